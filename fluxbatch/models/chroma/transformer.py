"""The Chroma transformer: FLUX.1's blocks, whose modulation depends on time alone.

A small network, the approximator, makes every shift, scale and gate of all blocks: a vector each, of time and of the
vector's number. Padding of the text is known to the attention. Shapes: B batch, L image tokens, T text tokens, D width,
S steps, N vectors of modulation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fluxbatch.distributed.mesh import Layout
from fluxbatch.models import attention as attn
from fluxbatch.models.dit import in_order, modulate, timestep_embedding
from fluxbatch.models.family import StreamParts
from fluxbatch.models.flux1.transformer import DoubleBlock, FluxConfig, Modulation, SingleBlock, without_modulators
from fluxbatch.models.layers import Linear, RMSNorm, scan, stack

Array = jax.Array

EPS = float(np.finfo(np.float32).eps)  # of the approximator's norms: torch's own, in half precision too


@dataclasses.dataclass(frozen=True)
class ChromaConfig(FluxConfig):
    """FLUX.1's without a pooled vector and guidance, and the approximator's sizes."""

    approximator_num_channels: int
    approximator_hidden_dim: int
    approximator_layers: int

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> ChromaConfig:
        """Reads ``transformer/config.json``; ValueError for what this model cannot be."""
        defaults = {"approximator_num_channels": 64, "approximator_hidden_dim": 5120, "approximator_layers": 5}
        unread = {"pooled_projection_dim": 0, "guidance_embeds": False}  # published files have FLUX.1's here
        cfg = super().from_json({**defaults, **config, **unread})
        if cfg.approximator_num_channels % 8:
            raise ValueError(f"approximator_num_channels {cfg.approximator_num_channels}: expected a multiple of 8")
        return cfg

    @property
    def vectors(self) -> int:
        """Of modulation: three of each single block, twelve of each double one, two of the last layer."""
        return 3 * self.num_single_layers + 12 * self.num_layers + 2

    @property
    def approximator_flops(self) -> int:
        """Of one time."""
        hidden, ends = self.approximator_hidden_dim, self.approximator_num_channels + self.width
        return 2 * self.vectors * hidden * (2 * self.approximator_layers * hidden + ends)


class PromptEmbeds(NamedTuple):
    """What is read of a prompt."""

    states: Any  # of T5, [B, T, joint_attention_dim]
    mask: Any  # [B, T], 0 where there is padding, but for its first token


class Embedded(NamedTuple):
    """The same on its way into the blocks."""

    txt: Array  # [B, T, D]
    mask: Array  # [B, T]


class Tokens(NamedTuple):
    """Those of image and text on their way through blocks that come one at a time."""

    img: Array
    txt: Array
    mask: Array  # [B, T]
    passed: Array  # [B] int32, how many blocks they have passed: a block is not told its number


class Around(NamedTuple):
    """What FLUX.1's blocks read of their model."""

    attention: Callable[[Array, Array, Array], Array]
    layout: Layout
    split_head_dim: bool
    residual: Callable[[Array], Array]


def numbers(cfg: ChromaConfig) -> np.ndarray:
    """``[N, channels / 2]`` float32: cosines, then sines, of the vectors' numbers times 1000.

    Rounded as diffusers rounds: angles are up to 343,000, where an ulp is 0.03.
    """
    half = cfg.approximator_num_channels // 4
    exponents = np.float32(-np.log(10_000)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = np.float32(1000) * np.arange(cfg.vectors, dtype=np.float32)[:, None] * frequencies
    angles = angles.astype(np.float64)
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)


class Layer(nnx.Module):
    """``[…, hidden]`` → the same."""

    def __init__(self, width: int, *, rngs: nnx.Rngs | None):
        self.norm = RMSNorm(width, eps=EPS, rngs=rngs)
        self.in_layer = Linear(width, width, ("mlp", "embed"), rngs=rngs)
        self.out_layer = Linear(width, width, ("embed", "mlp"), rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return x + self.out_layer(jax.nn.silu(self.in_layer(self.norm(x))))


class Approximator(nnx.Module):
    """Times ``[B]`` in 0..1 → vectors ``[B, N, D]``. Its layers are no stack: in eight bits, as blocks can be, they
    would cost much quality and save little memory."""

    def __init__(self, cfg: ChromaConfig, *, rngs: nnx.Rngs | None):
        self.cfg = cfg
        self.in_proj = Linear(cfg.approximator_num_channels, cfg.approximator_hidden_dim, ("embed", None), rngs=rngs)
        for i in range(cfg.approximator_layers):
            setattr(self, f"layer{i}", Layer(cfg.approximator_hidden_dim, rngs=rngs))
        self.out_proj = Linear(cfg.approximator_hidden_dim, cfg.width, ("mlp", "embed"), rngs=rngs)

    def __call__(self, t: Array, dtype: Any) -> Array:
        channels = self.cfg.approximator_num_channels // 4
        times = jnp.stack([t, jnp.zeros_like(t)], axis=1)  # the second is a guidance that no step has
        times = timestep_embedding(times, channels).reshape(len(t), 1, -1)
        own = jnp.asarray(numbers(self.cfg))[None]
        both = (jnp.broadcast_to(x, (len(t), self.cfg.vectors, x.shape[-1])) for x in (times, own))
        x = self.in_proj(jnp.concatenate([*both], axis=-1).astype(dtype))
        for i in range(self.cfg.approximator_layers):
            x = getattr(self, f"layer{i}")(x)
        return self.out_proj(x)


class Chroma(nnx.Module):
    """Velocity ``[B, L, C]`` of packed latents ``[B, L, C]``.

    ``attention`` is a function of ``models/attention.py``; ``masked``: whether padding is seen by padding alone;
    ``layout`` says where activations lie on the devices.
    """

    def __init__(
        self,
        cfg: ChromaConfig,
        *,
        rngs: nnx.Rngs | None,
        attention: attn.AttentionFn = attn.dot_product,
        split_head_dim: bool = True,
        masked: bool = False,
        layout: Layout = Layout(),
    ):
        d = cfg.width
        self.layout, self.masked = layout, masked
        self.cfg, self.attention, self.split_head_dim = cfg, attention, split_head_dim
        self.img_in = Linear(cfg.in_channels, d, ("embed", None), rngs=rngs)
        self.txt_in = Linear(cfg.joint_attention_dim, d, ("embed", None), rngs=rngs)
        self.approximator = Approximator(cfg, rngs=rngs)
        self.double_blocks = stack(cfg.num_layers, lambda r: _double_block(cfg, r), rngs)
        self.single_blocks = stack(cfg.num_single_layers, lambda r: _single_block(cfg, r), rngs)
        self.final_out = Linear(d, cfg.out_channels, (None, "embed"), rngs=rngs)

    # What the programs call: models/family.py, Denoiser

    def step_inputs(self, conditioning: PromptEmbeds, sigmas: Array, guidance: Array, dtype: Any) -> Modulation:
        """Of steps from noise levels ``[B, S + 1]``, one at a time: an image's hidden units of all are as many as those
        of a block."""
        vectors = jax.lax.map(lambda t: self.approximator(t, dtype), sigmas[:, :-1].T)  # [S, B, N, D]
        rows, steps = sigmas.shape[0], sigmas.shape[1] - 1
        single, double = self.cfg.num_single_layers, self.cfg.num_layers
        ends = np.cumsum([3 * single, 6 * double, 6 * double]).tolist()

        def of(layers: int, vectors: Array) -> Array | None:
            return vectors.reshape(rows, steps, layers, -1) if layers else None

        own, img, txt, final = jnp.split(jnp.moveaxis(vectors, 0, 1), ends, axis=2)
        made = Modulation(of(double, img), of(double, txt), of(single, own), final.reshape(rows, steps, -1))
        return jax.tree.map(lambda x: self.layout.place(x, "batch", *[None] * (x.ndim - 1)), made)

    def drop_step_layers(self) -> None:
        del self.approximator

    def embed(self, conditioning: PromptEmbeds, positions: Any, dtype: Any) -> Embedded:
        return Embedded(self.residual(self.txt_in(conditioning.states.astype(dtype))), conditioning.mask)

    def velocity(
        self, img: Array, text: Embedded, mod: Modulation, rope: tuple[Array, Array], references: Array | None = None
    ) -> Array:
        """Of packed latents ``[B, L, C]``, embedded text and the modulation of one step."""
        sizes = text.txt.shape[1], img.shape[1]
        cos, sin = (in_order(table, sizes, self.layout) for table in rope)
        rope, around = (cos, sin), self._around(text.mask, img.shape[1])
        img_mods, txt_mods, own = (x if x is None else x.swapaxes(0, 1) for x in mod[:3])
        call = lambda block, x, mods: block(x, mods, rope, around)  # noqa: E731
        x = self.residual(self.img_in(img)), self.residual(text.txt)
        x = scan(self.double_blocks, call, x, self.layout, (img_mods, txt_mods))
        both = scan(self.single_blocks, call, self.layout.join(x[::-1], 1, "tokens"), self.layout, own)
        return self._velocity_of(self.layout.split(both, sizes, 1, "tokens")[1], mod.final)

    # The same for blocks that come one at a time: StreamedDenoiser

    def stream(self) -> StreamParts:
        cfg = self.cfg
        return StreamParts(
            blocks=(("double_blocks", cfg.num_layers), ("single_blocks", cfg.num_single_layers)),
            step_layers={"double_blocks": (), "single_blocks": ()},
            makers={
                "double_blocks": lambda rngs: _double_block(cfg, rngs),
                "single_blocks": lambda rngs: _single_block(cfg, rngs),
            },
            rest=self._without_blocks,
        )

    def _without_blocks(self, rngs: nnx.Rngs | None) -> Chroma:
        model = Chroma(
            self.cfg, rngs=rngs, attention=self.attention, split_head_dim=self.split_head_dim, masked=self.masked
        )
        model.double_blocks = model.single_blocks = None
        return model

    def step_vector(
        self, conditioning: PromptEmbeds, sigmas: Array, guidance: Array, dtype: Any
    ) -> tuple[None, Modulation]:
        """No vector of step layers, as there are none, and the modulation of all blocks."""
        return None, self.step_inputs(conditioning, sigmas, guidance, dtype)

    def embed_tokens(self, latents: Array, conditioning: PromptEmbeds, positions: Any, dtype: Any) -> Tokens:
        text = self.embed(conditioning, positions, dtype)
        return Tokens(self.img_in(latents.astype(dtype)), *text, jnp.zeros(len(latents), jnp.int32))

    def block(
        self, block: nnx.Module, x: Tokens, step: Sequence[Array], shared: Modulation, positions: tuple[Array, Array]
    ) -> Tokens:
        """Single blocks read one sequence of text and image."""
        around: Any = self._around(x.mask, x.img.shape[1])

        def of(mods: Array | None, first: int = 0) -> Array:
            assert mods is not None
            return jnp.take_along_axis(mods, (x.passed - first)[:, None, None], axis=1)[:, 0]

        if isinstance(block, DoubleBlock):
            img, txt = block((x.img, x.txt), (of(shared.img), of(shared.txt)), positions, around)
        else:
            both = jnp.concatenate([x.txt, x.img], axis=1)
            both = block(both, of(shared.single, self.cfg.num_layers), positions, around)
            txt, img = jnp.split(both, [x.txt.shape[1]], axis=1)
        return Tokens(img, txt, x.mask, x.passed + 1)

    def finish(self, x: Tokens, shared: Modulation) -> Array:
        return self._velocity_of(x.img, shared.final)

    # The parts of both

    def residual(self, x: Array) -> Array:
        """``[B, L, D]`` between blocks: whole in its width, divided by images and tokens."""
        return self.layout.place(x, "batch", "tokens", None)

    def _around(self, mask: Array, image: int) -> Around:
        """With an attention that adds 1 to the scores between tokens that are no padding, and masks none: diffusers
        gives a mask of 0 and 1 to a function that adds it. ``masked``: that adds 64 to those of a kind, and takes as
        much from the others."""
        real = self.layout.join([mask, jnp.ones((len(mask), image), mask.dtype)], 1, "tokens")
        factor = 16 * real - 8 if self.masked else real

        def attention(q: Array, k: Array, v: Array) -> Array:
            return self.attention(q, k, v, (factor, factor))

        return Around(attention, self.layout, self.split_head_dim, self.residual)

    def _velocity_of(self, img: Array, mod: Array) -> Array:
        """``[B, L, D]`` as the blocks leave it, and its modulation ``[B, 2D]`` → velocity ``[B, L, C]``."""
        return self.final_out(modulate(img, *jnp.split(mod, 2, axis=-1)))


def _double_block(cfg: ChromaConfig, rngs: nnx.Rngs | None) -> DoubleBlock:
    return without_modulators(DoubleBlock(cfg, rngs=rngs))


def _single_block(cfg: ChromaConfig, rngs: nnx.Rngs | None) -> SingleBlock:
    return without_modulators(SingleBlock(cfg, rngs=rngs))
