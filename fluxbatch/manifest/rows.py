"""The manifest of prompts → rows with every parameter resolved. Every bad line is named."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fluxbatch.config.schema import Job
from fluxbatch.manifest import formats
from fluxbatch.manifest.fields import FIELDS, INTEGERS, SURROGATES, Resolver
from fluxbatch.manifest.formats import TAB, BadLine, Line
from fluxbatch.storage.base import StorageError
from fluxbatch.storage.registry import open_stream
from fluxbatch.types import Reject, Row, UserError

_SHOWN = 50  # bad lines in one message
_PROMPT_COLUMNS = ("prompt", "caption", "text")
_JSON = ("jsonl", "ndjson")


def read_rows(job: Job, *, size_multiple: int = 16) -> tuple[list[Row], list[Reject]]:
    """The job's rows, from ``job.manifest`` (.jsonl, .txt, .tsv, .csv) or ``job.prompt``.

    ``multiple``: what heights and widths must divide by (the model's latent grid).
    A row's index counts a bad line as one row, so no row's index or seed depends on which other
    lines are good. Bad lines come back as Rejects with ``manifest_errors=quarantine``.

    Raises UserError naming every bad line otherwise; also when there is no row at all.
    """
    extension = (job.manifest or "").rpartition(".")[2].lower()
    resolve = Resolver(job, size_multiple, empty=extension in _JSON)
    if job.manifest is None:
        if job.prompt is None:
            raise UserError("nothing to do: give manifest=FILE or prompt=TEXT")
        return _collect(iter([Line(0, {"prompt": job.prompt})]), resolve, lambda number: "prompt=", quarantine=False)
    if job.prompt is not None:
        raise UserError("manifest and prompt are both given: expected one of them")
    quarantine = job.manifest_errors.name == "quarantine"
    name = job.manifest.encode("utf-8", "backslashreplace").decode()  # a path may be no UTF-8, and rejects.jsonl is
    try:
        with open_stream(job.manifest) as stream:
            parsed = _parsed(stream, name, extension, job.prompt_column)
            rows, rejects = _collect(parsed, resolve, lambda n: f"{name}:{n}", quarantine)
    except StorageError as error:
        mistake = UserError(f"manifest: {error}")
        mistake.code = error.code  # a server that stays away is none
        raise mistake from None
    if not rows and not rejects:
        raise UserError(f"{job.manifest}: no rows in it")
    return rows, rejects


def _collect(
    parsed: Iterator[Line], resolve: Resolver, where: Callable[[int], str], quarantine: bool
) -> tuple[list[Row], list[Reject]]:
    rows: list[Row] = []
    rejects: list[Reject] = []
    index = 0
    for number, fields in parsed:
        try:
            made = resolve(fields, index, where(number))
            rows += made
            index += len(made)
        except BadLine as error:
            rejects.append(Reject(where(number), str(error), index=index, prompt=_prompt_of(fields)))
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


def _parsed(stream: Any, name: str, extension: str, prompt_column: str | None) -> Iterator[Line]:
    """The file's lines, whatever its format, with the prompt under ``prompt``."""
    if kind := formats.kind(stream):
        raise UserError(f"{name}: the file is {kind}")
    if extension in _JSON:
        return _renamed(formats.json_lines(stream), {prompt_column or "prompt": "prompt"})
    if extension == "txt":
        return formats.prompt_lines(stream)
    if extension in ("tsv", "csv"):
        has_prompt = lambda columns: _prompt_column(columns, prompt_column) is not None  # noqa: E731
        columns, parsed = formats.table_lines(stream, TAB if extension == "tsv" else ",", name, has_prompt)
        known = {column: column.lower() for column in columns if column.lower() in FIELDS}
        for column, other in itertools.combinations(known, 2):
            if known[column] == known[other]:
                raise UserError(
                    f"{name}:1: columns {json.dumps(column)} and {json.dumps(other)} differ only in case, expected "
                    "one of them"
                )
        prompt = _prompt_column(columns, prompt_column)
        if prompt is None:
            found = "prompt, caption or text (or name it: prompt_column=…)"
            wanted = found if prompt_column is None else json.dumps(prompt_column)
            raise UserError(f"{name}:1: got the columns {', '.join(map(json.dumps, columns))}, expected {wanted}")
        known = {column: field for column, field in known.items() if field != "prompt"}
        return map(_converted, _renamed(parsed, {**known, prompt: "prompt"}))
    hint = " (of a JSON array, jq -c '.[]' makes JSONL)" if extension == "json" else ""
    raise UserError(f"{name}: expected a manifest that ends in .jsonl, .txt, .tsv or .csv{hint}")


def _prompt_column(columns: list[str], wanted: str | None) -> str | None:
    by_lower = {column.lower(): column for column in reversed(columns)}
    for candidate in _PROMPT_COLUMNS if wanted is None else (wanted,):
        if candidate in columns or candidate.lower() in by_lower:
            return candidate if candidate in columns else by_lower[candidate.lower()]
    return None


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
    with contextlib.suppress(KeyError, ValueError):
        fields["guidance_scale"] = float(fields["guidance_scale"])
    for key in ("lora", "sigmas"):
        with contextlib.suppress(KeyError, ValueError, RecursionError):
            fields[key] = json.loads(fields[key])
    return Line(line.number, fields)
