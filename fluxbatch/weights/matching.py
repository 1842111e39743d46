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

from fluxbatch.models.key_tables import Table, split_layer
from fluxbatch.types import UserError
from fluxbatch.weights.source import FLOATS, Tensor

MAX_LISTED = 20


@dataclasses.dataclass(frozen=True)
class Piece:
    """What fills one parameter, or one layer of it."""

    tensor: Tensor
    rows: tuple[tuple[int, int], ...]  # ranges of the tensor's rows, in the target's order


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
