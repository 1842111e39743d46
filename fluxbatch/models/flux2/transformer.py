"""The FLUX.2 transformer: a flow-matching velocity field over 2×2 patches of latents.

As FLUX.1's, but without biases, with SwiGLU in the MLPs, and with one modulation that all double blocks share and
one that all single blocks share. It depends on time (and guidance) alone: no pooled text. Tokens have four
coordinates (picture, row, column, word). Shapes: B batch, L image tokens, R tokens of reference images, T text
tokens, D width, H heads, K head width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fluxbatch.distributed.mesh import Layout
from fluxbatch.models import attention as attn
from fluxbatch.models.dit import EPS, QKV, TIME_FACTOR, MLPEmbedder, gated, in_order, modulate, rotate
from fluxbatch.models.family import StreamParts
from fluxbatch.models.layers import Linear, from_heads, scan, stack, swiglu

Array = jax.Array

REFERENCE_STEP = 10  # of the first coordinate, from one reference image to the next; the new picture is at 0


@dataclasses.dataclass(frozen=True)
class Flux2Config:
    in_channels: int  # of a token: latent channels × 2 × 2
    out_channels: int
    num_layers: int  # double blocks
    num_single_layers: int
    num_attention_heads: int
    attention_head_dim: int
    joint_attention_dim: int  # width of the text states: of three layers of the encoder side by side
    timestep_guidance_channels: int
    mlp_ratio: float
    guidance_embeds: bool
    axes_dims_rope: tuple[int, ...]
    rope_theta: float

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Flux2Config:
        """Reads ``transformer/config.json``; ValueError for what this model cannot be."""
        axes = tuple(config.get("axes_dims_rope", (32, 32, 32, 32)))
        head = config["attention_head_dim"]
        if sum(axes) != head or len(axes) != 4 or any(a % 2 for a in axes):
            raise ValueError(
                f"axes_dims_rope {list(axes)}: expected four even sizes that add up to attention_head_dim {head}"
            )
        for key, expected in (("patch_size", 1), ("eps", EPS)):
            if (value := config.get(key, expected)) != expected:
                raise ValueError(f"{key} {value}: expected {expected}")
        defaults = {"timestep_guidance_channels": 256, "mlp_ratio": 3.0, "guidance_embeds": True, "rope_theta": 2000}
        fields = {f.name: config.get(f.name, defaults.get(f.name)) for f in dataclasses.fields(cls)}
        return cls(
            **fields | {"axes_dims_rope": axes, "out_channels": config.get("out_channels") or config["in_channels"]}
        )

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def hidden(self) -> int:
        """Of an MLP, between its two products."""
        return int(self.width * self.mlp_ratio)


def positions(text_len: int, rows: int, cols: int, references: Sequence[tuple[int, int]] = ()) -> np.ndarray:
    """``[T + L + R, 4]`` coordinates: word l of the text at (0, 0, 0, l), image token (y, x) at (0, y, x, 0), token (y,
    x) of reference k at (10 + 10k, y, x, 0). ``references``: rows and columns of each."""
    grids = [(0, rows, cols), *((REFERENCE_STEP * k, *size) for k, size in enumerate(references, 1))]
    parts = [np.stack([np.zeros(text_len)] * 3 + [np.arange(text_len)], axis=1)]
    for picture, height, width in grids:
        y, x = np.divmod(np.arange(height * width), width)
        parts.append(np.stack([np.full(y.shape, picture), y, x, np.zeros(y.shape)], axis=1))
    return np.concatenate(parts).astype(np.float64)


def rope_table(
    cfg: Flux2Config, text_len: int, rows: int, cols: int, references: Sequence[tuple[int, int]] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines ``[T + L + R, K/2]`` float32 of the rotary angles at ``positions``. Angles are computed in
    float64."""
    ids = positions(text_len, rows, cols, references)
    axes = [ids[:, i, None] / cfg.rope_theta ** (np.arange(0, d, 2) / d) for i, d in enumerate(cfg.axes_dims_rope)]
    angles = np.concatenate(axes, axis=-1)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


class Modulation(NamedTuple):
    """The shifts, scales and gates that all double, or all single, blocks share, for many steps at once."""

    img: Array  # [B, S, 6D], of double blocks
    txt: Array
    single: Array  # [B, S, 3D]
    final: Array  # [B, S, 2D]


class PromptEmbeds(NamedTuple):
    """What is read of a prompt."""

    states: Any  # [B, T, joint_attention_dim]


class Stream(nnx.Module):
    """The image's or the text's half of a double block."""

    def __init__(self, cfg: Flux2Config, *, rngs: nnx.Rngs | None):
        d = cfg.width
        self.qkv = QKV(cfg, bias=False, rngs=rngs)
        self.proj = Linear(d, d, ("embed", "heads"), bias=False, rngs=rngs)
        self.mlp_gate = Linear(d, cfg.hidden, ("mlp", "embed"), bias=False, rngs=rngs)
        self.mlp_up = Linear(d, cfg.hidden, ("mlp", "embed"), bias=False, rngs=rngs)
        self.mlp_out = Linear(cfg.hidden, d, ("embed", "mlp"), bias=False, rngs=rngs)

    def after_attention(self, x: Array, attended: Array, mod: Sequence[Array]) -> Array:
        gate_attn, shift, scale, gate_mlp = mod
        x = gated(x, gate_attn, self.proj(from_heads(attended)))
        y = modulate(x, shift, scale)
        return gated(x, gate_mlp, self.mlp_out(swiglu(self.mlp_gate(y), self.mlp_up(y))))


class DoubleBlock(nnx.Module):
    """Image and text keep their own weights and attend to each other."""

    def __init__(self, cfg: Flux2Config, *, rngs: nnx.Rngs | None):
        self.img = Stream(cfg, rngs=rngs)
        self.txt = Stream(cfg, rngs=rngs)

    def __call__(
        self, x: tuple[Array, Array], mods: tuple[Array, Array], rope: tuple[Array, Array], model: Flux2
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

    def __init__(self, cfg: Flux2Config, *, rngs: nnx.Rngs | None):
        d = cfg.width
        self.qkv = QKV(cfg, bias=False, rngs=rngs)
        self.mlp_gate = Linear(d, cfg.hidden, ("mlp", "embed"), bias=False, rngs=rngs)
        self.mlp_up = Linear(d, cfg.hidden, ("mlp", "embed"), bias=False, rngs=rngs)
        reads = ("heads", d), ("mlp", cfg.hidden)  # attention, then MLP
        self.out = Linear(d + cfg.hidden, d, ("embed", reads), bias=False, rngs=rngs)

    def __call__(self, x: Array, mod: Array, rope: tuple[Array, Array], model: Flux2) -> Array:
        shift, scale, gate = jnp.split(mod, 3, axis=-1)
        y = jax.lax.optimization_barrier(modulate(x, shift, scale))  # a TPU would make it anew in each of the products
        q, k, v = self.qkv(y, model.split_head_dim)
        attended = from_heads(model.attention(rotate(q, rope), rotate(k, rope), v))
        out = self.out(attended, swiglu(self.mlp_gate(y), self.mlp_up(y)), layout=model.layout)
        return model.residual(gated(x, gate, out))


def sinusoids(x: Array, channels: int) -> Array:
    """``[…]`` times or guidance → ``[…, channels]`` float32: cosines, then sines, of 1000 times them.

    Rounded as diffusers rounds: angles are up to 1000, where an ulp is 6e-5, and guidance makes more of it.
    """
    half = channels // 2
    exponents = np.float32(-np.log(10_000)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = _apart(TIME_FACTOR * x.astype(jnp.float32))[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def there_and_back(t: Array) -> Array:
    """Times as they come out of diffusers' scheduler, which has 1000 times them: an ulp may be lost."""
    return _apart(TIME_FACTOR * t.astype(jnp.float32)) / TIME_FACTOR


def _apart(x: Array) -> Array:
    """``x``, which the compiler does not multiply out with the constants that it is multiplied by."""
    return jax.lax.optimization_barrier(x)


class Flux2(nnx.Module):
    """Velocity ``[B, L, C]`` of packed latents ``[B, L, C]`` at times ``[B]``.

    ``attention`` is a function of ``models/attention.py``; ``layout`` says where activations lie on the devices.
    """

    def __init__(
        self,
        cfg: Flux2Config,
        *,
        rngs: nnx.Rngs | None,
        attention: attn.AttentionFn = attn.dot_product,
        split_head_dim: bool = True,
        layout: Layout = Layout(),
    ):
        d = cfg.width
        self.layout = layout
        self.cfg, self.attention, self.split_head_dim = cfg, attention, split_head_dim
        self.img_in = Linear(cfg.in_channels, d, ("embed", None), bias=False, rngs=rngs)
        self.txt_in = Linear(cfg.joint_attention_dim, d, ("embed", None), bias=False, rngs=rngs)
        self.time_in = MLPEmbedder(cfg.timestep_guidance_channels, d, bias=False, rngs=rngs)
        self.guidance_in = (
            MLPEmbedder(cfg.timestep_guidance_channels, d, bias=False, rngs=rngs) if cfg.guidance_embeds else None
        )
        self.img_mod = Linear(d, 6 * d, ("mlp", "embed"), bias=False, rngs=rngs)
        self.txt_mod = Linear(d, 6 * d, ("mlp", "embed"), bias=False, rngs=rngs)
        self.single_mod = Linear(d, 3 * d, ("mlp", "embed"), bias=False, rngs=rngs)
        self.double_blocks = stack(cfg.num_layers, lambda r: DoubleBlock(cfg, rngs=r), rngs)
        self.single_blocks = stack(cfg.num_single_layers, lambda r: SingleBlock(cfg, rngs=r), rngs)
        self.final_mod = Linear(d, 2 * d, ("mlp", "embed"), bias=False, rngs=rngs)  # shift, then scale, as BFL has it
        self.final_out = Linear(d, cfg.out_channels, (None, "embed"), bias=False, rngs=rngs)

    def __call__(
        self, img: Array, txt: Array, t: Array, guidance: Array, rope: tuple[Array, Array], refs: Array | None = None
    ) -> Array:
        """img ``[B, L, C]``, txt ``[B, T, joint_attention_dim]``, t and guidance ``[B]`` (guidance is read only if the
        model was distilled with it), rope from ``rope_table``, refs ``[B, R, C]`` of all reference images, one after
        the other."""
        mod = jax.tree.map(lambda x: x[:, 0], self._modulation(t[:, None], guidance, img.dtype))
        references = None if refs is None else self.embed_image(refs)
        return self.velocity(img, self._embed_text(txt, img.dtype), mod, rope, references)

    # What the programs call: models/family.py, Denoiser

    def step_inputs(self, conditioning: PromptEmbeds, sigmas: Array, guidance: Array, dtype: Any) -> Modulation:
        """The modulation of steps from noise levels ``[B, S + 1]``."""
        return self._modulation(sigmas[:, :-1], guidance, dtype)

    def drop_step_layers(self) -> None:
        del self.time_in, self.guidance_in, self.img_mod, self.txt_mod, self.single_mod, self.final_mod

    def embed(self, conditioning: PromptEmbeds, positions: Any, dtype: Any) -> Array:
        """``[B, T, D]`` of the prompt."""
        return self._embed_text(conditioning.states, dtype)

    def embed_image(self, tokens: Array) -> Array:
        """``[B, L, C]`` → ``[B, L, D]``."""
        return self.residual(self.img_in(tokens))

    def embed_references(self, tokens: Array, positions: Any) -> Array:
        return self.embed_image(tokens)

    def velocity(
        self, img: Array, txt: Array, mod: Modulation, rope: tuple[Array, Array], references: Array | None = None
    ) -> Array:
        """Of packed latents ``[B, L, C]``, one embedded text ``[B, T, D]``, the modulation of one step and embedded
        reference pictures ``[B, R, D]``."""
        pictures = [self.embed_image(img), *([] if references is None else [references])]
        counts = [x.shape[1] for x in pictures]
        sizes = txt.shape[1], sum(counts)
        cos, sin = (in_order(table, (sizes[0], *counts), self.layout) for table in rope)
        rope = cos, sin
        x = self.layout.join(pictures, 1, "tokens"), self.residual(txt)
        x = scan(self.double_blocks, lambda block, x: block(x, (mod.img, mod.txt), rope, self), x, self.layout)
        both = self.layout.join(x[::-1], 1, "tokens")
        both = scan(self.single_blocks, lambda block, x: block(x, mod.single, rope, self), both, self.layout)
        image = self.layout.split(both, sizes, 1, "tokens")[1]
        return self._finish(self.layout.split(image, counts, 1, "tokens")[0], mod.final)

    # The same for blocks that come one at a time: StreamedDenoiser

    def stream(self) -> StreamParts:
        cfg = self.cfg
        bare = dataclasses.replace(cfg, num_layers=0, num_single_layers=0)
        return StreamParts(
            blocks=(("double_blocks", cfg.num_layers), ("single_blocks", cfg.num_single_layers)),
            step_layers={"double_blocks": (), "single_blocks": ()},
            makers={
                "double_blocks": lambda rngs: DoubleBlock(cfg, rngs=rngs),
                "single_blocks": lambda rngs: SingleBlock(cfg, rngs=rngs),
            },
            rest=lambda rngs: Flux2(bare, rngs=rngs, attention=self.attention, split_head_dim=self.split_head_dim),
        )

    def step_vector(
        self, conditioning: PromptEmbeds, sigmas: Array, guidance: Array, dtype: Any
    ) -> tuple[None, Modulation]:
        """No vector, as all blocks share their modulation, and that."""
        return None, self.step_inputs(conditioning, sigmas, guidance, dtype)

    def embed_tokens(
        self, latents: Array, conditioning: PromptEmbeds, positions: Any, dtype: Any
    ) -> tuple[Array, Array]:  # fmt: skip
        """Image and text ``[B, …, D]``."""
        return self.embed_image(latents.astype(dtype)), self.embed(conditioning, positions, dtype)

    def block(
        self,
        block: nnx.Module,
        x: tuple[Array, Array],
        step: Sequence[Array],
        shared: Modulation,
        positions: tuple[Array, Array],
    ) -> tuple[Array, Array]:
        """Image and text after a block; single blocks read one sequence of both, text first."""
        img, txt = x
        if isinstance(block, DoubleBlock):
            return block(x, (shared.img, shared.txt), positions, self)
        both = block(jnp.concatenate([txt, img], axis=1), shared.single, positions, self)
        return both[:, txt.shape[1] :], both[:, : txt.shape[1]]

    def finish(self, x: tuple[Array, Array], shared: Modulation) -> Array:
        return self._finish(x[0], shared.final)

    # The parts of both

    def residual(self, x: Array) -> Array:
        """``[B, L, D]`` between blocks: whole in its width, divided by images and tokens."""
        return self.layout.place(x, "batch", "tokens", None)

    def _modulation(self, t: Array, guidance: Array, dtype: Any) -> Modulation:
        """Of times ``[B, S]`` and one guidance for each image."""
        vec = self.time_in(sinusoids(there_and_back(t), self.cfg.timestep_guidance_channels).astype(dtype))
        if self.guidance_in is not None:
            vec = (
                vec + self.guidance_in(sinusoids(guidance, self.cfg.timestep_guidance_channels).astype(dtype))[:, None]
            )
        vec = self._whole(jax.nn.silu(vec))
        mods = (layer(vec) for layer in (self.img_mod, self.txt_mod, self.single_mod, self.final_mod))
        return jax.tree.map(self._whole, Modulation(*mods))

    def _embed_text(self, txt: Array, dtype: Any) -> Array:
        """``[B, T, joint_attention_dim]`` → ``[B, T, D]``."""
        return self.residual(self.txt_in(txt.astype(dtype)))

    def _finish(self, img: Array, mod: Array) -> Array:
        """``[B, L, D]`` as the blocks leave it, and its modulation ``[B, 2D]`` → velocity ``[B, L, C]``."""
        return self.final_out(modulate(img, *jnp.split(mod, 2, axis=-1)))

    def _whole(self, x: Array) -> Array:
        """``[B, …]``, vectors for each image, on all the devices that make it."""
        return self.layout.place(x, "batch", *[None] * (x.ndim - 1))
