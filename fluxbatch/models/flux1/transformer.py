"""The FLUX.1 transformer: a flow-matching velocity field over packed 2×2 latents.

Follows Black Forest Labs' reference (``double_blocks``, ``single_blocks``, modulation); sizes come
from diffusers' ``transformer/config.json``. Shapes: B batch, L image tokens, T text tokens, D width,
H heads, K head width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fluxbatch.distributed.mesh import Layout
from fluxbatch.models import attention as attn
from fluxbatch.models.dit import QKV, TIME_CHANNELS, MLPEmbedder, gated, in_order, modulate, rotate, timestep_embedding
from fluxbatch.models.family import StreamParts
from fluxbatch.models.layers import Linear, each, from_heads, gelu_tanh, scan, stack
from fluxbatch.models.step_cache import StepCache, cached, fresh

Array = jax.Array
Block = TypeVar("Block", "DoubleBlock", "SingleBlock")

ROPE_BASE = 10_000


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
    def from_json(cls, config: Mapping[str, Any]) -> Self:
        """Reads ``transformer/config.json``; ValueError for what this model cannot be."""
        axes = tuple(config.get("axes_dims_rope", (16, 56, 56)))
        head = config["attention_head_dim"]
        if sum(axes) != head or len(axes) != 3 or any(a % 2 for a in axes):
            raise ValueError(
                f"axes_dims_rope {list(axes)}: expected three even sizes that add up to attention_head_dim {head}"
            )
        if config.get("patch_size", 1) != 1:
            raise ValueError(f"patch_size {config['patch_size']}: expected 1")
        defaults = {"guidance_embeds": False}
        fields = {f.name: config.get(f.name, defaults.get(f.name)) for f in dataclasses.fields(cls)}
        fields |= {"axes_dims_rope": axes, "out_channels": config.get("out_channels") or config["in_channels"]}
        return cls(**fields)

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


def rope_table(
    text_len: int, rows: int, cols: int, axes: tuple[int, ...], references: Sequence[tuple[int, int]] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines ``[T + rows·cols + R, K/2]`` float32 of the rotary angles.

    Text sits at (0, 0, 0); image token (y, x) at (0, y, x), that of a reference picture at (1, y, x). Angles are
    computed in float64. ``references``: rows and columns of each.
    """
    parts = [np.zeros((text_len, 3))]
    for picture, height, width in ((0, rows, cols), *((1, *size) for size in references)):
        y, x = np.divmod(np.arange(height * width), width)
        parts.append(np.stack([np.full(y.shape, picture), y, x], axis=1))
    ids = np.concatenate(parts).astype(np.float64)
    by_axis = [ids[:, i, None] / ROPE_BASE ** (np.arange(0, d, 2) / d) for i, d in enumerate(axes)]
    angles = np.concatenate(by_axis, axis=-1)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


class Modulation(NamedTuple):
    """The shifts, scales and gates of all layers. They depend on time, guidance and pooled text and not on the
    image, while the layers that make them are 27 % of the weights: so they are made for many steps at once.

    For S steps 2.1 MB · S · B of FLUX.1 in bfloat16; None for a stack without layers.
    """

    img: Array | None  # [B, S, layers, 6D], of double blocks
    txt: Array | None
    single: Array | None  # [B, S, layers, 3D]
    final: Array  # [B, S, 2D]


class Stream(nnx.Module):
    """The image's or the text's half of a double block."""

    def __init__(self, cfg: FluxConfig, *, rngs: nnx.Rngs | None):
        d = cfg.width
        self.mod = Linear(d, 6 * d, ("mlp", "embed"), rngs=rngs, tokens=False)
        self.qkv = QKV(cfg, rngs=rngs)
        self.proj = Linear(d, d, ("embed", "heads"), rngs=rngs)
        self.mlp_in = Linear(d, 4 * d, ("mlp", "embed"), rngs=rngs)
        self.mlp_out = Linear(4 * d, d, ("embed", "mlp"), rngs=rngs)

    def after_attention(self, x: Array, attended: Array, mod: Sequence[Array]) -> Array:
        gate_attn, shift, scale, gate_mlp = mod
        x = gated(x, gate_attn, self.proj(from_heads(attended)))
        return gated(x, gate_mlp, self.mlp_out(gelu_tanh(self.mlp_in(modulate(x, shift, scale)))))


class DoubleBlock(nnx.Module):
    """Image and text keep their own weights and attend to each other."""

    def __init__(self, cfg: FluxConfig, *, rngs: nnx.Rngs | None):
        self.img = Stream(cfg, rngs=rngs)
        self.txt = Stream(cfg, rngs=rngs)

    def __call__(
        self, x: tuple[Array, Array], mods: Sequence[Array], rope: tuple[Array, Array], model: Flux
    ) -> tuple[Array, Array]:
        """``x`` and ``mods`` ``[B, 6D]``: of the image and of the text."""
        img, txt = x
        img_mod, txt_mod = (jnp.split(mod, 6, axis=-1) for mod in mods)
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

    def __init__(self, cfg: FluxConfig, *, rngs: nnx.Rngs | None):
        d = cfg.width
        self.mod = Linear(d, 3 * d, ("mlp", "embed"), rngs=rngs, tokens=False)
        self.qkv = QKV(cfg, rngs=rngs)
        self.mlp_in = Linear(d, 4 * d, ("mlp", "embed"), rngs=rngs)
        self.out = Linear(5 * d, d, ("embed", (("heads", d), ("mlp", 4 * d))), rngs=rngs)  # reads attention, then MLP

    def __call__(self, x: Array, mod: Array, rope: tuple[Array, Array], model: Flux) -> Array:
        shift, scale, gate = jnp.split(mod, 3, axis=-1)
        y = jax.lax.optimization_barrier(modulate(x, shift, scale))  # a TPU would make it anew in each of the products
        q, k, v = self.qkv(y, model.split_head_dim)
        attended = from_heads(model.attention(rotate(q, rope), rotate(k, rope), v))
        out = self.out(attended, gelu_tanh(self.mlp_in(y)), layout=model.layout)
        return model.residual(gated(x, gate, out))


def without_modulators(block: Block) -> Block:
    """A block, or a stack of them, without the layers that make its modulation."""
    for part in (block.img, block.txt) if isinstance(block, DoubleBlock) else (block,):
        del part.mod
    return block


def _by_layer(mods: Any) -> Any:
    return jax.tree.map(lambda x: x.swapaxes(0, 1), mods)


class Flux(nnx.Module):
    """Velocity ``[B, L, C]`` of packed latents ``[B, L, C]`` at times ``[B]``.

    ``attention`` is a function of ``models/attention.py``; ``layout`` says where activations lie on
    the devices.
    """

    def __init__(
        self,
        cfg: FluxConfig,
        *,
        rngs: nnx.Rngs | None,
        attention: attn.AttentionFn = attn.dot_product,
        split_head_dim: bool = True,
        layout: Layout = Layout(),
    ):
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

    def __call__(
        self,
        img: Array,
        txt: Array,
        pooled: Array,
        t: Array,
        guidance: Array,
        rope: tuple[Array, Array],
        references: Array | None = None,
    ) -> Array:
        """img ``[B, L, C]``, txt ``[B, T, joint_attention_dim]``, pooled ``[B, P]``, t and guidance
        ``[B]`` (guidance is read only if the model was distilled with it), rope from ``rope_table``, references
        ``[B, R, C]``."""
        vec = self._vector(pooled, t[:, None], guidance, img.dtype)
        mod = jax.tree.map(lambda x: x[:, 0], self._modulation(vec))
        read = None if references is None else self.embed_image(references)
        return self.velocity(img, self._embed_text(txt, img.dtype), mod, rope, read)

    # What the programs call: models/family.py, Denoiser

    def step_inputs(self, conditioning: Any, sigmas: Array, guidance: Array, dtype: Any) -> Modulation:
        """The modulation of steps from noise levels ``[B, S + 1]``."""
        return self._modulation(self._vector(conditioning.pooled, sigmas[:, :-1], guidance, dtype))

    def drop_step_layers(self) -> None:
        for blocks in (self.double_blocks, self.single_blocks):
            if blocks is not None:
                without_modulators(cast(Any, blocks))  # a stack

    def embed(self, conditioning: Any, positions: Any, dtype: Any) -> Array:
        """``[B, T, D]`` of T5's states."""
        return self._embed_text(conditioning.states, dtype)

    def embed_image(self, tokens: Array) -> Array:
        """``[B, L, C]`` → ``[B, L, D]``."""
        return self.residual(self.img_in(tokens))

    def embed_references(self, tokens: Array, positions: Any) -> Array:
        return self.embed_image(tokens)

    def velocity(
        self, img: Array, txt: Array, mod: Modulation, rope: tuple[Array, Array], references: Array | None = None
    ) -> Array:
        """Of packed latents ``[B, L, C]``, embedded text ``[B, T, D]``, the modulation of one step and embedded
        reference pictures ``[B, R, D]``."""
        pictures = [self.embed_image(img), *([] if references is None else [references])]
        counts = [x.shape[1] for x in pictures]
        rope = self._joined(rope, (txt.shape[1], *counts))
        x = self._double((self.layout.join(pictures, 1, "tokens"), self.residual(txt)), mod, rope, slice(None))
        image = self._single(x, mod, rope)
        return self._velocity_of(self.layout.split(image, counts, 1, "tokens")[0], mod.final)

    # With a step cache: CachedDenoiser

    def fresh_cache(self, img: Array, dtype: Any) -> StepCache:
        return fresh(img.shape[0], img.shape[1], self.cfg.width, dtype)

    def cached_velocity(
        self, img: Array, txt: Array, mod: Modulation, rope: tuple[Array, Array], cache: StepCache, threshold: Array,
        live: Array,
    ) -> tuple[Array, StepCache]:  # fmt: skip
        """As ``velocity``, of the first block alone where all rows skip the others."""
        rope = self._joined(rope, (txt.shape[1], img.shape[1]))
        before = self.embed_image(img)
        after = self._double((before, txt), mod, rope, slice(0, 1))

        def rest() -> Array:
            return self._single(self._double(after, mod, rope, slice(1, None)), mod, rope)

        out, cache = cached(before, after[0], cache, threshold, live, rest)
        return self._velocity_of(out, mod.final), cache

    # The same for blocks that come one at a time: StreamedDenoiser

    def stream(self) -> StreamParts:
        cfg = self.cfg
        bare = dataclasses.replace(cfg, num_layers=0, num_single_layers=0)
        return StreamParts(
            blocks=(("double_blocks", cfg.num_layers), ("single_blocks", cfg.num_single_layers)),
            step_layers={
                "double_blocks": ("double_blocks.img.mod", "double_blocks.txt.mod"),
                "single_blocks": ("single_blocks.mod",),
            },
            makers={
                "double_blocks.img.mod": lambda rngs: DoubleBlock(cfg, rngs=rngs).img.mod,
                "double_blocks.txt.mod": lambda rngs: DoubleBlock(cfg, rngs=rngs).txt.mod,
                "single_blocks.mod": lambda rngs: SingleBlock(cfg, rngs=rngs).mod,
                "double_blocks": lambda rngs: without_modulators(DoubleBlock(cfg, rngs=rngs)),
                "single_blocks": lambda rngs: without_modulators(SingleBlock(cfg, rngs=rngs)),
            },
            rest=lambda rngs: Flux(bare, rngs=rngs, attention=self.attention, split_head_dim=self.split_head_dim),
        )

    def step_vector(self, conditioning: Any, sigmas: Array, guidance: Array, dtype: Any) -> tuple[Array, Array]:
        """``[B, S, D]``, and the modulation of ``finish``."""
        vec = self._vector(conditioning.pooled, sigmas[:, :-1], guidance, dtype)
        return vec, self._modulation(vec).final

    def embed_tokens(self, latents: Array, conditioning: Any, positions: Any, dtype: Any) -> tuple[Array, Array]:
        """Image and text ``[B, …, D]``."""
        return self.embed_image(latents.astype(dtype)), self.embed(conditioning, positions, dtype)

    def block(
        self,
        block: nnx.Module,
        x: tuple[Array, Array],
        step: Sequence[Array],
        shared: Array,
        positions: tuple[Array, Array],
    ) -> tuple[Array, Array]:
        """Image and text after a block; single blocks read one sequence of both, text first."""
        img, txt = x
        if isinstance(block, DoubleBlock):
            return block(x, step, positions, self)
        both = block(jnp.concatenate([txt, img], axis=1), *step, positions, self)
        return both[:, txt.shape[1] :], both[:, : txt.shape[1]]

    def finish(self, x: tuple[Array, Array], shared: Array) -> Array:
        return self._velocity_of(x[0], shared)

    # The parts of both

    def residual(self, x: Array) -> Array:
        """``[B, L, D]`` between blocks: whole in its width, divided by images and tokens."""
        return self.layout.place(x, "batch", "tokens", None)

    def _vector(self, pooled: Array, t: Array, guidance: Array, dtype: Any) -> Array:
        """What all modulation is made of: ``[B, S, D]`` of times ``[B, S]``, one pooled vector and one guidance
        for each image."""
        vec = self.time_in(timestep_embedding(t).astype(dtype)) + self.vector_in(pooled.astype(dtype))[:, None]
        if self.guidance_in is not None:
            vec = vec + self.guidance_in(timestep_embedding(guidance).astype(dtype))[:, None]
        return self._whole(jax.nn.silu(vec))

    def _modulation(self, vec: Array) -> Modulation:
        """Of what ``_vector`` returns."""

        def of(layers: nnx.Module) -> Array:
            return jnp.moveaxis(each(layers, lambda layer: layer(vec), self.layout), 0, 2)

        double = cast(DoubleBlock | None, self.double_blocks)  # a stack of them
        single = cast(SingleBlock | None, self.single_blocks)
        img, txt = (of(double.img.mod), of(double.txt.mod)) if double else (None, None)
        return jax.tree.map(self._whole, Modulation(img, txt, of(single.mod) if single else None, self.final_mod(vec)))

    def _joined(self, rope: tuple[Array, Array], sizes: Sequence[int]) -> tuple[Array, Array]:
        """The angles in the order in which the blocks have the tokens of text, image and references."""
        cos, sin = (in_order(table, sizes, self.layout) for table in rope)
        return cos, sin

    def _double(
        self, x: tuple[Array, Array], mod: Modulation, rope: tuple[Array, Array], part: slice
    ) -> tuple[Array, Array]:
        """Image and text after these of the double blocks."""
        call = lambda block, x, mods: block(x, mods, rope, self)  # noqa: E731
        return scan(self.double_blocks, call, x, self.layout, _by_layer((mod.img, mod.txt)), part)

    def _single(self, x: tuple[Array, Array], mod: Modulation, rope: tuple[Array, Array]) -> Array:
        """The image after the single blocks, of image and text."""
        img, txt = x
        both = self.layout.join((txt, img), 1, "tokens")
        call = lambda block, x, mod: block(x, mod, rope, self)  # noqa: E731
        both = scan(self.single_blocks, call, both, self.layout, _by_layer(mod.single))
        return self.layout.split(both, (txt.shape[1], img.shape[1]), 1, "tokens")[1]

    def _embed_text(self, txt: Array, dtype: Any) -> Array:
        """``[B, T, joint_attention_dim]`` → ``[B, T, D]``."""
        return self.residual(self.txt_in(txt.astype(dtype)))

    def _velocity_of(self, img: Array, mod: Array) -> Array:
        """``[B, L, D]`` as the blocks leave it, and its modulation ``[B, 2D]`` → velocity ``[B, L, C]``."""
        return self.final_out(modulate(img, *jnp.split(mod, 2, axis=-1)))

    def _whole(self, x: Array) -> Array:
        """``[B, …]``, vectors for each image, on all the devices that make it."""
        return self.layout.place(x, "batch", *[None] * (x.ndim - 1))
