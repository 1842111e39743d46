"""Which bytes of a checkpoint fill which parameter: pattern → target, total or an error.

A table is data: every source key must be used or ignored by name, every parameter filled exactly
once with the right shape. All offenders are listed together, from headers alone, before anything
is loaded or compiled.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence

from fluxbatch.types import UserError
from fluxbatch.weights.source import FLOATS, Tensor

# Rows (axis 0) start/of .. stop/of of the source, e.g. (1, 2, 3): the middle third.
Rows = tuple[int, int, int]
ALL: tuple[Rows, ...] = ((0, 1, 1),)

MAX_LISTED = 20


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
class Piece:
    """What fills one parameter, or one layer of it."""

    tensor: Tensor
    rows: tuple[tuple[int, int], ...]  # ranges of the tensor's rows, in the target's order


# What torch.compile, FSDP, DDP and activation checkpoints put round modules, and so into names.
_WRAPPER = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)[._]|(?<![^.])module\.")


def unwrapped(name: str) -> str:
    """The name of a tensor or module without the wrappers that a trainer left in it."""
    return _WRAPPER.sub("", name)


def linear(pattern: str, target: str, rows: tuple[Rows, ...] = ALL, *, bias: bool = True) -> tuple[Rule, ...]:
    """The rules of a linear or convolution layer."""
    names = (("weight", "kernel"), ("bias", "bias")) if bias else (("weight", "kernel"),)
    return tuple(Rule(rf"{pattern}\.{a}", f"{target}.{b}", rows) for a, b in names)


def norm(pattern: str, target: str, *, bias: bool = True) -> tuple[Rule, ...]:
    """The rules of a norm's scale and bias."""
    names = (("weight", "scale"), ("bias", "bias")) if bias else (("weight", "scale"),)
    return tuple(Rule(rf"{pattern}\.{a}", f"{target}.{b}") for a, b in names)


def assign(
    tensors: Mapping[str, Tensor],
    table: Table,
    targets: Mapping[str, Sequence[int]],
    stacked: Mapping[str, bool],
    where: str,
) -> dict[str, list[Piece]]:
    """For each target path, what fills it: one piece, or one per layer where ``stacked``.

    ``targets`` maps paths to full shapes (leading layer axis included). Raises UserError with every
    key that matches nothing, every parameter left empty or filled twice, and every wrong shape.
    """
    compiled = [(re.compile(rule.pattern), rule) for rule in table.rules]
    ignored = [re.compile(pattern) for pattern in table.ignored]
    filled: dict[str, list[Piece | None]] = {p: [None] * (s[0] if stacked[p] else 1) for p, s in targets.items()}
    unknown, wrong = [], []

    for name, tensor in tensors.items():
        matches = [(m, rule) for pattern, rule in compiled if (m := pattern.fullmatch(name))]
        if not matches and not any(p.fullmatch(name) for p in ignored):
            unknown.append(name)
        for match, rule in matches:
            path, layer = split_layer(rule.target.format(*match.groups()))
            if path not in targets or layer >= len(filled[path]):
                unknown.append(name)
                continue
            shape = tuple(targets[path])[1:] if stacked[path] else tuple(targets[path])
            count = tensor.shape[0] if tensor.shape else 1
            piece = Piece(tensor, tuple((count * a // n, count * b // n) for a, b, n in rule.rows))
            got = (sum(b - a for a, b in piece.rows), *tensor.shape[1:])
            if tensor.dtype not in FLOATS.values():
                wrong.append(f"{name}: dtype {tensor.dtype}, expected one of {', '.join(FLOATS)} (other quantizations are not read)")
            elif got != shape and not (math.prod(got) == math.prod(shape) and got[: len(shape)] == shape):
                wrong.append(f"{name}: shape {list(got)}, the model expects {list(shape)} for {path}")
            elif filled[path][layer] is not None:
                wrong.append(f"{name}: {path} is filled already by {filled[path][layer].tensor.name}")
            else:
                filled[path][layer] = piece

    empty = [f"{p}[{i}]" if stacked[p] else p for p, pieces in filled.items() for i, x in enumerate(pieces) if x is None]
    if unknown or wrong or empty:
        lines = listed(dict.fromkeys(unknown), "tensor that the model does not have")
        lines += listed(empty, "parameter that no tensor fills") + listed(wrong, "wrong tensor")
        raise UserError(*(f"{where}: {line}" for line in lines))
    return filled  # type: ignore[return-value]  # no None left


def listed(items: Iterable[str], what: str) -> list[str]:
    items = list(items)
    more = [f"… and {len(items) - MAX_LISTED} more of this kind"] if len(items) > MAX_LISTED else []
    return [f"{what}: {item}" for item in items[:MAX_LISTED]] + more


def split_layer(target: str) -> tuple[str, int]:
    """``double_blocks[3].img.mod`` → (``double_blocks.img.mod``, 3)."""
    head, bracket, rest = target.partition("[")
    if not bracket:
        return target, 0
    layer, _, tail = rest.partition("]")
    return head + tail, int(layer)
