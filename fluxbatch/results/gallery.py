"""What people open first after a run: ``index.html``, and a sweep's grid.

All of it is built from records (lines of ``metadata.jsonl``), never from file names. A page is
one file that asks for nothing but the run's own images: the records travel in it as JSON, column
by column, with what is the same for every image said once. ``gallery.html`` is what draws them.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import importlib.resources
import io
import itertools
import json
import math
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from PIL import Image

from fluxbatch.results import inputs
from fluxbatch.results.images import Images
from fluxbatch.results.packed import open_images
from fluxbatch.results.resume import mix
from fluxbatch.storage.base import StorageError, Store, join
from fluxbatch.storage.registry import open_store

MAX_ROWS = 100_000  # of one page
MAX_THUMBNAILS = 400  # of one page, which carries them where images lie in shards: some 10 kB each
MAX_DETAILED = 10_000  # of one page whose rows say all, also what nobody looks up there: ``_DETAILS``
_DETAILS = frozenset({"sha256", "key", "created"})
SAFE_INTEGER = 2**53  # JavaScript's numbers are exact up to here
OWN = frozenset({"file_name", "id", "index", "prompt", "prompt_2", "seed"})  # an image's, even if all agree

Record = Mapping[str, Any]
T = TypeVar("T")


def write_gallery(
    store: Store,
    records: Iterable[Record],
    rejects: Iterable[Record],
    title: str,
    summary: Mapping[str, Any],
    images: Images | None = None,
    folders: Sequence[str] = (),
    *,
    note: str | None = None,
) -> None:
    """Write ``index.html``: every image and every failed row, in the manifest's order.

    ``summary`` is the line on top, label → value, in the order given (None: left out); the model
    is added from the records. Of more than ``MAX_ROWS`` images the page holds an even choice, and
    says so. ``images``: where they lie, if not in files that the page can show: it carries small
    copies of at most ``MAX_THUMBNAILS`` then. ``folders``: where relative paths of the pictures that images were made
    of may begin; these are shown beside the images. ``note``: what it says instead of what is left out. Raises
    StorageError.
    """
    chosen, made = thin(records, MAX_THUMBNAILS if images else MAX_ROWS)
    failures, failed = thin(rejects, MAX_ROWS)
    if images:
        chosen = _with_thumbnails((images, record) for record in chosen)
    rows = sorted([*chosen, *map(_failure, failures)], key=_order)
    pictures = inputs.addresses(rows, folders, store.url)
    left_out = made + failed - len(rows)
    store.write("index.html", _page(title, summary, rows, pictures, left_out=left_out, note=note))


def write_grid(
    store: Store, jobs: Mapping[str, Mapping[str, Any]], title: str = "Sweep", folders: Sequence[str] = ()
) -> None:
    """Write a multirun's ``index.html`` at the root of its output place.

    ``jobs`` maps each job's run directory, relative to ``store``, to its swept keys and values.
    A picture's place is its manifest row (id and prompt: the first axis) and its job's value of
    every key that has more than one. A job that ended without a record is shown as failed, one
    that has not ended as empty cells. ``folders`` as in ``write_gallery``. Raises StorageError.
    """
    jobs = {job: sweep or {"job": job} for job, sweep in jobs.items()}
    keys = dict.fromkeys(key for sweep in jobs.values() for key in sweep)
    values = {key: _distinct(sweep.get(key, "—") for sweep in jobs.values()) for key in keys}
    axes = [key for key in keys if len(values[key]) > 1] or list(keys)[:1]
    place = {job: [values[key].index(_label(sweep.get(key, "—"))) for key in axes] for job, sweep in jobs.items()}

    cells = [(job, record) for job in jobs for record in _lines(store, f"{job}/metadata.jsonl")]
    cells.sort(key=lambda cell: _order(cell[1]))
    cells += [(job, _failure(reject)) for job in jobs for reject in _lines(store, f"{job}/rejects.jsonl")]
    manifest = _ManifestAxis(by_prompt=not any(key.rpartition(".")[2] == "prompt" for key in keys))
    placed = [(manifest.index(record), job, record) for job, record in cells]
    heard = {job for job, _ in cells}
    for job in jobs:
        if job not in heard and (status := _status(store, job)):
            reason = f"the job made nothing: {status.get('reason', 'see its status.json')}"
            rows = range(len(manifest.rows)) or [manifest.index({"id": "no row known"})]
            placed += [(row, job, {**manifest.rows[row], "reason": reason}) for row in rows]

    in_shards = {job for job, record in cells if "shard" in record}
    most = MAX_THUMBNAILS if in_shards else MAX_ROWS
    kept = set(thin(range(len(manifest.rows)), max(1, most // len(jobs)))[0]) if jobs else set()
    shown = [cell for cell in placed if cell[0] in kept]
    images = sum("file_name" in record for *_, record in placed)
    fixed = {key: values[key][0] for key in keys if key not in axes}
    numbers = {job: number for number, job in enumerate(jobs)}
    sweep = {
        "axes": [{"key": "prompt", "values": manifest.rows}]
        + [{"key": key, "values": [{"label": label} for label in values[key]]} for key in axes],
        "jobs": list(jobs),
        "job": [numbers[job] for _, job, _ in shown],
        "at": [[row, *place[job]] for row, job, _ in shown],
    }
    summary = {"jobs": len(jobs), "images": images, "failed": len(placed) - images, **fixed}
    images_of = {job: open_images(open_store(join(store.url, job))) for job in in_shards}
    records = _with_thumbnails((images_of.get(job), record) for _, job, record in shown)
    pictures = inputs.addresses(records, folders, store.url)
    left_out = len(placed) - len(shown)
    store.write("index.html", _page(title, summary, records, pictures, left_out=left_out, sweep=sweep))


def thin(items: Iterable[T], limit: int) -> tuple[list[T], int]:
    """At most ``limit`` items in their order and the count of all, in one pass that never holds more than twice the
    limit: of each stretch one, by lots that are the same every time, as manifests repeat themselves in cycles."""
    lots = random.Random(0)
    kept: list[tuple[float, T]] = []  # of each stretch the lowest lot
    stretch, total = 1, 0
    for item in items:
        drawn = lots.random(), item
        if total % stretch == 0:
            if len(kept) == 2 * limit:
                kept, stretch = [*map(_lowest, zip(kept[::2], kept[1::2], strict=True))], 2 * stretch
            kept.append(drawn)
        elif drawn[0] < kept[-1][0]:
            kept[-1] = drawn
        total += 1
    count = min(limit, len(kept))
    bounds = [i * len(kept) // count for i in range(count)] + [len(kept)]
    return [_lowest(kept[first:last])[1] for first, last in itertools.pairwise(bounds)], total


def _lowest(drawn: Iterable[tuple[float, T]]) -> tuple[float, T]:
    return min(drawn, key=lambda each: each[0])


def _page(
    title: str,
    summary: Mapping[str, Any],
    rows: Sequence[Record],
    pictures: Mapping[str, str],
    *,
    left_out: int,
    note: str | None = None,
    sweep: Mapping[str, Any] | None = None,
) -> bytes:
    template, policy = _template()
    facts = {label: _figure(value) for label, value in summary.items() if value is not None}
    models = {row["model"] for row in rows if "model" in row}
    if len(models) == 1:
        facts.setdefault("model", models.pop())
    more = f"An even choice: {left_out:,} more rows are in metadata.jsonl only." if left_out else ""
    if len(rows) > MAX_DETAILED:
        more = f"{more} See metadata.jsonl for created, key and sha256.".strip()
    filling = {
        "title": html.escape(title),
        "policy": policy,
        "summary": "".join(
            f"<div><dt>{html.escape(label)}</dt><dd>{html.escape(figure)}</dd></div>" for label, figure in facts.items()
        ),
        "data": _json(
            {
                "count": len(rows),
                "note": note or more,
                **_columns(rows, [*pictures]),
                "sweep": sweep,
                "pictures": [*pictures.values()],
            }
        ),
    }
    page = re.sub(r"@@(\w+)@@", lambda mark: filling[mark[1]], template)  # one pass: data is never searched
    return page.encode("utf-8", "xmlcharrefreplace")  # a lone surrogate can be in a title, not in UTF-8


@functools.cache
def _template() -> tuple[str, str]:
    """``gallery.html``, and what its Content-Security-Policy allows: its own style and script only."""
    template = importlib.resources.files("fluxbatch.results").joinpath("gallery.html").read_text("utf-8")
    allowed = []
    for tag in ("style", "script"):
        found = re.search(f"<{tag}>(.*?)</{tag}>", template, re.DOTALL)
        assert found is not None
        digest = base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()
        allowed.append(f"{tag}-src 'sha256-{digest}'")
    return template, "; ".join(allowed)


def _columns(rows: Sequence[Record], pictures: Sequence[str]) -> dict[str, Any]:
    """``columns``: field → its value in every row; ``common``: field → the value all images share. ``pictures``: the
    digests of those that can be shown, which ``before`` numbers."""
    adapters = any(mix(row) for row in rows if "lora" in row)
    brief = _DETAILS if len(rows) > MAX_DETAILED else frozenset()
    numbers = {digest: number for number, digest in enumerate(pictures)}
    shown = (_shown(row, adapters, numbers) for row in rows)
    rows = [{key: value for key, value in row.items() if key not in brief} for row in shown]
    fields = dict.fromkeys(field for row in rows for field in row)
    columns = {field: [row.get(field) for row in rows] for field in fields}
    if "prompt_2" in columns:  # worth telling only where it differs
        pairs = zip(columns["prompt_2"], columns["prompt"], strict=True)
        columns["prompt_2"] = [second if second != first else None for second, first in pairs]
    images = [i for i, row in enumerate(rows) if "file_name" in row]
    failures = [i for i, row in enumerate(rows) if "file_name" not in row]
    common = {}
    for field in columns.keys() - OWN if images else ():
        values, first = columns[field], columns[field][images[0]]
        same = all(values[i] == first and type(values[i]) is type(first) for i in images)
        if same and all(values[i] is None for i in failures):
            common[field] = first
    return {
        "fields": list(fields),
        "common": common,
        "columns": {field: values for field, values in columns.items() if field not in common},
    }


def _shown(row: Record, adapters: bool, numbers: Mapping[str, int]) -> Record:
    """A record as people read it: without what says that there is nothing to say, or says it twice."""
    nothing = (
        ("mfu", 0), ("sigmas", "[]"), ("step_cache", ""), ("matmul_dtype", ""), ("step_cache_threshold", 0),
        ("inputs", "{}"), ("strength", 1), ("true_cfg_scale", 1), ("padding_mask_crop", -1),
    )  # fmt: skip
    said = {key: value for key, value in row.items() if key != "seed_text" and (key, value) not in nothing}
    if "inputs" in said:
        read = inputs.inputs_of(row)
        said["inputs"] = ", ".join(f"{field} {p.path} {p.width}×{p.height}" for field in read for p in read[field])
        said["before"] = [[field, numbers[p.sha256]] for field in read for p in read[field] if p.sha256 in numbers]
    return said | {"lora": mix(row) if adapters else None} if "lora" in row else said


def _json(value: Any) -> str:
    """JSON that is safe inside ``<script>`` and that JavaScript reads exactly: ASCII, no ``<``, and
    NaN, infinities and long integers as strings."""

    def integer(digits: str) -> int | str:
        return digits if len(digits) > 15 and abs(int(digits)) > SAFE_INTEGER else int(digits)

    exact = json.loads(json.dumps(value, default=str), parse_constant=str, parse_int=integer)
    text = json.dumps(exact, separators=(",", ":"), allow_nan=False)
    return text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _failure(reject: Record) -> dict[str, Any]:
    """A row without ``file_name`` is one that failed; it has a reason."""
    return {"reason": "unknown", **{k: v for k, v in reject.items() if v is not None and k != "file_name"}}


def _order(record: Record) -> float:
    index = record.get("index")
    return math.inf if index is None else index


class _ManifestAxis:
    """The rows of a sweep's manifest, known again in every job by their id and prompt."""

    def __init__(self, by_prompt: bool):
        self.rows: list[dict[str, Any]] = []
        self._by_prompt = by_prompt  # not when the sweep varies the prompt itself
        self._numbers: dict[Any, int] = {}

    def index(self, record: Record) -> int:
        row = {"id": record.get("id", record.get("where"))}
        if self._by_prompt and "prompt" in record:
            row["prompt"] = record["prompt"]
        name = row["id"], row.get("prompt")
        number = self._numbers.get(name)
        if number is None:
            number = self._numbers[name] = len(self.rows)
            self.rows.append(row)
            self._numbers.setdefault((row["id"], None), number)  # a reject may not know its prompt
        return number


def _label(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def _distinct(values: Iterable[Any]) -> list[str]:
    """A swept key's values as labels: numbers by size, others in the order they were given."""
    labels = list(dict.fromkeys(map(_label, values)))
    try:
        return sorted(labels, key=float)
    except ValueError:
        return labels


def _lines(store: Store, name: str) -> list[dict[str, Any]]:
    data = store.read(name) if store.exists(name) else b""
    return [json.loads(line) for line in data.splitlines() if line.strip()]


def _status(store: Store, job: str) -> dict[str, Any]:
    """What ``status.json`` tells of how a job ended; empty while it runs or waits."""
    name = f"{job}/status.json"
    return json.loads(store.read(name)) if store.exists(name) else {}


def thumbnail(images: Images, record: Record, side: int) -> Image.Image | None:
    """The record's image, shrunk into a square of ``side`` pixels; None where it cannot be read."""
    try:
        with Image.open(io.BytesIO(images.read(record["file_name"]))) as image:
            image.thumbnail((side, side), Image.Resampling.LANCZOS)
            return image.convert("RGB")
    except (StorageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


def _with_thumbnails(cells: Iterable[tuple[Images | None, Record]]) -> list[Record]:
    """Records with a small copy of their image, as an address that holds it; None: the page can show the file."""

    def told(cell: tuple[Images | None, Record]) -> Record:
        images, record = cell
        if images is None or "file_name" not in record or (small := thumbnail(images, record, 256)) is None:
            return record
        return {**record, "thumbnail": inputs.carried(small)}

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(told, cells))
