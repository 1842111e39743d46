"""What the keys of adapter files mean: prefix, module, role.

Trainers name the same modules after Black Forest Labs' checkpoint or after diffusers', with dots or with
underscores, so the names come from the family's key tables; only roles are found here.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator

from fluxbatch.models.family import LoraKeys
from fluxbatch.models.key_tables import Rows, Rule, split_layer

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

_KEY = re.compile(r"(.+?)\.(?:" + "|".join(f"(?P<{role}>{end})" for role, end in ROLES.items()) + ")")


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
    targets: tuple[Target, ...]  # none: a part that inference does not read


def read_key(key: str, keys: LoraKeys) -> Site | None:
    """None for a key that no format of adapters for this family has."""
    match = _KEY.fullmatch(key)
    if not match:
        return None
    module, role = match[1], match.lastgroup
    assert role is not None
    for prefix, component, writer in keys.prefixes:
        if not module.startswith(prefix):
            continue
        name = module[len(prefix) :].rstrip("_")
        if re.fullmatch(keys.unread.get(component, r"(?!)"), name):
            return Site(component, module, role, writer, ())
        for naming, rules in _namings(keys, component).items():
            if targets := tuple(_targets(name, rules)):
                writer = {"bare": naming}.get(writer, "XLabs" if naming == "XLabs" else writer)
                return Site(component, module, role, writer, targets)
    return None


def _targets(name: str, rules: tuple[tuple[re.Pattern[str], Rule], ...]) -> Iterator[Target]:
    for pattern, rule in rules:
        if match := pattern.fullmatch(name):
            path, layer = split_layer(rule.target.format(*match.groups()))
            path, _, leaf = path.rpartition(".")
            yield Target(path, leaf, layer, rule.rows)


@functools.cache
def _namings(keys: LoraKeys, component: str) -> dict[str, tuple[tuple[re.Pattern[str], Rule], ...]]:
    """By naming: the modules of a component, dots and underscores alike."""
    return {name: _modules(rules) for name, rules in keys.namings[component].items()}


def _modules(rules: tuple[Rule, ...]) -> tuple[tuple[re.Pattern[str], Rule], ...]:
    chosen = [rule for rule in rules if rule.target.endswith((".kernel", ".scale"))]
    names = (re.sub(r"\\\.(?:weight|\(\?:scale\|weight\))$", "", rule.pattern) for rule in chosen)
    return tuple((re.compile(name.replace(r"\.", "[._]")), rule) for name, rule in zip(names, chosen, strict=True))
