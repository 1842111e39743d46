"""The FLUX.1 transformer: a flow-matching velocity field over packed 2×2 latents.

Follows Black Forest Labs' reference (``double_blocks``, ``single_blocks``, modulation); sizes come
from diffusers' ``transformer/config.json``. Shapes: B batch, L image tokens, T text tokens, D width,
H heads, K head width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fluxbatch.dist.mesh import Layout
from fluxbatch.models import attention as attn
from fluxbatch.models.layers import Linear, RMSNorm, from_heads, gelu_tanh, layer_norm, scan, stack

Array = jax.Array

ROPE_BASE = 10_000
TIME_CHANNELS = 256
TIME_FACTOR = 1000.0
EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class FluxConfig:
    in_channels: int  # of a packed token: latent channels × 2 × 2
    out_channels: int
    num_layers: int  # double blocks
    num_single_layers: int
    num_attention_heads: int
    attention_head_dim: int
    joint_attention_dim: int  # width of the T5 states
    pooled_projection_dim: int  # width of the pooled CLIP vector
    guidance_embeds: bool
    axes_dims_rope: tuple[int, ...]

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> FluxConfig:
        """Reads ``transformer/config.json``; ValueError for what this model cannot be."""
        axes = tuple(config.get("axes_dims_rope", (16, 56, 56)))
        head = config["attention_head_dim"]
        if sum(axes) != head or len(axes) != 3 or any(a % 2 for a in axes):
            raise ValueError(f"axes_dims_rope {list(axes)}: expected three even sizes that add up to attention_head_dim {head}")
        if config.get("patch_size", 1) != 1:
            raise ValueError(f"patch_size {config['patch_size']}: expected 1")
        fields = {f.name: config[f.name] for f in dataclasses.fields(cls) if f.name in config}
        fields |= {"axes_dims_rope": axes, "out_channels": config.get("out_channels") or config["in_channels"]}
        return cls(**fields)

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


def timestep_embedding(t: Array) -> Array:
    """``[B]`` times in 0..1 → ``[B, 256]`` float32: cosines, then sines."""
    half = TIME_CHANNELS // 2
    freqs = jnp.exp(-np.log(10_000) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = (TIME_FACTOR * t.astype(jnp.float32))[:, None] * freqs
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def rope_table(text_len: int, rows: int, cols: int, axes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines ``[T + rows·cols, K/2]`` float32 of the rotary angles.

    Text sits at (0, 0, 0); image token (y, x) at (0, y, x). Angles are computed in float64.
    """
    ids = np.zeros((text_len + rows * cols, 3))
    ids[text_len:, 1] = np.repeat(np.arange(rows), cols)
    ids[text_len:, 2] = np.tile(np.arange(cols), rows)
    angles = [ids[:, i, None] / ROPE_BASE ** (np.arange(0, d, 2) / d) for i, d in enumerate(axes)]
    angles = np.concatenate(angles, axis=-1)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate(x: Array, rope: tuple[Array, Array]) -> Array:
    """Rotates neighbouring pairs of ``[B, H, L, K]`` by the angles of each token, in float32."""
    cos, sin = rope
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    return jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape).astype(x.dtype)


def modulate(x: Array, shift: Array, scale: Array) -> Array:
    """``[B, L, D]`` normed, then scaled and shifted by ``[B, D]``."""
    y = layer_norm(x, EPS) * (1 + scale[:, None].astype(jnp.float32)) + shift[:, None].astype(jnp.float32)
    return y.astype(x.dtype)


def gated(x: Array, gate: Array, y: Array) -> Array:
    """The residual ``x + gate · y``, added in float32 so that bfloat16 rounds once."""
    return (x.astype(jnp.float32) + gate[:, None].astype(jnp.float32) * y.astype(jnp.float32)).astype(x.dtype)


class MLPEmbedder(nnx.Module):
    """``[B, in]`` → ``[B, D]``: two layers with SiLU between."""

    def __init__(self, d_in: int, width: int, *, rngs: nnx.Rngs):
        self.in_layer = Linear(d_in, width, ("mlp", "embed"), rngs=rngs)
        self.out_layer = Linear(width, width, ("embed", "mlp"), rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.out_layer(jax.nn.silu(self.in_layer(x)))


class QKV(nnx.Module):
    """Normed queries and keys, and values: ``[B, L, D]`` → three of ``[B, H, L, K]``."""

    def __init__(self, cfg: FluxConfig, *, rngs: nnx.Rngs):
        d = cfg.width
        self.q = Linear(d, d, ("heads", "embed"), rngs=rngs)
        self.k = Linear(d, d, ("heads", "embed"), rngs=rngs)
        self.v = Linear(d, d, ("heads", "embed"), rngs=rngs)
        self.query_norm = RMSNorm(cfg.attention_head_dim, eps=EPS, rngs=rngs)
        self.key_norm = RMSNorm(cfg.attention_head_dim, eps=EPS, rngs=rngs)
        self.heads = cfg.num_attention_heads

    def __call__(self, x: Array, split_head_dim: bool) -> tuple[Array, Array, Array]:
        q, k, v = (f.to_heads(x, self.heads, split_head_dim) for f in (self.q, self.k, self.v))
        return self.query_norm(q), self.key_norm(k), v


class Stream(nnx.Module):
    """The image's or the text's half of a double block."""

    def __init__(self, cfg: FluxConfig, *, rngs: nnx.Rngs):
        d = cfg.width
        self.mod = Linear(d, 6 * d, ("mlp", "embed"), rngs=rngs)
        self.qkv = QKV(cfg, rngs=rngs)
        self.proj = Linear(d, d, ("embed", "heads"), rngs=rngs)
        self.mlp_in = Linear(d, 4 * d, ("mlp", "embed"), rngs=rngs)
        self.mlp_out = Linear(4 * d, d, ("embed", "mlp"), rngs=rngs)

    def after_attention(self, x: Array, attended: Array, mod: list[Array]) -> Array:
        gate_attn, shift, scale, gate_mlp = mod
        x = gated(x, gate_attn, self.proj(from_heads(attended)))
        return gated(x, gate_mlp, self.mlp_out(gelu_tanh(self.mlp_in(modulate(x, shift, scale)))))


class DoubleBlock(nnx.Module):
    """Image and text keep their own weights and attend to each other."""

    def __init__(self, cfg: FluxConfig, *, rngs: nnx.Rngs):
        self.img = Stream(cfg, rngs=rngs)
        self.txt = Stream(cfg, rngs=rngs)

    def __call__(self, img: Array, txt: Array, vec: Array, rope, model: Flux) -> tuple[Array, Array]:
        img_mod = jnp.split(model.whole(self.img.mod(vec)), 6, axis=-1)
        txt_mod = jnp.split(model.whole(self.txt.mod(vec)), 6, axis=-1)
        qkv_img = self.img.qkv(modulate(img, *img_mod[:2]), model.split_head_dim)
        qkv_txt = self.txt.qkv(modulate(txt, *txt_mod[:2]), model.split_head_dim)
        q, k, v = (model.layout.join(pair, 2, "tokens") for pair in zip(qkv_txt, qkv_img, strict=True))
        out = model.attention(rotate(q, rope), rotate(k, rope), v)
        out_txt, out_img = model.layout.split(out, (txt.shape[1], img.shape[1]), 2, "tokens")
        img = self.img.after_attention(img, out_img, img_mod[2:])
        txt = self.txt.after_attention(txt, out_txt, txt_mod[2:])
        return model.residual(img), model.residual(txt)


class SingleBlock(nnx.Module):
    """Text and image as one sequence; attention and MLP side by side."""

    def __init__(self, cfg: FluxConfig, *, rngs: nnx.Rngs):
        d = cfg.width
        self.mod = Linear(d, 3 * d, ("mlp", "embed"), rngs=rngs)
        self.qkv = QKV(cfg, rngs=rngs)
        self.mlp_in = Linear(d, 4 * d, ("mlp", "embed"), rngs=rngs)
        self.out = Linear(5 * d, d, ("embed", (("heads", d), ("mlp", 4 * d))), rngs=rngs)  # reads attention, then MLP

    def __call__(self, x: Array, vec: Array, rope, model: Flux) -> Array:
        shift, scale, gate = jnp.split(model.whole(self.mod(vec)), 3, axis=-1)
        y = modulate(x, shift, scale)
        q, k, v = self.qkv(y, model.split_head_dim)
        attended = from_heads(model.attention(rotate(q, rope), rotate(k, rope), v))
        joined = model.layout.join([attended, gelu_tanh(self.mlp_in(y))], -1, "mlp")
        return model.residual(gated(x, gate, self.out(joined)))


class Flux(nnx.Module):
    """Velocity ``[B, L, C]`` of packed latents ``[B, L, C]`` at times ``[B]``.

    ``attention`` is a function of ``models/attention.py``; ``layout`` says where activations lie on
    the devices.
    """

    def __init__(
        self, cfg: FluxConfig, *, rngs: nnx.Rngs, attention: attn.AttentionFn = attn.dot_product, split_head_dim: bool = True,
        layout: Layout = Layout(),
    ):  # fmt: skip
        d = cfg.width
        self.layout = layout
        self.cfg, self.attention, self.split_head_dim = cfg, attention, split_head_dim
        self.img_in = Linear(cfg.in_channels, d, ("embed", None), rngs=rngs)
        self.txt_in = Linear(cfg.joint_attention_dim, d, ("embed", None), rngs=rngs)
        self.time_in = MLPEmbedder(TIME_CHANNELS, d, rngs=rngs)
        self.vector_in = MLPEmbedder(cfg.pooled_projection_dim, d, rngs=rngs)
        self.guidance_in = MLPEmbedder(TIME_CHANNELS, d, rngs=rngs) if cfg.guidance_embeds else None
        self.double_blocks = stack(cfg.num_layers, lambda r: DoubleBlock(cfg, rngs=r), rngs)
        self.single_blocks = stack(cfg.num_single_layers, lambda r: SingleBlock(cfg, rngs=r), rngs)
        self.final_mod = Linear(d, 2 * d, ("mlp", "embed"), rngs=rngs)  # shift, then scale, as BFL has it
        self.final_out = Linear(d, cfg.out_channels, (None, "embed"), rngs=rngs)

    def __call__(self, img: Array, txt: Array, pooled: Array, t: Array, guidance: Array, rope: tuple[Array, Array]) -> Array:
        """img ``[B, L, C]``, txt ``[B, T, joint_attention_dim]``, pooled ``[B, P]``, t and guidance
        ``[B]`` (guidance is read only if the model was distilled with it), rope from ``rope_table``."""
        img, txt, vec = self.embed(img, txt, pooled, t, guidance)
        sizes = txt.shape[1], img.shape[1]
        rope = tuple(self.layout.join((table[: sizes[0]], table[sizes[0] :]), 0, "tokens") for table in rope)
        img, txt = scan(self.double_blocks, lambda block, x: block(*x, vec, rope, self), (img, txt), self.layout)
        x = self.layout.join((txt, img), 1, "tokens")
        x = scan(self.single_blocks, lambda block, x: block(x, vec, rope, self), x, self.layout)
        return self.finish(self.layout.split(x, sizes, 1, "tokens")[1], vec)

    def whole(self, x: Array) -> Array:
        """``[B, …]``, one vector for each image, on all the devices that make it."""
        return self.layout.place(x, "batch", None)

    def residual(self, x: Array) -> Array:
        """``[B, L, D]`` between blocks: whole in its width, divided by images and tokens."""
        return self.layout.place(x, "batch", "tokens", None)

    def embed(self, img: Array, txt: Array, pooled: Array, t: Array, guidance: Array) -> tuple[Array, Array, Array]:
        """What the blocks start from: image ``[B, L, D]``, text ``[B, T, D]`` and the vector ``[B, D]``
        that modulates them all."""
        dtype = img.dtype
        vec = self.time_in(timestep_embedding(t).astype(dtype)) + self.vector_in(pooled.astype(dtype))
        if self.guidance_in is not None:
            vec = vec + self.guidance_in(timestep_embedding(guidance).astype(dtype))
        return self.residual(self.img_in(img)), self.residual(self.txt_in(txt.astype(dtype))), self.whole(jax.nn.silu(vec))

    def finish(self, img: Array, vec: Array) -> Array:
        """``[B, L, D]`` as the blocks leave it → velocity ``[B, L, C]``."""
        shift, scale = jnp.split(self.whole(self.final_mod(vec)), 2, axis=-1)
        return self.final_out(modulate(img, shift, scale))
