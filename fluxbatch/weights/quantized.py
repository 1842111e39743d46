"""Quantizations that are not read, recognised by what only they have: names and dtypes of tensors, notes in a file's
header, or the config beside it. One line says which it looks like, by what, and what to use instead."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from fluxbatch.config.schema import shown
from fluxbatch.weights.find import GGUF, INSTEAD, NO_PICKLES
from fluxbatch.weights.source import Tensor

# (what has it, the ends of names that only it has); the first that any tensor bears holds
SIGNS: tuple[tuple[str, str], ...] = (
    ("bitsandbytes NF4", r"quant_state\.bitsandbytes__nf4"),
    ("bitsandbytes FP4", r"quant_state\.bitsandbytes__fp4"),
    ("bitsandbytes 4-bit", r"(?:nested_)?(?:absmax|quant_map)|quant_state\..+"),
    ("bitsandbytes int8", r"SCB|weight_format"),
    ("quanto", r"weight\._(?:data|scale|shift|zeropoint|packed)(?:\._\w+)?|output_scale"),
    ("flux-fp8-api float8", r"float8_data|(?:input_)?scale_reciprocal"),
    ("nunchaku (SVDQuant)", r"wscales|wzeros|wtscale|wcscales|smooth(?:_orig|_factor)?|proj_down|proj_up"),
    (
        "torchao",
        r"_?weight[_:](?:qdata|int_data|zero_point|scale_and_zero|tensor_impl.*)|_weight_(?:scale|block_size)|weight:\w+",
    ),
    ("nvfp4", r"weight_scale_2|weight_global_scale"),
    ("compressed-tensors", r"weight_packed|weight_shape"),
    ("fp8 in blocks", r"weight_scale_inv"),
    ("HQQ", r"W_q(?:\..+)?"),
    ("GPTQ", r"g_idx"),
    ("AWQ or GPTQ", r"qweight|qzeros"),
    ("SDNQ", r"zero_point|svd_up|svd_down"),
    ("MLX", r"biases"),
    ("mxfp4", r"(?:weight_)?blocks"),
)
_SIGNS = tuple((what, re.compile(rf"(?:.+\.)?(?:{ends})")) for what, ends in SIGNS)

# Notes in a safetensors header, by key, and what they are of if the value does not say
NOTES = {
    "tensor_names": "torchao",
    "quantization_config": "",
    "quantization_level": "MLX",
    "quantization": "",
    "_quantization_metadata": "",
    "mflux_version": "MLX",
}
_METHODS = re.compile(
    r"nvfp4|mxfp[48]|svdquant|nf4|fp4|u?int[248]|float8\w*|bitsandbytes\w*|quanto|torchao|gptq|awq|sdnq|modelopt",
    re.IGNORECASE,
)

# dtypes of safetensors that only quantizations have
DTYPES = {"F4": "fp4", "F6_E2M3": "mxfp6", "F6_E3M2": "mxfp6", "F8_E8M0": "mxfp4 or mxfp8", "I4": "int4", "U4": "int4"}

# What the first bytes of a file that is no safetensors file say it is, whatever its name says
MAGIC = (
    (b"GGUF", f"is a GGUF file, a quantization that is not read: {INSTEAD}"),
    *((magic, f"is a pickle whatever its name says; {NO_PICKLES}") for magic in (b"PK\x03\x04", b"\x80\x02\x8a")),
    (b"version ", "is a pointer of Git LFS, not the file itself: `git lfs pull` fetches it"),
    *(
        (magic, "is a web page, not the file itself: it must be downloaded anew")
        for magic in (b"<!D", b"<!d", b"<htm", b"<HTM", b"<?x")
    ),
    (b"\x1f\x8b\x08", "is compressed (gzip): unpack it"),
)


def line(where: str, what: str, by: str) -> str:
    return f"{where}: looks quantized{f' with {what}' if what else ''} ({by}), which is not read: {INSTEAD}"


def in_tensors(tensors: Mapping[str, Tensor], where: str, config: Mapping[str, Any] | None = None) -> str | None:
    """The line of a quantization that the tensors show; ``config`` may name one that they do not name."""
    for what, pattern in _SIGNS:
        if name := next((name for name in tensors if pattern.fullmatch(name)), None):
            return line(where, what, f"tensor {tensors[name].name}")
    for name, tensor in tensors.items():
        if name.endswith("weight") and len(tensor.shape) > 1 and np.issubdtype(tensor.dtype, np.integer):
            what = _described((config or {}).get("quantization_config") or {})
            return line(where, what, f"tensor {tensor.name} of dtype {tensor.dtype}")
    return None


def in_notes(notes: Mapping[str, Any], where: str) -> str | None:
    """That of one that a header's notes speak of."""
    if notes.get("format") == "mlx":
        return line(where, "MLX", "its header says format mlx")
    for key, what in NOTES.items():
        if key in notes and str(notes[key]).lower() not in ("", "none", "null"):
            method = _METHODS.search(str(notes[key]))
            return line(where, what or (method[0] if method else ""), f"its header has {key}")
    return None


def in_config(config: Mapping[str, Any], where: str) -> str | None:
    """That of one that a ``config.json`` speaks of."""
    given = config.get("quantization_config")
    return line(where, _described(given), f"its quantization_config is {shown(json.dumps(given))}") if given else None


def _described(given: Any) -> str:
    """The method of a ``quantization_config``, and the kind of number if it has one."""
    if not isinstance(given, Mapping):
        return ""
    kinds = ("bnb_4bit_quant_type", "weights_dtype", "quant_type")
    kind = "int8" if given.get("load_in_8bit") else next(filter(None, map(given.get, kinds)), None)
    return " ".join(word for word in (given.get("quant_method"), kind) if isinstance(word, str))


def in_names(files: Iterable[str], where: str) -> str | None:
    """That of a directory whose weights are GGUF files."""
    name = next((file for file in files if file.lower().endswith(GGUF)), None)
    return line(where, "GGUF", f"it has {name}") if name else None
