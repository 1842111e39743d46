"""What the keys of adapter files mean: prefix, module, role.

Trainers name the same modules after Black Forest Labs' checkpoint, diffusers' or DiffSynth's, with dots or with
underscores, so the names come from the family's key tables; only roles are found here.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator

from fluxbatch.models.family import LoraKeys
from fluxbatch.models.key_tables import Rows, Rule, split_layer
from fluxbatch.weights.matching import unwrapped

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
KINDS = {
    "down": "LoRA",
    "hada_w1_a": "LoHa",
    "lokr_w1": "LoKr",
    "lokr_w1_a": "LoKr",
    "dora_scale": "DoRA",
    "dora_peft": "DoRA",
    "diff": "difference",
    "diff_b": "difference",
    "set": "norms",
    "set_weight": "replacement",
    "set_bias": "replacement",
}

_KEY = re.compile(r"(.+?)\.(?:" + "|".join(f"(?P<{role}>{end})" for role, end in ROLES.items()) + ")")


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
    targets: tuple[Target, ...]  # none: a part that inference does not read


def split_key(key: str) -> tuple[str, str] | None:
    """The module and the role of a key; None for one that no format of adapters has."""
    match = _KEY.fullmatch(key)
    return None if match is None else (match[1], str(match.lastgroup))


def read_key(key: str, keys: LoraKeys) -> Site | None:
    """None for a key that no format of adapters for this family has."""
    if (parts := split_key(key)) is None or (found := _place(keys, unwrapped(parts[0]), None, "")) is None:
        return None
    component, name, writer, targets = found
    return Site(component, parts[0], name, parts[1], writer, targets)


@functools.cache
def _place(
    keys: LoraKeys, name: str, component: str | None, writer: str
) -> tuple[str, str, str, tuple[Target, ...]] | None:
    """Component, name without prefixes, writer and targets of a module."""
    name = name.rstrip("_")
    if re.fullmatch(keys.unread.get(component or "", r"(?!)"), name):
        return str(component), name, writer, ()
    for naming, rules in _namings(keys, component or keys.main).items():
        if targets := tuple(_targets(name, rules)):
            return component or keys.main, name, naming if naming in keys.writers else writer or naming, targets
    for prefix, of, by in keys.prefixes:
        fits = name.startswith(prefix) and (of is None or component in (None, of))
        if fits and (found := _place(keys, name[len(prefix) :], component or of, writer or by)):
            return found
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
    chosen = [rule for rule in rules if not rule.target.endswith(".bias")]
    names = (re.sub(r"\\\.(?:weight|\(\?:scale\|weight\))$", "", rule.pattern) for rule in chosen)
    return tuple((re.compile(name.replace(r"\.", "[._]")), rule) for name, rule in zip(names, chosen, strict=True))
