"""The VAE of flux-mini."""

from __future__ import annotations

from typing import Any

import data
import jax
import jax.numpy as jnp
from flax import nnx
from loop import Work, matrices_by_muon, train

from fluxbatch.models.autoencoder import Decoder, Encoder, VaeConfig

CROP = 64  # pixels of the pictures that it begins with
BLUR = 0.05  # of a latent: the flow is not exact, the decoder should not mind
VAE = dict(latent_channels=16, block_out_channels=[12, 24, 48, 64], layers_per_block=1, norm_num_groups=4,
           mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False)  # fmt: skip


def modules() -> tuple[Encoder, Decoder]:
    config = VaeConfig.from_json(VAE | {"scaling_factor": 1.0, "shift_factor": 0.0})
    return Encoder(config, rngs=nnx.Rngs(0)), Decoder(config, rngs=nnx.Rngs(1))


def distance(error: Any) -> tuple[Any, Any]:
    """L1 on pixels and on their differences (edges), a little of the square; and the PSNR in dB."""
    edges = jnp.abs(jnp.diff(error, axis=1)).mean() + jnp.abs(jnp.diff(error, axis=2)).mean()
    squared = (error**2).mean()
    return jnp.abs(error).mean() + 0.5 * edges + squared, 10 * jnp.log10(4 / squared)


def train_vae(work: Work, steps: int, size: int = 16) -> None:
    """Both halves on crops (a quarter of the cost), with a little of the KL."""
    (encoder, encoder_params), (decoder, decoder_params) = (nnx.split(module) for module in modules())

    def loss(params, images, key):
        mean, logvar = nnx.merge(encoder, params[0])(images)
        latents = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
        value, psnr = distance(nnx.merge(decoder, params[1])(latents) - images)
        return value + 2e-5 * 0.5 * (mean**2 + jnp.exp(logvar) - 1 - logvar).mean(), psnr

    def batch(rng, step):
        images = work.draw([data.sample(rng) for _ in range(size)])
        y, x = (int(rng.integers(0, max(1, side - CROP + 1))) for side in images.shape[1:3])
        return images[:, y : y + CROP, x : x + CROP]

    optimizer = matrices_by_muon(peak=1e-2, adam_peak=3e-3, steps=steps)
    work.save("vae-done", train(work, "vae", (encoder_params, decoder_params), optimizer, steps, batch, loss))


def train_decoder(work: Work, steps: int, size: int = 6) -> None:
    """The decoder alone goes on, on whole pictures, a third of them in the adapters' styles; the
    latents, and so the flow, stay as they are."""
    (encoder, _), (decoder, _) = (nnx.split(module) for module in modules())
    encoder_params, decoder_params = work.result("vae")
    styles = [lambda image: image] * 4 + list(data.STYLES.values())

    def loss(params, batch, key):
        images, encoder_params = batch
        mean, _ = nnx.merge(encoder, encoder_params)(images)
        latents = mean + BLUR * jnp.std(mean) * jax.random.normal(key, mean.shape)
        return distance(nnx.merge(decoder, params)(latents) - images)

    def batch(rng, step):
        shape = data.SHAPES[0] if rng.random() < 0.8 else data.SHAPES[rng.integers(1, 3)]
        return work.draw([data.sample(rng, shape) for _ in range(size)], styles[step % len(styles)]), encoder_params

    optimizer = matrices_by_muon(peak=3e-3, adam_peak=1e-3, steps=steps)
    work.save("vae-done", (encoder_params, train(work, "decoder", decoder_params, optimizer, steps, batch, loss)))
