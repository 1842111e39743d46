"""The Z-Image transformer: a flow-matching velocity field over 2×2 patches of latents.

Text passes through blocks of its own, the context refiner, which no step changes; the image through those of the noise
refiner; then both as one sequence, image first, through joint blocks. A block is attention, then an MLP, and norms the
result of each before it is added. Time modulates by scales and gates, without shifts. Text and image are padded to
multiples of 32 tokens with learned ones, which are attended to. Tokens have three coordinates (word or picture, row,
column). Shapes: B batch, L image tokens, P those that pad them, T text tokens, padding included, D width, K head width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fluxbatch.distributed.mesh import Layout
from fluxbatch.models import attention as attn
from fluxbatch.models.dit import EPS, QKV, TIME_CHANNELS, TIME_FACTOR, gated, rotate
from fluxbatch.models.family import StreamParts
from fluxbatch.models.flux2.transformer import sinusoids
from fluxbatch.models.layers import Linear, RMSNorm, from_heads, layer_norm, param, scan, stack, swiglu, zeros

Array = jax.Array
Rope = tuple[Any, Any]  # cosines and sines [tokens, K/2]

MULTIPLE = 32  # of tokens, to which text and image are padded
HEAD_EPS = 1e-5  # of the norms of queries and keys, whatever the config says of others
TIME_HIDDEN, TIME_OUT = 1024, 256  # widths of what time is embedded to; the second at most the model's


@dataclasses.dataclass(frozen=True)
class ZImageConfig:
    in_channels: int  # of latents: a token has 2 × 2 of them
    dim: int
    n_layers: int  # joint blocks
    n_refiner_layers: int  # blocks of text, and as many of the image
    n_heads: int
    cap_feat_dim: int  # width of the text states
    norm_eps: float
    rope_theta: float
    axes_dims: tuple[int, ...]
    axes_lens: tuple[int, ...]  # coordinates below these were learned

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> ZImageConfig:
        """Reads ``transformer/config.json``; ValueError for what this model cannot be."""
        plain = {"all_patch_size": [2], "all_f_patch_size": [1], "qk_norm": True, "t_scale": 1000.0}
        for key, expected in (plain | {"siglip_feat_dim": None}).items():
            found = config.get(key, expected)
            if (list(found) if isinstance(found, tuple) else found) != expected:
                raise ValueError(f"{key} {found}: expected {expected}")
        defaults = {
            "in_channels": 16,
            "dim": 3840,
            "n_layers": 30,
            "n_refiner_layers": 2,
            "n_heads": 30,
            "cap_feat_dim": 2560,
            "norm_eps": 1e-5,
            "rope_theta": 256.0,
            "axes_dims": (32, 48, 48),
            "axes_lens": (1024, 512, 512),
        }
        fields = {f.name: config.get(f.name, defaults[f.name]) for f in dataclasses.fields(cls)}
        cfg = cls(**fields | {key: tuple(fields[key]) for key in ("axes_dims", "axes_lens")})
        axes, head = cfg.axes_dims, cfg.attention_head_dim
        if cfg.dim % cfg.n_heads or sum(axes) != head or len(axes) != 3 or any(a % 2 for a in axes):
            raise ValueError(
                f"axes_dims {list(axes)}: expected three even sizes that add up to dim over n_heads, {head}"
            )
        if len(cfg.axes_lens) != 3:
            raise ValueError(f"axes_lens {list(cfg.axes_lens)}: expected three")
        return cfg

    @property
    def width(self) -> int:
        return self.dim

    @property
    def num_attention_heads(self) -> int:
        return self.n_heads

    @property
    def attention_head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def hidden(self) -> int:
        """Of an MLP, between its two products."""
        return int(self.dim / 3 * 8)

    @property
    def time(self) -> int:
        """Width of a time's vector."""
        return min(self.dim, TIME_OUT)


class PromptEmbeds(NamedTuple):
    """What is read of a prompt."""

    states: Any  # [B, T, cap_feat_dim]
    mask: Any  # [B, T], 0 where there is padding


class Positions(NamedTuple):
    """Rotary tables of each group, padding included."""

    text: Rope
    image: Rope


class Tokens(NamedTuple):
    """Those of each group ``[B, …, D]`` on their way through blocks that come one at a time."""

    text: Array
    image: Array


def padding(tokens: int) -> int:
    """How many tokens stand behind so many."""
    return -tokens % MULTIPLE


def rope_tables(cfg: ZImageConfig, text_len: int, rows: int, cols: int) -> Positions:
    """Float32, of angles in float64 that are rounded. Word l, counted from 1 and padding included, is at (l, 0, 0), all
    the image behind the last one at (T + 1, y, x), and what pads the image at (0, 0, 0)."""

    def table(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        axes = [ids[:, i, None] / cfg.rope_theta ** (np.arange(0, d, 2) / d) for i, d in enumerate(cfg.axes_dims)]
        angles = np.concatenate(axes, axis=-1).astype(np.float32)
        return np.cos(angles), np.sin(angles)

    y, x = np.divmod(np.arange(rows * cols), cols)
    grid = np.stack([np.full(y.shape, text_len + 1), y, x], axis=1)
    words = np.stack([np.arange(1, text_len + 1), *[np.zeros(text_len)] * 2], axis=1)
    return Positions(table(words), table(np.concatenate([grid, np.zeros((padding(rows * cols), 3))])))


class TimeEmbedder(nnx.Module):
    """``[…]`` times in 0..1 → ``[…, cfg.time]``."""

    def __init__(self, cfg: ZImageConfig, *, rngs: nnx.Rngs | None):
        self.in_layer = Linear(TIME_CHANNELS, TIME_HIDDEN, ("mlp", "embed"), rngs=rngs)
        self.out_layer = Linear(TIME_HIDDEN, cfg.time, ("embed", "mlp"), rngs=rngs)

    def __call__(self, t: Array, dtype: Any) -> Array:
        return self.out_layer(jax.nn.silu(self.in_layer(sinusoids(t, TIME_CHANNELS).astype(dtype))))


class Block(nnx.Module):
    """Attention, then the MLP. ``group``: the one that a refiner's block is of; none: a joint block."""

    def __init__(self, cfg: ZImageConfig, group: str = "", *, rngs: nnx.Rngs | None):
        d, self.group = cfg.width, group
        norm = functools.partial(RMSNorm, d, eps=cfg.norm_eps, rngs=rngs)
        # what it reads is so narrow that it is 2 % of a block's weights
        self.mod = None if group == "text" else Linear(cfg.time, 4 * d, ("embed", None), rngs=rngs, tokens=False)
        self.attention_in_norm, self.attention_out_norm, self.mlp_in_norm, self.mlp_out_norm = (
            norm() for _ in range(4)
        )
        self.qkv = QKV(cfg, bias=False, eps=HEAD_EPS, rngs=rngs)
        self.proj = Linear(d, d, ("embed", "heads"), bias=False, rngs=rngs)
        self.mlp_gate = Linear(d, cfg.hidden, ("mlp", "embed"), bias=False, rngs=rngs)
        self.mlp_up = Linear(d, cfg.hidden, ("mlp", "embed"), bias=False, rngs=rngs)
        self.mlp_out = Linear(cfg.hidden, d, ("embed", "mlp"), bias=False, rngs=rngs)

    def __call__(self, x: Array, vec: Array | None, rope: Rope, model: ZImage) -> Array:
        """``x`` ``[B, …, D]``, ``vec`` ``[B, cfg.time]`` of the step, which blocks of text have no use for."""
        if self.mod is None or vec is None:
            still = jnp.zeros((len(x), x.shape[-1]), x.dtype)
            mods = (still, still + 1, still, still + 1)
        else:
            scale, gate, mlp_scale, mlp_gate = jnp.split(self.mod(vec), 4, axis=-1)
            mods = (scale, jnp.tanh(gate), mlp_scale, jnp.tanh(mlp_gate))
        q, k, v = self.qkv(scaled(self.attention_in_norm(x), mods[0]), model.split_head_dim)
        attended = self.proj(from_heads(model.attention(rotate(q, rope), rotate(k, rope), v)))
        x = model.residual(gated(x, mods[1], self.attention_out_norm(attended)))
        y = scaled(self.mlp_in_norm(x), mods[2])
        out = self.mlp_out(swiglu(self.mlp_gate(y), self.mlp_up(y)))
        return model.residual(gated(x, mods[3], self.mlp_out_norm(out)))


def scaled(x: Array, scale: Array) -> Array:
    """Normed tokens ``[B, …, D]`` times one plus ``scale`` ``[B, D]``."""
    return (x.astype(jnp.float32) * (1 + scale[:, None].astype(jnp.float32))).astype(x.dtype)


def _block(cfg: ZImageConfig, group: str, rngs: nnx.Rngs | None) -> Block:
    return Block(cfg, group, rngs=rngs)


class ZImage(nnx.Module):
    """Velocity ``[B, L, C]`` of patches of latents ``[B, L, C]``.

    ``attention`` is a function of ``models/attention.py``; ``layout`` says where activations lie on the devices.
    """

    def __init__(
        self,
        cfg: ZImageConfig,
        *,
        rngs: nnx.Rngs | None,
        attention: attn.AttentionFn = attn.dot_product,
        split_head_dim: bool = True,
        layout: Layout = Layout(),
    ):
        d, patch = cfg.width, 4 * cfg.in_channels
        self.layout = layout
        self.cfg, self.attention, self.split_head_dim = cfg, attention, split_head_dim
        self.img_in = Linear(patch, d, ("embed", None), rngs=rngs)
        self.txt_norm = RMSNorm(cfg.cap_feat_dim, eps=cfg.norm_eps, rngs=rngs)
        self.txt_in = Linear(cfg.cap_feat_dim, d, ("embed", None), rngs=rngs)
        self.img_pad = param(rngs, (1, d), (None, None), zeros)
        self.txt_pad = param(rngs, (1, d), (None, None), zeros)
        self.time_in = TimeEmbedder(cfg, rngs=rngs)
        self.text_blocks = stack(cfg.n_refiner_layers, lambda r: Block(cfg, "text", rngs=r), rngs)
        self.image_blocks = stack(cfg.n_refiner_layers, lambda r: Block(cfg, "image", rngs=r), rngs)
        self.joint_blocks = stack(cfg.n_layers, lambda r: Block(cfg, rngs=r), rngs)
        self.final_mod = Linear(cfg.time, d, ("embed", None), rngs=rngs, tokens=False)
        self.final_out = Linear(d, patch, (None, "embed"), rngs=rngs)

    # What the programs call: models/family.py, Denoiser

    def step_inputs(self, conditioning: PromptEmbeds, sigmas: Array, guidance: Array, dtype: Any) -> Array:
        """Vectors ``[B, S, cfg.time]`` of steps from noise levels ``[B, S + 1]``. The model's time is 0 in noise; it is
        rounded as diffusers rounds it."""
        t = jax.lax.optimization_barrier(TIME_FACTOR * sigmas[:, :-1].astype(jnp.float32))
        vec = self.time_in(jax.lax.optimization_barrier(TIME_FACTOR - t) / TIME_FACTOR, dtype)
        return self.layout.place(vec, "batch", None, None)

    def drop_step_layers(self) -> None:
        del self.time_in

    def embed(self, conditioning: PromptEmbeds, positions: Positions, dtype: Any) -> Array:
        """``[B, T, D]`` past the blocks of text."""
        x, rope = self._embed_text(conditioning, dtype), self._joined([positions.text])
        return scan(self.text_blocks, lambda block, x: block(x, None, rope, self), x, self.layout)

    def velocity(
        self, img: Array, txt: Array, vec: Array, positions: Positions, references: Array | None = None
    ) -> Array:
        """Of patches ``[B, L, C]``, text past its blocks ``[B, T, D]`` and the vector of one step."""
        counts = self._counts(img)
        rope = self._joined(zip(*(jnp.split(jnp.asarray(x), counts[:-1]) for x in positions.image), strict=True))
        x = self._embed_image(img)
        x = scan(self.image_blocks, lambda block, x: block(x, vec, rope, self), x, self.layout)
        both, ropes = self.layout.join([x, txt], 1, "tokens"), self._joined([rope, positions.text])
        both = scan(self.joint_blocks, lambda block, x: block(x, vec, ropes, self), both, self.layout)
        x = self.layout.split(both, (x.shape[1], txt.shape[1]), 1, "tokens")[0]
        return self._finish(self.layout.split(x, counts, 1, "tokens")[0], vec)

    # The same for blocks that come one at a time: StreamedDenoiser

    def stream(self) -> StreamParts:
        cfg = self.cfg
        bare = dataclasses.replace(cfg, n_layers=0, n_refiner_layers=0)
        groups = {"text_blocks": "text", "image_blocks": "image", "joint_blocks": ""}
        return StreamParts(
            blocks=tuple((name, cfg.n_refiner_layers if group else cfg.n_layers) for name, group in groups.items()),
            step_layers=dict.fromkeys(groups, ()),
            makers={name: functools.partial(_block, cfg, group) for name, group in groups.items()},
            rest=lambda rngs: ZImage(bare, rngs=rngs, attention=self.attention, split_head_dim=self.split_head_dim),
            still={"text_blocks": "text"},
        )

    def step_vector(
        self, conditioning: PromptEmbeds, sigmas: Array, guidance: Array, dtype: Any
    ) -> tuple[None, Array]:  # fmt: skip
        """No vector of step layers, as there are none, and that of all blocks."""
        return None, self.step_inputs(conditioning, sigmas, guidance, dtype)

    def embed_tokens(self, latents: Array, conditioning: PromptEmbeds, positions: Positions, dtype: Any) -> Tokens:
        return Tokens(self._embed_text(conditioning, dtype), self._embed_image(latents.astype(dtype)))

    def block(self, block: Block, x: Tokens, step: Sequence[Array], shared: Array, positions: Positions) -> Tokens:
        if block.group:
            own = block(getattr(x, block.group), shared, getattr(positions, block.group), self)
            return x._replace(**{block.group: own})
        rope = self._joined([positions.image, positions.text])
        image, text = jnp.split(block(jnp.concatenate([x.image, x.text], 1), shared, rope, self), [x.image.shape[1]], 1)
        return Tokens(text, image)

    def finish(self, x: Tokens, shared: Array) -> Array:
        return self._finish(x.image, shared)

    # The parts of both

    def residual(self, x: Array) -> Array:
        """``[B, L, D]`` between blocks: whole in its width, divided by images and tokens."""
        return self.layout.place(x, "batch", "tokens", None)

    @staticmethod
    def _counts(img: Array) -> tuple[int, ...]:
        """Tokens of the image, and those that pad it, if any do."""
        count = img.shape[1]
        return (count, padding(count)) if padding(count) else (count,)

    def _joined(self, ropes: Iterable[Any]) -> Rope:
        """The rotary table of groups, in the order in which their tokens are joined."""
        cos, sin = (self.layout.join([jnp.asarray(x) for x in part], 0, "tokens") for part in zip(*ropes, strict=True))
        return cos, sin

    def _embed_text(self, conditioning: PromptEmbeds, dtype: Any) -> Array:
        x = self.txt_in(self.txt_norm(conditioning.states.astype(dtype)))
        return self.residual(jnp.where(conditioning.mask[..., None] > 0, x, self.txt_pad[...].astype(dtype)))

    def _embed_image(self, img: Array) -> Array:
        """``[B, L, C]`` → ``[B, L + P, D]``."""
        x = self.img_in(img)
        pad = self.img_pad[...].astype(x.dtype)
        pads = [jnp.broadcast_to(pad, (len(x), count, x.shape[-1])) for count in self._counts(img)[1:]]
        return self.residual(self.layout.join([x, *pads], 1, "tokens"))

    def _finish(self, img: Array, vec: Array) -> Array:
        """``[B, L, D]`` as the blocks leave it → velocity ``[B, L, C]``: the model's own leads from noise."""
        scale = self.final_mod(jax.nn.silu(vec))[:, None].astype(jnp.float32)
        return -self.final_out((layer_norm(img, EPS) * (1 + scale)).astype(img.dtype))
