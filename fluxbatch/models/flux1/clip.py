"""The CLIP text encoder; FLUX reads only its pooled vector."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fluxbatch.distributed.mesh import Layout
from fluxbatch.models.attention import dot_product
from fluxbatch.models.layers import (
    Embedding,  # fmt: skip
    LayerNorm,
    Linear,
    from_heads,
    gelu_erf,
    gelu_tanh,
    normal,
    param,
    quick_gelu,
    scan,
    stack,
)

Array = jax.Array

ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu_erf, "gelu_new": gelu_tanh, "gelu_pytorch_tanh": gelu_tanh}
# OpenAI's checkpoints say 2 although their end-of-text token is the vocabulary's last one.
LEGACY_EOS = 2


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    hidden_act: str
    layer_norm_eps: float
    eos_token_id: int

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> ClipConfig:
        """Reads ``text_encoder/config.json`` (or the ``text_config`` of a whole CLIP model, in which transformers 4 has
        left out what is as it is by default)."""
        config = config.get("text_config", config)
        defaults = {
            "vocab_size": 49408,
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "num_attention_heads": 8,
            "max_position_embeddings": 77,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
            "eos_token_id": 49407,
        }
        cfg = cls(**{f.name: config.get(f.name, defaults.get(f.name)) for f in dataclasses.fields(cls)})
        if cfg.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act {cfg.hidden_act!r}: expected one of {', '.join(ACTIVATIONS)}")
        if not cfg.num_attention_heads or cfg.hidden_size % cfg.num_attention_heads:
            raise ValueError(
                f"num_attention_heads {cfg.num_attention_heads}: expected a divisor of hidden_size {cfg.hidden_size}"
            )
        return cfg


class Block(nnx.Module):
    def __init__(self, cfg: ClipConfig, *, rngs: nnx.Rngs | None):
        d = cfg.hidden_size
        self.norm1 = LayerNorm(d, eps=cfg.layer_norm_eps, rngs=rngs)
        self.q = Linear(d, d, ("heads", "embed"), rngs=rngs)
        self.k = Linear(d, d, ("heads", "embed"), rngs=rngs)
        self.v = Linear(d, d, ("heads", "embed"), rngs=rngs)
        self.out = Linear(d, d, ("embed", "heads"), rngs=rngs)
        self.norm2 = LayerNorm(d, eps=cfg.layer_norm_eps, rngs=rngs)
        self.fc1 = Linear(d, cfg.intermediate_size, ("mlp", "embed"), rngs=rngs)
        self.fc2 = Linear(cfg.intermediate_size, d, ("embed", "mlp"), rngs=rngs)
        self.heads, self.act = cfg.num_attention_heads, ACTIVATIONS[cfg.hidden_act]

    def __call__(self, x: Array, mask: Array) -> Array:
        y = self.norm1(x)
        q, k, v = (f.to_heads(y, self.heads) for f in (self.q, self.k, self.v))
        x = x + self.out(from_heads(dot_product(q, k, v, bias=mask)))
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


class ClipTextEncoder(nnx.Module):
    """Token ids ``[B, T]`` → pooled ``[B, D]``: the state at the first end-of-text token."""

    def __init__(self, cfg: ClipConfig, *, rngs: nnx.Rngs | None, layout: Layout = Layout()):
        self.cfg, self.layout = cfg, layout
        self.embed = Embedding(cfg.vocab_size, cfg.hidden_size, rngs=rngs)
        self.positions = param(rngs, (cfg.max_position_embeddings, cfg.hidden_size), (None, "embed"), normal(0.01))
        self.blocks = stack(cfg.num_hidden_layers, lambda r: Block(cfg, rngs=r), rngs)
        self.final_norm = LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps, rngs=rngs)

    def __call__(self, ids: Array, dtype: Any = jnp.float32) -> Array:
        length = ids.shape[1]
        causal = jnp.where(jnp.tri(length, dtype=bool), 0.0, -jnp.inf)[None]
        x = self.embed(ids, dtype) + self.positions[...][:length].astype(dtype)
        x = self.final_norm(scan(self.blocks, lambda block, x: block(x, causal), x, self.layout))
        is_end = ids if self.cfg.eos_token_id == LEGACY_EOS else (ids == self.cfg.eos_token_id)
        return x[jnp.arange(ids.shape[0]), jnp.argmax(is_end, axis=1)]
