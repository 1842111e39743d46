"""The T5 v1.1 encoder: token ids to states that FLUX reads word by word."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fluxbatch.distributed.mesh import Layout
from fluxbatch.models.attention import dot_product
from fluxbatch.models.layers import (
    Embedding,
    Linear,
    RMSNorm,
    from_heads,
    gelu_tanh,
    normal,
    param,
    scan,
    stack,
)

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class T5Config:
    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int
    relative_attention_max_distance: int
    layer_norm_epsilon: float

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> T5Config:
        """Reads ``text_encoder_2/config.json``; ValueError unless it is a gated (v1.1) T5."""
        kind = config.get("feed_forward_proj", "relu")
        if kind != "gated-gelu":
            raise ValueError(f"feed_forward_proj {kind!r}: expected 'gated-gelu' (T5 v1.1)")
        if (act := config.get("dense_act_fn", "gelu_new")) not in (
            "gelu_new",
            "gelu_pytorch_tanh",
        ):  # where it stands, it holds
            raise ValueError(f"dense_act_fn {act!r}: expected 'gelu_new'")
        defaults = {
            "relative_attention_num_buckets": 32,
            "relative_attention_max_distance": 128,
            "layer_norm_epsilon": 1e-6,
        }
        return cls(**{f.name: config.get(f.name, defaults.get(f.name)) for f in dataclasses.fields(cls)})


def relative_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """``[L, L]`` bucket of the distance from query (row) to key (column): near ones exact, far ones
    by logarithm, both directions apart."""
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    half = buckets // 2
    exact = half // 2
    n = np.abs(distance)
    scale = np.float32(math.log(max_distance / exact))
    far = exact + (np.log(np.maximum(n, 1).astype(np.float32) / exact) / scale * (half - exact)).astype(np.int64)
    return (distance > 0) * half + np.where(n < exact, n, np.minimum(far, half - 1))


class Block(nnx.Module):
    """Self-attention without scaling (T5 folds it into the weights), then the gated MLP."""

    def __init__(self, cfg: T5Config, *, rngs: nnx.Rngs | None):
        d, inner = cfg.d_model, cfg.num_heads * cfg.d_kv
        self.norm1 = RMSNorm(d, eps=cfg.layer_norm_epsilon, rngs=rngs)
        self.q = Linear(d, inner, ("heads", "embed"), bias=False, rngs=rngs, init=normal((d * cfg.d_kv) ** -0.5))
        self.k = Linear(d, inner, ("heads", "embed"), bias=False, rngs=rngs)
        self.v = Linear(d, inner, ("heads", "embed"), bias=False, rngs=rngs)
        self.o = Linear(inner, d, ("embed", "heads"), bias=False, rngs=rngs)
        self.norm2 = RMSNorm(d, eps=cfg.layer_norm_epsilon, rngs=rngs)
        self.wi_0 = Linear(d, cfg.d_ff, ("mlp", "embed"), bias=False, rngs=rngs)
        self.wi_1 = Linear(d, cfg.d_ff, ("mlp", "embed"), bias=False, rngs=rngs)
        self.wo = Linear(cfg.d_ff, d, ("embed", "mlp"), bias=False, rngs=rngs)
        self.heads = cfg.num_heads

    def __call__(self, x: Array, bias: Array) -> Array:
        y = self.norm1(x)
        q, k, v = (f.to_heads(y, self.heads) for f in (self.q, self.k, self.v))
        x = x + self.o(from_heads(dot_product(q, k, v, bias=bias, scale=1.0)))
        y = self.norm2(x)
        return x + self.wo(gelu_tanh(self.wi_0(y)) * self.wi_1(y))


class T5Encoder(nnx.Module):
    """Token ids ``[B, T]`` → states ``[B, T, d_model]`` in ``dtype``; padding is attended, as FLUX does, but where a
    ``mask`` ``[B, T]`` is 0."""

    def __init__(self, cfg: T5Config, *, rngs: nnx.Rngs | None, layout: Layout = Layout()):
        self.cfg, self.layout = cfg, layout
        self.embed = Embedding(cfg.vocab_size, cfg.d_model, rngs=rngs)
        buckets = (cfg.relative_attention_num_buckets, cfg.num_heads)
        self.relative_bias = param(rngs, buckets, (None, None), normal(0.02))
        self.blocks = stack(cfg.num_layers, lambda r: Block(cfg, rngs=r), rngs)
        self.final_norm = RMSNorm(cfg.d_model, eps=cfg.layer_norm_epsilon, rngs=rngs)

    def __call__(self, ids: Array, dtype: Any = jnp.float32, mask: Array | None = None) -> Array:
        cfg = self.cfg
        buckets = relative_buckets(
            ids.shape[1], cfg.relative_attention_num_buckets, cfg.relative_attention_max_distance
        )
        bias = self.relative_bias[...].astype(jnp.float32)[buckets].transpose(2, 0, 1)
        if mask is not None:
            bias = jnp.where(mask[:, None, None, :] > 0, bias, np.finfo(np.float32).min)
        x = scan(self.blocks, lambda block, x: block(x, bias), self.embed(ids, dtype), self.layout)
        return self.final_norm(x)
