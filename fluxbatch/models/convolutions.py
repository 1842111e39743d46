"""What autoencoders are made of, as layers.py has it of transformers. B batch, h rows, w columns, C channels."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fluxbatch.models.layers import normal, ones, param, zeros

Array = jax.Array
Padding = tuple[tuple[int, int], tuple[int, int]]  # before and after, of rows and of columns


class GroupNorm(nnx.Module):
    """``[B, …, C]`` normed over pixels and the channels of a group, in float32."""

    def __init__(self, channels: int, groups: int, *, eps: float, rngs: nnx.Rngs | None):
        self.scale = param(rngs, (channels,), (None,), ones)
        self.bias = param(rngs, (channels,), (None,), zeros)
        self.groups, self.eps = groups, eps

    def __call__(self, x: Array) -> Array:
        # Pixels are reduced first, channel by channel: five times faster on a CPU than by groups.
        y, pixels = x.astype(jnp.float32), tuple(range(1, x.ndim - 1))
        y = y - self._over_groups(jnp.mean(y, pixels, keepdims=True))
        factor = jax.lax.rsqrt(self._over_groups(jnp.mean(y * y, pixels, keepdims=True)) + self.eps)
        return (y * (factor * self.scale[...]) + self.bias[...]).astype(x.dtype)

    def _over_groups(self, means: Array) -> Array:
        """``[B, 1, …, C]`` → the same, each channel with its group's mean."""
        size = means.shape[-1] // self.groups
        grouped = jnp.mean(means.reshape(*means.shape[:-1], self.groups, size), axis=-1)
        # Given back by a product, which is exact here: of a broadcast XLA:CPU works out each channel's group for each
        # pixel.
        return jnp.matmul(grouped, np.repeat(np.eye(self.groups, dtype=np.float32), size, axis=1), precision="highest")


class Conv(nnx.Module):
    """Square convolution, ``[B, h, w, in]`` → ``[B, h', w', out]``, kernel ``[out, in, k, k]``.

    Also ``[B, N, h, w, in]`` → ``[B, N, h, w, out]``: pictures in N bands of h rows, for a 3×3 kernel of stride 1.
    A TPU convolves as many pictures at once as its vectors have rows, eight: of fewer it would make bands of its own,
    before each convolution, and undo them behind it.
    """

    def __init__(
        self, c_in: int, c_out: int, size: int, *, stride: int = 1, padding: Padding | None = None,
        rngs: nnx.Rngs | None,
    ):  # fmt: skip
        init = normal(1 / math.sqrt(c_in * size * size))
        self.kernel = param(rngs, (c_out, c_in, size, size), ("channels", None, None, None), init)
        self.bias = param(rngs, (c_out,), ("channels",), zeros)
        self.stride = stride
        self.padding = ((size // 2, size // 2),) * 2 if padding is None else padding

    def __call__(self, x: Array) -> Array:
        kernel = self.kernel[...].astype(x.dtype)
        if (
            kernel.shape[2] == self.stride == 1
        ):  # a matrix product, and three times as fast on a CPU if it is called one
            y = jax.lax.dot_general(x, kernel[:, :, 0, 0], (((x.ndim - 1,), (1,)), ((), ())))
        else:
            y = self._convolved(x, kernel, self.padding)
        return y + self.bias[...].astype(x.dtype)

    def of_doubled(self, x: Array) -> Array:
        """The same of ``x`` with each pixel repeated 2×2: ``[B, h, w, in]`` → ``[B, 2h, 2w, out]``, for a 3×3 kernel.

        A window of 3×3 then sees 2×2 pixels, other ones for each of the four that come from one: four kernels of 2×2,
        sums over the 3×3 one, do it with 4/9 of the work and without the larger picture. (In bands ``[B, N, h, w, in]``
        it is made all the same: a TPU can put rows between rows, but not the four results.)
        """
        b, *bands, h, w, c = x.shape
        if bands:
            x = jnp.broadcast_to(x[:, :, :, None, :, None], (b, *bands, h, 2, w, 2, c))
            return self(x.reshape(b, *bands, 2 * h, 2 * w, c))
        kernel = self.kernel[...].astype(jnp.float32)
        for axis in (2, 3):  # [out, in, 3, 3] → [out, in, 2, 3, 2] → [out, in, 2, 2, 2, 2]: after each axis, the parity
            first, second, third = jnp.moveaxis(kernel, axis, 0)
            pairs = [jnp.stack(pair, -1) for pair in ((first, first + second), (second + third, third))]
            kernel = jnp.stack(pairs, axis)
        kernel = kernel.transpose(4, 5, 0, 1, 2, 3).reshape(-1, *kernel.shape[1:4])
        y = self._convolved(x, kernel.astype(x.dtype), ((1, 1), (1, 1))).reshape(b, h + 1, w + 1, 4, -1)
        rows = [jnp.stack([y[:, i : i + h, j : j + w, 2 * i + j] for j in (0, 1)], 3) for i in (0, 1)]
        return jnp.stack(rows, 2).reshape(b, 2 * h, 2 * w, -1) + self.bias[...].astype(x.dtype)

    def _convolved(self, x: Array, kernel: Array, padding: Any) -> Array:
        if x.ndim == 5:
            y = self._convolved(
                with_neighbours(x).reshape(-1, x.shape[2] + 2, *x.shape[3:]), kernel, ((0, 0), padding[1])
            )
            return y.reshape(*x.shape[:4], -1)
        # XLA:CPU brings kernels into this order by itself, but not in loops: there its convolution takes eight times as
        # long.
        kernel = kernel.transpose(2, 3, 1, 0)
        return jax.lax.conv_general_dilated(
            x, kernel, (self.stride,) * 2, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )


def with_neighbours(bands: Array) -> Array:
    """``[B, N, h, w, C]`` → ``[B, N, h + 2, w, C]``: each band between the last row of the one above and the first row
    of the one below; outside the picture there are zeros."""
    last, first = (jnp.pad(bands[:, :, row], ((0, 0), (1, 1), (0, 0), (0, 0))) for row in (-1, 0))
    return jnp.concatenate([last[:, :-2, None], bands, first[:, 2:, None]], axis=2)
