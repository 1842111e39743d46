"""Key tables: which tensor of a checkpoint fills which parameter, as data.

A table is a list of rules, pattern → target. ``weights/matching.py`` applies it and is total: every source
key is used or ignored by name, every parameter is filled exactly once.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

# Rows (axis 0) start/of .. stop/of of the source, e.g. (1, 2, 3): the middle third.
Rows = tuple[int, int, int]
ALL: tuple[Rows, ...] = ((0, 1, 1),)
SWAP_HALVES: tuple[Rows, ...] = ((1, 2, 2), (0, 1, 2))


@dataclasses.dataclass(frozen=True)
class Rule:
    """``pattern`` (fullmatch) → ``target`` with ``{0}, {1}, …`` for the pattern's groups;
    ``name[{0}]`` is layer {0} of a stack. ``rows`` are the source rows that make up the target."""

    pattern: str
    target: str
    rows: tuple[Rows, ...] = ALL


@dataclasses.dataclass(frozen=True)
class Table:
    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()  # patterns of keys that inference does not need


@dataclasses.dataclass(frozen=True)
class Naming:
    """How some files name a component's tensors. ``sign``: a key that only this naming has, or several that only it has
    all of."""

    sign: str | tuple[str, ...]
    table: Table | Callable[[Mapping[str, Any]], Table]

    def signs(self, prefix: str) -> frozenset[str]:
        """The keys of ``sign`` behind a prefix."""
        return frozenset(prefix + sign for sign in ((self.sign,) if isinstance(self.sign, str) else self.sign))

    def table_for(self, tensors: Mapping[str, Any]) -> Table:
        """The table, which may depend on the tensors that are there (as a VAE's levels)."""
        return self.table if isinstance(self.table, Table) else self.table(tensors)


def linear(pattern: str, target: str, rows: tuple[Rows, ...] = ALL, *, bias: bool = True) -> tuple[Rule, ...]:
    """The rules of a linear or convolution layer."""
    names = (("weight", "kernel"), ("bias", "bias")) if bias else (("weight", "kernel"),)
    return tuple(Rule(rf"{pattern}\.{a}", f"{target}.{b}", rows) for a, b in names)


def norm(pattern: str, target: str, *, bias: bool = True) -> tuple[Rule, ...]:
    """The rules of a norm's scale and bias."""
    names = (("weight", "scale"), ("bias", "bias")) if bias else (("weight", "scale"),)
    return tuple(Rule(rf"{pattern}\.{a}", f"{target}.{b}") for a, b in names)


def split_layer(target: str) -> tuple[str, int]:
    """``double_blocks[3].img.mod`` → (``double_blocks.img.mod``, 3)."""
    head, bracket, rest = target.partition("[")
    if not bracket:
        return target, 0
    layer, _, tail = rest.partition("]")
    return head + tail, int(layer)


def shapes_of(tensors: Mapping[str, Any], table: Table) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """Shapes by target path (of the first layer of a stack), and how many layers each stack has."""
    shapes: dict[str, tuple[int, ...]] = {}
    layers: dict[str, int] = {}
    rules = [(re.compile(rule.pattern), rule.target) for rule in table.rules]
    for name, tensor in tensors.items():
        for pattern, target in rules:
            if match := pattern.fullmatch(name):
                path, layer = split_layer(target.format(*match.groups()))
                shapes.setdefault(path, tensor.shape)
                stack = path.partition(".")[0]
                layers[stack] = max(layers.get(stack, 0), layer + 1)
    return shapes, layers


# A converted checkpoint has the model's own names.
NATIVE = Table((Rule("(.+)", "{0}"),))
