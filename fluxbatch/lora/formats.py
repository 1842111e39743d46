"""What the keys of adapter files mean: prefix, module, role.

Trainers name the same modules after Black Forest Labs' checkpoint or after diffusers', with dots or with
underscores, so the names come from the checkpoints' tables; only prefixes and roles are the trainers' own.
"""

from __future__ import annotations

import dataclasses
import functools
import re

from fluxbatch.models.flux1 import keys
from fluxbatch.weights.matching import Rows, Rule, split_layer

# (prefix, component, what writes it); the first that leads to a module of the component holds
PREFIXES = (
    ("base_model.model.transformer.", "transformer", "PEFT"),
    ("base_model.model.", "transformer", "PEFT"),
    ("transformer.", "transformer", "diffusers"),
    ("model.diffusion_model.", "transformer", "ComfyUI"),
    ("diffusion_model.", "transformer", "ComfyUI"),
    ("unet.", "transformer", "diffusers"),
    ("lora_unet_", "transformer", "kohya"),
    ("lora_transformer_", "transformer", "OneTrainer"),
    ("lycoris_", "transformer", "LyCORIS"),
    ("text_encoder.", "text_encoder", "diffusers"),
    ("text_encoders.clip_l.transformer.", "text_encoder", "ComfyUI"),
    ("lora_te1_", "text_encoder", "kohya"),
    ("lora_te_", "text_encoder", "kohya"),
    ("clip_l.", "text_encoder", "OneTrainer"),
    ("text_encoder_2.", "text_encoder_2", "diffusers"),
    ("text_encoders.t5xxl.transformer.", "text_encoder_2", "ComfyUI"),
    ("lora_te3_", "text_encoder_2", "kohya"),
    ("lora_te2_", "text_encoder_2", "OneTrainer"),
    ("t5.", "text_encoder_2", "OneTrainer"),
    ("", "transformer", "bare"),
)

# role → the ends of keys that have it
ROLES = {
    "down": r"lora_A(?:\.[^.]+)?\.weight|lora_down\.weight|lora\.down\.weight|lora_linear_layer\.down\.weight|down\.weight",
    "up": r"lora_B(?:\.[^.]+)?\.weight|lora_up\.weight|lora\.up\.weight|lora_linear_layer\.up\.weight|up\.weight",
    "up_bias": r"lora_B(?:\.[^.]+)?\.bias|lora_up\.bias",
    "alpha": "alpha",
    "dora_scale": "dora_scale",
    "dora_peft": r"lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?",
    **{name: name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")},
    **{name: name for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")},
    "diff": "diff|w_norm",
    "diff_b": "diff_b|b_norm",
    "set": "scale|weight",  # of a norm
}
KINDS = {"down": "LoRA", "hada_w1_a": "LoHa", "lokr_w1": "LoKr", "lokr_w1_a": "LoKr", "dora_scale": "DoRA", "dora_peft": "DoRA",
         "diff": "difference", "diff_b": "difference", "set": "norms"}  # fmt: skip

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


@dataclasses.dataclass(frozen=True)
class Target:
    """Rows ``rows`` of a module's change belong to the module at ``path`` (no leaf), layer ``layer``."""

    path: str
    leaf: str  # what its weight is called: kernel or scale
    layer: int
    rows: tuple[Rows, ...]


@dataclasses.dataclass(frozen=True)
class Site:
    """What one key is about."""

    component: str
    module: str  # as the file names it, prefix included
    role: str
    writer: str
    targets: tuple[Target, ...]  # none: a part that FLUX does not read


def read_key(key: str) -> Site | None:
    """None for a key that no format of adapters for FLUX has."""
    match = _KEY.fullmatch(key)
    if not match:
        return None
    module, role = match[1], match.lastgroup
    assert role is not None
    for prefix, component, writer in PREFIXES:
        if not module.startswith(prefix):
            continue
        name = module[len(prefix) :].rstrip("_")
        if component == "text_encoder" and UNREAD.fullmatch(name):
            return Site(component, module, role, writer, ())
        for naming, rules in _rules(component).items():
            if targets := tuple(_targets(name, rules)):
                writer = {"bare": naming}.get(writer, "XLabs" if naming == "XLabs" else writer)
                return Site(component, module, role, writer, targets)
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
        return {"transformers": _modules(keys.CLIP.rules)}
    if component == "text_encoder_2":
        return {"transformers": _modules(keys.T5.rules)}
    bfl = keys.FLUX_BFL.rules
    return {"diffusers": _modules(keys.FLUX_DIFFUSERS.rules), "BFL": _modules(bfl), "XLabs": _modules(XLABS), "BFL apart": _modules(APART)}


def _modules(rules: tuple[Rule, ...]) -> tuple[tuple[re.Pattern[str], Rule], ...]:
    chosen = [rule for rule in rules if rule.target.endswith((".kernel", ".scale"))]
    names = (re.sub(r"\\\.(?:weight|\(\?:scale\|weight\))$", "", rule.pattern) for rule in chosen)
    return tuple((re.compile(name.replace(r"\.", "[._]")), rule) for name, rule in zip(names, chosen, strict=True))

