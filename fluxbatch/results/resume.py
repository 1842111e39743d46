"""Which rows of a manifest the records of earlier starts make done. Pure."""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fluxbatch.types import Row

Record = dict[str, Any]
RecordId = bytes  # of a record's id and key: a million are held at once

# older records have none
LATER = ("negative_prompt", "negative_prompt_2", "true_cfg_scale", "strength", "padding_mask_crop", "inputs", "crop")
_SHOWN = 20  # changed rows in one message
# What a record says besides its row's parameters and the model
_OWN = ("file_name", "index", "seed_text", "sha256", "computed_steps", "seconds", "mfu", "created", "flags", "key")


def row_key(row: Row, job_facts: Mapping[str, Any]) -> str:
    """Digest (32 hex digits) of everything that decides the pixels: not the place, id or batch."""
    return key_under(row, digest(job_facts))


def record_id(id: str, key: str) -> RecordId:
    return hashlib.blake2b(f"{id}\0{key}".encode("utf-8", "surrogatepass"), digest_size=16).digest()


def id_of(record: Record) -> RecordId:
    return record_id(record["id"], record["key"])


def key_under(row: Row, facts_digest: str) -> str:
    """``row_key`` with the digest of the job's facts at hand."""
    given = decisive(row)
    # what a row has nothing of decides nothing: keys from before there were such fields still hold
    return digest([{k: v for k, v in given.items() if v is not None or k == "lora"}, facts_digest])


def decisive(row: Row) -> dict[str, Any]:
    """The row's parameters that decide its pixels, under the names of a record; None for what it has nothing of."""
    negative, (height, width) = row.mode.negative, row.kept
    return {
        "prompt": row.prompt,
        "prompt_2": row.prompt_2,
        "seed": row.seed,
        "height": height,
        "width": width,
        "num_inference_steps": row.num_inference_steps,
        "guidance_scale": row.guidance_scale,
        "sigmas": list(row.sigmas) or None,
        "lora": dict(row.lora) if row.lora else None,
        "negative_prompt": row.negative_prompt or None if negative else None,
        "negative_prompt_2": row.negative_prompt_2 or None if negative else None,
        "true_cfg_scale": row.true_cfg_scale if negative and row.true_cfg_scale != 1 else None,
        "strength": row.strength if row.mode.start and row.strength != 1 else None,
        "padding_mask_crop": row.padding_mask_crop,
        "inputs": {field: [picture.sha256 for picture in pictures] for field, pictures in row.pictures.items()} or None,
        "crop": [*row.crop] or None,
    }


def parameters(row: Row) -> dict[str, Any]:
    """``decisive`` in the form of a record, where no field has another type in another row: readers of metadata.jsonl
    take a column's type from its first rows."""
    given = decisive(row) | {"inputs": inputs_of(row)}
    given |= {key: given[key] or "" for key in ("negative_prompt", "negative_prompt_2")}
    given |= {key: 1.0 if given[key] is None else given[key] for key in ("true_cfg_scale", "strength")}
    lora = json.dumps(given.pop("lora") or {}, ensure_ascii=False)
    given["padding_mask_crop"] = -1 if row.padding_mask_crop is None else row.padding_mask_crop
    text = {key: json.dumps(given[key] or []) for key in ("sigmas", "crop")} | {"lora": lora}
    return given | text | {"seed_text": str(row.seed)}  # the number may be more than 63 bits


def inputs_of(row: Row) -> str:
    """JSON: of each field the pictures, with the path that the row has, and digest and size of the file; of references
    the size, height first, at which the model reads them. Other pictures are read at the image's."""
    found = {
        field: [{"path": p.path, "sha256": p.sha256, "height": p.height, "width": p.width} for p in pictures]
        for field, pictures in row.pictures.items()
    }
    for reference, size in zip(found.get("image", ()), row.mode.references, strict=False):  # a mode may have none
        reference["read_as"] = [*size]
    return json.dumps(found, ensure_ascii=False)


def paths_of(row: Row) -> Record:
    """What a record says of the row's pictures, which may lie elsewhere now."""
    return {"inputs": inputs_of(row)} if row.pictures else {}


def plain(record: Record) -> Record:
    """The record with its values in the form of ``decisive``, whatever version of fluxbatch wrote it."""
    inputs = json.loads(record.get("inputs") or "{}")
    negative = {key: record.get(key) or None for key in ("negative_prompt", "negative_prompt_2")}
    scale, strength = record.get("true_cfg_scale") or 1.0, record.get("strength")
    return (
        record
        | negative
        | {
            "lora": mix(record) or None,
            "sigmas": [*levels(record)] or None,
            "true_cfg_scale": None if scale == 1 else scale,
            "strength": None if strength in (None, 1.0) else strength,
            "padding_mask_crop": crop_padding(record),
            "inputs": {field: [p["sha256"] for p in pictures] for field, pictures in inputs.items()} or None,
            "crop": json.loads(record.get("crop") or "[]") or None,
        }
    )


def crop_padding(record: Mapping[str, Any]) -> int | None:
    """The record's ``padding_mask_crop``; None where the image is all that was drawn."""
    return None if record.get("padding_mask_crop") in (None, -1) else record["padding_mask_crop"]


def mix(record: Mapping[str, Any]) -> dict[str, float]:
    """Adapter → scale, of a record or of what ``decisive`` says."""
    lora = record["lora"] or {}
    return json.loads(lora) if isinstance(lora, str) else lora


def levels(record: Mapping[str, Any]) -> tuple[float, ...]:
    """The noise levels that a record, or what ``decisive`` says, has in place of the schedule's own."""
    given = record.get("sigmas") or ()  # older records have none
    return tuple(json.loads(given) if isinstance(given, str) else given)


def with_extra(record: Mapping[str, Any], row: Row) -> Record:
    """The record's own fields, the last of which is ``key``, and then those of the row that it has no field for."""
    keys = list(record)
    own = {key: record[key] for key in keys[: keys.index("key") + 1]}
    taken = {*own, *_OWN}
    extra = row.extra.items()
    return own | {key: value for key, value in extra if key not in taken and not _names_pictures(key, value)}


def left_out(rows: Iterable[Row], model: Mapping[str, Any]) -> list[str]:
    """A remark on fields of the rows that no record carries, if there are any. ``model``: what records say of it."""
    own, pictures = dict[str, None](), dict[str, None]()
    for row in rows:
        for key, value in row.extra.items():
            if key in model or key in _OWN:
                own[key] = None
            elif key not in pictures and _names_pictures(key, value):
                pictures[key] = None
    because = (own, "every record has for itself"), (pictures, "ImageFolder takes for pictures, as it does file_name")
    way_out = "rename them and start again, no picture is made twice"
    said = ((", ".join(map(json.dumps, fields)), why) for fields, why in because if fields)
    return [f"not carried into the metadata: {names}, which {why}; {way_out}" for names, why in said]


def _names_pictures(key: str, value: Any) -> bool:
    """Whether Hugging Face's ImageFolder would put pictures where the field is, at any depth."""
    if key == "image" or re.fullmatch("(.*_)?file_names?", key, re.DOTALL):
        return True
    if isinstance(value, list):
        return any(_names_pictures("", each) for each in value)
    if isinstance(value, dict):  # where an "image" is in nobody's place
        return any(name != "image" and _names_pictures(name, each) for name, each in value.items())
    return False


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


class Match(NamedTuple):
    """``moved``: record → the row it makes done, where that has another id or key by now. ``todo``: rows that no
    record makes done; those that did change since their record was made are in ``changed`` as well."""

    moved: dict[RecordId, Row]
    todo: list[Row]
    changed: list[tuple[Row, Record]]


def match(
    rows: Sequence[Row],
    key: Callable[[Row], str],
    left: set[RecordId],
    records: Callable[[], Iterable[Record]],
) -> Match:
    """Rows and records by id and key; what is left, by what tells a moved row from a changed one.

    ``left``: all records; those that a row's own id and key find are taken out. ``records``: all of them again, and in
    full; called only when some rows may have moved or changed.
    """
    row_of: dict[RecordId, Row] = {}
    todo: dict[str, tuple[Row, str]] = {}  # by id
    for row in rows:
        own = record_id(row.id, row_key := key(row))
        if own in left:
            left.discard(own)
        else:
            todo[row.id] = row, row_key

    over = (record["id"] for record in records() if id_of(record) in left) if left and todo else ()
    ids = {known for id in over for known in (id, f"{id}-0")}
    if not ids or not any(id in ids or not row.named for id, (row, _) in todo.items()):
        return Match(row_of, [row for row, _ in todo.values()], [])

    def pair(named: bool, handle_of_record: Callable[[Record], Any], handle_of_row: Callable[[Row, str], Any]) -> None:
        """Makes rows with ids of their own, or those without, done by the records that have the same handle,
        each record once."""
        by_handle: dict[Any, deque[RecordId]] = defaultdict(deque)
        for record in remembered:
            # an id that is not the index was given by a manifest, and only its own row may have the record
            if id_of(record) not in row_of and (named or record["id"] == str(record["index"])):
                by_handle[handle_of_record(record)].append(id_of(record))
        for row, key in list(todo.values()):
            if row.named == named and (alike := by_handle.get(handle_of_row(row, key))):
                row_of[alike.popleft()] = row
                del todo[row.id]

    remembered = [record for record in records() if id_of(record) in left]
    remembered.sort(key=lambda record: record["index"])
    # A row without a seed of its own that stands elsewhere would get another seed now. It is the
    # same row when all else is equal and its seed was as far from its place.
    pair(
        True,
        lambda r: (r["id"], *_but_place(plain(r), r["index"])),
        lambda row, _: (row.id, *_but_place(decisive(row), row.index)),
    )
    # The first of several images of a row is the one that it had before alone.
    pair(True, lambda r: (f"{r['id']}-0", r["key"]), lambda row, key: (row.id, key))
    pair(
        True,
        lambda r: (f"{r['id']}-0", *_but_place(plain(r), r["index"])),
        lambda row, _: (row.id, *_but_place(decisive(row), row.index)),
    )
    # A row without an id of its own may stand elsewhere too: the key finds it.
    pair(False, lambda r: r["key"], lambda _, key: key)
    pair(False, lambda r: _but_place(plain(r), r["index"]), lambda row, _: _but_place(decisive(row), row.index))
    changed = [
        (todo[record["id"]][0], record) for record in remembered if id_of(record) not in row_of and record["id"] in todo
    ]
    return Match(row_of, [row for row, _ in todo.values()], changed)


class NamesSeen:
    """Names of images in a ledger's records, as 16 bytes for each."""

    def __init__(self) -> None:
        self._names, self._keys = array("q"), array("q")

    def saw(self, record: Record) -> None:
        self._names.append(hash(record["file_name"]))
        self._keys.append(hash(record["key"]))

    def twice(self, records: Callable[[], Iterable[Record]]) -> set[str]:
        """Those that are recorded for different pixels: two starts at once, as a bucket lets them, wrote over each
        other's images, and nobody knows whose are there. ``records``: all of them again, only called where some
        names seem to be."""
        if not self._names:
            return set()
        names, keys = np.frombuffer(self._names, np.int64), np.frombuffer(self._keys, np.int64)
        order = np.argsort(names)
        again = (np.diff(names[order]) == 0) & (np.diff(keys[order]) != 0)
        doubtful = {int(name) for name in names[order][1:][again]}
        if not doubtful:
            return set()
        known: dict[str, str] = {}
        found = (r for r in records() if hash(r["file_name"]) in doubtful)
        return {r["file_name"] for r in found if known.setdefault(r["file_name"], r["key"]) != r["key"]}


def describe(changed: Sequence[tuple[Row, Record]]) -> Iterator[str]:
    """A line for all rows that changed alike, as by a setting of the job (their seeds by one number): where the first
    is, and every field with its old and new value."""
    alike: dict[Any, list[tuple[Row, Record]]] = defaultdict(list)
    for row, record in changed:
        record = plain(record)
        fields = difference(record, decisive(row) | {"seed": record["seed"]}, only_new=True)
        alike[*fields, row.seed - record["seed"]].append((row, record))
    groups = list(alike.values())
    for (row, record), *others in groups[:_SHOWN]:
        what = ", ".join(difference(record, decisive(row), only_new=True)) or "the job's configuration changed"
        likewise = f" and likewise {len(others):,} more rows" if others else ""
        yield f"{row.where}{likewise}: {what} since {record['file_name']} was made (id {json.dumps(row.id)})"
    if more := sum(map(len, groups[_SHOWN:])):
        yield f"… and {more:,} more changed rows"


def difference(old: Mapping[str, Any], new: Mapping[str, Any], *, only_new: bool = False) -> list[str]:
    """``key: old → new`` of the keys with other values; nested mappings by dotted keys."""
    if only_new:
        old = {key: old.get(key) for key in new}
    old, new = dict(_flat(old)), dict(_flat(new))
    keys = dict.fromkeys([*new, *old])
    return [f"{k}: {_shown(old.get(k))} → {_shown(new.get(k))}" for k in keys if old.get(k) != new.get(k)]


def _but_place(values: Mapping[str, Any], index: int) -> tuple[str, int]:
    """What stays of a row without a seed of its own when it moves: all but the seed, and the seed's distance."""
    fields = (
        "prompt",
        "prompt_2",
        "height",
        "width",
        "num_inference_steps",
        "guidance_scale",
        "lora",
        "sigmas",
        *LATER,
    )
    return digest([values[field] for field in fields]), values["seed"] - index


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"
