"""The compiled programs: encode, denoise, decode. The only place that jits.

Everything that differs from row to row is an argument (prompts, noise, schedule, guidance), so there
is one compilation per image size, batch size and text length.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fluxbatch import sampling
from fluxbatch.dist.mesh import batch_sharding, put, replicated
from fluxbatch.models.flux import rope_table
from fluxbatch.models.layers import set_rows
from fluxbatch.models.vae import Decoder
from fluxbatch.types import Row
from fluxbatch.weights.lora_apply import Loras


@dataclasses.dataclass
class Models:
    """The four networks on one mesh."""

    flux: nnx.Module
    clip: nnx.Module
    t5: nnx.Module
    vae: Decoder


class Pipeline:
    """Runs batches of rows; returns device arrays without waiting for them."""

    def __init__(
        self, models: Models, mesh: jax.sharding.Mesh, dtype: Any, schedule: sampling.Schedule, offload_encoders: bool,
        lora: Loras | None = None,
    ):  # fmt: skip
        """``lora``: the adapters that stand beside the weights, mixed row by row."""
        self.mesh, self.dtype, self.schedule = mesh, jnp.dtype(dtype), schedule
        self.flux_config, self.vae_config = models.flux.cfg, models.vae.cfg
        split = {name: nnx.split(getattr(models, name)) for name in ("flux", "clip", "t5", "vae")}
        self._states = {name: state for name, (_, state) in split.items()}
        graphs = {name: graph for name, (graph, _) in split.items()}
        self._lora = lora
        self._offload = offload_encoders and _host_memory(mesh) is not None
        batch = batch_sharding(mesh)
        jit = functools.partial(jax.jit, out_shardings=batch)
        self._encode = jit(functools.partial(_encode, graphs["clip"], graphs["t5"], self.dtype))
        self._denoise = jit(functools.partial(_denoise, graphs["flux"], self.dtype), donate_argnames="latents")
        self._decode = jit(functools.partial(_decode, graphs["vae"], self.dtype), static_argnums=(2, 3))

    @property
    def multiple(self) -> int:
        """Heights and widths must be whole numbers of packed tokens: this many pixels."""
        return 2 * self.vae_config.scale

    def encode(self, clip_ids: np.ndarray, t5_ids: np.ndarray, rows: Sequence[Row]) -> tuple[jax.Array, jax.Array]:
        """Ids ``[B, 77]``, ``[B, T]`` of rows → T5 states ``[B, T, D]`` and pooled vectors ``[B, P]``."""
        return self._run(self._encode, self._states["clip"], self._states["t5"], *self._put(clip_ids, t5_ids), *self._scales(rows))

    def text_mix(self, row: Row) -> Hashable:
        """What the encoding of a row's prompts depends on besides them."""
        return () if self._lora is None else self._lora.text_mix(row)

    def swap(self, name: str, change: Callable[[Any], Any]) -> None:
        """Replaces the weights of one network by what ``change`` makes of them; shapes stay."""
        self._states[name] = change(self._states.pop(name))

    def encoders_out(self) -> None:
        """Moves CLIP and T5 to host memory, if asked for and the device has a host memory space."""
        self._move_encoders(_host_memory(self.mesh))

    def encoders_in(self) -> None:
        self._move_encoders("device")

    def _move_encoders(self, kind: str | None) -> None:
        if self._offload:
            for name in ("clip", "t5"):
                move = lambda x: jax.device_put(x, x.sharding.with_memory_kind(kind))  # noqa: E731
                self._states[name] = jax.tree.map(move, self._states[name])

    def denoise(self, rows: Sequence[Row], text: np.ndarray, pooled: np.ndarray) -> jax.Array:
        """Latents ``[B, L, 4C]`` float32 of rows of one size, from their own seeds."""
        height, width = (side // self.vae_config.scale for side in (rows[0].height, rows[0].width))
        tokens = (height // 2) * (width // 2)
        noise = {row.seed: None for row in rows}
        for seed in noise:
            noise[seed] = sampling.noise(seed, self.flux_config.in_channels // 4, height, width)
        latents = np.stack([noise[row.seed] for row in rows])
        sigmas, counts = sampling.padded_sigmas([self.schedule.sigmas(row.num_inference_steps, tokens) for row in rows])
        guidance = np.array([row.guidance_scale for row in rows], np.float32)
        rope = rope_table(text.shape[1], height // 2, width // 2, self.flux_config.axes_dims_rope)
        rope = tuple(put(table, replicated(self.mesh)) for table in rope)
        arrays = self._put(latents, text, pooled, sigmas, counts, guidance)
        return self._run(self._denoise, self._states["flux"], *arrays, rope, *self._scales(rows))

    def decode(self, latents: jax.Array, height: int, width: int) -> tuple[jax.Array, jax.Array]:
        """Latents → pixels ``[B, height, width, 3]`` uint8, and whether each image is finite ``[B]``."""
        scale = self.vae_config.scale
        return self._run(self._decode, self._states["vae"], latents, height // scale, width // scale)

    def _scales(self, rows: Sequence[Row]) -> list[jax.Array]:
        """Each row's mix of adapters, if it has one of its own."""
        return [] if self._lora is None else self._put(self._lora.scales(rows))

    def _put(self, *arrays: np.ndarray) -> list[jax.Array]:
        return [put(array, batch_sharding(self.mesh)) for array in arrays]

    def _run(self, program: Any, *args: Any) -> Any:
        # float32 means float32: TPUs and GPUs would multiply in bfloat16 or TF32.
        precision = "highest" if self.dtype == jnp.float32 else "default"
        with jax.default_matmul_precision(precision):
            return program(*args)


def _host_memory(mesh: jax.sharding.Mesh) -> str | None:
    device = mesh.devices.flat[0]
    kinds = {memory.kind for memory in device.addressable_memories()}
    return "pinned_host" if device.platform != "cpu" and "pinned_host" in kinds else None


def _model(graph, state, scales=None):
    model = nnx.merge(graph, state)
    return model if scales is None else set_rows(model, scales)


def _encode(clip_graph, t5_graph, dtype, clip, t5, clip_ids, t5_ids, scales=None):
    pooled = _model(clip_graph, clip, scales)(clip_ids, dtype)
    return _model(t5_graph, t5, scales)(t5_ids, dtype), pooled


def _denoise(graph, dtype, state, latents, text, pooled, sigmas, counts, guidance, rope, scales=None):
    """Euler steps from noise to latents; a row that has had its ``counts`` steps stands still."""
    flux = _model(graph, state, scales)

    def step(i, x):
        now, then = sigmas[:, i], sigmas[:, i + 1]
        velocity = flux(x.astype(dtype), text, pooled, now, guidance, rope).astype(jnp.float32)
        moved = x + (then - now)[:, None, None] * velocity
        return jnp.where((i < counts)[:, None, None], moved, x)

    return jax.lax.fori_loop(0, jnp.max(counts), step, latents)


def _decode(graph, dtype, state, latents, height, width):
    """Non-finite pictures of finite latents are decoded once more in float32."""
    vae = nnx.merge(graph, state)
    grid = sampling.unpack(latents, height, width)
    picture = lambda dtype: vae(grid.astype(dtype)).astype(jnp.float32)  # noqa: E731
    image = picture(dtype)
    if dtype != jnp.float32:
        again = jnp.all(jnp.isfinite(grid), axis=(1, 2, 3)) & ~jnp.all(jnp.isfinite(image), axis=(1, 2, 3))
        second = jax.lax.cond(jnp.any(again), lambda: picture(jnp.float32), lambda: image)
        image = jnp.where(again[:, None, None, None], second, image)
    finite = jnp.all(jnp.isfinite(image), axis=(1, 2, 3)) & jnp.all(jnp.isfinite(grid), axis=(1, 2, 3))
    pixels = jnp.round(jnp.clip(image * 0.5 + 0.5, 0, 1) * 255)
    return jnp.where(finite[:, None, None, None], pixels, 0).astype(jnp.uint8), finite
