"""From a checkpoint's bytes to parameters on their devices, without a whole file in host memory.

Each distinct range of a parameter's rows that local devices own is read once, with a bounded number of
bytes in flight, and goes to the devices that own it: on the CPU into the array itself, elsewhere layer
by layer through short-lived staging buffers into arrays that already lie on the devices.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np
from flax import nnx

from fluxbatch.distributed.mesh import Placement
from fluxbatch.models.key_tables import Table
from fluxbatch.types import UserError
from fluxbatch.weights import cast
from fluxbatch.weights.matching import Piece, assign
from fluxbatch.weights.precision import SCALE, Precision
from fluxbatch.weights.source import Source, Tensor
from fluxbatch.weights.staging import (
    IN_FLIGHT,
    DeviceBuffer,
    HostBuffer,
    Index,
    QuantizingBuffer,
    StagingBuffer,
    local_parts,
)

SMALL = 256 << 10  # a tensor up to this size is read whole, not part by part

Progress = Callable[[int], object]
Edit = Callable[[np.ndarray], np.ndarray]  # one layer of a parameter, float32 → float32
Edits = Mapping[tuple[str, int], Edit]  # by path and layer (0 of a parameter that is not stacked)


def path_of(keys: tuple[Any, ...]) -> str:
    return ".".join(str(key) for key in keys)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A component whose every parameter has its bytes; made from headers alone."""

    source: Source
    graph: Any  # nnx graph definition
    state: Any  # abstract parameters
    pieces: dict[str, list[Piece]]

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int | None, tuple[int, ...]]]:
        """Of each parameter: its layers (None: it is not stacked), and the shape of one."""
        found = {}
        for keys, leaf in nnx.to_flat_state(self.state):
            shape = tuple(leaf.get_value().shape)
            stacked = len(shape) > len(leaf.get_metadata()["axes"])
            found[path_of(keys)] = (shape[0], shape[1:]) if stacked else (None, shape)
        return found

    @property
    def nbytes(self) -> int:
        """Bytes to read for one copy of the weights."""
        return sum((b - a) * p.tensor.row_bytes for ps in self.pieces.values() for p in ps for a, b in p.rows)


def plan(
    make: Callable[[nnx.Rngs | None], nnx.Module], tensors: dict[str, Tensor], table: Table, source: Source
) -> Plan:
    """Assigns the tensors to the parameters of the module that ``make`` builds; nothing is allocated."""
    graph, state = nnx.split(make(None), nnx.Param, ...)[:2]
    flat = {path_of(keys): leaf for keys, leaf in nnx.to_flat_state(state)}
    shapes = {path: leaf.get_value().shape for path, leaf in flat.items()}
    stacked = {path: len(shapes[path]) > len(leaf.get_metadata()["axes"]) for path, leaf in flat.items()}
    files = {tensor.file for tensor in tensors.values()}
    where = source.path(*files) if len(files) == 1 else source.url
    return Plan(source, graph, state, assign(tensors, table, shapes, stacked, where))


def load(
    plan: Plan, mesh: jax.sharding.Mesh, dtype: Any, progress: Progress = lambda _: None, edits: Edits | None = None
) -> nnx.Module:
    """Streams the weights onto ``mesh`` as ``dtype``, which may be a Precision, and returns the module.

    Layers with an edit are read whole on every host and changed in float32 on the way, so the result does
    not depend on the sharding. Raises UserError, naming file and tensor, when bytes are missing, cut
    short, damaged (where the format has checksums) or changed since the plan was made.
    """
    leaves = list(nnx.to_flat_state(plan.state))
    return _module(plan, _stream(plan, leaves, mesh, dtype, progress, edits or {}))


def _module(plan: Plan, leaves: list[tuple[Any, Any]]) -> nnx.Module:
    """The module with these parameters; scales, of which its plan knows nothing, go beside their kernels."""
    module = nnx.merge(plan.graph, nnx.from_flat_state([(k, leaf) for k, leaf in leaves if path_of(k) in plan.shapes]))
    for keys, leaf in leaves:
        if path_of(keys) not in plan.shapes:
            setattr(functools.reduce(getattr, keys[:-1], module), keys[-1], leaf)
    return module


def to_read(
    plan: Plan,
    mesh: jax.sharding.Mesh,
    edits: Edits,
    paths: Collection[str] | None = None,
    devices: Collection[jax.Device] | None = None,
) -> int:
    """Bytes that this process reads to load the parameters at ``paths`` (None: all) onto ``mesh``; or another one,
    whose devices are ``devices``."""
    total, scales = 0, {}
    for keys, leaf in nnx.to_flat_state(plan.state) if paths is None or paths else ():
        shape, axes, path = leaf.get_value().shape, leaf.get_metadata()["axes"], path_of(keys)
        if paths is None or path in paths:
            parts = local_parts(shape, Placement.of(mesh, shape, axes).read, devices)
            local = [index[len(shape) - len(axes) :] for index in parts]
            for layer, piece in enumerate(plan.pieces[path]):
                whole = (path, layer) in edits or _is_narrow(piece, shape)
                total += sum(b - a for a, b in _ranges(local, piece, whole)) * piece.tensor.row_bytes
                if piece.tensor.scale is not None:
                    scales[id(piece.tensor)] = piece.tensor.scale
    return total + sum(math.prod(scale.shape) * scale.dtype.itemsize for scale in scales.values())


def held(plan: Plan, mesh: jax.sharding.Mesh, dtype: Any) -> int:
    """Bytes that the parameters take on this process's devices, all together."""
    total = 0
    for shape, axes, own, _ in _arrays(plan, Precision.of(dtype)):
        for index, devices in local_parts(shape, Placement.of(mesh, shape, axes).final).items():
            total += len(devices) * math.prod(b - a for a, b in index) * own.itemsize
    return total


def sizes(plan: Plan, dtype: Any) -> dict[str, int]:
    """Bytes of each parameter, by path; scales are counted by their own."""
    return {path: math.prod(shape) * own.itemsize for shape, _, own, path in _arrays(plan, Precision.of(dtype))}


def _arrays(plan: Plan, precision: Precision) -> Iterator[tuple[tuple[int, ...], Any, np.dtype, str]]:
    """Shape, logical axes, dtype and path of every array that ``load`` makes."""
    for keys, leaf in nnx.to_flat_state(plan.state):
        shape, axes, path = leaf.get_value().shape, leaf.get_metadata()["axes"], path_of(keys)
        yield shape, axes, precision.dtype(path, shape, axes), path
        if precision.quantizes(path, shape, axes):
            yield shape[:-1], axes[:1], SCALE, path_of((*keys[:-1], "scale"))


def abstract(plan: Plan, mesh: jax.sharding.Mesh, dtype: Any) -> nnx.Module:
    """What ``load`` would return, without values."""
    leaves, precision = [], Precision.of(dtype)

    def placed(shape: tuple[int, ...], axes: Any, dtype: np.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=Placement.of(mesh, shape, axes).final)

    for keys, leaf in nnx.to_flat_state(plan.state):
        shape, axes, path = leaf.get_value().shape, leaf.get_metadata()["axes"], path_of(keys)
        leaves.append((keys, leaf.replace(placed(shape, axes, precision.dtype(path, shape, axes)))))
        if precision.quantizes(path, shape, axes):
            leaves.append(_scale(keys, placed(shape[:-1], axes[:1], SCALE), axes, precision))
    return _module(plan, leaves)


def _scale(
    keys: tuple[Any, ...], value: Any, axes: Any, precision: Precision
) -> tuple[tuple[Any, ...], nnx.Param[Any]]:
    """The parameter beside a kernel, which says how products with it are made."""
    return (*keys[:-1], "scale"), nnx.Param(value, axes=axes[:1], products=precision.products)


def reload(
    plan: Plan, state: Any, paths: Collection[str], mesh: jax.sharding.Mesh, dtype: Any,
    progress: Progress = lambda _: None, edits: Edits | None = None,
) -> Any:  # fmt: skip
    """``state`` with the parameters at ``paths`` streamed anew, as ``load`` would load them now; each old one
    is deleted before its successor is read."""
    fresh = dict(nnx.to_flat_state(state))
    for keys, leaf in nnx.to_flat_state(plan.state):
        if path_of(keys) in paths:
            fresh[keys].get_value().delete()
            fresh |= _stream(plan, [(keys, leaf)], mesh, dtype, progress, edits or {})
    return nnx.from_flat_state(list(fresh.items()))


def _stream(
    plan: Plan, leaves: Any, mesh: jax.sharding.Mesh, dtype: Any, progress: Progress, edits: Edits
) -> list[tuple[Any, Any]]:
    reader = Reader(plan.source, progress)
    scales = read_scales([piece for keys, _ in leaves for piece in plan.pieces[path_of(keys)]], reader)
    copies: collections.deque[tuple[jax.Array, int]] = collections.deque()
    precision = Precision.of(dtype)
    loaded = []
    for keys, leaf in leaves:
        shape, axes, path = leaf.get_value().shape, leaf.get_metadata()["axes"], path_of(keys)
        given = shape, len(shape) > len(axes), Placement.of(mesh, shape, axes), precision.dtype(path, shape, axes)
        buffer: StagingBuffer
        if precision.quantizes(path, shape, axes):
            buffer = QuantizingBuffer(*given, axes, copies)
        else:
            buffer = HostBuffer(*given) if on_host(mesh) else DeviceBuffer(*given, copies=copies)
        for layer, piece in enumerate(plan.pieces[path]):
            fill(buffer, layer, piece, scales.get(id(piece.tensor)), reader, edits.get((path, layer)))
        loaded.append((keys, leaf, buffer))
    reader.drain()
    found = []
    for keys, leaf, buffer in loaded:
        found.append((keys, leaf.replace(buffer.array())))
        if isinstance(buffer, QuantizingBuffer):
            found.append(_scale(keys, buffer.scales(), leaf.get_metadata()["axes"], precision))
    return found


def on_host(mesh: jax.sharding.Mesh) -> bool:
    """Whether the devices' memory is the host's."""
    return mesh.devices.flat[0].platform == "cpu"


def read_scales(pieces: list[Piece], reader: Reader) -> dict[int, np.ndarray]:
    """The float32 scales of quantized tensors, by the tensor's identity: one number, or one a row."""
    found = {id(p.tensor): p.tensor.scale for p in pieces if p.tensor.scale is not None}
    scales: dict[int, np.ndarray] = {}
    for key, scale in found.items():
        count = math.prod(scale.shape)
        scales[key] = np.empty(count, np.float32)
        rows = Rows([(((0, count),), scales[key])], 0, None, lambda: None)
        reader.read(scale, 0, scale.shape[0] if scale.shape else 1, rows)
    reader.drain()
    return {key: values if values.size > 1 else values.reshape(()) for key, values in scales.items()}


class Reader:
    """Reads of rows with at most ``IN_FLIGHT`` bytes under way, finished in the order of asking."""

    def __init__(self, source: Source, progress: Progress):
        self.source, self.progress = source, progress
        self._pending: collections.deque[tuple[Future[None], int, Rows]] = collections.deque()
        self._bytes = 0

    def read(self, tensor: Tensor, first: int, last: int, rows: Rows) -> None:
        size = (last - first) * tensor.row_bytes
        while self._pending and self._bytes + size > IN_FLIGHT:
            self._finish()
        self._pending.append((self.source.pool.submit(self._place, tensor, first, last, rows), size, rows))
        self._bytes += size

    def drain(self) -> None:
        while self._pending:
            self._finish()

    def _place(self, tensor: Tensor, first: int, last: int, rows: Rows) -> None:
        try:
            rows.put(self.source.read_rows(tensor, first, last))
        except UserError as error:
            raise UserError(f"{error} (tensor {tensor.name})") from error

    def _finish(self) -> None:
        future, size, rows = self._pending.popleft()
        future.result()
        rows.done()
        self._bytes -= size
        self.progress(size)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of a layer on their way, the target's from ``first`` on, into the parts they belong to."""

    parts: list[tuple[Index, np.ndarray]]
    first: int
    scale: np.ndarray | None  # one number, or one for each row of the target
    done: Callable[[], None]

    def put(self, rows: np.ndarray) -> None:
        for (own, *columns), buffer in self.parts:
            low, high = max(own[0], self.first), min(own[1], self.first + len(rows))
            if low < high:
                # a 1×1 convolution may be a matrix in the model
                values = rows.reshape(rows.shape[: buffer.ndim])[
                    (slice(low - self.first, high - self.first), *(slice(a, b) for a, b in columns))
                ]
                factor = self.scale[low:high] if self.scale is not None and self.scale.ndim else self.scale
                cast.copy(buffer[low - own[0] : high - own[0]], values, factor)


def fill(
    buffer: StagingBuffer, layer: int, piece: Piece, scale: np.ndarray | None, reader: Reader, edit: Edit | None = None
) -> None:
    """Starts the reads of one layer: one for each distinct range of rows, whoever shares it."""
    tensor = piece.tensor
    if edit is None and _is_narrow(piece, buffer.shape):
        edit = lambda whole: whole  # noqa: E731
    parts = buffer.open(layer, tensor.dtype if edit is None else np.dtype(np.float32))
    scale = _by_row(scale, piece, parts[0][1].ndim)
    if edit is not None:
        return _fill_edited(buffer, layer, piece, scale, reader, edit, parts)
    left = _Countdown(lambda: buffer.close(layer, scale))
    for rows in sorted(_ranges([index for index, _ in parts], piece)):
        for first, last, row in _reads(piece, rows, reader.source.piece):
            left.add()
            reader.read(tensor, first, last, Rows(parts, row, buffer.scale(scale), left.done))
    left.done()


def _is_narrow(piece: Piece, shape: tuple[int, ...]) -> bool:
    """Whether the parameter has more columns than its tensor: they are zeros."""
    return len(piece.tensor.shape) == len(shape) == 2 and piece.tensor.shape[1] < shape[1]


def _by_row(scale: np.ndarray | None, piece: Piece, axes: int) -> np.ndarray | None:
    """Scales of rows in the target's order, beside its other axes."""
    if scale is None or not scale.ndim:
        return scale
    return np.concatenate([scale[a:b] for a, b in piece.rows]).reshape(-1, *[1] * (axes - 1))


def _ranges(local: list[Index], piece: Piece, edited: bool = False) -> set[tuple[int, int]]:
    """The target's rows to read for ``local`` parts of a layer: each range once, whoever shares it, and
    whole chunks where the file has them."""
    count, chunk = sum(b - a for a, b in piece.rows), piece.tensor.chunk
    if edited or count * piece.tensor.row_bytes <= SMALL:
        return {(0, count)}
    found: list[tuple[int, int]] = []
    for first, last in sorted({index[0] for index in local}):
        first, last = first - first % chunk, min(count, last + -last % chunk)
        if found and first < found[-1][1]:  # a chunk in common
            first, last = found[-1][0], max(last, found.pop()[1])
        found.append((first, last))
    return set(found)


def _fill_edited(
    buffer: StagingBuffer, layer: int, piece: Piece, scale: np.ndarray | None, reader: Reader, edit: Edit,
    parts: list[tuple[Index, np.ndarray]],
) -> None:  # fmt: skip
    """Starts the reads of a whole layer, which is changed before its parts are cut from it."""
    whole = np.zeros(buffer.shape[1:] if buffer.stacked else buffer.shape, np.float32)

    def finish() -> None:
        changed = edit(whole)
        for index, part in parts:
            cast.copy(part, changed[tuple(slice(a, b) for a, b in index)], None)
        buffer.close(layer, None)

    _read_whole(piece, scale, reader, whole, _Countdown(finish))


def _read_whole(piece: Piece, scale: np.ndarray | None, reader: Reader, whole: np.ndarray, left: _Countdown) -> None:
    part = whole[:, : piece.tensor.shape[1]] if _is_narrow(piece, whole.shape) else whole
    for first, last, row in _reads(piece, (0, len(whole)), reader.source.piece):
        left.add()
        parts = [(tuple((0, n) for n in part.shape), part)]
        reader.read(piece.tensor, first, last, Rows(parts, row, scale, left.done))
    left.done()


def read_layer(plan: Plan, path: str, layer: int) -> np.ndarray:
    """One layer of a parameter (0 of one that is not stacked) as the checkpoint has it, float32."""
    piece, reader = plan.pieces[path][layer], Reader(plan.source, lambda _: None)
    whole = np.zeros(plan.shapes[path][1], np.float32)
    scale = read_scales([piece], reader).get(id(piece.tensor))
    _read_whole(piece, _by_row(scale, piece, whole.ndim), reader, whole, _Countdown(lambda: None))
    reader.drain()
    return whole


def _reads(piece: Piece, rows: tuple[int, int], size: int) -> Iterator[tuple[int, int, int]]:
    """Ranges of the tensor's rows, of ``size`` bytes at most, that make up the target's ``rows``; and the
    target's row of each."""
    tensor, offset = piece.tensor, 0
    step = max(1, size // max(1, tensor.row_bytes * tensor.chunk)) * tensor.chunk
    for first, last in piece.rows:
        low, high = max(rows[0], offset), min(rows[1], offset + last - first)
        for row in range(low, high, step):
            start = first + row - offset
            yield start, start + min(step, high - row), row
        offset += last - first


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
