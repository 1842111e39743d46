"""Decoder-only language models as text encoders: token ids to what some of their layers leave behind.

Qwen3 and Mistral differ here in one thing: Qwen3 norms queries and keys of each head. Shapes: B batch, T tokens,
D width, H heads, G heads of keys and values, K head width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fluxbatch.distributed.mesh import Layout
from fluxbatch.models.attention import dot_product
from fluxbatch.models.dit import rotate
from fluxbatch.models.layers import Embedding, Linear, RMSNorm, from_heads, scan, stack, swiglu

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    sliding_window: int  # how many tokens, itself included, a token sees; 0: all before it

    @classmethod
    def read(cls, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> Self:
        """From a ``config.json``; ValueError for what this model cannot be."""
        if (act := config.get("hidden_act", "silu")) != "silu":
            raise ValueError(f"hidden_act {act!r}: expected 'silu'")
        if config.get("attention_bias"):
            raise ValueError("attention_bias true: expected false")
        # transformers 5 writes rope_parameters, 4 rope_theta and rope_scaling
        rope = config.get("rope_parameters") or {
            **(config.get("rope_scaling") or {}),
            "rope_theta": config.get("rope_theta"),
        }
        if (kind := rope.get("rope_type", rope.get("type", "default"))) != "default":
            raise ValueError(f"rope_type {kind!r}: expected 'default'")
        fields = {f.name: config.get(f.name, defaults.get(f.name)) for f in dataclasses.fields(cls)}
        heads = fields["num_attention_heads"]
        fields["num_key_value_heads"] = fields["num_key_value_heads"] or heads
        fields["head_dim"] = fields["head_dim"] or (fields["hidden_size"] // heads if heads else None)
        theta = rope.get("rope_theta")
        fields |= {
            "rope_theta": float(defaults["rope_theta"] if theta is None else theta),
            "sliding_window": fields["sliding_window"] or 0,
        }
        if heads and heads % fields["num_key_value_heads"]:
            raise ValueError(
                f"num_key_value_heads {fields['num_key_value_heads']}: expected a divisor of num_attention_heads "
                f"{heads}"
            )
        return cls(**fields)


def rope_table(cfg: DecoderConfig, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines ``[T, K/2]`` float32 of the rotary angles of tokens 0, 1, …, with float32 frequencies as
    transformers has them."""
    exponents = np.arange(0, cfg.head_dim, 2, dtype=np.float32) / np.float32(cfg.head_dim)
    angles = np.arange(length, dtype=np.float32)[:, None] / np.float32(cfg.rope_theta) ** exponents
    return np.cos(angles), np.sin(angles)


class Block(nnx.Module):
    """Causal self-attention with shared heads of keys and values, then the gated MLP."""

    def __init__(self, cfg: DecoderConfig, qk_norm: bool, *, rngs: nnx.Rngs | None):
        d, head, hidden = cfg.hidden_size, cfg.head_dim, cfg.intermediate_size
        self.heads, self.groups = cfg.num_attention_heads, cfg.num_key_value_heads

        def norm(width: int) -> RMSNorm:
            return RMSNorm(width, eps=cfg.rms_norm_eps, rngs=rngs)

        self.norm1 = norm(d)
        self.q = Linear(d, self.heads * head, ("heads", "embed"), bias=False, rngs=rngs)
        self.k = Linear(d, self.groups * head, ("heads", "embed"), bias=False, rngs=rngs)
        self.v = Linear(d, self.groups * head, ("heads", "embed"), bias=False, rngs=rngs)
        self.query_norm = norm(head) if qk_norm else None
        self.key_norm = norm(head) if qk_norm else None
        self.o = Linear(self.heads * head, d, ("embed", "heads"), bias=False, rngs=rngs)
        self.norm2 = norm(d)
        self.gate = Linear(d, hidden, ("mlp", "embed"), bias=False, rngs=rngs)
        self.up = Linear(d, hidden, ("mlp", "embed"), bias=False, rngs=rngs)
        self.down = Linear(hidden, d, ("embed", "mlp"), bias=False, rngs=rngs)

    def __call__(self, x: Array, seen: Array, rope: tuple[Array, Array]) -> Array:
        """``seen`` ``[B, 1, T, T]``: which keys a query attends to; one that sees none gets nothing."""
        y = self.norm1(x)
        q, k, v = (
            layer.to_heads(y, heads)
            for layer, heads in ((self.q, self.heads), (self.k, self.groups), (self.v, self.groups))
        )
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        k, v = (jnp.repeat(part, self.heads // self.groups, axis=1) for part in (rotate(k, rope), v))
        attended = dot_product(rotate(q, rope), k, v, bias=jnp.where(seen, 0.0, np.finfo(np.float32).min))
        x = x + self.o(from_heads(jnp.where(jnp.any(seen, axis=-1, keepdims=True), attended, 0)))
        y = self.norm2(x)
        return x + self.down(swiglu(self.gate(y), self.up(y)))


class Decoder(nnx.Module):
    """Token ids and mask ``[B, T]`` → ``[B, T, layers · D]`` in ``dtype``: what the given layers leave, side by side.

    ``layers``: after how many blocks, ascending. Later blocks and the final norm are not there. ``padding_at``: the
    position of all padding; None: positions count it.
    """

    def __init__(
        self,
        cfg: DecoderConfig,
        layers: tuple[int, ...],
        qk_norm: bool,
        *,
        rngs: nnx.Rngs | None,
        layout: Layout = Layout(),
        padding_at: int | None = None,
    ):
        if cfg.num_hidden_layers <= max(
            layers
        ):  # of the last one transformers gives the state only after the final norm
            raise ValueError(
                f"num_hidden_layers {cfg.num_hidden_layers}: expected more than {max(layers)}, the last layer that "
                "is read"
            )
        self.cfg, self.layers, self.layout, self.padding_at = cfg, layers, layout, padding_at
        self.embed = Embedding(cfg.vocab_size, cfg.hidden_size, rngs=rngs)
        self.blocks = stack(max(layers), lambda r: Block(cfg, qk_norm, rngs=r), rngs)

    def __call__(self, ids: Array, mask: Array, dtype: Any = jnp.float32) -> Array:
        length = ids.shape[1]
        back = np.arange(length)[:, None] - np.arange(length)
        near = (back >= 0) & (back < (self.cfg.sliding_window or length))
        seen = mask.astype(bool)[:, None, None, :] & near
        cos, sin = rope_table(self.cfg, length)
        rope = jnp.asarray(cos), jnp.asarray(sin)
        if self.padding_at is not None:
            places = jnp.where(mask.astype(bool), np.arange(length), self.padding_at)
            rope = rope[0][places][:, None], rope[1][places][:, None]
        x = self.embed(ids, dtype)

        def step(block: Block, carry: tuple[Array, Array], depth: Array) -> tuple[Array, Array]:
            x, kept = carry
            x = block(x, seen, rope)
            return x, jnp.where((depth == np.array(self.layers)).reshape(-1, 1, 1, 1), x, kept)

        # The states are picked while the blocks are folded: stacks of nine blocks each would be copies of their
        # weights.
        kept = jnp.zeros((len(self.layers), *x.shape), dtype)
        _, kept = scan(self.blocks, step, (x, kept), self.layout, jnp.arange(1, max(self.layers) + 1))
        return jnp.moveaxis(kept, 0, 2).reshape(*x.shape[:2], -1)
