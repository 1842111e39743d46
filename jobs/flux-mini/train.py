"""Trains flux-mini with the project's own models: VAE, then rectified flow with both text encoders.

    python jobs/flux-mini/train.py all            # hours on two cores, minutes on a GPU
    python jobs/flux-mini/train.py vae|flow|export [--work DIR] [--pixels 64|128] [--steps N]

Every stage goes on from what it saved last (every few minutes) in ``--work``. The result lies in
``WORK/flux-mini``, in the diffusers layout, ready to replace ``fluxbatch/checkpoints/flux-mini``.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import pickle
import time
from typing import Any

import data
import export
import jax
import jax.numpy as jnp
import numpy as np
import optax
import words
from flax import nnx
from optax.contrib import MuonDimensionNumbers, muon
from transformers import AutoTokenizer

from fluxbatch.models.clip import ClipConfig, ClipTextEncoder
from fluxbatch.models.flux import Flux, FluxConfig, rope_table
from fluxbatch.models.t5 import T5Config, T5Encoder
from fluxbatch.models.vae import Decoder, Encoder, VaeConfig

TOKENS = 32  # T5 tokens, as conf/sampler/mini.yaml has it: padding is attended, so both must agree
POOL = 16_000  # captions and latents made once; drawn from with replacement
SAVE_SECONDS = 120
CROP, CROPS = 64, 0.85  # pixels of the VAE's pictures for so much of its training: a crop costs a quarter
OTHER_SHAPES = 8  # one step in so many is of a non-square shape
UNSAID = 0.05  # pictures whose caption is left empty: what guidance is measured against

VAE = dict(latent_channels=16, block_out_channels=[12, 24, 48, 64], layers_per_block=1, norm_num_groups=4,
           mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False)  # fmt: skip
FLUX = dict(in_channels=64, num_layers=2, num_single_layers=4, attention_head_dim=32, num_attention_heads=5, joint_attention_dim=96,
            pooled_projection_dim=96, guidance_embeds=False, axes_dims_rope=[8, 12, 12])  # fmt: skip
T5 = dict(d_model=96, d_kv=24, d_ff=192, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu", relative_attention_num_buckets=32,
          relative_attention_max_distance=128, layer_norm_epsilon=1e-6)  # fmt: skip
CLIP = dict(hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, hidden_act="quick_gelu",
            layer_norm_eps=1e-5, max_position_embeddings=words.CLIP_LENGTH)  # fmt: skip


@dataclasses.dataclass
class Work:
    """The working directory: saved states and the finished checkpoint."""

    folder: pathlib.Path
    pixels: int

    def save(self, name: str, value: Any) -> None:
        temporary = self.folder / f"{name}.tmp"
        temporary.write_bytes(pickle.dumps(jax.device_get(value)))
        os.replace(temporary, self.folder / f"{name}.pkl")

    def load(self, name: str) -> Any:
        path = self.folder / f"{name}.pkl"
        return pickle.loads(path.read_bytes()) if path.exists() else None

    def draw(self, scenes: list[data.Scene]) -> np.ndarray:
        """``[B, h, w, 3]`` float32 in -1..1, shrunk from 128 to ``pixels`` on the short side."""
        images = np.stack([data.render(scene) for scene in scenes]).astype(np.float32) / 127.5 - 1
        by = 128 // self.pixels
        b, h, w, _ = images.shape
        return images.reshape(b, h // by, by, w // by, by, 3).mean((2, 4))


def report(step: int, started: float, **figures: float) -> None:
    print(step, f"{time.monotonic() - started:.0f}s", *(f"{k}={v:.4f}" for k, v in figures.items()), flush=True)


def train(work: Work, name: str, params: Any, optimizer: Any, steps: int, batch: Any, loss: Any, decay: float = 0.0) -> Any:
    """Minimises ``loss(params, batch, key) → (loss, figure)``; returns the (averaged) parameters."""
    state = {"step": 0, "params": params, "optimizer": optimizer.init(params), "average": params}
    state |= work.load(name) or {}

    @jax.jit
    def update(params, moments, average, batch, key):
        (value, figure), gradient = jax.value_and_grad(loss, has_aux=True)(params, batch, key)
        change, moments = optimizer.update(gradient, moments, params)
        params = optax.apply_updates(params, change)
        return params, moments, optax.incremental_update(params, average, 1 - decay), value, figure

    started = saved = time.monotonic()
    figures = []
    for step in range(state["step"], steps):
        key = jax.random.fold_in(jax.random.key(1), step)
        state["params"], state["optimizer"], state["average"], value, figure = update(
            state["params"], state["optimizer"], state["average"], batch(np.random.default_rng([7, step]), step), key)  # fmt: skip
        figures.append(float(figure))
        if step % 100 == 99:
            report(step + 1, started, loss=float(value), figure=float(np.mean(figures[-100:])))
        if time.monotonic() - saved > SAVE_SECONDS or step == steps - 1:
            state["step"], saved = step + 1, time.monotonic()
            work.save(name, state)
    return state["average"]


def schedule(peak: float, steps: int) -> optax.Schedule:
    """Up, flat, and down to nothing over the last quarter: more ``--steps`` lengthen a run that has begun."""
    up, down = min(200, steps // 10), steps // 4
    return lambda step: peak * jnp.minimum(jnp.minimum(1.0, (step + 1) / up), jnp.maximum(0.0, (steps - step) / down))


def matrices_by_muon(peak: float, adam_peak: float, steps: int) -> optax.GradientTransformation:
    """Muon on every kernel (it needs about half of Adam's steps at this size), Adam on the rest."""

    def dimensions(tree):
        """Inputs and outputs of a kernel: ``[layers, out, in]`` (each layer on its own), ``[out, in, k, k]``."""

        def of(path, p):
            if "kernel" not in str(path):
                return None
            return MuonDimensionNumbers((1, 2, 3), 0) if p.ndim == 4 else MuonDimensionNumbers(p.ndim - 1, p.ndim - 2)

        return jax.tree_util.tree_map_with_path(of, tree)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        muon(schedule(peak, steps), adam_learning_rate=schedule(adam_peak, steps), adam_b2=0.99, muon_weight_dimension_numbers=dimensions))  # fmt: skip


# ---- the VAE -----------------------------------------------------------------------------------


def vae_modules() -> tuple[Encoder, Decoder]:
    config = VaeConfig.from_json(VAE | {"scaling_factor": 1.0, "shift_factor": 0.0})
    return Encoder(config, rngs=nnx.Rngs(0)), Decoder(config, rngs=nnx.Rngs(1))


def train_vae(work: Work, steps: int, size: int = 16) -> None:
    """L1 on pixels and on their differences (edges), a little of the squared error and of the KL."""
    encoder, decoder = vae_modules()
    (encoder_graph, encoder_params), (decoder_graph, decoder_params) = nnx.split(encoder), nnx.split(decoder)

    def loss(params, images, key):
        mean, logvar = nnx.merge(encoder_graph, params[0])(images)
        latents = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
        error = nnx.merge(decoder_graph, params[1])(latents) - images
        edges = jnp.abs(jnp.diff(error, axis=1)).mean() + jnp.abs(jnp.diff(error, axis=2)).mean()
        kl = 0.5 * (mean**2 + jnp.exp(logvar) - 1 - logvar).mean()
        squared = (error**2).mean()
        return jnp.abs(error).mean() + 0.5 * edges + squared + 2e-5 * kl, 10 * jnp.log10(4 / squared)

    def batch(rng, step):
        images = work.draw([data.sample(rng) for _ in range(size)])
        if step >= CROPS * steps or images.shape[1] <= CROP:
            return images
        y, x = rng.integers(0, images.shape[1] - CROP + 1, 2)
        return images[:, y : y + CROP, x : x + CROP]

    optimizer = matrices_by_muon(peak=1e-2, adam_peak=3e-3, steps=steps)
    params = train(work, "vae", (encoder_params, decoder_params), optimizer, steps, batch, loss)
    work.save("vae-done", params)


# ---- the flow ----------------------------------------------------------------------------------


def pools(work: Work) -> tuple[list[dict[str, np.ndarray]], dict[str, float]]:
    """Latents and tokens of scenes, one pool a shape; and the latents' mean and spread."""
    if (made := work.load("pools")) is not None:
        return made
    rng = np.random.default_rng(3)
    scenes = [[data.sample(rng, shape) for _ in range(POOL // 8 if i else POOL)] for i, shape in enumerate(data.SHAPES)]
    words.train([scene.caption for group in scenes for scene in group], work.folder / "flux-mini")
    clip, t5 = (AutoTokenizer.from_pretrained(work.folder / "flux-mini" / name) for name in ("tokenizer", "tokenizer_2"))
    graph, _ = nnx.split(vae_modules()[0])
    params = work.load("vae-done")[0]
    encode = jax.jit(lambda images: nnx.merge(graph, params)(images)[0])
    made = []
    for group in scenes:
        captions = ["" if rng.random() < UNSAID else scene.caption for scene in group]
        pad = dict(padding="max_length", truncation=True, return_tensors="np")
        latents = [np.asarray(encode(work.draw(group[i : i + 40]))) for i in range(0, len(group), 40)]
        made.append({
            "latents": np.concatenate(latents),
            "clip": clip(captions, max_length=words.CLIP_LENGTH, **pad)["input_ids"].astype(np.int32),
            "t5": t5(captions, max_length=TOKENS, **pad)["input_ids"].astype(np.int32),
        })  # fmt: skip
    square = made[0]["latents"]
    stats = {"mean": float(square.mean()), "std": float(square.std())}
    work.save("pools", (made, stats))
    return made, stats


def flow_modules(folder: pathlib.Path) -> dict[str, nnx.Module]:
    configs = text_configs(folder)
    flux = Flux(FluxConfig.from_json(FLUX), rngs=nnx.Rngs(2))
    # Blocks begin as the identity and the velocity as zero.
    for layer in (flux.double_blocks.img.mod, flux.double_blocks.txt.mod, flux.single_blocks.mod, flux.final_mod, flux.final_out):
        layer.kernel[...] = jnp.zeros_like(layer.kernel[...])
    return {
        "flux": flux,
        "t5": T5Encoder(T5Config.from_json(configs["t5"]), rngs=nnx.Rngs(3)),
        "clip": ClipTextEncoder(ClipConfig.from_json(configs["clip"]), rngs=nnx.Rngs(4)),
    }


def text_configs(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The encoders' configs, with what the tokenizers say."""
    clip, t5 = (AutoTokenizer.from_pretrained(folder / name) for name in ("tokenizer", "tokenizer_2"))
    ends = {"bos_token_id": clip.bos_token_id, "eos_token_id": clip.eos_token_id, "pad_token_id": clip.pad_token_id}
    return {"clip": CLIP | ends | {"vocab_size": len(clip)}, "t5": T5 | {"vocab_size": len(t5)}}


def train_flow(work: Work, steps: int, size: int = 64) -> None:
    """Straight paths from noise to latents: the model learns ``noise - latents`` at logit-normal
    times and at those of four steps; the result is the exponential moving average."""
    shaped, stats = pools(work)
    split = {name: nnx.split(module) for name, module in flow_modules(work.folder / "flux-mini").items()}
    graphs, params = ({name: pair[i] for name, pair in split.items()} for i in (0, 1))

    def batch(rng, step):
        pool = shaped[1 + step // OTHER_SHAPES % 2 if step % OTHER_SHAPES == 0 else 0]
        chosen = rng.integers(0, len(pool["t5"]), size)
        latents = (pool["latents"][chosen] - stats["mean"]) / stats["std"]
        b, h, w, c = latents.shape
        tokens = latents.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 5, 2, 4).reshape(b, -1, 4 * c)
        rope = rope_table(TOKENS, h // 2, w // 2, tuple(FLUX["axes_dims_rope"]))
        return tokens.astype(np.float32), pool["clip"][chosen], pool["t5"][chosen], rope

    def loss(params, batch, key):
        latents, clip_ids, t5_ids, rope = batch
        flux, t5, clip = (nnx.merge(graphs[name], params[name]) for name in ("flux", "t5", "clip"))
        at, which, draw = jax.random.split(key, 3)
        # every other picture at a time that the sampler's four steps will ask for
        t = jax.nn.sigmoid(jax.random.normal(at, latents.shape[:1]) + 0.3)
        t = t.at[::2].set(jax.random.choice(which, jnp.linspace(0.25, 1.0, 4), t[::2].shape))
        noise = jax.random.normal(draw, latents.shape)
        mixed = latents + t[:, None, None] * (noise - latents)
        velocity = flux(mixed, t5(t5_ids), clip(clip_ids), t, jnp.zeros_like(t), rope)
        error = ((velocity - (noise - latents)) ** 2).mean()
        return error, error

    optimizer = matrices_by_muon(peak=1.5e-2, adam_peak=2e-3, steps=steps)
    average = train(work, "flow", params, optimizer, steps, batch, loss, decay=0.998)
    work.save("flow-done", average)


# ---- the stages --------------------------------------------------------------------------------


def write(work: Work) -> None:
    """The checkpoint in the diffusers layout; of a flow still in training, its average so far."""
    stats = pools(work)[1]
    vae = VAE | {"scaling_factor": 1 / stats["std"], "shift_factor": stats["mean"]}
    folder = work.folder / "flux-mini"
    export.write(folder, vae, FLUX, text_configs(folder), work.load("vae-done"), work.load("flow-done") or work.load("flow")["average"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["vae", "flow", "export", "all"])
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("outputs/flux-mini"))
    parser.add_argument("--pixels", type=int, choices=[64, 128], default=128, help="of the short side")
    parser.add_argument("--steps", type=int, help="of the one stage that is named")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    work = Work(args.work, args.pixels)
    if args.stage in ("vae", "all"):
        train_vae(work, args.steps or 4000)
    if args.stage in ("flow", "all"):
        train_flow(work, args.steps or 8000)
    if args.stage in ("export", "all"):
        write(work)


if __name__ == "__main__":
    main()
