"""From a checkpoint's bytes to parameters on their devices, without a whole file in host memory.

Each distinct range of a parameter's rows that local devices own is read once, with a bounded number of
bytes in flight, and goes to the devices that own it.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from flax import nnx

from fluxbatch.dist.mesh import param_sharding
from fluxbatch.types import UserError
from fluxbatch.weights.rules import Piece, Table, assign
from fluxbatch.weights.source import Source, Tensor

IN_FLIGHT = 64 << 20  # bytes of reads under way: more was no faster
READ = 8 << 20  # bytes of one read at most

Progress = Callable[[int], None]
Index = tuple[tuple[int, int], ...]  # of a local part: start and stop on each axis


def path_of(keys: tuple[Any, ...]) -> str:
    return ".".join(str(key) for key in keys)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A component whose every parameter has its bytes; made from headers alone."""

    source: Source
    graph: Any  # nnx graph definition
    state: Any  # abstract parameters
    pieces: dict[str, list[Piece]]

    @property
    def nbytes(self) -> int:
        """Bytes to read for one copy of the weights."""
        return sum((b - a) * p.tensor.row_bytes for ps in self.pieces.values() for p in ps for a, b in p.rows)


def plan(make: Callable[[nnx.Rngs], nnx.Module], tensors: dict[str, Tensor], table: Table, source: Source) -> Plan:
    """Assigns the tensors to the parameters of the module that ``make`` builds; nothing is allocated."""
    graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param, ...)[:2]
    flat = {path_of(keys): leaf for keys, leaf in nnx.to_flat_state(state)}
    shapes = {path: leaf.get_value().shape for path, leaf in flat.items()}
    stacked = {path: len(shapes[path]) > len(leaf.get_metadata()["axes"]) for path, leaf in flat.items()}
    return Plan(source, graph, state, assign(tensors, table, shapes, stacked, source.url))


def load(plan: Plan, mesh: jax.sharding.Mesh, dtype: Any, progress: Progress = lambda _: None) -> nnx.Module:
    """Streams the weights onto ``mesh`` as ``dtype`` and returns the module."""
    reader = Reader(plan.source, progress)
    boxes: list[tuple[Any, Box]] = []
    for keys, leaf in nnx.to_flat_state(plan.state):
        shape, axes = leaf.get_value().shape, leaf.get_metadata()["axes"]
        box = Box(shape, param_sharding(mesh, shape, axes), np.dtype(dtype))
        box.fill(plan.pieces[path_of(keys)], len(shape) > len(axes), reader)
        boxes.append((leaf, box))
    reader.drain()
    flat = [(keys, leaf.replace(box.array())) for (keys, leaf), (_, box) in zip(nnx.to_flat_state(plan.state), boxes, strict=True)]
    return nnx.merge(plan.graph, nnx.from_flat_state(flat))


class Reader:
    """Ranged reads with at most ``IN_FLIGHT`` bytes under way, finished in order."""

    def __init__(self, source: Source, progress: Progress):
        self.source, self.progress = source, progress
        self._pending: collections.deque[tuple[ts.Future, Tensor, int, Callable[[bytes], None]]] = collections.deque()
        self._bytes = 0

    def read(self, tensor: Tensor, start: int, stop: int, use: Callable[[bytes], None]) -> None:
        while self._pending and self._bytes + stop - start > IN_FLIGHT:
            self._finish()
        self._pending.append((self.source.start_read(tensor.file, start, stop), tensor, stop - start, use))
        self._bytes += stop - start

    def drain(self) -> None:
        while self._pending:
            self._finish()

    def _finish(self) -> None:
        future, tensor, size, use = self._pending.popleft()
        try:
            data = self.source.finish_read(future, tensor.file, size)
        except UserError as error:
            raise UserError(f"{error} (tensor {tensor.name})") from error
        self._bytes -= size
        use(data)
        self.progress(size)


class Box:
    """A parameter under way: one host buffer per distinct local index, put on its devices when full.

    Buffers are never reused: on CPU, ``device_put`` keeps the buffer as the array.
    """

    def __init__(self, shape: tuple[int, ...], sharding: jax.sharding.NamedSharding, dtype: np.dtype):
        self.shape, self.sharding, self.dtype = shape, sharding, dtype
        self._devices: dict[Index, list[jax.Device]] = {}
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            key = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
            self._devices.setdefault(key, []).append(device)
        self._arrays: list[jax.Array] = []

    def fill(self, pieces: list[Piece], stacked: bool, reader: Reader) -> None:
        """Starts the reads: one for each distinct range of rows, whoever shares it."""
        at = 1 if stacked else 0  # the axis of rows
        groups: dict[tuple[int, int], list[tuple[Index, np.ndarray]]] = {}
        for index in self._devices:
            groups.setdefault(index[at], []).append((index, np.empty([b - a for a, b in index], self.dtype)))
        for rows, buffers in groups.items():
            left = _Countdown(lambda buffers=buffers: self._put(buffers))
            for layer, piece in enumerate(pieces):
                targets = [(buffer[layer] if stacked else buffer, index[at + 1 :]) for index, buffer in buffers]
                for start, stop, row in _reads(piece, rows):
                    left.add()
                    reader.read(piece.tensor, start, stop, _copy(piece.tensor, targets, row, left.done))
            left.done()

    def _put(self, buffers: list[tuple[Index, np.ndarray]]) -> None:
        for index, buffer in buffers:
            self._arrays += [jax.device_put(buffer, device) for device in self._devices[index]]

    def array(self) -> jax.Array:
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, self._arrays)


class _Countdown:
    """Calls ``then`` once ``done`` has been called for the opener and for every ``add``."""

    def __init__(self, then: Callable[[], None]):
        self._left, self._then = 1, then

    def add(self) -> None:
        self._left += 1

    def done(self) -> None:
        self._left -= 1
        if not self._left:
            self._then()


def _reads(piece: Piece, rows: tuple[int, int]):
    """Byte ranges of the piece that make up the target's ``rows``: (start, stop, local row)."""
    tensor, offset = piece.tensor, 0
    step = max(1, READ // max(1, tensor.row_bytes))
    for first, last in piece.rows:
        low, high = max(rows[0], offset), min(rows[1], offset + last - first)
        for row in range(low, high, step):
            count = min(step, high - row)
            start = tensor.start + (first + row - offset) * tensor.row_bytes
            yield start, start + count * tensor.row_bytes, row - rows[0]
        offset += last - first


def _copy(tensor: Tensor, targets: list[tuple[np.ndarray, Index]], row: int, done: Callable[[], None]):
    """Writes read rows into each target from ``row`` on, cut to its columns, cast on the way."""

    def use(data: bytes) -> None:
        rows = np.frombuffer(data, tensor.dtype).reshape(-1, *tensor.shape[1:])
        for target, columns in targets:
            # a 1×1 convolution may be a matrix in the model
            cut = rows.reshape(rows.shape[: target.ndim])[(slice(None), *(slice(a, b) for a, b in columns))]
            target[row : row + len(cut)] = cut
        done()

    return use
