"""The formats of shards: images with their records, as one file that loaders of data sets read.

webdataset: tar members ``KEY.png`` (or .jpg, .webp), ``KEY.json`` (the record) and ``KEY.txt`` (the prompt).
parquet:    the column ``image`` as Hugging Face's Image feature, and the record's fields as columns of one type.
"""

from __future__ import annotations

import importlib.util
import io
import json
import sys
import tarfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from fluxbatch.config.schema import Container
from fluxbatch.storage.base import Store
from fluxbatch.types import UserError

Place = tuple[int, int]  # where an image lies within its shard, as the format wants it


class Item(NamedTuple):
    """What one row has in a shard."""

    record: Mapping[str, Any]
    image: bytes


class Format(Protocol):
    extension: str
    package: str  # that writes it

    def writer(self) -> Any:
        """The package's own, imported when it is first asked for."""

    def pack(self, items: Sequence[Item], kinds: Mapping[str, str]) -> tuple[bytes, list[Place]]:
        """The shard's bytes, and the place of each image in it. ``kinds``: as ``column_kinds`` has them."""

    def read(self, store: Store, shard: str, place: Place) -> bytes:
        """One image. ``NotFound`` where the shard is not there; ValueError where it is damaged."""


class Tar:
    """A place is the image's first byte and its count of bytes."""

    extension, package = ".tar", "webdataset"

    def pack(self, items: Sequence[Item], kinds: Mapping[str, str]) -> tuple[bytes, list[Place]]:
        out = io.BytesIO()
        with self.writer()(out, encoder=False, mtime=0) as tar:
            for record, image in items:
                key, _, extension = record["file_name"].rpartition(".")
                said = json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass")
                prompt = record["prompt"].encode("utf-8", "surrogatepass")
                tar.write({"__key__": key, extension: image, "json": said, "txt": prompt})
        out.seek(0)
        with tarfile.open(fileobj=out) as written:
            places = {member.name: (member.offset_data, member.size) for member in written}
        return out.getvalue(), [places[item.record["file_name"]] for item in items]

    def writer(self) -> Any:
        """webdataset's, without torch: webdataset imports it where it is installed, which takes seconds, and writing
        needs nothing of it."""
        hide = "torch" not in sys.modules
        if hide:
            sys.modules["torch"] = None  # type: ignore[assignment]
        try:
            from webdataset.writer import TarWriter
        finally:
            if hide:
                del sys.modules["torch"]
        return TarWriter

    def read(self, store: Store, shard: str, place: Place) -> bytes:
        return store.read_range(shard, *place)


class Parquet:
    """A place is a row group and a row within it."""

    extension, package = ".parquet", "pyarrow"

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: tuple[tuple[str, int], list[bytes]] | None = None  # the row group that was read last

    def writer(self) -> Any:
        from pyarrow.parquet import ParquetWriter

        return ParquetWriter

    def pack(self, items: Sequence[Item], kinds: Mapping[str, str]) -> tuple[bytes, list[Place]]:
        import pyarrow as pa  # takes its time, and only shards need it

        kinds = {**_own_kinds(items[0].record), **kinds}
        fields = [pa.field(name, getattr(pa, _ARROW.get(kind, kind))()) for name, kind in kinds.items()]
        image = pa.field("image", pa.struct({"bytes": pa.binary(), "path": pa.string()}))
        features: dict[str, Any] = {"image": {"_type": "Image"}}
        features |= {name: {"dtype": _HF.get(kind, kind), "_type": "Value"} for name, kind in kinds.items()}
        said = {"huggingface": json.dumps({"info": {"features": features}})}
        schema = pa.schema([image, *fields], metadata=said)
        compression = dict.fromkeys(kinds, "SNAPPY") | {
            "image.bytes": "NONE",
            "image.path": "NONE",
        }  # an image is packed

        out = io.BytesIO()
        places: list[Place] = []
        with self.writer()(out, schema, compression=compression, use_dictionary=[*kinds]) as writer:
            for number, group in enumerate(_groups(items)):
                places += [(number, row) for row in range(len(group))]
                rows = [{name: _value(item.record.get(name), kind) for name, kind in kinds.items()} for item in group]
                images = [{"bytes": item.image, "path": item.record["file_name"]} for item in group]
                columns = {name: [row[name] for row in rows] for name in kinds}
                writer.write_table(pa.table({"image": images, **columns}, schema))
        return out.getvalue(), places

    def read(self, store: Store, shard: str, place: Place) -> bytes:
        import pyarrow as pa
        import pyarrow.parquet as pq

        number, row = place
        with self._lock:
            if self._last is None or self._last[0] != (shard, number):
                try:
                    file = pq.ParquetFile(io.BufferedReader(_Ranges(store, shard), 1 << 20))
                    column = file.read_row_group(number, ["image.bytes"]).column("image")
                except (pa.ArrowException, IndexError, KeyError) as error:
                    raise ValueError(f"{shard}: not a whole shard: {error}") from None
                self._last = (shard, number), [each["bytes"] for each in column.to_pylist()]
            return self._last[1][row]


_ARROW = {"bool": "bool_", "json": "string"}
_HF = {"json": "string"}
_GROUP_BYTES = 64 << 20  # of images in one row group, which a reader holds in memory
_GROUP_ROWS = 1000


def column_kinds(extras: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """What the column of each of the manifest's own fields holds: bool, int64, float64, string, or json: the text of
    values that are of several types, or lists or objects."""
    kinds: dict[str, str] = {}
    for extra in extras:
        for name, value in extra.items():
            if value is not None:
                kind = _kind(value)
                known = kinds.setdefault(name, kind)
                if {known, kind} == {"int64", "float64"}:
                    kinds[name] = "float64"
                elif known != kind:
                    kinds[name] = "json"
    return kinds


def _kind(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return "int64" if -(2**63) <= value < 2**63 else "json"
    return {bool: "bool", float: "float64", str: "string"}.get(type(value), "json")


def _own_kinds(record: Mapping[str, Any]) -> dict[str, str]:
    """Of the fields that every record has; the last of them is ``key``."""
    names = list(record)
    own = {name: _kind(record[name]) for name in names[: names.index("key") + 1]}
    return own | {"seed": "uint64", "guidance_scale": "float64", "seconds": "float64", "mfu": "float64"}


def _value(value: Any, kind: str) -> Any:
    if kind == "json" and value is not None:
        value = json.dumps(value, ensure_ascii=False)
    # half a character, as JSON may have it, is none
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def _groups(items: Sequence[Item]) -> Iterator[list[Item]]:
    """The items of each row group."""
    group: list[Item] = []
    size = 0
    for item in items:
        if group and (size + len(item.image) > _GROUP_BYTES or len(group) == _GROUP_ROWS):
            yield group
            group, size = [], 0
        group.append(item)
        size += len(item.image)
    yield group


class _Ranges(io.RawIOBase):
    """An object of a store as a file to read from anywhere."""

    def __init__(self, store: Store, name: str):
        self._store, self._name, self._at = store, name, 0
        self._size = store.size(name)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._size - self._at))
        data = self._store.read_range(self._name, self._at, count) if count else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


_FORMATS: dict[Container, type[Format]] = {Container.webdataset: Tar, Container.parquet: Parquet}


def open_format(container: Container) -> Format:
    return _FORMATS[container]()


def require_package(container: Container) -> None:
    """Import what writes the format, before devices and threads are at work. UserError where it is not installed."""
    if container is Container.files:
        return
    format = open_format(container)
    if importlib.util.find_spec(format.package) is None:
        raise UserError(
            f"output.container={container.name}: needs the package {format.package}, found none: pip install "
            '"fluxbatch[datasets]"'
        )
    format.writer()
