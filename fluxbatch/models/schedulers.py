"""Schedulers: the noise levels of a denoising run, and the step from one to the next."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fluxbatch.types import UserError


class Scheduler(Protocol):
    """What a run needs of one. ``sigmas`` runs on the host, row by row; ``step`` is part of the compiled program and
    goes by its arguments alone."""

    def sigmas(self, steps: int, tokens: int) -> np.ndarray:
        """``[steps + 1]`` float32 noise levels from 1 down to 0 for an image of ``tokens`` tokens."""

    def shifted(self, sigmas: Sequence[float], tokens: int) -> np.ndarray:
        """``[len(sigmas) + 1]``: the same of levels that are given in place of evenly spaced ones, falling, in 0..1."""

    @staticmethod
    def step(
        latents: Float[Array, "B L C"], velocity: Float[Array, "B L C"], sigma: Float[Array, " B"],
        next_sigma: Float[Array, " B"],
    ) -> Float[Array, "B L C"]:  # fmt: skip
        """``latents``, float32, moved from one noise level to the next."""

    def facts(self) -> Mapping[str, Any]:
        """What of it decides pixels, as plain values."""


@dataclasses.dataclass(frozen=True)
class Euler:
    """What flow-matching schedules of Euler steps share: the step, and how ``scheduler_config.json`` is read."""

    @staticmethod
    def check(config: Mapping[str, Any]) -> None:
        """UserError for samplers that this is not."""
        plain = {
            "use_karras_sigmas": False,
            "use_exponential_sigmas": False,
            "use_beta_sigmas": False,
            "invert_sigmas": False,
            "shift_terminal": None,
            "stochastic_sampling": False,
            "use_flow_sigmas": False,
            "time_shift_type": "exponential",
            "num_train_timesteps": 1000,
            "_class_name": "FlowMatchEulerDiscreteScheduler",
        }
        for key, expected in plain.items():
            if config.get(key, expected) != expected:
                raise UserError(f"scheduler_config.json: {key} is {config[key]!r}, expected {expected!r}")

    @staticmethod
    def number(config: Mapping[str, Any], key: str, default: float, given: float | None = None) -> float:
        """``given``, else the config's, else the default; UserError for what is no number."""
        value = config.get(key, default) if given is None else given
        if type(value) not in (int, float) or not math.isfinite(value):
            raise UserError(f"scheduler_config.json: {key} is {value!r}, expected a number")
        return value

    @staticmethod
    def by_constant(shift: float, sigmas: np.ndarray) -> np.ndarray:
        """Noise levels shifted by a constant, which is above 0."""
        return shift * sigmas / (1 + (shift - 1) * sigmas)

    @staticmethod
    def step(
        latents: Float[Array, "B L C"], velocity: Float[Array, "B L C"], sigma: Float[Array, " B"],
        next_sigma: Float[Array, " B"],
    ) -> Float[Array, "B L C"]:  # fmt: skip
        """An Euler step, in float32."""
        return latents + (next_sigma - sigma)[:, None, None] * velocity.astype(jnp.float32)

    def facts(self) -> Mapping[str, Any]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class FlowMatchEuler(Euler):
    """Flow-matching Euler times, as diffusers' FlowMatchEulerDiscreteScheduler has them for FLUX.1."""

    time_shift: bool  # shift by the number of image tokens (dev), else by the constant ``shift``
    base_shift: float
    max_shift: float
    shift: float
    base_tokens: int
    max_tokens: int

    @classmethod
    def of(
        cls, config: Mapping[str, Any], time_shift: bool | None, base_shift: float | None, max_shift: float | None
    ) -> FlowMatchEuler:
        """From ``scheduler_config.json``; arguments that are not None win. UserError for samplers that
        this is not."""
        cls.check(config)
        number = functools.partial(cls.number, config)
        schedule = cls(
            time_shift=bool(config.get("use_dynamic_shifting", False) if time_shift is None else time_shift),
            base_shift=float(number("base_shift", 0.5, base_shift)),
            max_shift=float(number("max_shift", 1.15, max_shift)),
            shift=float(number("shift", 1.0)),
            base_tokens=int(number("base_image_seq_len", 256)),
            max_tokens=int(number("max_image_seq_len", 4096)),
        )
        if schedule.time_shift and schedule.base_tokens == schedule.max_tokens:
            raise UserError(
                f"scheduler_config.json: base_image_seq_len is {schedule.base_tokens}, expected another number than "
                "max_image_seq_len"
            )
        if not schedule.time_shift and schedule.shift <= 0:
            raise UserError(f"scheduler_config.json: shift is {schedule.shift:g}, expected a number above 0")
        return schedule

    def sigmas(self, steps: int, tokens: int) -> np.ndarray:
        """``[steps + 1]`` float32 noise levels from 1 down to 0 for an image of ``tokens`` tokens."""
        return self.shifted(np.linspace(1.0, 1 / steps, steps), tokens)

    def shifted(self, sigmas: Sequence[float] | np.ndarray, tokens: int) -> np.ndarray:
        """``[len(sigmas) + 1]``: ``sigmas`` shifted, and a 0 behind them. What diffusers' FluxPipeline makes of its
        argument ``sigmas``."""
        sigmas = np.asarray(sigmas, np.float32)
        if self.time_shift:
            slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
            mu = self.base_shift + slope * (tokens - self.base_tokens)
            sigmas = (np.exp(mu) / (np.exp(mu) + (1 / sigmas - 1))).astype(np.float32)
        else:
            sigmas = self.by_constant(self.shift, sigmas)
        return np.append(sigmas, 0).astype(np.float32)
