"""The manifest of prompts → rows with every parameter resolved. Every bad line is named."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from fluxbatch.config.checks import template_parts
from fluxbatch.config.schema import STANDARD_INPUT, Job, manifests
from fluxbatch.manifest import files, formats
from fluxbatch.manifest.fields import FIELDS, INTEGERS, NUMBERS, SURROGATES, Resolver
from fluxbatch.manifest.formats import TAB, BadLine, Line, described
from fluxbatch.manifest.parquet import parquet_rows
from fluxbatch.storage.base import StorageError
from fluxbatch.storage.registry import open_stream
from fluxbatch.types import Reject, Row, UserError

_SHOWN = 50  # bad lines in one message
_PROMPT_COLUMNS = ("prompt", "caption", "text")
_JSON = ("jsonl", "ndjson", "json")


class _Read(NamedTuple):
    """A line of a manifest, whatever its format, with the prompt under ``prompt``."""

    where: str  # file:line
    fields: dict[str, Any] | BadLine
    empty: bool = False  # whether an empty prompt is meant, as it is where it is written out


def read_rows(job: Job, *, size_multiple: int = 16) -> tuple[list[Row], list[Reject]]:
    """The job's rows, from the files of ``job.manifest`` or from ``job.prompt``.

    ``size_multiple``: what heights and widths must divide by (the model's latent grid).
    A row's index counts a bad line as one row, so no row's index or seed depends on which other
    lines are good. Bad lines come back as Rejects with ``manifest_errors=quarantine``.

    Raises UserError naming every bad line otherwise; also when there is no row at all.
    """
    resolve = Resolver(job, size_multiple)
    if job.manifest is None:
        if job.prompt is None:
            raise UserError("nothing to do: give manifest=FILE or prompt=TEXT")
        prompt = _combined(iter([Line(0, {"prompt": job.prompt})]), job.prompt_template, ())
        return _collect((_Read("prompt=", fields) for _, fields in prompt), resolve, quarantine=False)
    if job.prompt is not None:
        raise UserError("manifest and prompt are both given: expected one of them")
    try:
        rows, rejects = _collect(_read(job), resolve, job.manifest_errors.name == "quarantine")
    except StorageError as error:
        mistake = UserError(f"manifest: {error}")
        mistake.code = error.code  # a server that stays away is none
        raise mistake from None
    if not rows and not rejects:
        raise UserError(f"{', '.join(manifests(job))}: no rows in it")
    return rows, rejects


def _read(job: Job) -> Iterator[_Read]:
    for path in files.find(job):
        # a path may be no UTF-8, and rejects.jsonl is
        name = "stdin" if path == STANDARD_INPUT else path.encode("utf-8", "backslashreplace").decode()
        kind = files.format_of(path)
        with open_stream(path) if kind == "parquet" else files.open_unpacked(path) as stream:
            for number, fields in _parsed(stream, name, kind, job.prompt_column, job.prompt_template):
                yield _Read(f"{name}:{number}", fields, empty=kind in _JSON)


def _collect(read: Iterable[_Read], resolve: Resolver, quarantine: bool) -> tuple[list[Row], list[Reject]]:
    rows: list[Row] = []
    rejects: list[Reject] = []
    index = 0
    for where, fields, empty in read:
        try:
            made = resolve(fields, index, where, empty)
            rows += made
            index += len(made)
        except BadLine as error:
            rejects.append(Reject(where, str(error), index=index, prompt=_prompt_of(fields)))
            index += 1
    if rejects and not quarantine:
        more = len(rejects) - _SHOWN
        listed = [f"{r.where}: {r.reason}" for r in rejects[:_SHOWN]]
        raise UserError(*listed, *([f"… and {more} more bad lines"] if more > 0 else []))
    return rows, rejects


def _prompt_of(fields: dict[str, Any] | BadLine) -> str | None:
    """The prompt of a line that is bad for another reason, if it can be written."""
    prompt = None if isinstance(fields, BadLine) else fields.get("prompt")
    return prompt if isinstance(prompt, str) and not SURROGATES.search(prompt) else None


def _parsed(stream: Any, name: str, kind: str, prompt_column: str | None, template: str | None) -> Iterator[Line]:
    """The file's lines, whatever its format, with the prompt under ``prompt``. ``kind``: how its name ends."""
    if kind == "parquet":
        columns, parsed = parquet_rows(stream, name)
        names = _names(columns, name, prompt_column, template)
        return map(_from_text, _renamed(_combined(parsed, template, columns), names))
    if what := formats.kind(stream):
        raise UserError(f"{name}: the file is {what}")
    if kind in _JSON:
        parsed = formats.json_array(stream, name) if kind == "json" else formats.json_lines(stream)
        return _renamed(_combined(parsed, template, ()), {prompt_column or "prompt": "prompt"})
    if kind == "txt":
        return _combined(formats.prompt_lines(stream), template, ())
    if kind in ("tsv", "csv"):
        fields = [field for _, field in template_parts(template or "") if field]

        def is_wanted(columns: list[str]) -> bool:
            if fields:
                return all(_column(columns, field) for field in fields)
            return _prompt_column(columns, prompt_column) is not None

        columns, parsed = formats.table_lines(stream, TAB if kind == "tsv" else ",", name, is_wanted)
        names = _names(columns, f"{name}:1", prompt_column, template)
        return map(_converted, _renamed(_combined(parsed, template, columns), names))
    raise UserError(f"{name}: expected a manifest that ends in .jsonl, .json, .txt, .tsv, .csv or .parquet")


def _names(columns: list[str], where: str, prompt_column: str | None, template: str | None) -> dict[str, str]:
    """Column → field, of the columns of a table that are fields. UserError where it has no column for the prompt."""
    known = {column: column.lower() for column in columns if column.lower() in FIELDS}
    for column, other in itertools.combinations(known, 2):
        if known[column] == known[other]:
            raise UserError(
                f"{where}: columns {json.dumps(column)} and {json.dumps(other)} differ only in case, expected "
                "one of them"
            )
    known = {column: field for column, field in known.items() if field != "prompt"}
    if template is not None:
        missing = [field for _, field in template_parts(template) if field and not _column(columns, field)]
        if missing:
            wanted = f"{', '.join(map(json.dumps, missing))} of prompt_template"
            raise UserError(f"{where}: got the columns {', '.join(map(json.dumps, columns))}, expected {wanted}")
        return known
    prompt = _prompt_column(columns, prompt_column)
    if prompt is None:
        found = "prompt, caption or text (or name it: prompt_column=…)"
        wanted = found if prompt_column is None else json.dumps(prompt_column)
        raise UserError(f"{where}: got the columns {', '.join(map(json.dumps, columns))}, expected {wanted}")
    return {**{column: field for column, field in known.items() if column != prompt}, prompt: "prompt"}


def _column(columns: Iterable[str], wanted: str) -> str | None:
    """The column that is called so, else one that differs in case."""
    by_lower = {column.lower(): column for column in reversed([*columns])}
    return wanted if wanted in by_lower.values() else by_lower.get(wanted.lower())


def _combined(parsed: Iterator[Line], template: str | None, columns: Collection[str]) -> Iterator[Line]:
    """The lines, with the prompt that ``template`` makes of their fields. ``columns``: a table's, as it spells them."""
    if template is None:
        return parsed
    parts = [(text, _column(columns, field) or field) for text, field in template_parts(template)]

    def combine(fields: Any) -> Any:
        if isinstance(fields, BadLine):
            return fields
        problems, prompt = [], ""
        for text, field in parts:
            value = fields.get(field, "") if field else None
            if field and (value is None or (isinstance(value, str) and not value.strip())):
                problems.append(f"prompt_template: {json.dumps(field)} is missing")
            elif field and type(value) not in (str, int, float):
                problems.append(f"prompt_template: {json.dumps(field)}: got {described(value)}, expected text")
            prompt += text + ("" if value is None else str(value))
        return BadLine("; ".join(problems)) if problems else {**fields, "prompt": prompt}

    return (Line(number, combine(fields)) for number, fields in parsed)


def _prompt_column(columns: list[str], wanted: str | None) -> str | None:
    candidates = _PROMPT_COLUMNS if wanted is None else (wanted,)
    return next(filter(None, (_column(columns, candidate) for candidate in candidates)), None)


def _renamed(parsed: Iterator[Line], names: Mapping[str, str]) -> Iterator[Line]:
    if all(old == new for old, new in names.items()):
        return parsed

    def rename(fields: Any) -> Any:
        if isinstance(fields, BadLine):
            return fields
        # what another column calls "prompt" is not the prompt, and would take its place
        kept = {k: v for k, v in fields.items() if k in names or k not in names.values()}
        return {names.get(key, key): value for key, value in kept.items()}

    return (Line(number, rename(fields)) for number, fields in parsed)


def _converted(line: Line) -> Line:
    """Cells of a table have no types: numbers where numbers belong, and empty means not given (but the prompt).

    What cannot be converted stays a string, which the resolver then refuses by name.
    """
    if isinstance(line.fields, BadLine):
        return line
    fields = {key: cell for key, cell in line.fields.items() if cell.strip() or key not in FIELDS[1:]}
    for key in INTEGERS:
        if key in fields and re.fullmatch(r"\s*[+-]?[0-9]{1,30}(\.0*)?\s*", fields[key]):
            fields[key] = int(fields[key].partition(".")[0])  # pandas writes 28.0 where another row has none
    if "id" in fields and (whole := re.fullmatch(r"\s*(-?(?:0|[1-9][0-9]{0,30}))\.0*\s*", fields["id"])):
        fields["id"] = whole[1]
    for key in NUMBERS:
        with contextlib.suppress(KeyError, ValueError):
            fields[key] = float(fields[key])
    return _from_text(Line(line.number, fields))


def _from_text(line: Line) -> Line:
    """Objects and lists that a cell holds as text."""
    if isinstance(line.fields, dict):
        for key in ("lora", "sigmas"):
            if isinstance(text := line.fields.get(key), str):
                with contextlib.suppress(ValueError, RecursionError):
                    line.fields[key] = json.loads(text)
        if isinstance(text := line.fields.get("image"), str) and text.startswith("["):
            with contextlib.suppress(ValueError, RecursionError):
                line.fields["image"] = json.loads(text)
    return line
