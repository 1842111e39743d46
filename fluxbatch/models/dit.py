"""What the transformers of several families are made of. Shapes: B batch, L tokens, D width, H heads, K head width."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from fluxbatch.distributed.mesh import Layout, Pairs
from fluxbatch.models.layers import Linear, RMSNorm, layer_norm

Tokens = Float[Array, "B L D"]
Vector = Float[Array, "B D"]
Heads = Float[Array, "B H L K"]
Angles = Float[Array | np.ndarray, "*rows L K//2"]  # ``rows``: none, or B and 1 where each image has its own

TIME_CHANNELS = 256
TIME_FACTOR = 1000.0
EPS = 1e-6


def timestep_embedding(t: Float[Array, ...], channels: int = TIME_CHANNELS) -> Float[Array, "... {channels}"]:
    """Times in 0..1 → float32: cosines, then sines."""
    half = channels // 2
    freqs = jnp.exp(-np.log(10_000) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = (TIME_FACTOR * t.astype(jnp.float32))[..., None] * freqs
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def rotate(x: Heads, rope: tuple[Angles, Angles]) -> Heads:
    """Rotates by the angles of each token, in float32: its halves are the pairs' first and
    second numbers."""
    return jax.lax.platform_dependent(x, *rope, tpu=rotated_by_product, default=rotated_by_halves)


def rotated_by_halves(x: Heads, cos: Angles, sin: Angles) -> Heads:
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def rotated_by_product(x: Heads, cos: Angles, sin: Angles) -> Heads:
    """The same for a TPU, whose vectors are as wide as both halves: it cuts and joins them in memory, and exchanges
    them without leaving the chip where that is a product with a permutation, which is exact."""
    width = x.shape[-1]
    swap = jnp.asarray(np.roll(np.eye(width), width // 2, 0), x.dtype)
    swapped = jax.lax.dot_general(x, swap, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    cos, sin = jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1)
    return (x.astype(jnp.float32) * cos + swapped * sin).astype(x.dtype)


def modulate(x: Tokens, shift: Vector, scale: Vector) -> Tokens:
    """Normed, then scaled and shifted."""
    y = layer_norm(x, EPS) * (1 + scale[:, None].astype(jnp.float32)) + shift[:, None].astype(jnp.float32)
    return y.astype(x.dtype)


def gated(x: Tokens, gate: Vector, y: Tokens) -> Tokens:
    """The residual ``x + gate · y``, added in float32 so that bfloat16 rounds once."""
    return (x.astype(jnp.float32) + gate[:, None].astype(jnp.float32) * y.astype(jnp.float32)).astype(x.dtype)


def led(positive: Tokens, negative: Tokens, scale: Float[Array, " B"]) -> Tokens:
    """Classifier-free guidance of velocities, in float32."""
    positive, negative, scale = (x.astype(jnp.float32) for x in (positive, negative, scale[:, None, None]))
    return negative + scale * (positive - negative)


def in_order(table: Float[Array | np.ndarray, "tokens ..."], sizes: Sequence[int], layout: Layout) -> Array:
    """A table of text, image and references, of these ``sizes``, in the order in which the blocks
    have the tokens."""
    text, *pictures = jnp.split(jnp.asarray(table), np.cumsum(sizes)[:-1].tolist())
    return layout.join([text, layout.join(pictures, 0, "tokens")], 0, "tokens")


class MLPEmbedder(nnx.Module):
    """``[B, in]`` → ``[B, D]``: two layers with SiLU between."""

    def __init__(self, d_in: int, width: int, *, bias: bool = True, rngs: nnx.Rngs | None):
        self.in_layer = Linear(d_in, width, ("mlp", "embed"), bias=bias, rngs=rngs)
        self.out_layer = Linear(width, width, ("embed", "mlp"), bias=bias, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.out_layer(jax.nn.silu(self.in_layer(x)))


class QKV(nnx.Module):
    """Normed queries and keys, and values: ``[B, L, D]`` → three of ``[B, H, L, K]``."""

    def __init__(self, cfg: Any, *, bias: bool = True, eps: float = EPS, rngs: nnx.Rngs | None):
        """``cfg``: of a model with ``width``, ``attention_head_dim`` and ``num_attention_heads``; ``eps``: of the
        norms."""
        d, head = cfg.width, cfg.attention_head_dim
        self.heads = cfg.num_attention_heads
        linear = functools.partial(Linear, d, d, bias=bias, rngs=rngs, heads=self.heads)
        self.q = linear((Pairs("heads", head), "embed"))
        self.k = linear((Pairs("heads", head), "embed"))
        self.v = linear(("heads", "embed"))
        self.query_norm = RMSNorm(head, eps=eps, rngs=rngs, axis=Pairs(None, head))
        self.key_norm = RMSNorm(head, eps=eps, rngs=rngs, axis=Pairs(None, head))

    def __call__(self, x: Array, split_head_dim: bool) -> tuple[Array, Array, Array]:
        q, k, v = (f.to_heads(x, self.heads, split_head_dim) for f in (self.q, self.k, self.v))
        return self.query_norm(q), self.key_norm(k), v
