"""Rows as a checkpoint understands them: what is wrong with one is known before a weight is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from fluxbatch.generation import prompts
from fluxbatch.lora.apply import Loras
from fluxbatch.models.family import Family, TextInput
from fluxbatch.types import Row, UserError

_SHOWN = 50  # rows in one message


def resolved(
    rows: Sequence[Row], family: Family, inputs: Sequence[TextInput], lora: Loras, streamed: bool, cached: bool
) -> list[Row]:
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
    found = lora.resolve(_padded(found, inputs))
    if streamed and len(lora.distinct(found)) > 1:
        first = lora.distinct(found)[0]
        other = next(row for row in found if lora.distinct([row]) != [first])
        raise UserError(
            f"hardware.stream_blocks=true: {other.where}: lora is {dict(other.lora or ())}, rows before it have "
            f"{dict(first)}: expected the same LoRA weights for all rows, which are merged into the blocks as they pass"
        )
    return found


def _padded(rows: list[Row], inputs: Sequence[TextInput]) -> list[Row]:
    """The rows with the lengths that their texts are padded to, where those are not the job's."""
    if not any(each.multiple for each in inputs):
        return rows
    own = [prompts.texts(inputs, row) for row in rows]
    lengths = []
    for i, each in enumerate(inputs):
        distinct = list(dict.fromkeys(texts[i] for prompt in own for texts in prompt))
        lengths.append(dict(zip(distinct, each.lengths(distinct), strict=True)))
    read = [
        tuple(tuple(length[text] for length, text in zip(lengths, texts, strict=True)) for texts in prompt)
        for prompt in own
    ]
    return [dataclasses.replace(row, mode=row.mode._replace(texts=each)) for row, each in zip(rows, read, strict=True)]


def _understood(row: Row, family: Family, cached: bool) -> Row:
    if row.image and not row.sized:
        height, width = family.default_size(row)
        row = dataclasses.replace(row, height=height, width=width)
    row = family.resolve(row)
    if row.padding_mask_crop is not None and not row.mode.mask:
        raise ValueError("padding_mask_crop: expected a model that keeps what lies outside a mask, and a mask_image")
    if cached and (row.mode.negative or row.mode.references):
        raise ValueError("sampler.step_cache: expected null: the cache is for rows without references and negatives")
    if row.steps < 1:
        raise ValueError(f"strength: got {row.strength:g}, expected a number above 0: no step is left")
    return row
