"""Rectified flow with both text encoders, from scratch."""

from __future__ import annotations

import pathlib
from typing import Any

import autoencoder
import data
import jax
import jax.numpy as jnp
import numpy as np
import words
from flax import nnx
from loop import Work, matrices_by_muon, train
from transformers import AutoTokenizer

from fluxbatch.models.flux1.clip import ClipConfig, ClipTextEncoder
from fluxbatch.models.flux1.t5 import T5Config, T5Encoder
from fluxbatch.models.flux1.transformer import Flux, FluxConfig, rope_table

TOKENS = 32  # T5 tokens, as conf/sampler/mini.yaml has it: padding is attended, so both must agree
POOL = 16_000  # captions and latents made once; drawn from with replacement
OTHER_SHAPES = 8  # one step in so many is of a non-square shape
UNSAID = 0.05  # pictures whose caption is left empty: what guidance is measured against
FLUX = dict(
    in_channels=64,
    num_layers=2,
    num_single_layers=4,
    attention_head_dim=32,
    num_attention_heads=5,
    joint_attention_dim=96,
    pooled_projection_dim=96,
    guidance_embeds=False,
    axes_dims_rope=[8, 12, 12],
)
T5 = dict(
    d_model=96,
    d_kv=24,
    d_ff=192,
    num_layers=2,
    num_heads=4,
    feed_forward_proj="gated-gelu",
    relative_attention_num_buckets=32,
    relative_attention_max_distance=128,
    layer_norm_epsilon=1e-6,
)
CLIP = dict(hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, hidden_act="quick_gelu",
            layer_norm_eps=1e-5, max_position_embeddings=words.CLIP_LENGTH)  # fmt: skip


def tokens(folder: pathlib.Path, captions: list[str]) -> dict[str, np.ndarray]:
    """CLIP and T5 ids ``[N, T]``, by the tokenizers in ``folder``."""
    clip, t5 = (AutoTokenizer.from_pretrained(folder / name) for name in ("tokenizer", "tokenizer_2"))
    pad = dict(padding="max_length", truncation=True, return_tensors="np")
    lengths = {"clip": (clip, words.CLIP_LENGTH), "t5": (t5, TOKENS)}
    return {
        name: call(captions, max_length=length, **pad)["input_ids"].astype(np.int32)
        for name, (call, length) in lengths.items()
    }


def latents(work: Work, scenes: list[data.Scene], style: Any = lambda image: image) -> np.ndarray:
    """``[N, h, w, C]`` float32 of scenes of one shape."""
    graph, _ = nnx.split(autoencoder.modules()[0])
    params = work.result("vae")[0]
    encode = jax.jit(lambda params, images: nnx.merge(graph, params)(images)[0])
    return np.concatenate(
        [np.asarray(encode(params, work.draw(scenes[i : i + 40], style))) for i in range(0, len(scenes), 40)]
    )


def pools(work: Work) -> tuple[list[dict[str, np.ndarray]], dict[str, float]]:
    """One pool a shape; and the latents' mean and spread. Trains the tokenizers on the way."""
    if (made := work.load("pools")) is not None:
        return made
    rng = np.random.default_rng(3)
    scenes = [[data.sample(rng, shape) for _ in range(POOL // 8 if i else POOL)] for i, shape in enumerate(data.SHAPES)]
    words.train([scene.caption for group in scenes for scene in group], work.folder / "flux-mini")
    made = []
    for group in scenes:
        captions = ["" if rng.random() < UNSAID else scene.caption for scene in group]
        made.append({"latents": latents(work, group)} | tokens(work.folder / "flux-mini", captions))
    square = made[0]["latents"]
    stats = {"mean": float(square.mean()), "std": float(square.std())}
    work.save("pools", (made, stats))
    return made, stats


def modules(folder: pathlib.Path) -> dict[str, nnx.Module]:
    configs = text_configs(folder)
    flux = Flux(FluxConfig.from_json(FLUX), rngs=nnx.Rngs(2))
    # Blocks begin as the identity and the velocity as zero.
    for layer in (
        flux.double_blocks.img.mod,
        flux.double_blocks.txt.mod,
        flux.single_blocks.mod,
        flux.final_mod,
        flux.final_out,
    ):
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


def batch_of(pool: dict[str, np.ndarray], stats: dict[str, float], chosen: np.ndarray) -> tuple[Any, ...]:
    """Packed latents ``[B, L, 4C]``, CLIP and T5 ids, RoPE table."""
    grid = (pool["latents"][chosen] - stats["mean"]) / stats["std"]
    b, h, w, c = grid.shape
    packed = grid.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 5, 2, 4).reshape(b, -1, 4 * c)
    return (
        packed.astype(np.float32),
        pool["clip"][chosen],
        pool["t5"][chosen],
        rope_table(TOKENS, h // 2, w // 2, tuple(FLUX["axes_dims_rope"])),
    )


def noised(key: Any, packed: Any) -> tuple[Any, Any, Any]:
    """Times ``[B]``, pictures part of the way to noise, and the velocity there. Every other picture is
    at a time that the sampler's four steps will ask for."""
    at, which, draw = jax.random.split(key, 3)
    t = jax.nn.sigmoid(jax.random.normal(at, packed.shape[:1]) + 0.3)
    t = t.at[::2].set(jax.random.choice(which, jnp.linspace(0.25, 1.0, 4), t[::2].shape))
    noise = jax.random.normal(draw, packed.shape)
    return t, packed + t[:, None, None] * (noise - packed), noise - packed


def velocity(graphs: dict, params: dict, batch: tuple, t: Any, mixed: Any, guidance: Any) -> Any:
    """What the three networks say of ``mixed`` ``[B, L, 4C]`` at ``t`` ``[B]``."""
    flux, t5, clip = (nnx.merge(graphs[name], params[name]) for name in ("flux", "t5", "clip"))
    _, clip_ids, t5_ids, rope = batch
    return flux(mixed, t5(t5_ids), clip(clip_ids), t, guidance, rope)


def train_flow(work: Work, steps: int, size: int = 64) -> None:
    """Straight paths from noise to latents: the model learns ``noise - latents``; the result is the
    exponential moving average."""
    shaped, stats = pools(work)
    graphs, params = split(modules(work.folder / "flux-mini"))

    def batch(rng, step):
        pool = shaped[1 + step // OTHER_SHAPES % 2 if step % OTHER_SHAPES == 0 else 0]
        return batch_of(pool, stats, rng.integers(0, len(pool["t5"]), size))

    def loss(params, batch, key):
        t, mixed, wanted = noised(key, batch[0])
        error = ((velocity(graphs, params, batch, t, mixed, jnp.zeros_like(t)) - wanted) ** 2).mean()
        return error, error

    optimizer = matrices_by_muon(peak=1.5e-2, adam_peak=2e-3, steps=steps)
    work.save("flow-done", train(work, "flow", params, optimizer, steps, batch, loss, decay=0.998))


def split(networks: dict[str, nnx.Module]) -> tuple[dict, dict]:
    """Graphs and parameters of networks by name."""
    pairs = {name: nnx.split(network) for name, network in networks.items()}
    return {name: graph for name, (graph, _) in pairs.items()}, {name: params for name, (_, params) in pairs.items()}
