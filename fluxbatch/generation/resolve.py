"""Rows as a checkpoint understands them: what is wrong with one is known before a weight is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from fluxbatch.lora.apply import Loras
from fluxbatch.models.family import Family
from fluxbatch.types import PLAIN, Row, UserError

_SHOWN = 50  # rows in one message


def resolved(rows: Sequence[Row], family: Family, lora: Loras, streamed: bool, cached: bool) -> list[Row]:
    """The rows, each with its mode, size and LoRA weights. ``streamed``: whether blocks pass through the devices;
    ``cached``: whether there is a step cache. UserError for fields that the checkpoint has no use for, and for rows
    that cannot be in one job."""
    found, problems = [], []
    for row in rows:
        try:
            found.append(_understood(row, family, cached))
        except ValueError as error:
            problems.append(f"{row.where}: {error}")
    if problems:
        more = [f"… and {len(problems) - _SHOWN:,} more rows"] if len(problems) > _SHOWN else []
        raise UserError(*problems[:_SHOWN], *more)
    found = lora.resolve(found)
    if streamed and len(lora.distinct(found)) > 1:
        first = lora.distinct(found)[0]
        other = next(row for row in found if lora.distinct([row]) != [first])
        raise UserError(
            f"hardware.stream_blocks=true: {other.where}: lora is {dict(other.lora or ())}, rows before it have "
            f"{dict(first)}: expected the same LoRA weights for all rows, which are merged into the blocks as they pass"
        )
    return found


def _understood(row: Row, family: Family, cached: bool) -> Row:
    if row.image and not row.sized:
        height, width = family.default_size(row.image[0], row.height * row.width)
        row = dataclasses.replace(row, height=height, width=width)
    row = family.resolve(row)
    if cached and row.mode != PLAIN:
        raise ValueError("sampler.step_cache: expected null: the cache is for rows without pictures and negatives")
    if row.steps < 1:
        raise ValueError(f"strength: got {row.strength:g}, expected a number above 0: no step is left")
    return row
