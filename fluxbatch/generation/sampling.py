"""Noise, schedule and packing: what diffusers' FluxPipeline does around the transformer.

Shapes: C latent channels, h × w latents, L = h/2 · w/2 packed tokens of 4·C channels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fluxbatch.types import UserError

STEPS = 8  # of a schedule that are prepared and run at a time


def torch_normal(seed: int, size: int) -> np.ndarray:
    """``size`` ≥ 16 float32 normals, as ``torch.randn`` draws them on the CPU after ``manual_seed(seed)``.

    Mersenne Twister, 24 bits a value, Box-Muller over blocks of 16 (8 radii, 8 angles); a last
    partial block is replaced by 16 fresh values. Equal to torch within float32 rounding.
    """
    if size < 16:
        raise ValueError(f"noise of {size} values: at least 16 are needed")
    state = np.random.RandomState(seed & 0xFFFFFFFF)  # torch keeps the low 32 bits
    tail = 16 if size % 16 else 0
    raw = state.randint(0, 2**32, size=size + tail, dtype=np.uint32)
    uniform = (raw & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)
    normal = np.empty(size, np.float32)
    whole = size - size % 16
    normal[:whole] = _box_muller(uniform[:whole].reshape(-1, 2, 8)).reshape(-1)
    if tail:
        normal[-16:] = _box_muller(uniform[size:].reshape(1, 2, 8)).reshape(-1)
    return normal


def _box_muller(uniform: np.ndarray) -> np.ndarray:
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - uniform[:, 0]))
    angle = np.float32(2 * np.pi) * uniform[:, 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def noise(seed: int, channels: int, height: int, width: int) -> np.ndarray:
    """Packed noise ``[L, 4C]`` float32 of an image of ``height`` × ``width`` latents."""
    return pack(torch_normal(seed, channels * height * width).reshape(channels, height, width))


def pack(latents: np.ndarray) -> np.ndarray:
    """``[C, h, w]`` → ``[h/2 · w/2, 4C]``: each token is a 2×2 patch, channels first."""
    c, h, w = latents.shape
    return latents.reshape(c, h // 2, 2, w // 2, 2).transpose(1, 3, 0, 2, 4).reshape(h // 2 * (w // 2), c * 4)


def unpack(tokens: jax.Array, height: int, width: int) -> jax.Array:
    """``[B, L, 4C]`` → ``[B, h, w, C]``."""
    b, _, c = tokens.shape
    patches = tokens.reshape(b, height // 2, width // 2, c // 4, 2, 2)
    return jnp.transpose(patches, (0, 1, 4, 2, 5, 3)).reshape(b, height, width, c // 4)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Flow-matching Euler times, as diffusers' FlowMatchEulerDiscreteScheduler has them for FLUX."""

    time_shift: bool  # shift by the number of image tokens (dev), else by the constant ``shift``
    base_shift: float
    max_shift: float
    shift: float
    base_tokens: int
    max_tokens: int

    @classmethod
    def of(cls, config: Mapping[str, Any], time_shift: bool | None, base_shift: float | None, max_shift: float | None) -> Schedule:
        """From ``scheduler_config.json``; arguments that are not None win. UserError for samplers that
        this is not."""
        plain = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False, "invert_sigmas": False,
                 "shift_terminal": None, "stochastic_sampling": False, "use_flow_sigmas": False, "time_shift_type": "exponential",
                 "num_train_timesteps": 1000, "_class_name": "FlowMatchEulerDiscreteScheduler"}  # fmt: skip
        for key, expected in plain.items():
            if config.get(key, expected) != expected:
                raise UserError(f"scheduler_config.json: {key} is {config[key]!r}, expected {expected!r}")

        def number(key: str, default: float, given: float | None = None) -> float:
            value = config.get(key, default) if given is None else given
            if type(value) not in (int, float) or not math.isfinite(value):
                raise UserError(f"scheduler_config.json: {key} is {value!r}, expected a number")
            return value

        schedule = cls(
            time_shift=bool(config.get("use_dynamic_shifting", False) if time_shift is None else time_shift),
            base_shift=float(number("base_shift", 0.5, base_shift)),
            max_shift=float(number("max_shift", 1.15, max_shift)),
            shift=float(number("shift", 1.0)),
            base_tokens=int(number("base_image_seq_len", 256)),
            max_tokens=int(number("max_image_seq_len", 4096)),
        )
        if schedule.time_shift and schedule.base_tokens == schedule.max_tokens:
            raise UserError(f"scheduler_config.json: base_image_seq_len is {schedule.base_tokens}, expected another number than max_image_seq_len")
        if not schedule.time_shift and schedule.shift <= 0:
            raise UserError(f"scheduler_config.json: shift is {schedule.shift:g}, expected a number above 0")
        return schedule

    def sigmas(self, steps: int, tokens: int) -> np.ndarray:
        """``[steps + 1]`` float32 noise levels from 1 down to 0 for an image of ``tokens`` tokens."""
        sigmas = np.linspace(1.0, 1 / steps, steps).astype(np.float32)
        if self.time_shift:
            slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
            mu = self.base_shift + slope * (tokens - self.base_tokens)
            sigmas = (np.exp(mu) / (np.exp(mu) + (1 / sigmas - 1))).astype(np.float32)
        else:
            sigmas = self.shift * sigmas / (1 + (self.shift - 1) * sigmas)
        return np.append(sigmas, 0).astype(np.float32)


def padded_sigmas(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Schedules of a batch as data: levels ``[B, S + 1]``, zero after each row's end, and step counts
    ``[B]``. S is a multiple of ``STEPS``: programs take that many, so that another count compiles nothing."""
    counts = np.array([len(row) - 1 for row in rows], np.int32)
    size = -(-counts.max() // STEPS) * STEPS
    levels = np.zeros((len(rows), size + 1), np.float32)
    for level, row in zip(levels, rows, strict=True):
        level[: len(row)] = row
    return levels, counts
