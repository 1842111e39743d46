"""The toy's networks. Shapes: B batch, L image tokens, T text tokens, D width, S steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fluxbatch.distributed.mesh import Layout
from fluxbatch.models import attention as attn
from fluxbatch.models.convolutions import Conv
from fluxbatch.models.family import StreamParts
from fluxbatch.models.layers import Embedding, Linear, RMSNorm, each, from_heads, layer_norm, scan, stack

Array = jax.Array
EPS = 1e-5
TIME_FEATURES = 4


class FromJson:
    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Any:
        return cls(**{field.name: config[field.name] for field in dataclasses.fields(cls)})


@dataclasses.dataclass(frozen=True)
class ReaderConfig(FromJson):
    vocab_size: int
    width: int
    layers: int


class ReaderLayer(nnx.Module):
    def __init__(self, cfg: ReaderConfig, *, rngs: nnx.Rngs | None):
        self.norm = RMSNorm(cfg.width, eps=EPS, rngs=rngs)
        self.inner = Linear(cfg.width, 2 * cfg.width, ("mlp", "embed"), rngs=rngs)
        self.outer = Linear(2 * cfg.width, cfg.width, ("embed", "mlp"), rngs=rngs)

    def __call__(self, x: Array, mask: Array) -> Array:
        y = self.norm(x) * mask
        mean = jnp.sum(y, axis=1, keepdims=True) / jnp.sum(mask, axis=1, keepdims=True)
        return x + self.outer(jax.nn.silu(self.inner(y + mean)))


class Reader(nnx.Module):
    """Ids and mask ``[B, T]`` → states ``[B, T, D]``, zero where there is no token."""

    def __init__(self, cfg: ReaderConfig, *, rngs: nnx.Rngs | None, layout: Layout = Layout()):
        self.layout = layout
        self.letters = Embedding(cfg.vocab_size, cfg.width, rngs=rngs)
        self.layers = stack(cfg.layers, lambda r: ReaderLayer(cfg, rngs=r), rngs)

    def __call__(self, ids: Array, mask: Array, dtype: Any) -> tuple[Array, Array]:
        mask = mask.astype(dtype)[..., None]
        x = scan(self.layers, lambda layer, x: layer(x, mask), self.letters(ids, dtype), self.layout)
        return x * mask, mask[..., 0]


@dataclasses.dataclass(frozen=True)
class CanvasConfig(FromJson):
    channels: int
    width: int
    layers: int
    heads: int
    text_width: int


class CanvasLayer(nnx.Module):
    """Image tokens attend to text and image; time scales and gates."""

    def __init__(self, cfg: CanvasConfig, *, rngs: nnx.Rngs | None):
        d = cfg.width
        self.time = Linear(d, 2 * d, ("mlp", "embed"), rngs=rngs)
        self.q, self.k, self.v = (Linear(d, d, ("heads", "embed"), rngs=rngs) for _ in range(3))
        self.out = Linear(d, d, ("embed", "heads"), rngs=rngs)
        self.up = Linear(d, 2 * d, ("mlp", "embed"), rngs=rngs)
        self.down = Linear(2 * d, d, ("embed", "mlp"), rngs=rngs)

    def __call__(self, x: Array, text: Array, time: Array, model: Canvas) -> Array:
        scale, gate = jnp.split(time[:, None], 2, axis=-1)
        y = (layer_norm(x, EPS) * (1 + scale)).astype(x.dtype)
        both = jnp.concatenate([text, y], axis=1)
        q, k, v = (f.to_heads(tokens, model.cfg.heads) for f, tokens in ((self.q, y), (self.k, both), (self.v, both)))
        x = x + self.out(from_heads(model.attention(q, k, v)))
        return model.whole(
            x + gate.astype(x.dtype) * self.down(jax.nn.silu(self.up(layer_norm(x, EPS).astype(x.dtype))))
        )


class Canvas(nnx.Module):
    """Latents ``[B, L, C]`` with noise → the clean ones that it takes them for."""

    def __init__(
        self,
        cfg: CanvasConfig,
        *,
        rngs: nnx.Rngs | None,
        attention: attn.AttentionFn = attn.dot_product,
        layout: Layout = Layout(),
    ):
        self.cfg, self.attention, self.layout = cfg, attention, layout
        d = cfg.width
        self.latents_in = Linear(cfg.channels, d, ("embed", None), rngs=rngs)
        self.text_in = Linear(cfg.text_width, d, ("embed", None), rngs=rngs)
        self.place_in = Linear(2, d, ("embed", None), bias=False, rngs=rngs)
        self.time_in = Linear(TIME_FEATURES, d, ("embed", None), rngs=rngs)
        self.layers = stack(cfg.layers, lambda r: CanvasLayer(cfg, rngs=r), rngs)
        self.latents_out = Linear(d, cfg.channels, (None, "embed"), rngs=rngs)

    # Denoiser

    def step_inputs(self, conditioning: Any, sigmas: Array, guidance: Array, dtype: Any) -> dict[str, Array]:
        vector, last = self.step_vector(conditioning, sigmas, guidance, dtype)
        times = each(self.layers, lambda layer: layer.time(vector), self.layout)
        return {"layers": self.whole(jnp.moveaxis(times, 0, 2)), "last": last}

    def drop_step_layers(self) -> None:
        del self.layers.time

    def embed(self, conditioning: Any, positions: Any, dtype: Any) -> Array:
        return self.whole(self.text_in(conditioning.states.astype(dtype)) * conditioning.mask[..., None].astype(dtype))

    def velocity(
        self,
        latents: Array,
        embedded: Array,
        step: Mapping[str, Array],
        positions: Mapping[str, Array],
        references: None = None,
    ) -> Array:
        x = self._placed(self.latents_in(latents), positions)
        x = scan(
            self.layers,
            lambda layer, x, time: layer(x, embedded, time, self),
            x,
            self.layout,
            step["layers"].swapaxes(0, 1),
        )
        return self._finished(x, step["last"])

    # StreamedDenoiser

    def stream(self) -> StreamParts:
        cfg = self.cfg

        def bare(rngs: nnx.Rngs | None) -> CanvasLayer:
            layer = CanvasLayer(cfg, rngs=rngs)
            del layer.time
            return layer

        return StreamParts(
            blocks=(("layers", cfg.layers),),
            step_layers={"layers": ("layers.time",)},
            makers={"layers.time": lambda rngs: CanvasLayer(cfg, rngs=rngs).time, "layers": bare},
            rest=lambda rngs: Canvas(dataclasses.replace(cfg, layers=0), rngs=rngs, attention=self.attention),
        )

    def step_vector(self, conditioning: Any, sigmas: Array, guidance: Array, dtype: Any) -> tuple[Array, Array]:
        sigmas = sigmas[:, :-1]
        features = jnp.stack([sigmas, sigmas**2, jnp.cos(3 * sigmas), jnp.sin(3 * sigmas)], axis=-1)
        vector = self.whole(jax.nn.silu(self.time_in(features.astype(dtype))))
        return vector, vector

    def embed_tokens(
        self, latents: Array, conditioning: Any, positions: Mapping[str, Array], dtype: Any
    ) -> tuple[Array, Array]:
        return self._placed(self.latents_in(latents.astype(dtype)), positions), self.embed(
            conditioning, positions, dtype
        )

    def block(
        self,
        block: CanvasLayer,
        x: tuple[Array, Array],
        step: Sequence[Array],
        shared: Array,
        positions: Mapping[str, Array],
    ) -> tuple[Array, Array]:
        return block(x[0], x[1], step[0], self), x[1]

    def finish(self, x: tuple[Array, Array], step: Array) -> Array:
        return self._finished(x[0], step)

    def whole(self, x: Array) -> Array:
        """``[B, …]``: divided by images alone."""
        return self.layout.place(x, "batch", *[None] * (x.ndim - 1))

    def _placed(self, x: Array, positions: Mapping[str, Array]) -> Array:
        return self.whole(x + self.place_in(positions["grid"].astype(x.dtype)))

    def _finished(self, x: Array, last: Array) -> Array:
        return self.latents_out((layer_norm(x, EPS) * (1 + last[:, None])).astype(x.dtype))


@dataclasses.dataclass(frozen=True)
class PainterConfig(FromJson):
    channels: int
    width: int
    scale: int


class Painter(nnx.Module):
    """``[B, h, w, C]`` → ``[B, scale · h, scale · w, 3]`` in -1..1."""

    def __init__(self, cfg: PainterConfig, *, rngs: nnx.Rngs | None, layout: Layout = Layout()):
        self.cfg, self.layout = cfg, layout
        self.conv = Conv(cfg.channels, cfg.width, 3, rngs=rngs)
        self.colours = Linear(cfg.width, 3 * cfg.scale**2, (None, "embed"), rngs=rngs)

    def __call__(self, latents: Array) -> Array:
        b, h, w, _ = latents.shape
        n = self.cfg.scale
        patches = jnp.tanh(self.colours(jax.nn.silu(self.conv(latents)))).reshape(b, h, w, n, n, 3)
        return patches.swapaxes(2, 3).reshape(b, n * h, n * w, 3)
