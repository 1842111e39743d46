"""Which bytes of a checkpoint fill which parameter: pattern → target, total or an error.

A table is data: every source key must be used or ignored by name, every parameter filled exactly
once with the right shape. All offenders are listed together, from headers alone, before anything
is loaded or compiled.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from fluxbatch.models.key_tables import Table, split_layer
from fluxbatch.types import UserError
from fluxbatch.weights.source import FLOATS, Tensor

MAX_LISTED = 20


@dataclasses.dataclass(frozen=True)
class Piece:
    """What fills one parameter, or one layer of it."""

    tensor: Tensor
    rows: tuple[tuple[int, int], ...]  # ranges of the tensor's rows, in the target's order


# What torch.compile, FSDP, DDP and activation checkpoints put round modules, and so into names.
_WRAPPERS = r"_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module"
_WRAPPER = re.compile(rf"(?:{_WRAPPERS})[._]|(?<![^.])module\.")


def unwrapped(name: str) -> str:
    """The name of a tensor or module without the wrappers that a trainer left in it."""
    return _WRAPPER.sub("", name)


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
            unknown.append(tensor.name)
        for match, rule in matches:
            path, layer = split_layer(rule.target.format(*match.groups()))
            if path not in targets or layer >= len(filled[path]):
                unknown.append(tensor.name)
                continue
            shape = tuple(targets[path])[1:] if stacked[path] else tuple(targets[path])
            count = tensor.shape[0] if tensor.shape else 1
            piece = Piece(tensor, tuple((count * a // n, count * b // n) for a, b, n in rule.rows))
            got = (sum(b - a for a, b in piece.rows), *tensor.shape[1:])
            if tensor.dtype not in FLOATS.values():
                wrong.append(
                    f"{name}: dtype {tensor.dtype}, expected one of {', '.join(FLOATS)} (other quantizations are "
                    "not read)"
                )
            elif got != shape and not (math.prod(got) == math.prod(shape) and got[: len(shape)] == shape):
                wrong.append(f"{name}: shape {list(got)}, the model expects {list(shape)} for {path}")
            elif (other := filled[path][layer]) is not None:
                wrong.append(f"{name}: {path} is filled already by {other.tensor.name}")
            else:
                filled[path][layer] = piece

    empty = [(p, i) for p, pieces in filled.items() for i, x in enumerate(pieces) if x is None]
    if unknown or wrong or empty:
        lines = listed(dict.fromkeys(unknown), "tensor that the model does not have")
        named = []
        for path, layer in empty[:MAX_LISTED]:
            lacking = lacked(table, path, layer if stacked[path] else None, tensors)
            full = f"{path}[{layer}]" if stacked[path] else path
            named.append(f"{full}: the file lacks {lacking}" if lacking not in (None, full) else full)
        lines += listed(named, "parameter that no tensor fills", len(empty)) + listed(wrong, "wrong tensor")
        raise UserError(*(f"{where}: {line}" for line in lines))
    return filled  # type: ignore[return-value]  # no None left


def lacked(table: Table, path: str, layer: int | None, tensors: Mapping[str, Tensor]) -> str | None:
    """The name that a parameter's tensor would have in the file, as like those of ``tensors`` as the table lets it."""
    head, dot, rest = path.partition(".")
    target = path if layer is None else f"{head}[{layer}]{dot}{rest}"
    names = []
    for rule in table.rules:
        groups = re.sub(r"\\{(\d)\\}", r"(?P<g\1>.+)", re.escape(rule.target))
        if match := re.fullmatch(groups, target):
            names += _written(rule.pattern, iter([match[f"g{i}"] for i in range(len(match.groups()))]))
    if not names:
        return None

    def alike(name: str) -> int:
        common = (os.path.commonprefix([name, other]) for other in tensors)  # noqa: RUF071  # letters
        return max(map(len, common), default=0)

    name = max(names, key=alike)
    prefix = next((tensor.name[: -len(key)] for key, tensor in tensors.items() if tensor.name.endswith(key)), "")
    return prefix + name


def _written(pattern: str, groups: Iterator[str]) -> list[str]:
    """The names that a rule's pattern matches, with these for its groups."""
    filled = re.sub(r"\((?!\?)[^)]*\)", lambda _: next(groups), pattern)
    parts = re.split(r"\(\?:([^)]*)\)(\??)", filled)  # text, alternatives, whether they may be left out, text, …
    names = [parts[0]]
    for words, optional, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        names = [name + word + text for name in names for word in words.split("|") + [""] * bool(optional)]
    return [name.replace("\\", "") for name in names]


def listed(items: Iterable[str], what: str, count: int | None = None) -> list[str]:
    """The first of ``count`` items, or of these, a line each, and how many more there are."""
    items = list(items)
    left = (count or len(items)) - MAX_LISTED
    more = [f"… and {left} more of this kind"] if left > 0 else []
    return [f"{what}: {item}" for item in items[:MAX_LISTED]] + more
