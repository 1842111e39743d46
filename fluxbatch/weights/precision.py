"""What parameters are held as on the devices: all in one dtype, or the kernels of linear layers in eight bits.

A kernel ``[out, in]`` in eight bits has a float32 scale ``[out]`` beside it: the largest magnitude of each output's
weights becomes the largest number of the dtype. In eight bits are the kernels of blocks, nine tenths of a model and
more. As they are stay biases, norms, embeddings, and the linear layers outside the blocks, which would cost quality and
save hardly any memory: those that read latents, text, time and pooled text, or make the velocity.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fluxbatch.distributed.mesh import Axis
from fluxbatch.models.layers import EIGHT_BITS

SCALE = np.dtype(np.float32)


@dataclasses.dataclass(frozen=True)
class Precision:
    """``rest``: of every parameter but the kernels that are held as ``kernels``, where that is not None. ``products``:
    what they are multiplied by is brought to their dtype too. ``block``: the component is a block by itself; blocks of
    others are known by their layer axis."""

    rest: np.dtype
    kernels: np.dtype | None = None
    products: bool = False
    block: bool = False

    @classmethod
    def of(cls, dtype: Any) -> Precision:
        """The precision itself, or one dtype for all parameters."""
        return dtype if isinstance(dtype, cls) else cls(np.dtype(dtype))

    @classmethod
    def named(cls, weights: str, activations: str, products: bool = False) -> Precision:
        """Of ``hardware.weights_dtype``: beside kernels in eight bits all is in the dtype of activations."""
        if weights in EIGHT_BITS:
            return cls(np.dtype(activations), np.dtype(weights), products)
        return cls(np.dtype(weights))

    def quantizes(self, path: str, shape: Sequence[int], axes: Sequence[Axis]) -> bool:
        """Whether the parameter is a kernel that is held in eight bits; ``shape``: with the layer axis."""
        in_block = self.block or len(shape) > len(axes)
        return self.kernels is not None and in_block and len(axes) == 2 and path.endswith("kernel")

    def dtype(self, path: str, shape: Sequence[int], axes: Sequence[Axis]) -> np.dtype:
        """Of a parameter."""
        return self.kernels if self.kernels is not None and self.quantizes(path, shape, axes) else self.rest


def quantized(values: jax.Array, scale: jax.Array | None, dtype: np.dtype) -> tuple[jax.Array, jax.Array]:
    """``[out, in]`` as ``dtype``, and its scales ``[out]`` float32, of ``values · scale``. ``scale``: None, one number,
    or one a row. Values of that very dtype stay as they are."""
    if values.dtype == dtype:
        one = jnp.ones((), SCALE) if scale is None else jnp.reshape(scale, -1).astype(SCALE)
        return values, jnp.broadcast_to(one, values.shape[:1])
    limit = EIGHT_BITS[dtype.name]
    narrow = values.astype(jnp.float32) if values.dtype.itemsize == 1 else values
    most = jnp.max(jnp.abs(narrow), axis=-1).astype(jnp.float32)  # before it is cast: no array of float32 is written
    wide = values.astype(jnp.float32)
    if scale is not None:
        most, wide = most * jnp.abs(jnp.reshape(scale, -1)), wide * scale
    scales = jnp.where(most == 0, 1, most / limit)
    wide = wide / scales[:, None]
    rounded = jnp.round(wide) if dtype == np.int8 else wide
    return jnp.clip(rounded, -limit, limit).astype(dtype), scales
