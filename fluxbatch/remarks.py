"""What a start says: what is allowed and probably not meant, as fields that decide nothing and prompts that are too long."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence

from fluxbatch import columns
from fluxbatch.config import Job
from fluxbatch.engine import Engine
from fluxbatch.io.lines import shown
from fluxbatch.io.manifest import FIELDS
from fluxbatch.io.match import left_out
from fluxbatch.overrides import nearest
from fluxbatch.text import TextCache
from fluxbatch.tokens import Tokenizers
from fluxbatch.types import Row

SHOWN = 3  # rows named in one line
SHOWN_FIELDS = 8


def lines(job: Job, engine: Engine, rows: Sequence[Row], todo: Sequence[Row], texts: TextCache | None) -> Iterator[str]:
    """Of ``rows``, which are the whole manifest, and of what is to be drawn; and what each adapter touches."""
    yield from engine.remarks
    yield from unguided(engine, rows)
    yield from left_out(rows, engine.record)
    yield from columns.lines(rows)
    if fields := unread(rows):
        yield fields
    yield from (f"{reads}: {hit}" for reads, hit in cut(engine.tokenizers, todo) if hit)
    if job.text_cache_dir and texts is None:
        yield f"text_cache_gigabytes={job.text_cache_gigabytes:g}: the prompts encode to {engine.text_bytes(todo) / 1e9:.3g} GB, none is kept"
    yield from engine.lora.table()


def lost(files: Sequence[str]) -> Iterator[str]:
    """That images of earlier starts are gone."""
    if files:
        yield f"images that were made before and are not there, or empty: {len(files):,} are made again ({some(files)})"


def unguided(engine: Engine, rows: Sequence[Row]) -> Iterator[str]:
    """That rows have guidance, and the checkpoint has nothing that reads it."""
    count = sum(row.guidance_scale != 0 for row in rows)
    if count and not engine.remarks and not engine.checkpoint.components["transformer"].config.guidance_embeds:
        yield f"guidance_scale decides nothing ({count:,} rows have one): the checkpoint has no guidance embedding"


def unread(rows: Sequence[Row]) -> str | None:
    """Fields of the manifest that decide nothing, first those that look like one that does."""
    counts = Counter(key for row in rows for key in row.extra)
    meant = sorted(((key, _meant(key)) for key in counts), key=lambda each: each[1] is None)
    words = [f"{shown(key)[1:-1]} ({counts[key]:,} rows{f'; did you mean {near}?' if near else ''})" for key, near in meant]
    return "fields that decide nothing: " + some(words, SHOWN_FIELDS) if words else None


def _meant(key: str) -> str | None:
    """The known field that ``key`` is a slip or a part of, as steps is of num_inference_steps."""
    part = (field for field in FIELDS if {*key.lower().split("_")} <= {*field.split("_")})
    return nearest(key, FIELDS) or next(part, None)


def cut(tokenizers: Tokenizers, rows: Sequence[Row]) -> Iterator[tuple[str, str | None]]:
    """What each text encoder reads, and the rows that it does not read to their end."""
    clip, t5 = tokenizers.cut((row.prompt for row in rows), (row.prompt_2 for row in rows))
    for name, tokenizer, limit, texts, of in (
        ("CLIP", tokenizers.clip, tokenizers.lengths[0], clip, lambda row: row.prompt),
        ("T5", tokenizers.t5, tokenizers.lengths[1], t5, lambda row: row.prompt_2),
    ):
        hit = [row for row in rows if of(row) in texts] if texts else []
        lines = {row.where: of(row) for row in hit}
        first = dict(itertools.islice(lines.items(), SHOWN))
        named = [f"{where.rpartition('/')[2]} has {tokens}" for where, tokens in zip(first, tokenizer.count([*first.values()]), strict=True)]
        yield f"{name} reads {limit} tokens", f"{len(hit):,} rows are cut: {some(named, count=len(lines))}" if hit else None


def some(items: Sequence[str], shown: int = SHOWN, count: int | None = None) -> str:
    """The first of ``count`` items, or of these, and how many more there are."""
    more = (count or len(items)) - shown
    return ", ".join(items[:shown]) + (f" and {more:,} more" if more > 0 else "")
