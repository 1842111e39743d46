"""What people open first after a run: ``index.html``, ``.fluxbatch/contact_sheet.png``, and a sweep's grid.

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

from PIL import Image, ImageDraw, ImageFont

from fluxbatch.results.images import Images
from fluxbatch.results.location import SHEET
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
    *,
    note: str | None = None,
) -> None:
    """Write ``index.html``: every image and every failed row, in the manifest's order.

    ``summary`` is the line on top, label → value, in the order given (None: left out); the model
    is added from the records. Of more than ``MAX_ROWS`` images the page holds an even choice, and
    says so. ``images``: where they lie, if not in files that the page can show: it carries small
    copies of at most ``MAX_THUMBNAILS`` then. ``note``: what it says instead of what is left out. Raises StorageError.
    """
    chosen, made = thin(records, MAX_THUMBNAILS if images else MAX_ROWS)
    failures, failed = thin(rejects, MAX_ROWS)
    if images:
        chosen = _with_thumbnails((images, record) for record in chosen)
    rows = sorted([*chosen, *map(_failure, failures)], key=_order)
    store.write("index.html", _page(title, summary, rows, left_out=made + failed - len(rows), note=note))


def write_grid(store: Store, jobs: Mapping[str, Mapping[str, Any]], title: str = "Sweep") -> None:
    """Write a multirun's ``index.html`` at the root of its output place.

    ``jobs`` maps each job's run directory, relative to ``store``, to its swept keys and values.
    A picture's place is its manifest row (id and prompt: the first axis) and its job's value of
    every key that has more than one. A job that ended without a record is shown as failed, one
    that has not ended as empty cells. Raises StorageError.
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
    store.write("index.html", _page(title, summary, records, left_out=len(placed) - len(shown), sweep=sweep))


def write_contact_sheet(
    store: Store, images: Images, records: Iterable[Record], *, title: str = "", limit: int = 100, side: int = 160
) -> None:
    """Write ``.fluxbatch/contact_sheet.png``: at most ``limit`` evenly chosen images, shrunk into squares of
    ``side`` pixels, with short captions. An image that cannot be read stays an empty frame.
    """
    chosen, total = thin(records, limit)
    with ThreadPoolExecutor(8) as pool:  # an object store answers one read in some 50 ms
        thumbnails = list(pool.map(lambda record: _thumbnail(images, record, side), chosen))
    font, small = ImageFont.load_default(18), ImageFont.load_default(12)
    gap, caption = 12, 34
    across = max(4, math.ceil(math.sqrt(1.5 * len(chosen))))
    down = math.ceil(len(chosen) / across)
    head = gap + 26
    size = gap + across * (side + gap), head + gap + down * (side + caption + gap)
    sheet = Image.new("RGB", size, "#f7f7f5")
    draw = ImageDraw.Draw(sheet)
    count = f"{total:,} image{'s' * (total != 1)}" + (f", {len(chosen)} shown" if total > len(chosen) else "")
    width = small.getlength(count)
    draw.text((size[0] - gap - width, gap + 5), count, "#6b6b68", small)
    draw.text((gap, gap), _lines_of(title, font, size[0] - 3 * gap - width, 1)[0], "#1b1b1a", font)
    for i, (record, thumbnail) in enumerate(zip(chosen, thumbnails, strict=True)):
        x, y = gap + i % across * (side + gap), head + gap + i // across * (side + caption + gap)
        draw.rectangle((x, y, x + side - 1, y + side - 1), "#ebebe8")
        if thumbnail:
            sheet.paste(thumbnail, (x + (side - thumbnail.width) // 2, y + (side - thumbnail.height) // 2))
        else:
            draw.text((x + side / 2, y + side / 2), "missing", "#b3261e", small, anchor="mm")
        for n, line in enumerate(_lines_of(_caption(record), small, side, 2)):
            draw.text((x, y + side + 4 + 14 * n), line, "#4a4a47", small)
    out = io.BytesIO()
    sheet.save(out, "PNG", compress_level=4)  # twice as fast as 6, and 3 % larger
    store.write(SHEET, out.getvalue())


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
        "data": _json({"count": len(rows), "note": note or more, **_columns(rows), "sweep": sweep}),
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


def _columns(rows: Sequence[Record]) -> dict[str, Any]:
    """``columns``: field → its value in every row; ``common``: field → the value all images share."""
    adapters = any(mix(row) for row in rows if "lora" in row)
    brief = _DETAILS if len(rows) > MAX_DETAILED else frozenset()
    rows = [{key: value for key, value in _shown(row, adapters).items() if key not in brief} for row in rows]
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


def _shown(row: Record, adapters: bool) -> Record:
    """A record as people read it: without what says that there is nothing to say, or says it twice."""
    nothing = ("mfu", 0), ("sigmas", "[]"), ("step_cache", ""), ("matmul_dtype", ""), ("step_cache_threshold", 0)
    said = {key: value for key, value in row.items() if key != "seed_text" and (key, value) not in nothing}
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


def _thumbnail(images: Images, record: Record, side: int) -> Image.Image | None:
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
        if images is None or "file_name" not in record or (thumbnail := _thumbnail(images, record, 256)) is None:
            return record
        out = io.BytesIO()
        thumbnail.save(out, "JPEG", quality=80)
        return {**record, "thumbnail": f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"}

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(told, cells))


def _caption(record: Record) -> str:
    """The prompt as far as Pillow's own font can write it (Latin), else the file's name."""
    latin = re.sub(r"[^\s -~\xa0-\u024f\u2010-\u2026]", "", record["prompt"])
    return " ".join(latin.split()) or record["file_name"]


def _lines_of(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float, lines: int) -> list[str]:
    """``text`` broken into at most ``lines`` lines of ``width`` pixels, the last one cut with "…"."""
    rows = [""]
    words = text[:500].split(" ")
    for n, word in enumerate(words):
        longer = f"{rows[-1]} {word}".strip()
        if font.getlength(longer) <= width or not rows[-1]:
            rows[-1] = longer
        elif len(rows) < lines:
            rows.append(word)
        else:
            rows[-1] = " ".join([rows[-1], *words[n:]])
            break
    return [_cut(row, font, width) for row in rows]


def _cut(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"
