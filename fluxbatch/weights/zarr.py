"""The converted layout: every parameter one zarr3 array with checksums, in chunks that divide the shards.

    fluxbatch.json                      the list of arrays, written last: without it nothing is read
    model_index.json, scheduler/, the tokenizers' folders
    transformer/config.json
    transformer/blocks.mlp_in.kernel/zarr.json, c/…

A chunk that is missing, cut short or damaged is an error, never zeros.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import google_crc32c
import numpy as np
import tensorstore as ts

from fluxbatch.models.key_tables import split_layer
from fluxbatch.types import UserError
from fluxbatch.weights.find import CONVERTED
from fluxbatch.weights.source import (
    FLOATS,
    READERS,
    RETRIES,
    Place,
    Source,
    Tensor,
    store_spec,
)

MARKER = CONVERTED
STARTED = "converting.json"
FORMAT = 1
PARTS = 64  # a parameter's rows are cut into at most this many chunks: the widest fsdp with exact reads
CHUNK = 512 << 10  # bytes of a chunk at least
SHARD = 64 << 20  # bytes of one file, about
CHECKSUM = 4  # bytes
MISSING = 2**64 - 1  # the start of a chunk that was never written
REQUESTS = 16  # threads that read from elsewhere

_DTYPES = {dtype.name: dtype for dtype in FLOATS.values()}
BFLOAT16 = _DTYPES["bfloat16"]
_CONTEXT = {f"{name}_request_retries": RETRIES for name in ("gcs", "http")}


def dtype_of(name: str) -> np.dtype | None:
    """The dtype of that name; None for ``auto``."""
    return _DTYPES.get(name)


def grid(shape: tuple[int, ...], stacked: bool, itemsize: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of a file (zarr's shard) and of a chunk in it, for an array of ``shape``."""
    layers, rows, rest = (shape[0], shape[1], shape[2:]) if stacked else (1, shape[0], shape[1:])
    row_bytes = itemsize * math.prod(rest)
    if layers * rows * row_bytes <= CHUNK:
        return shape, shape
    parts = 1
    while parts < PARTS and rows % (2 * parts) == 0 and rows // (2 * parts) * row_bytes >= CHUNK:
        parts *= 2
    chunk_rows = rows // parts
    file_rows = rows
    while file_rows * row_bytes > SHARD and file_rows % (2 * chunk_rows) == 0:
        file_rows //= 2
    file_layers = max(1, min(layers, SHARD // (rows * row_bytes)))
    return (
        ((file_layers, file_rows, *rest), (1, chunk_rows, *rest))
        if stacked
        else ((file_rows, *rest), (chunk_rows, *rest))
    )


def spec(url: str, shape: tuple[int, ...], dtype: np.dtype, stacked: bool) -> dict[str, Any]:
    """TensorStore's specification of a parameter's array in directory ``url``."""
    file, chunk = grid(shape, stacked, dtype.itemsize)
    checked = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    return {
        "driver": "zarr3",
        "kvstore": store_spec(url),
        "metadata": {
            "shape": shape,
            "data_type": dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": file}},
            "codecs": [
                {
                    "name": "sharding_indexed",
                    "configuration": {"chunk_shape": chunk, "codecs": checked, "index_codecs": checked},
                }
            ],
        },
        "fill_missing_data_reads": False,
        "recheck_cached_data": "open",
        "recheck_cached_metadata": "open",
    }


def read_marker(root: Source) -> dict[str, Any] | None:
    """The list of a converted checkpoint; None where there is none. UserError for one unfinished or unknown."""
    if not root.exists(MARKER):
        if root.exists(STARTED):
            raise UserError(f"{root.path(STARTED)}: this conversion has not finished: run fluxbatch.convert again")
        return None
    marker = root.json(MARKER)
    if marker.get("format") != FORMAT:
        raise UserError(
            f"{root.path(MARKER)}: format {marker.get('format')!r}, expected {FORMAT}: convert the checkpoint again"
        )
    return marker


def tensors(marker: Mapping[str, Any], component: str, arrays: Arrays) -> dict[str, Tensor]:
    """One tensor a layer of the component's parameters; starts opening their arrays."""
    found: dict[str, Tensor] = {}
    try:
        for path, entry in marker["components"][component].items():
            shape, dtype, stacked = tuple(entry["shape"]), _DTYPES[entry["dtype"]], bool(entry["stacked"])
            arrays.open(path, shape, dtype, stacked)
            own = shape[1:] if stacked else shape
            chunk = grid(shape, stacked, dtype.itemsize)[1][1 if stacked else 0]
            for name in layer_names(path, shape[0]) if stacked else [path]:
                found[name] = Tensor(name, path, dtype, own, 0, math.prod(own) * dtype.itemsize, chunk=chunk)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(
            f"{arrays.url}/../{MARKER}: {component}: unsound entry: {type(error).__name__} {error}"
        ) from error
    return found


def layer_names(path: str, count: int) -> list[str]:
    """``blocks.mod.kernel`` → ``blocks[0].mod.kernel``, …"""
    head, _, tail = path.partition(".")
    return [f"{head}[{i}].{tail}" for i in range(count)]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the chunks of one array lie."""

    path: str
    dtype: np.dtype
    shape: tuple[int, ...]
    stacked: bool

    @functools.cached_property
    def grids(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return grid(self.shape, self.stacked, self.dtype.itemsize)

    @property
    def rows(self) -> int:
        """Of a chunk."""
        return self.grids[1][1 if self.stacked else 0]

    @property
    def nbytes(self) -> int:
        """Of a chunk, without its checksum."""
        return math.prod(self.grids[1]) * self.dtype.itemsize

    def place(self, layer: int, row: int) -> tuple[str, int]:
        """The file of the chunk that begins with this row, and the chunk's number in it."""
        file, chunk = self.grids
        corner: tuple[int, ...] = ((layer, row) if self.stacked else (row,)) if file != chunk else ()
        corner += (0,) * (len(self.shape) - len(corner))
        key = "/".join(str(at // size) for at, size in zip(corner, file, strict=True))
        inside = [at % size // part for at, size, part in zip(corner, file, chunk, strict=True)]
        return f"{self.path}/c/{key}", int(
            np.ravel_multi_index(inside, [n // m for n, m in zip(file, chunk, strict=True)])
        )

    def index(self, layer: int) -> tuple[int, int]:
        """Where the list of chunks lies in the file of this layer, behind all of them: first and last byte."""
        file, chunk = self.grids
        count = math.prod(n // m for n, m in zip(file, chunk, strict=True))
        there = count * min(file[0], self.shape[0] - layer // file[0] * file[0]) // file[0] if self.stacked else count
        start = there * (self.nbytes + CHECKSUM)
        return start, start + 16 * count + CHECKSUM


class Arrays(Source):
    """A component's arrays, read by rows.

    TensorStore opens and checks every array. The chunks themselves are raw rows with a checksum behind, so they are
    read like a safetensors file's, straight into their place (TensorStore's own way, through its buffers, is several
    times slower), and checked there.
    """

    def __init__(self, url: str):
        super().__init__(url)
        self._pool = ThreadPoolExecutor(READERS if self.local else REQUESTS, "weights")
        self._context = ts.Context(_CONTEXT)
        self._opening: dict[str, ts.Future[Any]] = {}
        self._layouts: dict[str, Layout] = {}
        self._indices: dict[str, np.ndarray] = {}  # by file: start and length of each chunk
        self._small: dict[str, np.ndarray] = {}  # arrays whose layers are one chunk
        self._one = threading.Lock()  # of the threads that want such an array reads it

    def open(self, path: str, shape: tuple[int, ...], dtype: np.dtype, stacked: bool) -> None:
        """Starts opening an array that must have this shape, dtype and grid."""
        self._opening[path] = ts.open(spec(self.path(path), shape, dtype, stacked), open=True, context=self._context)
        self._layouts[path] = Layout(path, dtype, shape, stacked)

    def start_rows(self, tensor: Tensor, first: int, last: int, place: Place) -> Any:
        return self._pool.submit(self._read_chunks, tensor, first, last, place)

    def finish_rows(self, future: Any, tensor: Tensor, first: int, last: int, place: Place) -> None:
        try:
            self.wait(future, tensor.file)
        except UserError as error:
            raise UserError(f"{error} (tensor {tensor.name})") from error

    def _read_chunks(self, tensor: Tensor, first: int, last: int, place: Place) -> None:
        self.wait(self._opening[tensor.file], tensor.file)
        layout, layer = self._layouts[tensor.file], split_layer(tensor.name)[1] if tensor.name != tensor.file else 0
        if layout.stacked and layout.grids[0] == layout.grids[1]:
            place.put(self._whole(layout)[layer, first:last])
            return
        target = place.target(tensor, last - first)
        rows = np.empty((last - first, *tensor.shape[1:]), tensor.dtype) if target is None else target
        chunks, parts = [], []
        for row in range(first - first % layout.rows, last, layout.rows):
            low, high = max(row, first), min(row + layout.rows, last)
            chunk = within = rows[low - first : high - first]
            if high - low < layout.rows:  # a part of a chunk: the checksum is of all of it
                chunk = np.empty((layout.rows, *tensor.shape[1:]), tensor.dtype)
                parts.append((within, chunk[low - row : high - row]))
            chunks.append((row, chunk))
        self._fill(layout, layer, chunks)
        for within, read in parts:
            within[...] = read
        if target is None:
            place.put(rows)

    def _whole(self, layout: Layout) -> np.ndarray:
        with self._one:
            if layout.path not in self._small:
                values = np.empty(layout.shape, layout.dtype)
                self._fill(layout, 0, [(0, values)])
                self._small[layout.path] = values
            return self._small[layout.path]

    def _fill(self, layout: Layout, layer: int, chunks: list[tuple[int, np.ndarray]]) -> None:
        """Fills contiguous arrays with the chunks that begin with these rows; UserError for one that is missing, cut
        short or damaged. Chunks that lie one behind another are one read."""
        runs: list[tuple[str, int, int, list[np.ndarray]]] = []  # file, first and last byte, what they fill
        checks = []
        for row, values in chunks:
            file, number = layout.place(layer, row)
            start, length = map(int, self._index(layout, layer, file)[number])
            what = f"{file}: chunk {number}"
            if start == MISSING:
                raise UserError(f"{self.path(what)} is missing")
            if length != layout.nbytes + CHECKSUM:
                raise UserError(f"{self.path(what)} has {length:,} bytes, expected {layout.nbytes + CHECKSUM:,}")
            data, checksum = values.reshape(-1).view(np.uint8), np.empty(CHECKSUM, np.uint8)
            checks.append((data, checksum, what))
            if runs and runs[-1][0] == file and runs[-1][2] == start:
                _, begin, _, buffers = runs.pop()
            else:
                begin, buffers = start, []
            runs.append((file, begin, start + length, [*buffers, data, checksum]))
        for file, start, stop, buffers in runs:
            if self.local:
                self._read_into(buffers, file, start)
            else:
                read = np.frombuffer(self.read(file, start, stop), np.uint8)
                for buffer, part in zip(buffers, np.split(read, np.cumsum([*map(len, buffers)])[:-1]), strict=True):
                    buffer[...] = part
        for check in checks:
            self._check(*check)

    def _index(self, layout: Layout, layer: int, file: str) -> np.ndarray:
        """``[chunks, 2]`` uint64: where each chunk of a file begins, and its length."""
        if file not in self._indices:
            data = np.frombuffer(self.read(file, *layout.index(layer)), np.uint8)
            self._check(data[:-CHECKSUM], data[-CHECKSUM:], f"{file}: the list of chunks")
            self._indices[file] = data[:-CHECKSUM].view("<u8").reshape(-1, 2)
        return self._indices[file]

    def _check(self, data: np.ndarray, checksum: np.ndarray, what: str) -> None:
        if google_crc32c.value(data) != int(checksum.view("<u4")[0]):
            raise UserError(f"{self.path(what)}: the checksum (CRC32C) does not fit: the file is damaged")
