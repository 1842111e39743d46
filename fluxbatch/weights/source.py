"""Bytes of a checkpoint, wherever it lies: small files, ranged reads.

TensorStore reads every byte, so a local directory, ``gs://``, ``s3://`` and ``http(s)://`` are one path, and a range
of rows is one contiguous read. What TensorStore lets pass in silence (a missing object, an object that changes between
two reads) is an error here. Local files are not mapped into memory: a read error would be SIGBUS, not an exception.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import ml_dtypes
import numpy as np
import tensorstore as ts

from fluxbatch.storage.registry import tensorstore_options
from fluxbatch.types import UserError

FLOATS = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
# Never weights here: buffers that tables ignore by name, or a quantization that is not read.
OTHERS = {f"{kind}{bits}": np.dtype(f"{kind}{bits // 8}".lower()) for kind in "IU" for bits in (8, 16, 32, 64)}
DTYPES = FLOATS | OTHERS | {"BOOL": np.dtype(np.bool_)}
# Transient failures are tried again for about 20 s (TensorStore's own default is a quarter of an hour);
# a read that has not moved for STALLED seconds is given up.
RETRIES = {"max_retries": 7, "initial_delay": "200ms", "max_delay": "5s"}
STALLED = 120.0
READERS, REQUESTS = 4, 16  # threads that read local files, and from elsewhere
_NOTES = re.compile(r" \[(source locations|tensorstore_spec)=.*")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file: bytes ``start`` .. ``stop`` of a safetensors file."""

    name: str
    file: str
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int
    scale: Tensor | None = None  # of a quantized tensor: what its values are multiplied by, one number or one a row
    chunk: int = 1  # rows that can only be read together

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape[1:])


class Source:
    """A directory of a checkpoint: local, ``gs://bucket/prefix``, ``s3://bucket/prefix`` or ``http(s)://host/path``."""

    def __init__(self, url: str):
        self.url = url.removeprefix("file://").rstrip("/")
        self.local = "://" not in self.url
        # bytes of one read: enough for each thread, as a request is worth
        self.piece = 4 << 20 if self.local else 8 << 20
        self.pool = ThreadPoolExecutor(READERS if self.local else REQUESTS, "weights")  # starts no thread before a read
        self.url = os.path.abspath(self.url) if self.local else self.url
        context = {f"{name}_request_retries": RETRIES for name in ("gcs", "http", "s3")}
        try:
            self._kv = ts.KvStore.open(store_spec(self.url), context=ts.Context(context)).result()
        except (ValueError, OSError) as error:
            raise UserError(f"{self.url}: cannot be opened: {first_line(error)}") from error
        self._generations: dict[str, bytes] = {}
        self.sizes: dict[str, int] = {}  # of the files whose headers were read

    def __truediv__(self, name: str) -> Source:
        return type(self)(f"{self.url}/{name}")

    def path(self, name: str) -> str:
        return f"{self.url}/{name}"

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        """Bytes of an object; UserError if it is missing, unreadable, too short or no longer the one that was read
        before."""
        result = self.wait(self._kv.read(name, byte_range=slice(start, stop)), name)
        if result.state != "value":
            raise UserError((broken_link(self.path(name)) if self.local else None) or f"{self.path(name)}: not found")
        value = result.value  # a copy, each time it is asked for
        if start is not None and stop is not None and len(value) != stop - start:
            got = f"read {len(value)} bytes, expected {stop - start}"
            raise UserError(f"{self.path(name)}: {got}: the file is truncated")
        generation = result.stamp.generation
        if self._generations.setdefault(name, generation) != generation:
            raise UserError(f"{self.path(name)}: changed while it was being read")
        return value

    def read_rows(self, tensor: Tensor, first: int, last: int) -> np.ndarray:
        """Rows ``first`` .. ``last`` as the file has them; a tensor without axes is one row."""
        start = tensor.start + first * tensor.row_bytes
        data = self.read(tensor.file, start, start + (last - first) * tensor.row_bytes)
        return np.frombuffer(data, tensor.dtype).reshape(-1, *tensor.shape[1:])

    def write(self, name: str, value: bytes | None) -> None:
        """Writes an object whole; None deletes it."""
        self.wait_written(self._kv.write(name, value), name)

    def wait_written(self, future: ts.Future[Any], name: str) -> Any:
        try:
            return future.result()
        except (ValueError, OSError) as error:
            raise UserError(f"{self.path(name)}: cannot be written: {first_line(error)}") from error

    def wait(self, future: ts.Future[Any], name: str) -> Any:
        try:
            return future.result(timeout=STALLED)
        except TimeoutError as error:
            raise UserError(f"{self.path(name)}: no answer for {STALLED:.0f} s") from error
        except (ValueError, OSError) as error:
            raise UserError(f"{self.path(name)}: cannot be read: {first_line(error)}") from error

    def exists(self, name: str) -> bool:
        try:
            if self.wait(self._kv.read(name, byte_range=slice(0, 0)), name).state == "value":
                return True
        except UserError as error:
            if self.url.startswith("http") and "HTTP code 403" in str(error):
                return False  # to those who may not list, a store denies what is not there
            raise
        if self.local and (reason := broken_link(self.path(name), above=False)):
            raise UserError(reason)
        return False

    def files(self) -> list[str]:
        """Names of the objects below this directory; none where the store cannot list (HTTP)."""
        if self.url.startswith("http"):
            return []
        return sorted(key.decode() for key in self.wait(self._kv.list(), ""))

    def top(self) -> list[str]:
        """Names of what lies in this directory itself, sorted; none where there is no such directory or the store
        cannot list."""
        if not self.local:
            return [name for name in self.files() if "/" not in name]
        try:
            return sorted(os.listdir(self.url))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise UserError(f"{self.url}: cannot be read: {str(error.strerror).lower()}") from error

    def json(self, name: str) -> dict[str, Any]:
        """A JSON object; UserError when it is missing or malformed."""
        try:
            value = json.loads(self.read(name))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.path(name)}: not valid JSON: {first_line(error)}") from error
        if not isinstance(value, dict):
            raise UserError(f"{self.path(name)}: expected a JSON object, got {type(value).__name__}")
        return value

    def size(self, name: str) -> int | None:
        """Bytes of a local file; None where the store does not say."""
        return os.stat(self.path(name)).st_size if self.local else None


def broken_link(path: str, above: bool = True) -> str | None:
    """What to say of a local path that is a link to what is not there, or, with ``above``, that lies below one."""
    while not os.path.islink(path):
        if not above or os.path.exists(path) or path == (path := os.path.dirname(path)):
            return None
    if os.path.exists(path):
        return None
    reason = f"{path}: a link to {os.readlink(path)}, which is not there"
    if cached := re.search(r"/models--([^/]+)/snapshots/", path):
        repo = cached[1].replace("--", "/", 1)
        return f"{reason}: this copy in Hugging Face's cache is not whole: hf download {repo} --force-download"
    return f"{reason}: mend the link, or copy the file"


def store_spec(url: str) -> dict[str, Any]:
    """TensorStore's specification of the key-value store below ``url``."""
    if url.startswith("gs://"):
        bucket, _, prefix = url[5:].partition("/")
        return {"driver": "gcs", "bucket": bucket, "path": f"{prefix}/" if prefix else ""}
    if url.startswith("s3://"):
        bucket, _, prefix = url[5:].partition("/")
        spec = {"driver": "s3", "bucket": bucket, "path": f"{prefix}/" if prefix else ""}
        return spec | tensorstore_options(url)
    if "://" in url:
        parts = urlsplit(url)
        return {"driver": "http", "base_url": f"{parts.scheme}://{parts.netloc}", "path": f"{parts.path}/"}
    return {"driver": "file", "path": f"{url}/"}


def first_line(error: BaseException) -> str:
    """What went wrong, without TensorStore's notes of where in its own source."""
    line = _NOTES.sub("", str(error).splitlines()[0]) if str(error) else type(error).__name__
    if re.search(r"HTTP code 30\d", line):
        return "redirects to another address, which is not followed: name that address, or a copy of the file"
    return line


def sampled(
    source: Source, file: str, size: int, whole: int = 64 << 20, blocks: int = 64, block: int = 64 << 10
) -> Iterator[bytes]:
    """Bytes that tell one file from another: all of a small file, evenly spaced blocks of a large
    one (a fine-tune changes every tensor, so samples see it without reading 24 GB)."""
    yield str(size).encode()
    if size <= whole:
        yield source.read(file)
    else:
        for i in range(blocks):
            at = (size - block) * i // (blocks - 1)
            yield source.read(file, at, at + block)
