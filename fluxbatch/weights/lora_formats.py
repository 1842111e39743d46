"""What the keys of adapter files mean: prefix, module, role.

Trainers name the same modules after Black Forest Labs' checkpoint, diffusers' or DiffSynth's, with dots or with
underscores, so the names come from the checkpoints' tables; only prefixes and roles are the trainers' own.
"""

from __future__ import annotations

import dataclasses
import functools
import re

from fluxbatch.weights import tables
from fluxbatch.weights.rules import Rows, Rule, split_layer, unwrapped

# (prefix, component, what writes it), one after another as far as they stand there: of those that lead to a module of
# the component the first holds. None: it says nothing of the component.
PREFIXES: tuple[tuple[str, str | None, str], ...] = (
    ("base_model.model.", None, "PEFT"),
    ("base_model_model_", None, "PEFT"),
    ("transformer.", "transformer", "diffusers"),
    ("transformer_", "transformer", "diffusers"),
    ("model.diffusion_model.", "transformer", "ComfyUI"),
    ("diffusion_model.", "transformer", "ComfyUI"),
    ("model_diffusion_model_", "transformer", "ComfyUI"),
    ("diffusion_model_", "transformer", "ComfyUI"),
    ("unet.", "transformer", "diffusers"),
    ("pipe.dit.", "transformer", "DiffSynth"),
    ("dit.", "transformer", "DiffSynth"),
    ("lora_unet_", "transformer", "kohya"),
    ("lora_transformer_", "transformer", "OneTrainer"),
    ("lycoris_", "transformer", "LyCORIS"),
    ("text_encoder.", "text_encoder", "diffusers"),
    ("text_encoder_2.", "text_encoder_2", "diffusers"),
    ("text_encoder_2_", "text_encoder_2", "diffusers"),
    ("text_encoder_", "text_encoder", "diffusers"),
    ("text_encoders.clip_l.transformer.", "text_encoder", "ComfyUI"),
    ("text_encoders.clip_l.", "text_encoder", "ComfyUI"),
    ("text_encoders.t5xxl.transformer.", "text_encoder_2", "ComfyUI"),
    ("text_encoders.t5xxl.", "text_encoder_2", "ComfyUI"),
    ("lora_te1_", "text_encoder", "kohya"),
    ("lora_te_", "text_encoder", "kohya"),
    ("clip_l.", "text_encoder", "OneTrainer"),
    ("lora_te3_", "text_encoder_2", "kohya"),
    ("lora_te2_", "text_encoder_2", "OneTrainer"),
    ("t5.", "text_encoder_2", "OneTrainer"),
    ("model.", None, ""),
)

_NAME = r"(?:\.[^.]+)?"  # of the adapter, where PEFT keeps it
# role → the ends of keys that have it
ROLES = {
    "down": rf"lora_A(?:{_NAME}\.weight)?|lora_down{_NAME}\.weight|(?:lora\.|lora_linear_layer\.)?down\.weight",
    "up": rf"lora_B(?:{_NAME}\.weight)?|lora_up{_NAME}\.weight|(?:lora\.|lora_linear_layer\.)?up\.weight",
    "up_bias": rf"lora_B{_NAME}\.bias|lora_up{_NAME}\.bias",
    "alpha": "alpha",
    "dora_scale": "dora_scale",
    "dora_peft": rf"lora_magnitude_vector{_NAME}(?:\.weight)?",
    **{name: name + _NAME for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")},
    **{name: name + _NAME for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")},
    "diff": r"(?:scale\.)?diff|w_norm",
    "diff_b": r"diff_b|bias\.diff|b_norm",
    "set_weight": r"(?:scale\.)?set_weight",
    "set_bias": r"bias\.set_weight",
    "set": "scale|weight",  # of a norm
    "reshape": "reshape_weight",  # what the weight must be padded to
}
KINDS = {"down": "LoRA", "hada_w1_a": "LoHa", "lokr_w1": "LoKr", "lokr_w1_a": "LoKr", "dora_scale": "DoRA", "dora_peft": "DoRA",
         "diff": "difference", "diff_b": "difference", "set": "norms", "set_weight": "replacement",
         "set_bias": "replacement"}  # fmt: skip

# Parts of CLIP that FLUX never reads: an adapter of them does nothing.
UNREAD = re.compile(r"(?:text_model[._])?(?:text_projection|visual_projection|logit_scale)")

_KEY = re.compile(r"(.+?)\.(?:" + "|".join(f"(?P<{role}>{end})" for role, end in ROLES.items()) + ")")
_DOUBLE, _SINGLE = r"double_blocks\.(\d+)\.", r"single_blocks\.(\d+)\."


def _thirds(pattern: str, target: str) -> tuple[Rule, ...]:
    return tuple(Rule(pattern, f"{target}.{n}.kernel", ((i, i + 1, 3),)) for i, n in enumerate("qkv"))


XLABS = (
    *(r for i, s in (("1", "img"), ("2", "txt")) for r in _thirds(_DOUBLE + rf"processor\.qkv_lora{i}", f"double_blocks[{{0}}].{s}.qkv")),
    *(Rule(_DOUBLE + rf"processor\.proj_lora{i}", f"double_blocks[{{0}}].{s}.proj.kernel") for i, s in (("1", "img"), ("2", "txt"))),
    *_thirds(_SINGLE + r"processor\.qkv_lora", "single_blocks[{0}].qkv"),
    Rule(_SINGLE + r"processor\.proj_lora", "single_blocks[{0}].out.kernel"),
)
# OneTrainer's newer files: BFL's names, the fused layers apart
APART = (
    *(Rule(_DOUBLE + rf"{s}_attn\.qkv\.{i}", f"double_blocks[{{0}}].{s}.qkv.{n}.kernel") for s in ("img", "txt") for i, n in enumerate("qkv")),
    *(Rule(_SINGLE + rf"linear1\.{i}", f"single_blocks[{{0}}].{n}.kernel") for i, n in enumerate(("qkv.q", "qkv.k", "qkv.v", "mlp_in"))),
)


def _diffsynth_stream(half: str, stream: str) -> tuple[Rule, ...]:
    src, dst = r"blocks\.(\d+)\.", f"double_blocks[{{0}}].{stream}."
    return (
        Rule(src + rf"norm1_{half}\.linear", dst + "mod.kernel"),
        *_thirds(src + rf"attn\.{half}_to_qkv", dst + "qkv"),
        *(Rule(src + rf"attn\.norm_{n[0]}_{half}", dst + f"qkv.{n}_norm.scale") for n in ("query", "key")),
        Rule(src + rf"attn\.{half}_to_out", dst + "proj.kernel"),
        Rule(src + rf"ff_{half}\.0", dst + "mlp_in.kernel"),
        Rule(src + rf"ff_{half}\.2", dst + "mlp_out.kernel"),
    )


# DiffSynth-Studio's own names; those of x_embedder and context_embedder are diffusers'
DIFFSYNTH = (
    *_diffsynth_stream("a", "img"),
    *_diffsynth_stream("b", "txt"),
    Rule(_SINGLE + r"norm\.linear", "single_blocks[{0}].mod.kernel"),
    *(Rule(_SINGLE + "to_qkv_mlp", f"single_blocks[{{0}}].qkv.{n}.kernel", ((i, i + 1, 7),))
      for i, n in enumerate("qkv")),
    Rule(_SINGLE + "to_qkv_mlp", "single_blocks[{0}].mlp_in.kernel", ((3, 7, 7),)),
    *(Rule(_SINGLE + f"norm_{n[0]}_a", f"single_blocks[{{0}}].qkv.{n}_norm.scale") for n in ("query", "key")),
    Rule(_SINGLE + "proj_out", "single_blocks[{0}].out.kernel"),
    *(Rule(rf"{src}\.{i}", f"{dst}.{layer}.kernel")
      for src, dst in ((r"time_embedder\.timestep_embedder", "time_in"), ("pooled_text_embedder", "vector_in"),
                       (r"guidance_embedder\.timestep_embedder", "guidance_in"))
      for i, layer in ((0, "in_layer"), (2, "out_layer"))),
    Rule(r"final_norm_out\.linear", "final_mod.kernel", tables.SWAP_HALVES),
    Rule("final_proj_out", "final_out.kernel"),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Target:
    """Rows ``rows`` of a module's change belong to the module at ``path`` (no leaf), layer ``layer``."""

    path: str
    leaf: str  # what its weight is called: kernel, scale, or an embedding's name
    layer: int
    rows: tuple[Rows, ...]

    def at(self, leaf: str = "") -> str:
        """The path of its weight, or of another of its parameters."""
        return f"{self.path}.{leaf or self.leaf}".removeprefix(".")


@dataclasses.dataclass(frozen=True)
class Site:
    """What one key is about."""

    component: str
    module: str  # as the file names it, prefix included
    name: str  # the same without prefixes
    role: str
    writer: str
    targets: tuple[Target, ...]  # none: a part that FLUX does not read


def split_key(key: str) -> tuple[str, str] | None:
    """The module and the role of a key; None for one that no format of adapters has."""
    match = _KEY.fullmatch(key)
    return None if match is None else (match[1], str(match.lastgroup))


def read_key(key: str) -> Site | None:
    """None for a key that no format of adapters for FLUX has."""
    if (parts := split_key(key)) is None or (found := _place(unwrapped(parts[0]), None, "")) is None:
        return None
    component, name, writer, targets = found
    return Site(component, parts[0], name, parts[1], writer, targets)


@functools.cache
def _place(name: str, component: str | None, writer: str) -> tuple[str, str, str, tuple[Target, ...]] | None:
    """Component, name without prefixes, writer and targets of a module."""
    name = name.rstrip("_")
    if component == "text_encoder" and UNREAD.fullmatch(name):
        return component, name, writer, ()
    for naming, rules in _rules(component or "transformer").items():
        if targets := tuple(_targets(name, rules)):
            by = naming if naming in ("XLabs", "DiffSynth") else writer or naming
            return component or "transformer", name, by, targets
    for prefix, of, by in PREFIXES:
        if name.startswith(prefix) and (of is None or component in (None, of)):
            if found := _place(name[len(prefix) :], component or of, writer or by):
                return found
    return None


def _targets(name: str, rules: tuple[tuple[re.Pattern[str], Rule], ...]):
    for pattern, rule in rules:
        if match := pattern.fullmatch(name):
            path, layer = split_layer(rule.target.format(*match.groups()))
            path, _, leaf = path.rpartition(".")
            yield Target(path, leaf, layer, rule.rows)


@functools.cache
def _rules(component: str) -> dict[str, tuple[tuple[re.Pattern[str], Rule], ...]]:
    """By naming: the modules of a component, dots and underscores alike."""
    if component == "text_encoder":
        return {"transformers": _modules(tables.CLIP.rules)}
    if component == "text_encoder_2":
        return {"transformers": _modules(tables.T5.rules)}
    bfl = tables.FLUX_BFL.rules
    return {"diffusers": _modules(tables.FLUX_DIFFUSERS.rules), "BFL": _modules(bfl), "XLabs": _modules(XLABS),
            "BFL apart": _modules(APART), "DiffSynth": _modules(DIFFSYNTH)}  # fmt: skip


def _modules(rules: tuple[Rule, ...]) -> tuple[tuple[re.Pattern[str], Rule], ...]:
    chosen = [rule for rule in rules if not rule.target.endswith(".bias")]
    names = (re.sub(r"\\\.(?:weight|\(\?:scale\|weight\))$", "", rule.pattern) for rule in chosen)
    return tuple((re.compile(name.replace(r"\.", "[._]")), rule) for name, rule in zip(names, chosen, strict=True))
