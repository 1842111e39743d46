"""Devices as a mesh, and the one table that says which mesh axis a logical axis lies on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fluxbatch.distributed.peers import ALONE

# data: every device has its own images and all weights; fsdp: its own images and a part of the weights,
# gathered layer by layer. The devices of the other two make the same images: context divides their
# tokens, tensor their heads and hidden units with the weights of these. The most talkative come last,
# where neighbours are near.
AXES = ("data", "fsdp", "context", "tensor")
SLOW = AXES[:2]  # those that may cross from one slice, or group of processes, to another
BATCH = P(SLOW)  # images are divided over both

RULES: dict[str | None, str | tuple[str, ...]] = {
    "heads": "tensor", "mlp": "tensor", "tokens": "context", "batch": SLOW,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Pairs:
    """An axis in groups of ``size`` that are rotated pair by pair. Checkpoints have a pair's two numbers side by
    side; the model has the first of each pair, then the second of each, so that no lane is shuffled."""

    name: str | None
    size: int

    def halved(self, x: Any, axis: int) -> Any:
        """A checkpoint's order → the model's."""
        return self._turned(x, axis, (self.size // 2, 2))

    def paired(self, x: Any, axis: int) -> Any:
        """The model's order → a checkpoint's."""
        return self._turned(x, axis, (2, self.size // 2))

    def _turned(self, x: Any, axis: int, grid: tuple[int, int]) -> Any:
        axis %= x.ndim
        return x.reshape(*x.shape[:axis], -1, *grid, *x.shape[axis + 1 :]).swapaxes(axis + 1, axis + 2).reshape(x.shape)


# Of a parameter: a name, or the names and sizes of parts that stand in one axis side by side.
Axis = str | None | Pairs | tuple[tuple[str, int], ...]


def mesh_shape(
    ici: Sequence[int], dcn: Sequence[int], devices: int, slices: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes of ``AXES`` within a slice and of ``SLOW`` across slices; in each one may be -1 and takes what is left.

    Raises ValueError when the sizes do not fit the devices, or the slices where there are several.
    """
    names = [f"{kind}_{axis}_parallelism" for kind, axes in (("ici", AXES), ("dcn", SLOW)) for axis in axes]
    given = [f"{name}={size}" for name, size in zip(names, (*ici, *dcn), strict=True) if size != 1]
    outer = _filled(dcn, slices, f"{slices} slices", names[len(AXES) :])
    across = math.prod(outer)
    if slices > 1 and across != slices:
        raise ValueError(f"{' × '.join(given)}: there are {slices} slices, the dcn_ sizes must multiply to as many")
    if devices % across:
        raise ValueError(f"{' × '.join(given)}: {devices} devices cannot be divided by {across}")
    inner = _filled(ici, devices // across, f"{devices // across} devices", names)
    if math.prod(inner) * across > devices:
        raise ValueError(f"{' × '.join(given)} needs {math.prod(inner) * across} devices, there are {devices}")
    return inner, outer


def _filled(sizes: Sequence[int], count: int, what: str, names: Sequence[str]) -> tuple[int, ...]:
    if sizes.count(-1) > 1:
        automatic = [name for name, size in zip(names, sizes, strict=False) if size == -1]
        raise ValueError(f"{' and '.join(automatic)} are both -1: at most one can be automatic")
    fixed = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and count % fixed:
        given = ", ".join(f"{name}={size}" for name, size in zip(names, sizes, strict=False))
        raise ValueError(f"{what} cannot be divided by {fixed}: {given}")
    return tuple(count // fixed if size == -1 else size for size in sizes)


def open_mesh(
    ici: Sequence[int], dcn: Sequence[int], devices: Sequence[jax.Device] | None = None, processes: int | None = None
) -> Mesh:
    """The mesh of these sizes over the devices of all processes, or over ``devices`` that belong to so many
    ``processes``.

    A slice is a TPU's; elsewhere what the dcn_ sizes divide are the processes, in their order. Raises
    ValueError when the sizes do not fit.
    """
    devices, processes = jax.devices() if devices is None else devices, processes or jax.process_count()
    inner, outer = mesh_shape(ici, dcn, len(devices), _slices(devices))
    across, count = math.prod(outer), math.prod(inner) * math.prod(outer)
    if _slices(devices) == 1 and processes % across:
        given = f"dcn_data_parallelism={outer[0]} × dcn_fsdp_parallelism={outer[1]}"
        raise ValueError(f"{given}: {processes} processes cannot be divided by {across}")
    if processes > 1 and count != len(devices):
        raise ValueError(
            f"the sharding takes {count} devices, the {processes} processes have {len(devices)}: all must be taken, as "
            "sharding=ddp does where they share one job; where each has its own, "
            f"start them with {ALONE} set: srun env {ALONE} …"
        )
    return make_mesh(inner, outer, devices)


def make_mesh(ici: Sequence[int], dcn: Sequence[int] = (), devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over the first devices; sizes that are not given are 1."""
    devices = jax.devices() if devices is None else devices
    inner, outer = ((*sizes, *[1] * (len(AXES) - len(sizes))) for sizes in (ici, dcn))
    devices = devices[: math.prod(inner) * math.prod(outer)]
    if _slices(devices) > 1:
        grid = mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
    elif devices[0].platform == "tpu" and math.prod(outer) == 1:
        grid = mesh_utils.create_device_mesh(inner, devices, allow_split_physical_axes=True)
    else:  # the slow part of each axis stands before its fast part
        pairs = [axis for i in range(len(AXES)) for axis in (i, i + len(AXES))]
        grid = np.asarray(devices).reshape(*outer, *inner).transpose(pairs).reshape(np.multiply(inner, outer))
    return Mesh(grid, AXES)


def _slices(devices: Sequence[jax.Device]) -> int:
    return len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis divided over the mesh."""
    return NamedSharding(mesh, BATCH)


def data_parallel_size_of(mesh: Mesh) -> int:
    """Into how many parts a batch is divided."""
    return math.prod(mesh.shape[axis] for axis in SLOW)


def put(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A host array that every process of the replica has, on the devices of all of them."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a parameter lies. A leading layer axis, not named in its axes, is never split.

    FSDP splits rows (axis 0 as the checkpoint has it), because a range of rows is one contiguous
    read; where rows do not divide it takes the first axis that does. It leaves vectors whole: a layer
    would wait for a dozen of them, and all together are a four-thousandth of the weights. What tensor
    parallelism splits by columns is read by rows all the same, each device another range, and
    exchanged on the devices.
    """

    read: NamedSharding
    final: NamedSharding
    used: NamedSharding  # while a layer computes: what fsdp divides is whole
    parts: tuple[int, ...] = ()  # of the last axis, which are divided over the devices each by itself
    groups: int = 1
    pairs: tuple[tuple[int, Pairs], ...] = ()  # axes, counted from the last (-1), that are rotated

    @classmethod
    def of(cls, mesh: Mesh, shape: Sequence[int], axes: Sequence[Axis]) -> Placement:
        layers = len(shape) - len(axes)
        spec: list[tuple[str, ...]] = [()] * len(shape)
        parts: tuple[int, ...] = ()
        for i, axis in enumerate(axes, layers):
            side_by_side = (
                axis if isinstance(axis, tuple) else ((axis.name if isinstance(axis, Pairs) else axis, shape[i]),)
            )
            names, sizes = {RULES.get(name) for name, _ in side_by_side}, tuple(size for _, size in side_by_side)
            (name,) = names  # parts that stand side by side lie on one mesh axis
            if name and _groups(mesh, name, sizes) > 1:
                if (name,) in spec:
                    raise ValueError(f"axes {tuple(axes)}: two of them lie on {name}")
                spec[i], parts = (cast(str, name),), sizes if len(sizes) > 1 else parts
        whole = list(spec)

        def fits(names: Sequence[str], i: int) -> bool:
            return shape[i] % math.prod(mesh.shape[name] for name in names) == 0

        if mesh.shape["fsdp"] > 1 and len(axes) > 1:
            for i in range(layers, len(shape)):
                if fits((*spec[i], "fsdp"), i):
                    spec[i] = (*spec[i], "fsdp")
                    break
        read = list(spec)
        if any(whole[layers + 1 :]):  # by columns
            read = [(), *[()] * (len(shape) - 1)]
            read[layers] = next(
                (names for names in ((*spec[layers], "tensor"), spec[layers]) if fits(names, layers)), ()
            )
        read_, final, used = (NamedSharding(mesh, _spec(axes)) for axes in (read, spec, whole))
        pairs = tuple((i - len(axes), axis) for i, axis in enumerate(axes) if isinstance(axis, Pairs))
        return cls(read_, final, used, parts, mesh.shape["tensor"] if parts else 1, pairs)

    def arranged(self, x: Any) -> Any:
        """``x``, as a checkpoint has it, in the order in which devices hold it."""
        if self.groups > 1:
            x = _join(_cut(x, self.parts, -1), -1, self.groups)
        for axis, pairs in self.pairs:
            x = pairs.halved(x, axis)
        return x


def _spec(axes: Sequence[tuple[str, ...]]) -> P:
    return P(*(names[0] if len(names) == 1 else names or None for names in axes))


def _groups(mesh: Mesh | None, name: str | tuple[str, ...], sizes: Sequence[int]) -> int:
    """In how many groups axes of these sizes are divided over a mesh axis: 1 where they do not divide."""
    count = mesh.shape[cast(str, name)] if mesh is not None else 1
    return count if all(size % count == 0 for size in sizes) else 1


def _cut(x: Any, sizes: Sequence[int], axis: int) -> list[Any]:
    return jnp.split(x, np.cumsum(sizes)[:-1].tolist(), axis)


def _join(parts: Sequence[Any], axis: int, groups: int) -> Any:
    """The parts side by side, or the first group of each, then the second of each, and so on."""
    if groups == 1:
        return jnp.concatenate(parts, axis)
    axis %= parts[0].ndim
    cut = [x.reshape(*x.shape[:axis], groups, -1, *x.shape[axis + 1 :]) for x in parts]
    whole = jnp.concatenate(cut, axis + 1)
    return whole.reshape(*whole.shape[:axis], -1, *whole.shape[axis + 2 :])


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a model's activations lie. Without a mesh there is one device, and nothing is constrained."""

    mesh: Mesh | None = None

    def place(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """``x`` with its axes where the table has them, if their sizes divide."""
        if self.mesh is None:
            return x
        sizes = zip(axes, x.shape, strict=True)
        names = [RULES[axis] if axis and self._divides(axis, size) else None for axis, size in sizes]
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, P(*names)))

    @property
    def divides_weights(self) -> bool:
        """Whether layers must gather their weights before they compute."""
        return self.mesh is not None and self.mesh.shape["fsdp"] > 1

    def gathered(self, value: jax.Array, axes: Sequence[Axis]) -> jax.Array:
        """A parameter as its layer computes with it. Said to the compiler, which may otherwise choose to
        gather the images instead."""
        if self.mesh is None or not self.divides_weights:
            return value
        return jax.lax.with_sharding_constraint(value, Placement.of(self.mesh, value.shape, axes).used)

    def join(self, parts: Sequence[jax.Array], axis: int, name: str) -> jax.Array:
        """``jnp.concatenate`` in an order in which no device needs another's: the first device's of each
        part, then the second's of each. ``name``: the logical axis."""
        return _join(parts, axis, self._joined(name, [x.shape[axis] for x in parts]))

    def split(self, x: jax.Array, sizes: Sequence[int], axis: int, name: str) -> list[jax.Array]:
        """Undoes ``join``."""
        groups = self._joined(name, sizes)
        if groups == 1:
            return _cut(x, sizes, axis)
        grouped = x.reshape(*x.shape[:axis], groups, -1, *x.shape[axis + 1 :])
        parts = _cut(grouped, [size // groups for size in sizes], axis + 1)
        return [part.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :]) for part in parts]

    def attention(self, attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        """``attend`` for each device's images, heads and queries, over the keys of all tokens; ``factors``: of queries
        and of keys ``[B, L]``, if there are any.

        Not left to the compiler: it cannot divide a kernel, nor a loop over heads.
        """
        if self.mesh is None:
            return attend

        def placed(
            q: jax.Array, k: jax.Array, v: jax.Array, factors: tuple[jax.Array, jax.Array] | None = None
        ) -> jax.Array:
            names = ("batch", "heads", "tokens")
            sizes = zip(names, q.shape, strict=False)
            own = P(*(RULES[name] if self._divides(name, size) else None for name, size in sizes))
            specs = own, P(*own[:2]), P(*own[:2]), None if factors is None else (P(own[0], own[2]), P(own[0]))
            divided = jax.shard_map(attend, mesh=self.mesh, in_specs=specs, out_specs=own, check_vma=False)
            return divided(q, k, v, factors)

        return placed

    def _joined(self, name: str, sizes: Sequence[int]) -> int:
        return _groups(self.mesh, RULES[name], sizes)

    def _divides(self, name: str, size: int) -> bool:
        assert self.mesh is not None
        axes = RULES[name]
        axes = axes if isinstance(axes, tuple) else (axes,)
        return size % math.prod(self.mesh.shape[axis] for axis in axes) == 0
