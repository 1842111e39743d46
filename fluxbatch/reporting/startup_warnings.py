"""What a start says: what is allowed and probably not meant, as fields that decide nothing and prompts that are too
long."""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fluxbatch.config.overrides import meant
from fluxbatch.config.schema import Job
from fluxbatch.generation.model_spec import ModelSpec
from fluxbatch.manifest.fields import FIELDS
from fluxbatch.manifest.formats import shown
from fluxbatch.models.family import TextInput
from fluxbatch.reporting import columns
from fluxbatch.results.resume import left_out
from fluxbatch.storage import cache
from fluxbatch.types import Row

SHOWN = 3  # rows named in one line
SHOWN_FIELDS = 8
# A job's key → the fields of a row that are used instead
DECIDED_BY: dict[str, tuple[str, ...]] = {key: (key,) for key in ("seed", "prompt_2", "num_images")}
DECIDED_BY |= {
    f"sampler.{key}": (key,) for key in ("num_inference_steps", "guidance_scale", "sigmas", "height", "width")
}
DECIDED_BY["sampler.resolution"] = ("height", "width")

# Prompts that were hardly meant as they stand. What other tools read in a prompt nothing here does.
ODD = {
    "empty": r"\A\s*\Z",
    "a word for no value": r"(?i)\A\s*(?:nan|none|null|n/?a|<na>|#n/a|undefined)\s*\Z",
    "a comment": r"\A\s*(?:#|//|/\*|<!--)",
    "JSON": r"""\A\s*[\[{]\s*["'{]""",
    "with options of another tool": r"(?:\A|\s)(?:--[A-Za-z]|-[A-Za-z] ?\d)|(?i:\bnegative prompt:)",
    "with weights or adapters of another tool": r"<(?:lora|lyco|hypernet):|\([^()]*:\d*\.\d+\)",
    "with a placeholder": r"\{[^{}]*\}|__\w+__",
    "with a character that is no text": "[\ufeff\ufffd\x01-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029]",
}
# Only in a list of prompts, where a line is nothing but text
ODD_IN_LISTS = {
    "a table's header (name the file .tsv or .csv)": r"(?i)\A(?:prompt|caption)s?(?:[\t,;|][\w\t,;|]*)?\Z",
    "with a tab (name a table .tsv)": r"\t",
    "in quotes, which are read as well": r"""\A(?:"[^"]*"|'[^']*'),?\Z""",
}


def lines(job: Job, spec: ModelSpec, given: Sequence[Row], rows: Sequence[Row], todo: Sequence[Row]) -> Iterator[str]:
    """Of ``rows``, which are the whole manifest, as they were ``given`` and with their mixes of adapters, and of what
    is to be drawn; and what each adapter touches."""
    yield from spec.warnings
    yield from mixed(spec, given)
    yield from unguided(spec, rows)
    yield from unread_texts(spec, rows)
    yield from idle_leading(given, rows)
    yield from overridden(job.sweep, rows)
    yield from left_out(rows, spec.provenance)
    yield from columns.lines(rows)
    if fields := unread(rows):
        yield fields
    yield from odd(rows)
    yield from (f"{reads}: {hit}" for reads, hit in truncated(spec.inputs, todo) if hit)
    yield from caches(job, spec, todo)
    yield from spec.lora.table()


def mixed(spec: ModelSpec, given: Sequence[Row]) -> Iterator[str]:
    """That rows without a mix of their own get every adapter, where others have one: few who leave it out mean that."""
    own = [f"{name} {scale:g}" for name, scale in spec.lora.own if scale]
    without = [row for row in given if row.lora is None]
    if own and 0 < len(without) < len(given):
        counted, first = f"{len(without):,} of {len(given):,} rows have none", without[0].where.rpartition("/")[2]
        yield f'lora: {counted} (the first is {first}) and get {", ".join(own)}; "lora": {{}} in a row is for none'


def caches(job: Job, spec: ModelSpec, todo: Sequence[Row]) -> Iterator[str]:
    """What is not kept for the next start, and why."""
    if remark := cache.find("jax_cache_dir", job.jax_cache_dir).remark:
        yield remark
    if job.text_cache_dir is None:
        return
    if (size := spec.text_bytes(todo)) > job.text_cache_gigabytes * 1e9:
        limit = f"text_cache_gigabytes={job.text_cache_gigabytes:g}"
        yield f"{limit}: the prompts encode to {size / 1e9:.3g} GB, none is kept"
    elif remark := cache.find("text_cache_dir", job.text_cache_dir).remark:
        yield remark


def lost(files: Sequence[str]) -> Iterator[str]:
    """That images of earlier starts are gone."""
    if files:
        yield f"images that were made before and are not there, or empty: {len(files):,} are made again ({some(files)})"


def unguided(spec: ModelSpec, rows: Sequence[Row]) -> Iterator[str]:
    """That rows have guidance, and the checkpoint has nothing that reads it."""
    count = sum(row.guidance_scale != 0 for row in rows)
    if count and not spec.warnings and not spec.family.guided:
        yield f"guidance_scale decides nothing ({count:,} rows have one): the checkpoint has no guidance embedding"


def idle_leading(given: Sequence[Row], rows: Sequence[Row]) -> Iterator[str]:
    """That rows have a negative prompt, and no guidance that leads away from it; or such guidance, and nothing that it
    leads away from."""
    negatives, scales = (zip(given, rows, strict=True) for _ in range(2))  # no list: there may be a million
    if count := sum(bool(was.negative_prompt) and not row.mode.negative for was, row in negatives):
        yield f"negative_prompt decides nothing ({count:,} rows have one): no guidance leads away from it"
    if count := sum(
        was.true_cfg_scale > 1 and not (row.mode.negative and row.true_cfg_scale > 1) for was, row in scales
    ):
        why = "no negative prompt is with it, or guidance_scale is what leads away from one in this model"
        yield f"true_cfg_scale decides nothing ({count:,} rows have one above 1): {why}"


def unread_texts(spec: ModelSpec, rows: Sequence[Row]) -> Iterator[str]:
    """That rows have a second prompt, and the checkpoint has nothing that reads it."""
    count = sum(row.prompt_2 != row.prompt for row in rows)
    if count and not any(each.field == "prompt_2" for each in spec.inputs):
        yield f"prompt_2 decides nothing ({count:,} rows have one): the checkpoint has no encoder that reads it"


def overridden(sweep: Mapping[str, Any], rows: Sequence[Row]) -> Iterator[str]:
    """Keys of a sweep that rows decide for themselves."""
    for key in sweep:
        of_lora = ("lora",) if re.fullmatch(r"lora|lora\..+\.scale|lora_config\.scale", key) else ()
        fields = DECIDED_BY.get(key, of_lora)
        count = sum(row.given.issuperset(fields) for row in rows) if fields else 0
        if count:
            own = f"{'a ' if len(fields) == 1 else ''}{' and '.join(fields)} of their own"
            those = f"{count:,} of {len(rows):,} rows, which have {own}"
            yield f"{key} is swept, and decides nothing for {those}: the same pictures in every job"


def unread(rows: Sequence[Row]) -> str | None:
    """Fields of the manifest that decide nothing, first those that look like one that does."""
    counts = Counter(key for row in rows for key in row.extra)
    meant = sorted(((key, _meant(key)) for key in counts), key=lambda each: each[1] is None)
    words = [
        f"{shown(key)[1:-1]} ({counts[key]:,} rows{f'; did you mean {near}?' if near else ''})" for key, near in meant
    ]
    return "fields that decide nothing: " + some(words, SHOWN_FIELDS) if words else None


def _meant(key: str) -> str | None:
    """The known field that ``key`` is a slip or a part of, as steps is of num_inference_steps."""
    part = (field for field in FIELDS if {*key.lower().split("_")} <= {*field.split("_")})
    return meant(key, FIELDS) or next(part, None)


def odd(rows: Sequence[Row]) -> Iterator[str]:
    """Prompts that look as if something else was meant: of each kind how many, and the first."""
    compiled = {kind: re.compile(pattern) for kind, pattern in (ODD | ODD_IN_LISTS).items()}
    found: dict[str, dict[str, str]] = defaultdict(dict)  # kind → where → text
    for row in rows:
        kinds = [*ODD, *ODD_IN_LISTS] if ".txt:" in row.where.lower() else ODD
        for text in dict.fromkeys((row.prompt, row.prompt_2)):
            if kind := next((kind for kind in kinds if compiled[kind].search(text)), None):
                found[kind].setdefault(row.where, text)
    for kind, lines in found.items():
        where, text = next(iter(lines.items()))
        first = f"{where.rpartition('/')[2]}: {shown(text)}"
        yield f"prompts that are {kind}, and drawn as they stand: {len(lines):,}; the first: {first}"


def unlisted(count: int, overwrite: bool) -> Iterator[str]:
    """That the place holds records of other rows than the manifest's."""
    stay = "they stay, in metadata.jsonl and with their images; overwrite=true drops them"
    drop = "overwrite=true drops them with their images, unless the manifest has bad lines"
    if count:
        yield f"records of no row of this manifest: {count:,}; {drop if overwrite else stay}"


def truncated(inputs: Sequence[TextInput], rows: Sequence[Row]) -> Iterator[tuple[str, str | None]]:
    """What each text encoder reads, and the rows that it does not read to their end."""
    for each in inputs:
        texts = {text: None for row in rows if (text := each.text(row)) is not None}
        longer, doubtful = each.truncated(texts), each.doubtful(texts)
        hit = [row for row in rows if each.text(row) in longer] if longer else []
        lines = {row.where: each.text(row) for row in hit}
        first = dict(itertools.islice(lines.items(), SHOWN))
        sizes = zip(first, each.tokenizer.count([*first.values()]), strict=True)
        named = [f"{where.rpartition('/')[2]} has {size}{each.tokenizer.unit}" for where, size in sizes]
        said = [f"{len(hit):,} rows are cut: {some(named, count=len(lines))}"] if hit else []
        if doubtful:
            count = sum(each.text(row) in doubtful for row in rows)
            others = f"{count:,} more" if hit else f"{count:,}"
            said.append(f"whether {others} rows are cut cannot be told, as its tokenizer is not here")
        if each.multiple and not each.tokenizer.here:
            said.append("how long prompts are is guessed from their words, as its tokenizer is not here")
        yield f"{each.name} reads {each.length} tokens", "; ".join(said) or None


def some(items: Sequence[str], shown: int = SHOWN, count: int | None = None) -> str:
    """The first of ``count`` items, or of these, and how many more there are."""
    more = (count or len(items)) - shown
    return ", ".join(items[:shown]) + (f" and {more:,} more" if more > 0 else "")
