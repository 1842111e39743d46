"""Devices as a mesh, and the one table that says which mesh axis a parameter's axis lies on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# data: every device has its own images and all weights; fsdp: its own images and a part of the
# weights, gathered layer by layer.
AXES = ("data", "fsdp")
BATCH = P(AXES)  # images are dealt over both


def mesh_shape(data: int, fsdp: int, devices: int) -> tuple[int, int]:
    """Sizes of ``AXES``; one of them may be -1 and takes the devices that are left.

    Raises ValueError when the sizes do not fit the number of devices.
    """
    sizes = [data, fsdp]
    if sizes.count(-1) > 1:
        raise ValueError("ici_data_parallelism and ici_fsdp_parallelism are both -1: at most one can be automatic")
    fixed = math.prod(s for s in sizes if s != -1)
    if -1 in sizes:
        if devices % fixed:
            raise ValueError(f"{devices} devices cannot be divided by {fixed}: ici_data_parallelism={data}, ici_fsdp_parallelism={fsdp}")
        sizes[sizes.index(-1)] = devices // fixed
    elif fixed > devices:
        raise ValueError(f"ici_data_parallelism={data} × ici_fsdp_parallelism={fsdp} needs {fixed} devices, there are {devices}")
    return sizes[0], sizes[1]


def make_mesh(shape: tuple[int, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over the first ``prod(shape)`` devices."""
    devices = jax.devices() if devices is None else devices
    count = math.prod(shape)
    return Mesh(np.asarray(devices[:count]).reshape(shape), AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis dealt over the mesh."""
    return NamedSharding(mesh, BATCH)


def put(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A host array that every process of the replica has, on the devices of all of them."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def param_sharding(mesh: Mesh, shape: Sequence[int], axes: Sequence[str | None]) -> NamedSharding:
    """Where a parameter of ``shape`` lies. A leading layer axis, not named in ``axes``, is never split.

    FSDP splits rows (axis 0 as the checkpoint has it), because a range of rows is one contiguous
    read; where rows do not divide it takes the first axis that does.
    """
    layers = len(shape) - len(axes)
    spec: list[str | None] = [None] * len(shape)
    size = mesh.shape["fsdp"]
    if size > 1:
        for i in range(layers, len(shape)):
            if shape[i] % size == 0:
                spec[i] = "fsdp"
                break
    return NamedSharding(mesh, P(*spec))
