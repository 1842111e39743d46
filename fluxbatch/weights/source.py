"""Bytes of a checkpoint, wherever it lies: small files, safetensors headers, ranged reads.

Everything goes through TensorStore key-value stores, so a local directory and ``gs://`` are one
path, and a range of rows is one contiguous read.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore as ts

from fluxbatch.types import UserError

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),  # buffers (position ids) that tables ignore by name
}
MAX_HEADER = 100 << 20  # safetensors' own bound
RETRIES = {"max_retries": 8, "initial_delay": "200ms", "max_delay": "5s"}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a safetensors file: bytes ``start`` .. ``stop`` of ``file``."""

    name: str
    file: str
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape[1:])


class Source:
    """A directory of a checkpoint, local or ``gs://bucket/prefix``."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        if self.url.startswith("gs://"):
            bucket, _, prefix = self.url[5:].partition("/")
            spec: dict[str, Any] = {"driver": "gcs", "bucket": bucket, "path": f"{prefix}/" if prefix else ""}
        else:
            self.url = os.path.abspath(self.url)
            spec = {"driver": "file", "path": self.url + "/"}
        self._kv = ts.KvStore.open(spec, context=ts.Context({"gcs_request_retries": RETRIES})).result()

    def __truediv__(self, name: str) -> Source:
        return Source(f"{self.url}/{name}")

    def path(self, name: str) -> str:
        return f"{self.url}/{name}"

    def start_read(self, name: str, start: int | None = None, stop: int | None = None) -> ts.Future:
        """A read under way; ``finish_read`` checks and returns its bytes."""
        return self._kv.read(name, byte_range=slice(start, stop))

    def finish_read(self, future: ts.Future, name: str, size: int | None = None) -> bytes:
        """The bytes of a read; UserError if the object is missing, unreadable or shorter than ``size``."""
        try:
            result = future.result()
        except (ValueError, OSError) as error:
            raise UserError(f"{self.path(name)}: cannot be read: {_first_line(error)}") from error
        if result.state != "value":
            raise UserError(f"{self.path(name)}: not found")
        if size is not None and len(result.value) != size:
            raise UserError(f"{self.path(name)}: read {len(result.value)} bytes where {size} were expected: the file is truncated")
        return result.value

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        size = None if start is None or stop is None else stop - start
        return self.finish_read(self.start_read(name, start, stop), name, size)

    def exists(self, name: str) -> bool:
        try:
            return self._kv.read(name, byte_range=slice(0, 0)).result().state == "value"
        except (ValueError, OSError):
            return False  # a directory, or nothing there

    def files(self) -> list[str]:
        """Names of the objects below this directory."""
        return sorted(key.decode() for key in self._kv.list().result())

    def json(self, name: str) -> dict[str, Any]:
        """A JSON object; UserError when it is missing or malformed."""
        try:
            value = json.loads(self.read(name))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.path(name)}: not valid JSON: {_first_line(error)}") from error
        if not isinstance(value, dict):
            raise UserError(f"{self.path(name)}: expected a JSON object, got {type(value).__name__}")
        return value

    def size(self, name: str) -> int | None:
        """Bytes of a local file; None where the store does not say."""
        return None if self.url.startswith("gs://") else os.stat(self.path(name)).st_size


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def read_header(source: Source, file: str) -> dict[str, Tensor]:
    """The tensors of one safetensors file; UserError unless its header and extent are sound."""
    where = source.path(file)
    length = int.from_bytes(source.read(file, 0, 8), "little")
    size = source.size(file)
    if length > MAX_HEADER or (size is not None and 8 + length > size):
        raise UserError(f"{where}: its header claims {length:,} bytes: not a safetensors file, or a truncated one")
    try:
        header = json.loads(source.read(file, 8, 8 + length))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: the safetensors header is not JSON: {_first_line(error)}") from error

    tensors: dict[str, Tensor] = {}
    for name, entry in header.items() if isinstance(header, dict) else ():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (start, stop) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
            sound = all(type(n) is int and n >= 0 for n in (*shape, start, stop))
            if not sound or stop - start != dtype.itemsize * math.prod(shape):
                raise ValueError("shape and offsets disagree")
        except KeyError as error:
            known = ", ".join(DTYPES)
            raise UserError(f"{where}: {name}: dtype {entry.get('dtype')!r}, expected one of {known}") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{where}: {name}: unsound header entry {str(entry)[:200]}: {_first_line(error)}") from error
        tensors[name] = Tensor(name, file, dtype, shape, 8 + length + start, 8 + length + stop)

    end = 8 + length
    for tensor in sorted(tensors.values(), key=lambda t: (t.start, t.stop)):
        if tensor.start != end:
            raise UserError(f"{where}: {tensor.name} starts at byte {tensor.start:,}, expected {end:,}: tensors must tile the file")
        end = tensor.stop
    if size is not None and size != end:
        state = "truncated" if size < end else "longer than its header says"
        raise UserError(f"{where}: {size:,} bytes, the header describes {end:,}: the file is {state}")
    if size is None and end > 8 + length:
        source.read(file, end - 1, end)
    return tensors


def read_headers(source: Source, stems: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors of a component: ``<stem>.safetensors.index.json`` with its parts, or
    ``<stem>.safetensors``; the index and the headers must agree both ways."""
    for stem in stems:
        if source.exists(f"{stem}.safetensors.index.json"):
            return _read_indexed(source, f"{stem}.safetensors.index.json")
        if source.exists(f"{stem}.safetensors"):
            return read_header(source, f"{stem}.safetensors")
    wanted = " or ".join(f"{stem}.safetensors" for stem in stems)
    raise UserError(f"{source.url}: no weights: expected {wanted} (pickled .bin files are not read)")


def _read_indexed(source: Source, index: str) -> dict[str, Tensor]:
    where = source.path(index)
    weight_map = source.json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise UserError(f"{where}: no weight_map from tensor names to files")
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(weight_map.values())):
        if "/" in file or not source.exists(file):
            raise UserError(f"{where}: names {file!r}, which is not there")
        tensors |= read_header(source, file)
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file != file:
            raise UserError(f"{where}: says {name} is in {file}, whose header does not have it")
    if extra := tensors.keys() - weight_map.keys():
        raise UserError(f"{where}: does not list {sorted(extra)[0]}, which {tensors[min(extra)].file} holds")
    return tensors


def sampled(source: Source, file: str, whole: int = 64 << 20, blocks: int = 64, block: int = 64 << 10) -> Iterator[bytes]:
    """Bytes that tell one file from another: all of a small file, evenly spaced blocks of a large
    one (a fine-tune changes every tensor, so samples see it without reading 24 GB)."""
    size = source.size(file)
    if size is None:
        size = max((t.stop for t in read_header(source, file).values()), default=0)
    yield str(size).encode()
    if size <= whole:
        yield source.read(file)
    else:
        for i in range(blocks):
            at = (size - block) * i // (blocks - 1)
            yield source.read(file, at, at + block)
