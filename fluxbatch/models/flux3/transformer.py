"""The FLUX.3 transformer: a flow-matching velocity field over 2×2 patches of latents.

Three groups of tokens, text, image and references, pass through early blocks of their own, in which a group attends to
itself alone, and then through joint blocks. A block is attention and MLP side by side. Each group has one modulation
for its early and one for the joint blocks: the image's of the step's time, those of text and references of time 0. A
flow map adds, to all of them, the time that the step leads to. Without one, early blocks of text and references are the
same in all steps. Tokens have four coordinates (picture, row, column, word). Shapes: B batch, L image tokens, R tokens
of reference images, T text tokens, D width, K head width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fluxbatch.distributed.mesh import Layout
from fluxbatch.models import attention as attn
from fluxbatch.models.dit import EPS, QKV, MLPEmbedder, gated, modulate, rotate
from fluxbatch.models.family import StreamParts
from fluxbatch.models.flux2.transformer import PromptEmbeds, sinusoids, there_and_back
from fluxbatch.models.layers import Linear, from_heads, scan, stack, swiglu

Array = jax.Array
Rope = tuple[Any, Any]  # cosines and sines [tokens, K/2]

GRID = 0.5  # of a coordinate, from a row or column to the next


@dataclasses.dataclass(frozen=True)
class Flux3Config:
    in_channels: int  # of a token: latent channels × 2 × 2
    cond_in_channels: int  # of a reference's
    num_layers: int  # early blocks of each group
    num_single_layers: int  # joint blocks
    num_attention_heads: int
    attention_head_dim: int
    joint_attention_dim: int  # width of the text states: of eight layers of the encoder side by side
    timestep_channels: int
    mlp_ratio: float
    axes_dims_rope: tuple[int, ...]
    rope_theta: float
    flow_map: bool  # whether it reads the time that a step leads to

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Flux3Config:
        """Reads ``transformer/config.json``; ValueError for what this model cannot be."""
        axes = tuple(config.get("axes_dims_rope", (32, 32, 32, 32)))
        head = config["attention_head_dim"]
        if sum(axes) != head or len(axes) != 4 or any(a % 2 for a in axes):
            raise ValueError(
                f"axes_dims_rope {list(axes)}: expected four even sizes that add up to attention_head_dim {head}"
            )
        if (eps := config.get("eps", EPS)) != EPS:
            raise ValueError(f"eps {eps}: expected {EPS}")
        channels = config["in_channels"]
        defaults = {"timestep_channels": 256, "mlp_ratio": 3.0, "rope_theta": 10_000, "flow_map": False}
        defaults["cond_in_channels"] = channels
        fields = {f.name: config.get(f.name, defaults.get(f.name)) for f in dataclasses.fields(cls)}
        return cls(**fields | {"axes_dims_rope": axes})

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def hidden(self) -> int:
        """Of an MLP, between its two products."""
        return int(self.width * self.mlp_ratio)


class Positions(NamedTuple):
    """Rotary tables of each group; the one of references is None where there are none."""

    text: Rope
    image: Rope
    references: Rope | None


def coordinates(rows: int, cols: int, word: int = 0) -> np.ndarray:
    """``[rows · cols, 4]`` of a picture's tokens: (0, y/2, x/2, word)."""
    y, x = np.divmod(np.arange(rows * cols), cols)
    return np.stack([np.zeros(y.shape), GRID * y, GRID * x, np.full(y.shape, word)], axis=1)


def rope_tables(
    cfg: Flux3Config, text_len: int, rows: int, cols: int, references: Sequence[tuple[int, int]] = ()
) -> Positions:
    """Float32, of angles in float64. Word l is at (0, 0, 0, l), reference k, counted from 1, at word -k;
    ``references``: rows and columns of each."""

    def table(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        axes = [ids[:, i, None] / cfg.rope_theta ** (np.arange(0, d, 2) / d) for i, d in enumerate(cfg.axes_dims_rope)]
        angles = np.concatenate(axes, axis=-1)
        return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    words = np.stack([*[np.zeros(text_len)] * 3, np.arange(text_len)], axis=1)
    pictures = [coordinates(*size, -k) for k, size in enumerate(references, 1)]
    return Positions(
        table(words), table(coordinates(rows, cols)), table(np.concatenate(pictures)) if pictures else None
    )


class Modulation(NamedTuple):
    """The shift, scale and gate that a group's tokens have in all early, and in all joint, blocks."""

    early: Array  # [B, S, 3D]
    joint: Array  # [B, S, 3D]


class StepInputs(NamedTuple):
    """Of many steps at once; None for groups whose modulation does not depend on the step."""

    image: Modulation
    final: Array  # [B, S, 2D]
    text: Modulation | None
    references: Modulation | None


class Embedded(NamedTuple):
    """Text or references: past their early blocks with what joint ones need of modulation ``[B, 3D]``, or, where steps
    modulate them, before their early blocks and None."""

    tokens: Array  # [B, …, D]
    joint: Array | None


class Tokens(NamedTuple):
    """Those of each group ``[B, …, D]`` on their way through blocks that come one at a time."""

    text: Array
    image: Array
    references: Array | None


class Modulator(nnx.Module):
    """What makes a group's modulation of a time's vector ``[B, …, D]``."""

    def __init__(self, d: int, *, rngs: nnx.Rngs | None):
        self.early = Linear(d, 3 * d, ("mlp", "embed"), bias=False, rngs=rngs)
        self.joint = Linear(d, 3 * d, ("mlp", "embed"), bias=False, rngs=rngs)

    def __call__(self, vec: Array) -> Modulation:
        return Modulation(self.early(vec), self.joint(vec))


class Block(nnx.Module):
    """Attention and MLP side by side. ``group``: the one that an early block is of; none: a joint block."""

    def __init__(self, cfg: Flux3Config, group: str = "", *, rngs: nnx.Rngs | None):
        d, self.group = cfg.width, group
        self.qkv = QKV(cfg, bias=False, rngs=rngs)
        self.proj = Linear(d, d, ("embed", "heads"), bias=False, rngs=rngs)
        self.mlp_gate = Linear(d, cfg.hidden, ("mlp", "embed"), bias=False, rngs=rngs)
        self.mlp_up = Linear(d, cfg.hidden, ("mlp", "embed"), bias=False, rngs=rngs)
        self.mlp_out = Linear(cfg.hidden, d, ("embed", "mlp"), bias=False, rngs=rngs)

    def __call__(self, groups: tuple[Array, ...], mods: Sequence[Array], rope: Rope, model: Flux3) -> tuple[Array, ...]:
        """``groups``: tokens ``[B, …, D]`` that attend to each other; ``mods`` ``[B, 3D]`` of each, ``rope`` of all."""
        parts = [jnp.split(mod, 3, axis=-1) for mod in mods]
        normed = [modulate(x, shift, scale) for x, (shift, scale, _) in zip(groups, parts, strict=True)]
        # a TPU would make it anew in each of the products
        y = jax.lax.optimization_barrier(model.layout.join(normed, 1, "tokens"))
        q, k, v = self.qkv(y, model.split_head_dim)
        attended = self.proj(from_heads(model.attention(rotate(q, rope), rotate(k, rope), v)))
        out = attended + self.mlp_out(swiglu(self.mlp_gate(y), self.mlp_up(y)))
        outs = model.layout.split(out, [x.shape[1] for x in groups], 1, "tokens")
        return tuple(
            model.residual(gated(x, gate, each)) for x, (*_, gate), each in zip(groups, parts, outs, strict=True)
        )


def _block(cfg: Flux3Config, group: str, rngs: nnx.Rngs | None) -> Block:
    return Block(cfg, group, rngs=rngs)


class Flux3(nnx.Module):
    """Velocity ``[B, L, C]`` of packed latents ``[B, L, C]``.

    ``attention`` is a function of ``models/attention.py``; ``layout`` says where activations lie on the devices.
    """

    def __init__(
        self,
        cfg: Flux3Config,
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
        self.ref_in = Linear(cfg.cond_in_channels, d, ("embed", None), bias=False, rngs=rngs)
        self.txt_in = Linear(cfg.joint_attention_dim, d, ("embed", None), bias=False, rngs=rngs)
        self.time_in = MLPEmbedder(cfg.timestep_channels, d, bias=False, rngs=rngs)
        self.target_in = MLPEmbedder(cfg.timestep_channels, d, bias=False, rngs=rngs) if cfg.flow_map else None
        self.img_mod = Modulator(d, rngs=rngs)
        self.ref_mod = Modulator(d, rngs=rngs)
        self.txt_mod = Modulator(d, rngs=rngs)
        self.text_blocks = stack(cfg.num_layers, lambda r: Block(cfg, "text", rngs=r), rngs)
        self.image_blocks = stack(cfg.num_layers, lambda r: Block(cfg, "image", rngs=r), rngs)
        self.reference_blocks = stack(cfg.num_layers, lambda r: Block(cfg, "references", rngs=r), rngs)
        self.joint_blocks = stack(cfg.num_single_layers, lambda r: Block(cfg, rngs=r), rngs)
        self.final_mod = Linear(d, 2 * d, ("mlp", "embed"), bias=False, rngs=rngs)  # shift, then scale, as BFL has it
        self.final_out = Linear(d, cfg.in_channels, (None, "embed"), bias=False, rngs=rngs)

    # What the programs call: models/family.py, Denoiser

    def step_inputs(self, conditioning: PromptEmbeds, sigmas: Array, guidance: Array, dtype: Any) -> StepInputs:
        """The modulation of steps between noise levels ``[B, S + 1]``."""
        return self._modulation(sigmas, dtype, all_groups=self.cfg.flow_map)

    def drop_step_layers(self) -> None:
        """Those of text and references stay where ``embed`` and ``embed_references`` read them."""
        del self.img_mod, self.final_mod
        if self.cfg.flow_map:
            del self.time_in, self.target_in, self.txt_mod, self.ref_mod

    def embed(self, conditioning: PromptEmbeds, positions: Positions, dtype: Any) -> Embedded:
        tokens = self._embed_text(conditioning, dtype)
        return (
            self._still(tokens, self.txt_mod, self.text_blocks, positions.text)
            if self._rests
            else Embedded(tokens, None)
        )

    def embed_references(self, tokens: Array, positions: Positions) -> Embedded:
        """Of ``[B, R, C]``, all reference images one after the other."""
        x, rope = self.residual(self.ref_in(tokens)), positions.references
        return self._still(x, self.ref_mod, self.reference_blocks, rope) if self._rests else Embedded(x, None)

    def velocity(
        self, img: Array, text: Embedded, step: StepInputs, positions: Positions, references: Embedded | None = None
    ) -> Array:
        """Of packed latents ``[B, L, C]``, text and references, and the modulation of one step."""
        image = self._early(self.image_blocks, self.residual(self.img_in(img)), step.image.early, positions.image)
        groups, mods, ropes = [], [], []
        for given, own, blocks, rope in (
            (text, step.text, self.text_blocks, positions.text),
            (Embedded(image, step.image.joint), None, None, positions.image),
            (references, step.references, self.reference_blocks, positions.references),
        ):
            if given is not None:
                tokens, joint = given
                if joint is None:
                    assert own is not None
                    tokens, joint = self._early(blocks, tokens, own.early, rope), own.joint
                groups.append(tokens)
                mods.append(joint)
                ropes.append(rope)
        rope = self._joined(ropes)
        groups = scan(self.joint_blocks, lambda block, x: block(x, mods, rope, self), tuple(groups), self.layout)
        return self._finish(groups[1], step.final)

    # The same for blocks that come one at a time: StreamedDenoiser

    def stream(self) -> StreamParts:
        cfg = self.cfg
        bare = dataclasses.replace(cfg, num_layers=0, num_single_layers=0)
        still = {"text_blocks": "text", "reference_blocks": "references"}
        groups = still | {"image_blocks": "image", "joint_blocks": ""}
        counts = {name: cfg.num_layers if group else cfg.num_single_layers for name, group in groups.items()}
        return StreamParts(
            blocks=tuple(counts.items()),
            step_layers=dict.fromkeys(groups, ()),
            makers={name: functools.partial(_block, cfg, group) for name, group in groups.items()},
            rest=lambda rngs: Flux3(bare, rngs=rngs, attention=self.attention, split_head_dim=self.split_head_dim),
            still=still if self._rests else {},
            references=("reference_blocks",),
        )

    def step_vector(
        self, conditioning: PromptEmbeds, sigmas: Array, guidance: Array, dtype: Any
    ) -> tuple[None, StepInputs]:
        """No vector, as all blocks of a group share their modulation, and that."""
        return None, self._modulation(sigmas, dtype, all_groups=True)

    def embed_tokens(self, latents: Array, conditioning: PromptEmbeds, positions: Positions, dtype: Any) -> Tokens:
        latents, count = latents.astype(dtype), len(positions.image[0])
        references = None if positions.references is None else self.residual(self.ref_in(latents[:, count:]))
        image = self.residual(self.img_in(latents[:, :count]))
        return Tokens(self._embed_text(conditioning, dtype), image, references)

    def block(self, block: Block, x: Tokens, step: Sequence[Array], shared: StepInputs, positions: Positions) -> Tokens:
        names = [name for name in Tokens._fields if getattr(x, name) is not None]
        if block.group:
            names = [name for name in names if name == block.group]
        if not names:  # early blocks of references that are not there
            return x
        groups = tuple(getattr(x, name) for name in names)
        mods = [getattr(getattr(shared, name), "early" if block.group else "joint") for name in names]
        rope = self._joined([getattr(positions, name) for name in names])
        return x._replace(**dict(zip(names, block(groups, mods, rope, self), strict=True)))

    def finish(self, x: Tokens, shared: StepInputs) -> Array:
        return self._finish(x.image, shared.final)

    # The parts of both

    def residual(self, x: Array) -> Array:
        """``[B, L, D]`` between blocks: whole in its width, divided by images and tokens."""
        return self.layout.place(x, "batch", "tokens", None)

    @property
    def _rests(self) -> bool:
        """Whether text and references are the same in all steps."""
        return not self.cfg.flow_map

    def _still(self, tokens: Array, modulator: Modulator, blocks: Any, rope: Any) -> Embedded:
        """Of a group that is at time 0 in all steps."""
        mod = jax.tree.map(lambda x: x[:, 0], modulator(self._at_rest(len(tokens), tokens.dtype)))
        return Embedded(self._early(blocks, tokens, mod.early, rope), mod.joint)

    def _early(self, blocks: Any, tokens: Array, mod: Array, rope: Any) -> Array:
        rope = self._joined([rope])
        return scan(blocks, lambda block, x: block(x, [mod], rope, self), (tokens,), self.layout)[0]

    def _joined(self, ropes: Sequence[Any]) -> Rope:
        """The rotary table of groups, in the order in which their tokens are joined."""
        cos, sin = (self.layout.join([jnp.asarray(x) for x in part], 0, "tokens") for part in zip(*ropes, strict=True))
        return cos, sin

    def _embed_text(self, conditioning: PromptEmbeds, dtype: Any) -> Array:
        return self.residual(self.txt_in(conditioning.states.astype(dtype)))

    def _times(self, t: Array, embedder: MLPEmbedder, dtype: Any) -> Array:
        """``[B, S]`` → ``[B, S, D]``."""
        return embedder(sinusoids(there_and_back(t), self.cfg.timestep_channels).astype(dtype))

    def _at_rest(self, count: int, dtype: Any) -> Array:
        """``[B, 1, D]`` of time 0."""
        return self._whole(jax.nn.silu(self._times(jnp.zeros((count, 1)), self.time_in, dtype)))

    def _modulation(self, sigmas: Array, dtype: Any, all_groups: bool) -> StepInputs:
        """Of steps between noise levels ``[B, S + 1]``."""
        image, rest = (self._times(t, self.time_in, dtype) for t in (sigmas[:, :-1], jnp.zeros_like(sigmas[:, :-1])))
        if self.target_in is not None:
            target = self._times(sigmas[:, 1:], self.target_in, dtype)
            image, rest = image + target, rest + target
        image, rest = (self._whole(jax.nn.silu(vec)) for vec in (image, rest))
        others = (self.txt_mod(rest), self.ref_mod(rest)) if all_groups else (None, None)
        return jax.tree.map(self._whole, StepInputs(self.img_mod(image), self.final_mod(image), *others))

    def _finish(self, img: Array, mod: Array) -> Array:
        """``[B, L, D]`` as the blocks leave it, and its modulation ``[B, 2D]`` → velocity ``[B, L, C]``."""
        return self.final_out(modulate(img, *jnp.split(mod, 2, axis=-1)))

    def _whole(self, x: Array) -> Array:
        """``[B, …]``, vectors for each image, on all the devices that make it."""
        return self.layout.place(x, "batch", *[None] * (x.ndim - 1))
