"""What the headers of safetensors files say, checked: the bytes of every tensor in its file, over all files of a
component."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
from typing import Any

from fluxbatch.types import UserError
from fluxbatch.weights import quantized
from fluxbatch.weights.find import INSTEAD, SUFFIXES
from fluxbatch.weights.matching import unwrapped
from fluxbatch.weights.source import DTYPES, FLOATS, Source, Tensor, broken_link, first_line

MAX_HEADER = 100 << 20  # safetensors' own bound


def read_header(source: Source, file: str) -> dict[str, Tensor]:
    """The tensors of one safetensors file; UserError unless its header and extent are sound."""
    where = source.path(file)
    try:
        start = source.read(file, 0, 8)
    except UserError as error:
        if "OUT_OF_RANGE" in str(error):
            raise UserError(f"{where}: has fewer than 8 bytes: not a safetensors file, or a truncated one") from error
        raise
    size, length = source.size(file), int.from_bytes(start, "little")
    if length > MAX_HEADER or (size is not None and 8 + length > size):
        reason = next((what for magic, what in quantized.MAGIC if start.startswith(magic)), None)
        reason = reason or f"its header claims {length:,} bytes: not a safetensors file, or a truncated one"
        raise UserError(f"{where}: {reason}")
    try:
        header = json.loads(source.read(file, 8, 8 + length))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: the safetensors header is not JSON: {first_line(error)}") from error
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__") or {}, dict):
        raise UserError(f"{where}: the safetensors header is unsound: expected an object, with objects for its entries")

    tensors: dict[str, Tensor] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (start, stop) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
            sound = all(type(n) is int and n >= 0 for n in (*shape, start, stop))
            if not sound or stop - start != dtype.itemsize * math.prod(shape):
                raise ValueError("shape and offsets disagree")
        except KeyError as error:
            known = ", ".join(DTYPES)
            if entry.get("dtype") in DTYPES:
                line = f"{where}: {name}: unsound header entry {str(entry)[:200]}: {error} is missing"
                raise UserError(line) from error
            if what := quantized.DTYPES.get(entry.get("dtype")):
                raise UserError(quantized.line(where, what, f"tensor {name} of dtype {entry['dtype']}")) from error
            raise UserError(f"{where}: {name}: dtype {entry.get('dtype')!r}, expected one of {known}") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{where}: {name}: unsound header entry {str(entry)[:200]}: {first_line(error)}") from error
        tensors[name] = Tensor(name, file, dtype, shape, 8 + length + start, 8 + length + stop)

    end = 8 + length
    for tensor in sorted(tensors.values(), key=lambda t: (t.start, t.stop)):
        if tensor.start != end:
            starts = f"{tensor.name} starts at byte {tensor.start:,}, expected {end:,}"
            raise UserError(f"{where}: {starts}: tensors must tile the file")
        end = tensor.stop
    if size is not None and size != end:
        state = "truncated" if size < end else "longer than its header says"
        raise UserError(f"{where}: {size:,} bytes, the header describes {end:,}: the file is {state}")
    if size is None and end > 8 + length:
        source.read(file, end - 1, end)
    source.sizes[file] = end
    return tensors


def notes(source: Source, file: str) -> dict[str, Any]:
    """What the header of a sound file says beside its tensors."""
    length = int.from_bytes(source.read(file, 0, 8), "little")
    return json.loads(source.read(file, 8, 8 + length)).get("__metadata__") or {}


def read_headers(source: Source, stems: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors of a component: of the index's parts, or of the one file; index and headers must agree both ways."""
    if file := weights_file(source, stems):
        read = _read_indexed if file.endswith(".json") else read_header
        return with_scales(read(source, file), source.path(file))
    if line := instead(source):
        raise UserError(line)
    wanted = " or ".join(f"{stem}.safetensors" for stem in stems)
    raise UserError(f"{source.url}: no weights: expected {wanted} (pickled .bin files are not read){held(source)}")


def weights_file(source: Source, stems: tuple[str, ...]) -> str | None:
    """``<stem>.safetensors.index.json`` or ``<stem>.safetensors``; those of a variant (``<stem>.fp16.safetensors``, as
    diffusers and transformers name it) where there is no other. UserError where there are several variants."""
    for stem in stems:
        for file in (f"{stem}.safetensors.index.json", f"{stem}.safetensors"):
            if source.exists(file):
                return file
    for stem in stems:
        pattern = re.compile(rf"{stem}\.(?:safetensors\.index\.([\w-]+)\.json|([\w-]+)\.safetensors)")
        usual = [(f"{stem}.{v}.safetensors", f"{stem}.safetensors.index.{v}.json") for v in ("fp16", "bf16")]
        found = {}
        for name in source.top() or filter(source.exists, sum(usual, ())):  # HTTP does not list
            if (match := pattern.fullmatch(name)) and not re.search(r"-\d+-of-\d+$", match[2] or ""):
                found[match[1] or match[2]] = name
        if len(found) > 1:
            names = ", ".join(sorted(found))
            raise UserError(f"{source.url}: has {len(found)} variants of the weights ({names}), and none by the usual "
                            "name: leave one of them there")  # fmt: skip
        if found:
            return next(iter(found.values()))
    return None


def instead(*folders: Source) -> str | None:
    """What is the matter with the first directory without the usual weights: a link to nothing, or a quantization."""
    for folder in folders:
        if folder.local and (line := broken_link(folder.url)):
            return line
        with contextlib.suppress(UserError):
            if line := quantized.in_names(folder.top(), folder.url):
                return line
            for file in [name for name in folder.top() if name.endswith(SUFFIXES)][:3]:
                if line := _quantized(folder, file):
                    return line
    return None


def _quantized(source: Source, file: str) -> str | None:
    where = source.path(file)
    try:
        return quantized.in_tensors(read_header(source, file), where) or quantized.in_notes(notes(source, file), where)
    except UserError as error:  # a file that is not sound, and that may be by its quantization
        return str(error) if "quantiz" in str(error) else None


def held(*folders: Source) -> str:
    """The files of weights in the first directory that has any, as the end of a message."""
    for folder in folders:
        with contextlib.suppress(UserError):
            if names := [name for name in folder.top() if name.endswith(SUFFIXES)]:
                return f"; {folder.url} has {', '.join(names[:5])}{', …' if len(names) > 5 else ''}"
    return ""


def _read_indexed(source: Source, index: str) -> dict[str, Tensor]:
    where = source.path(index)
    weight_map = source.json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise UserError(f"{where}: no weight_map from tensor names to files")
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(weight_map.values())):
        if "/" in file or not source.exists(file):
            raise UserError(f"{where}: names {file!r}, which is not there")
        tensors |= read_header(source, file)
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file != file:
            raise UserError(f"{where}: says {name} is in {file}, whose header does not have it")
    if extra := tensors.keys() - weight_map.keys():
        raise UserError(f"{where}: does not list {sorted(extra)[0]}, which {tensors[min(extra)].file} holds")
    return tensors


# What fp8 files carry beside a weight: its scale under one of two names, and notes for fp8 arithmetic.
_SCALE = re.compile(r"(.+\.)(?:scale_weight|weight_scale)")
_FP8_NOTES = re.compile(r"(?:.*\.)?(?:scaled_fp8|scale_input|input_scale|comfy_quant)")


def with_scales(tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors by their names without wrappers, the scales of fp8 files attached to the weights they belong to."""
    tensors = _unwrapped(tensors, where)
    whole = {
        name: tensor for name, tensor in tensors.items() if not (_SCALE.fullmatch(name) or _FP8_NOTES.fullmatch(name))
    }
    for name, scale in tensors.items():
        if match := _SCALE.fullmatch(name):
            of = f"{match[1]}weight"
            weight = whole.get(of)
            count = math.prod(scale.shape)  # one for each column, [1, N], is none for each row
            fits = scale.shape[:1] in ((), (count,)) and scale.dtype in FLOATS.values()
            if weight is None or count not in (1, weight.shape[0]) or not fits:
                if line := quantized.in_tensors(tensors, where):
                    raise UserError(line)
                shape = None if weight is None else list(weight.shape)
                blocks = "looks quantized in blocks, which is not read: "
                raise UserError(f"{where}: {name}: a scale of shape {list(scale.shape)}, {scale.dtype}, for a weight "
                                f"of shape {shape}: expected one number, or one for each row"
                                + (f": {blocks}{INSTEAD}" if scale.shape[1:] > (1,) else ""))  # fmt: skip
            whole[of] = dataclasses.replace(weight, scale=scale)
    return whole


def _unwrapped(tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if (plain := unwrapped(name)) in found:
            raise UserError(f"{where}: {found[plain].name} and {tensor.name} are one tensor of the model")
        found[plain] = tensor
    return found
