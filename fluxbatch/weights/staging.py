"""Parameters under way: the buffers that read rows go to, and how these become arrays on devices."""

from __future__ import annotations

import abc
import collections
import dataclasses
import functools
import math
import mmap
from collections.abc import Callable, Collection
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fluxbatch.distributed.mesh import Axis, Placement, replicated
from fluxbatch.weights.precision import SCALE, quantized

IN_FLIGHT = 64 << 20  # bytes of reads under way, and of copies to devices: more was no faster

Index = tuple[tuple[int, int], ...]  # of a local part: start and stop on each axis


def local_parts(
    shape: tuple[int, ...], sharding: NamedSharding, local: Collection[jax.Device] | None = None
) -> dict[Index, list[jax.Device]]:
    """Each distinct index of an array that local devices own, and these devices. ``local``: None for this process's."""
    parts: dict[Index, list[jax.Device]] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        if device not in (sharding.addressable_devices if local is None else local):
            continue
        parts.setdefault(tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True)), []).append(device)
    return parts


class StagingBuffer(abc.ABC):
    """A parameter under way, as one part for each distinct index of the local devices."""

    def __init__(self, shape: tuple[int, ...], stacked: bool, placement: Placement, dtype: np.dtype):
        self.shape, self.stacked, self.placement, self.dtype = shape, stacked, placement, dtype
        self.devices = local_parts(shape, placement.read)

    @abc.abstractmethod
    def open(self, layer: int, dtype: np.dtype) -> list[tuple[Index, np.ndarray]]:
        """Where to write a layer that comes as ``dtype``: each part's index within the layer, and its buffer."""

    @abc.abstractmethod
    def close(self, layer: int, scale: np.ndarray | None) -> None:
        """All buffers of the layer are written."""

    def scale(self, scale: np.ndarray | None) -> np.ndarray | None:
        """What values are multiplied by when they are written into a buffer."""
        return scale

    @abc.abstractmethod
    def array(self) -> jax.Array:
        """The parameter, once every layer is closed."""

    def _on_devices(
        self, buffers: dict[Index, np.ndarray], shape: tuple[int, ...], sharding: NamedSharding
    ) -> jax.Array:
        arrays = [
            jax.device_put(buffers[index], device) for index, devices in self.devices.items() for device in devices
        ]
        return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


class HostBuffer(StagingBuffer):
    """On the CPU: ``device_put`` keeps an aligned buffer as the array, so it is never reused."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._buffers = {index: aligned([b - a for a, b in index], self.dtype) for index in self.devices}

    def open(self, layer: int, dtype: np.dtype) -> list[tuple[Index, np.ndarray]]:
        if not self.stacked:
            return list(self._buffers.items())
        return [(index[1:], buffer[layer]) for index, buffer in self._buffers.items()]

    def close(self, layer: int, scale: np.ndarray | None) -> None:
        pass  # the buffers are views of the array to be

    def array(self) -> jax.Array:
        placement = self.placement
        here = all(
            bound % pairs.size == 0
            for axis, pairs in placement.pairs
            for index in self._buffers
            for bound in index[axis]
        )
        if placement.read != placement.final or not here:  # devices exchange what they have
            return _converted(placement, self.dtype)(self._on_devices(self._buffers, self.shape, placement.read), None)
        if placement.pairs:
            for buffer in self._buffers.values():
                for layer in buffer if self.stacked else [buffer]:
                    layer[...] = placement.arranged(layer)
        return self._on_devices(self._buffers, self.shape, placement.final)


class DeviceBuffer(StagingBuffer):
    """On an accelerator: a layer is staged as the file has it, cast and put in its place there.

    ``copies`` under way are bounded too, over all buffers together.
    """

    def __init__(self, *args: Any, copies: collections.deque[tuple[jax.Array, int]]):
        super().__init__(*args)
        self._copies = copies
        read = self.placement.read
        self._layer_sharding = NamedSharding(read.mesh, PartitionSpec(*read.spec[1:])) if self.stacked else read
        self._staged: dict[int, dict[Index, np.ndarray]] = {}
        self._array: jax.Array | None = None

    def open(self, layer: int, dtype: np.dtype) -> list[tuple[Index, np.ndarray]]:
        at = 1 if self.stacked else 0
        self._staged[layer] = {i: _returned([b - a for a, b in i[at:]], dtype) for i in self.devices}
        return [(index[at:], buffer) for index, buffer in self._staged[layer].items()]

    def scale(self, scale: np.ndarray | None) -> None:
        return None  # applied on the device

    def close(self, layer: int, scale: np.ndarray | None) -> None:
        parts = self._staged.pop(layer)
        staged = self._on_devices(parts, self.shape[1:] if self.stacked else self.shape, self._layer_sharding)
        if not self.stacked:
            self._array = _converted(self.placement, self.dtype)(staged, scale)
        else:
            if self._array is None:
                self._array = jnp.zeros(self.shape, self.dtype, device=self.placement.final)
            self._array = _placed(self.placement)(self._array, staged, scale, layer)
        self._copies.append((staged, sum(buffer.nbytes for buffer in parts.values())))
        self._bound()

    def _bound(self) -> None:
        while sum(size for _, size in self._copies) > IN_FLIGHT:
            self._copies.popleft()[0].block_until_ready()

    def array(self) -> jax.Array:
        assert self._array is not None
        return self._array


class QuantizingBuffer(DeviceBuffer):
    """A kernel that is held in eight bits, of any devices: a layer is staged as the file has it, and quantized on the
    devices, each output by itself."""

    def __init__(
        self, shape: tuple[int, ...], stacked: bool, placement: Placement, dtype: np.dtype, axes: tuple[Axis, ...],
        copies: collections.deque[tuple[jax.Array, int]],
    ):  # fmt: skip
        mesh = cast(Mesh, placement.read.mesh)
        if len(placement.read.spec) == len(shape) and placement.read.spec[-1] is not None:
            placement = dataclasses.replace(placement, read=replicated(mesh))  # a scale is of all inputs of an output
        super().__init__(shape, stacked, placement, dtype, copies=copies)
        self.axes = axes[:1]  # of the scales
        self._scale_placement = Placement.of(mesh, shape[:-1], self.axes)
        self._scales: jax.Array | None = None

    def close(self, layer: int, scale: np.ndarray | None) -> None:
        parts = self._staged.pop(layer)
        staged = self._on_devices(parts, self.shape[1:] if self.stacked else self.shape, self._layer_sharding)
        places = self.placement, self._scale_placement
        if not self.stacked:
            self._array, self._scales, done = _quantized(*places, self.dtype)(staged, scale)
        else:
            if self._array is None:
                self._array = jnp.zeros(self.shape, self.dtype, device=self.placement.final)
                self._scales = jnp.zeros(self.shape[:-1], SCALE, device=self._scale_placement.final)
            self._array, self._scales, done = _placed_quantized(*places)(
                self._array, self._scales, staged, scale, layer
            )
        if next(iter(staged.devices())).platform == "cpu":  # a staged layer is there until it is quantized
            done.block_until_ready()
        self._copies.append((done, sum(buffer.nbytes for buffer in parts.values())))
        self._bound()

    def scales(self) -> jax.Array:
        """Of each output, once every layer is closed."""
        assert self._scales is not None
        return self._scales


@functools.lru_cache
def _converted(placement: Placement, dtype: np.dtype) -> Callable[..., jax.Array]:
    return jax.jit(
        lambda values, scale: placement.arranged(_scaled(dtype, values, scale)), out_shardings=placement.final
    )


@functools.lru_cache
def _placed(placement: Placement) -> Callable[..., jax.Array]:
    def put(stack: jax.Array, layer: jax.Array, scale: jax.Array | None, at: int) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(stack, placement.arranged(_scaled(stack.dtype, layer, scale)), at, 0)

    return jax.jit(put, donate_argnums=0, out_shardings=placement.final)


@functools.lru_cache
def _quantized(placement: Placement, scale_placement: Placement, dtype: np.dtype) -> Callable[..., Any]:
    def quantize(values: jax.Array, scale: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        kernel, scales = quantized(values, scale, dtype)
        return placement.arranged(kernel), scale_placement.arranged(scales), scales[0]

    return jax.jit(quantize, out_shardings=(placement.final, scale_placement.final, None))


@functools.lru_cache
def _placed_quantized(placement: Placement, scale_placement: Placement) -> Callable[..., Any]:
    def put(
        stack: jax.Array, scales: jax.Array, values: jax.Array, scale: jax.Array | None, at: int
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        kernel, own = quantized(values, scale, np.dtype(stack.dtype))
        kernel, own = placement.arranged(kernel), scale_placement.arranged(own)
        put = jax.lax.dynamic_update_index_in_dim
        return put(stack, kernel, at, 0), put(scales, own, at, 0), own[0]

    return jax.jit(put, donate_argnums=(0, 1), out_shardings=(placement.final, scale_placement.final, None))


def _scaled(dtype: Any, values: jax.Array, scale: jax.Array | None) -> jax.Array:
    return (values if scale is None else values.astype(jnp.float32) * scale).astype(dtype)


def _returned(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """An empty array whose memory goes back to the system at once; malloc would keep hundreds of megabytes of such."""
    raw = np.frombuffer(mmap.mmap(-1, max(1, math.prod(shape) * dtype.itemsize)), np.uint8)
    return raw[: math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)


def aligned(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """An empty array at an address that JAX's CPU devices take over without a copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)
