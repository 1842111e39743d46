"""The converted layout: every parameter one zarr3 array with checksums, in chunks that divide the shards.

    fluxbatch.json                      the list of arrays, written last: without it nothing is read
    model_index.json, scheduler/, the tokenizers' folders
    transformer/config.json
    transformer/blocks.mlp_in.kernel/zarr.json, c/…

A chunk that is missing, cut short or damaged is an error, never zeros.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorstore as ts

from fluxbatch.models.key_tables import split_layer
from fluxbatch.types import UserError
from fluxbatch.weights.find import CONVERTED
from fluxbatch.weights.source import FLOATS, RETRIES, Source, Tensor, store_spec

MARKER = CONVERTED
STARTED = "converting.json"
FORMAT = 1
PARTS = 64  # a parameter's rows are cut into at most this many chunks: the widest fsdp with exact reads
CHUNK = 512 << 10  # bytes of a chunk at least
SHARD = 64 << 20  # bytes of one file, about
CACHE = 16 << 20  # bytes of chunks kept for the next layers that lie in them

_DTYPES = {dtype.name: dtype for dtype in FLOATS.values()}
BFLOAT16 = _DTYPES["bfloat16"]
_CONTEXT = {f"{name}_request_retries": RETRIES for name in ("gcs", "http")} | {
    "cache_pool": {"total_bytes_limit": CACHE}
}


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
    file, chunk = (file_rows, *rest), (chunk_rows, *rest)
    return ((file_layers, *file), (1, *chunk)) if stacked else (file, chunk)


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
        got = f"format {marker.get('format')!r}, expected {FORMAT}"
        raise UserError(f"{root.path(MARKER)}: {got}: convert the checkpoint again")
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
        line = f"{arrays.url}/../{MARKER}: {component}: unsound entry: {type(error).__name__} {error}"
        raise UserError(line) from error
    return found


def layer_names(path: str, count: int) -> list[str]:
    """``blocks.mod.kernel`` → ``blocks[0].mod.kernel``, …"""
    head, _, tail = path.partition(".")
    return [f"{head}[{i}].{tail}" for i in range(count)]


class Arrays(Source):
    """A component's arrays, read by rows; TensorStore checks shapes, dtypes, grids and checksums."""

    def __init__(self, url: str):
        super().__init__(url)
        self._context = ts.Context(_CONTEXT)
        self._opening: dict[str, ts.Future[Any]] = {}

    def open(self, path: str, shape: tuple[int, ...], dtype: np.dtype, stacked: bool) -> None:
        """Starts opening an array that must have this shape, dtype and grid."""
        self._opening[path] = ts.open(spec(self.path(path), shape, dtype, stacked), open=True, context=self._context)

    def read_rows(self, tensor: Tensor, first: int, last: int) -> np.ndarray:
        array = self.wait(self._opening[tensor.file], tensor.file)
        if tensor.name != tensor.file:
            array = array[split_layer(tensor.name)[1]]
        return self.wait(array[first:last].read(), tensor.file)
