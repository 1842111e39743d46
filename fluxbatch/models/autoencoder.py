"""AutoencoderKL: latents to pictures (and back, for training). Images are ``[B, h, w, 3]`` in -1..1."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fluxbatch.distributed.mesh import Layout
from fluxbatch.models.attention import blocked, dot_product
from fluxbatch.models.convolutions import Conv, GroupNorm
from fluxbatch.models.layers import Linear

Array = jax.Array

EPS = 1e-6
# Above this many pixels the mid block's score matrix is made a block at a time.
_ATTENTION_PIXELS = 2048
TPU_BANDS = 8  # the rows of its vectors


@dataclasses.dataclass(frozen=True)
class VaeConfig:
    latent_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    norm_num_groups: int
    scaling_factor: float
    shift_factor: float
    mid_block_add_attention: bool
    use_quant_conv: bool
    use_post_quant_conv: bool

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> VaeConfig:
        """Reads ``vae/config.json``; ValueError for what this model cannot be: blocks other than AutoencoderKL's plain
        ones, …"""
        for key, plain in (("up_block_types", "UpDecoderBlock2D"), ("down_block_types", "DownEncoderBlock2D")):
            if odd := [kind for kind in config.get(key, ()) if kind != plain]:
                raise ValueError(f"{key} {odd[0]!r}: expected {plain!r}")
        if (act := config.get("act_fn", "silu")) not in ("silu", "swish"):
            raise ValueError(f"act_fn {act!r}: expected 'silu'")
        defaults = {
            "shift_factor": None,
            "mid_block_add_attention": True,
            "use_quant_conv": True,
            "use_post_quant_conv": True,
            "norm_num_groups": 32,
            "scaling_factor": 0.18215,
        }
        fields = {f.name: config.get(f.name, defaults.get(f.name)) for f in dataclasses.fields(cls)}
        groups, channels = fields["norm_num_groups"], tuple(config["block_out_channels"])
        if not groups or any(size % groups for size in channels):
            raise ValueError(
                f"norm_num_groups {groups}: expected a divisor of each of block_out_channels {list(channels)}"
            )
        fields |= {"block_out_channels": channels, "shift_factor": fields["shift_factor"] or 0.0}
        return cls(**fields)

    @property
    def scale(self) -> int:
        """Pixels a latent spans on a side."""
        return 2 ** (len(self.block_out_channels) - 1)


class ResnetBlock(nnx.Module):
    def __init__(self, c_in: int, c_out: int, groups: int, *, rngs: nnx.Rngs | None):
        self.norm1 = GroupNorm(c_in, groups, eps=EPS, rngs=rngs)
        self.conv1 = Conv(c_in, c_out, 3, rngs=rngs)
        self.norm2 = GroupNorm(c_out, groups, eps=EPS, rngs=rngs)
        self.conv2 = Conv(c_out, c_out, 3, rngs=rngs)
        self.shortcut = Conv(c_in, c_out, 1, rngs=rngs) if c_in != c_out else None

    def __call__(self, x: Array) -> Array:
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return y + (x if self.shortcut is None else self.shortcut(x))


class AttentionBlock(nnx.Module):
    """One-headed attention over all pixels."""

    def __init__(self, channels: int, groups: int, layout: Layout, *, rngs: nnx.Rngs | None):
        self.norm = GroupNorm(channels, groups, eps=EPS, rngs=rngs)
        self.q, self.k, self.v, self.out = (Linear(channels, channels, ("channels", None), rngs=rngs) for _ in range(4))
        self.layout = layout

    def __call__(self, x: Array) -> Array:
        flat = self.norm(x).reshape(x.shape[0], -1, x.shape[-1])
        q, k, v = (f.to_heads(flat, 1) for f in (self.q, self.k, self.v))
        attend = blocked if flat.shape[1] > _ATTENTION_PIXELS else dot_product
        return x + self.out(self.layout.attention(attend)(q, k, v)[:, 0]).reshape(x.shape)


class MidBlock(nnx.Module):
    def __init__(self, channels: int, cfg: VaeConfig, layout: Layout, *, rngs: nnx.Rngs | None):
        groups = cfg.norm_num_groups
        self.block_1 = ResnetBlock(channels, channels, groups, rngs=rngs)
        self.attn_1 = AttentionBlock(channels, groups, layout, rngs=rngs) if cfg.mid_block_add_attention else None
        self.block_2 = ResnetBlock(channels, channels, groups, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = self.block_1(x)
        return self.block_2(x if self.attn_1 is None else self.attn_1(x))


class Level(nnx.Module):
    """The resnets of one resolution and the change to the next: up, down or none."""

    def __init__(self, c_in: int, c_out: int, count: int, change: str | None, groups: int, *, rngs: nnx.Rngs | None):
        sizes = [c_in] + [c_out] * (count - 1)
        self.block = nnx.List([ResnetBlock(c, c_out, groups, rngs=rngs) for c in sizes])
        self.change = change
        down: dict[str, Any] = {"stride": 2, "padding": ((0, 1), (0, 1))} if change == "down" else {}
        self.conv = Conv(c_out, c_out, 3, rngs=rngs, **down) if change else None

    def __call__(self, x: Array) -> Array:
        for block in self.block:
            x = block(x)
        if self.conv is None:
            return x
        return self.conv.of_doubled(x) if self.change == "up" else self.conv(x)


class Decoder(nnx.Module):
    """Latents ``[B, h, w, C]`` as the transformer leaves them → image ``[B, 8h, 8w, 3]``.

    ``bands``: how many bands of rows each picture is worked on in, where its height can be divided so (``Conv``).
    ``encoder``: whether it has the other half beside it, for rows with pictures.
    """

    encoder: Encoder | None = None

    def __init__(
        self,
        cfg: VaeConfig,
        *,
        rngs: nnx.Rngs | None,
        layout: Layout = Layout(),
        bands: int = 1,
        encoder: bool = False,
    ):
        self.cfg, self.layout, self.bands = cfg, layout, bands
        if encoder:
            self.encoder = Encoder(cfg, rngs=rngs, layout=layout)
        sizes, c = cfg.block_out_channels[::-1], cfg.latent_channels
        self.post_quant = Conv(c, c, 1, rngs=rngs) if cfg.use_post_quant_conv else None
        self.conv_in = Conv(c, sizes[0], 3, rngs=rngs)
        self.mid = MidBlock(sizes[0], cfg, layout, rngs=rngs)
        self.up = nnx.List(
            [
                Level(
                    sizes[max(i - 1, 0)],
                    size,
                    cfg.layers_per_block + 1,
                    "up" if i + 1 < len(sizes) else None,
                    cfg.norm_num_groups,
                    rngs=rngs,
                )
                for i, size in enumerate(sizes)
            ]
        )
        self.norm_out = GroupNorm(sizes[-1], cfg.norm_num_groups, eps=EPS, rngs=rngs)
        self.conv_out = Conv(sizes[-1], 3, 3, rngs=rngs)

    def __call__(self, latents: Array) -> Array:
        b, h, w, c = latents.shape
        if (bands := math.gcd(self.bands, h)) > 1:
            latents = latents.reshape(b, bands, h // bands, w, c)
        x = latents / self.cfg.scaling_factor + self.cfg.shift_factor
        x = x if self.post_quant is None else self.post_quant(x)
        x = self.mid(self.conv_in(x))
        for level in self.up:
            x = level(x)
        image = self.conv_out(jax.nn.silu(self.norm_out(x)))
        return image.reshape(b, self.cfg.scale * h, self.cfg.scale * w, 3)


class Encoder(nnx.Module):
    """Image ``[B, 8h, 8w, 3]`` → mean and log variance, each ``[B, h, w, C]``, before scale and shift."""

    def __init__(self, cfg: VaeConfig, *, rngs: nnx.Rngs | None, layout: Layout = Layout()):
        self.cfg = cfg
        sizes, c = cfg.block_out_channels, cfg.latent_channels
        self.conv_in = Conv(3, sizes[0], 3, rngs=rngs)
        self.down = nnx.List(
            [
                Level(
                    sizes[max(i - 1, 0)],
                    size,
                    cfg.layers_per_block,
                    "down" if i + 1 < len(sizes) else None,
                    cfg.norm_num_groups,
                    rngs=rngs,
                )
                for i, size in enumerate(sizes)
            ]
        )
        self.mid = MidBlock(sizes[-1], cfg, layout, rngs=rngs)
        self.norm_out = GroupNorm(sizes[-1], cfg.norm_num_groups, eps=EPS, rngs=rngs)
        self.conv_out = Conv(sizes[-1], 2 * c, 3, rngs=rngs)
        self.quant = Conv(2 * c, 2 * c, 1, rngs=rngs) if cfg.use_quant_conv else None

    def __call__(self, image: Array) -> tuple[Array, Array]:
        x = self.conv_in(image)
        for level in self.down:
            x = level(x)
        x = self.conv_out(jax.nn.silu(self.norm_out(self.mid(x))))
        x = x if self.quant is None else self.quant(x)
        mean, logvar = jnp.split(x, 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)
