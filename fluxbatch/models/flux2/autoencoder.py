"""AutoencoderKLFlux2: FLUX.1's halves, with patches of latents normed by the statistics of training between them and
the transformer. Images are ``[B, H, W, 3]`` in -1..1, patches ``[B, y, x, 4C]``; a patch is 2×2 latents."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fluxbatch.distributed.mesh import Layout
from fluxbatch.models import autoencoder
from fluxbatch.models.autoencoder import VaeConfig
from fluxbatch.models.flux2.latents import PATCH, patchify, unpatchify
from fluxbatch.models.layers import ones, param, zeros

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Flux2VaeConfig:
    latent_channels: int
    block_out_channels: tuple[int, ...]  # of the encoder
    decoder_block_out_channels: tuple[int, ...]
    layers_per_block: int
    norm_num_groups: int
    mid_block_add_attention: bool
    use_quant_conv: bool
    use_post_quant_conv: bool
    batch_norm_eps: float

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Flux2VaeConfig:
        """Reads ``vae/config.json``; ValueError for what this model cannot be."""
        if (patch := list(config.get("patch_size", (PATCH, PATCH)))) != [PATCH, PATCH]:
            raise ValueError(f"patch_size {patch}: expected {[PATCH, PATCH]}")
        defaults = {
            "latent_channels": 32,
            "layers_per_block": 2,
            "norm_num_groups": 32,
            "mid_block_add_attention": True,
            "use_quant_conv": True,
            "use_post_quant_conv": True,
            "batch_norm_eps": 1e-4,
        }
        fields = {f.name: config.get(f.name, defaults.get(f.name)) for f in dataclasses.fields(cls)}
        encoder = tuple(config["block_out_channels"])
        decoder = tuple(config.get("decoder_block_out_channels") or encoder)
        if len(decoder) != len(encoder):
            raise ValueError(
                f"decoder_block_out_channels {list(decoder)}: expected as many as block_out_channels {list(encoder)}"
            )
        cfg = cls(**fields | {"block_out_channels": encoder, "decoder_block_out_channels": decoder})
        plain = {key: config[key] for key in ("up_block_types", "down_block_types", "act_fn") if key in config}
        for sizes in (encoder, decoder):
            VaeConfig.from_json(dataclasses.asdict(cfg) | plain | {"block_out_channels": sizes})
        return cfg

    @property
    def encoder(self) -> VaeConfig:
        return self._half(self.block_out_channels)

    @property
    def decoder(self) -> VaeConfig:
        return self._half(self.decoder_block_out_channels)

    def _half(self, sizes: tuple[int, ...]) -> VaeConfig:
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(VaeConfig) if hasattr(self, f.name)}
        return VaeConfig(**own | {"block_out_channels": sizes, "scaling_factor": 1.0, "shift_factor": 0.0})

    @property
    def scale(self) -> int:
        """Pixels that a patch, which is a token, spans on a side."""
        return PATCH * self.encoder.scale


class Statistics(nnx.Module):
    """Mean and variance of each channel of a patch."""

    def __init__(self, cfg: Flux2VaeConfig, *, rngs: nnx.Rngs | None):
        channels = cfg.latent_channels * PATCH**2
        self.mean = param(rngs, (channels,), (None,), zeros)
        self.var = param(rngs, (channels,), (None,), ones)
        self.eps = cfg.batch_norm_eps

    def normed(self, x: Array) -> Array:
        return ((x.astype(jnp.float32) - self.mean[...]) / self._deviation()).astype(x.dtype)

    def denormed(self, x: Array) -> Array:
        return (x.astype(jnp.float32) * self._deviation() + self.mean[...]).astype(x.dtype)

    def _deviation(self) -> Array:
        return jnp.sqrt(self.var[...].astype(jnp.float32) + self.eps)


class Decoder(autoencoder.Decoder):
    """Patches as the transformer leaves them → image. Parameters besides ``bn`` are those of FLUX.1's."""

    def __init__(
        self,
        cfg: Flux2VaeConfig,
        *,
        rngs: nnx.Rngs | None,
        layout: Layout = Layout(),
        bands: int = 1,
        encoder: bool = False,
    ):
        super().__init__(cfg.decoder, rngs=rngs, layout=layout, bands=bands)
        if encoder:
            self.encoder = Encoder(cfg, rngs=rngs, layout=layout)
        self.bn = Statistics(cfg, rngs=rngs)

    def __call__(self, patches: Array) -> Array:
        return super().__call__(unpatchify(self.bn.denormed(patches)))


class Encoder(autoencoder.Encoder):
    """Image → patches as the transformer reads those of a reference: the means, nothing is drawn."""

    def __init__(self, cfg: Flux2VaeConfig, *, rngs: nnx.Rngs | None, layout: Layout = Layout()):
        super().__init__(cfg.encoder, rngs=rngs, layout=layout)
        self.bn = Statistics(cfg, rngs=rngs)

    def __call__(self, image: Array) -> Array:  # type: ignore[override]  # not a mean and a variance
        return self.bn.normed(patchify(super().__call__(image)[0]))
