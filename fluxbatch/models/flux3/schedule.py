"""Noise levels of FLUX.3: flow-matching Euler times with one shift for all sizes and step counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fluxbatch.models.schedulers import Euler
from fluxbatch.types import UserError

SHIFT = 6.93  # which no file of a checkpoint has


@dataclasses.dataclass(frozen=True)
class Flux3Schedule(Euler):
    shift: float

    @classmethod
    def of(cls, config: Mapping[str, Any], **given: Any) -> Flux3Schedule:
        """From ``scheduler_config.json``; UserError for samplers that this is not, and for settings ``given`` that
        would make another of it."""
        for key, value in given.items():
            if value not in (None, False):
                raise UserError(f"sampler.{key}={value}: expected null: FLUX.3's schedule is the same for all sizes")
        cls.check(config)
        if config.get("use_dynamic_shifting"):
            raise UserError("scheduler_config.json: use_dynamic_shifting is true, expected false")
        if (shift := cls.number(config, "shift", SHIFT)) <= 0:
            raise UserError(f"scheduler_config.json: shift is {shift:g}, expected a number above 0")
        return cls(float(shift))

    def sigmas(self, steps: int, tokens: int) -> np.ndarray:
        """``[steps + 1]`` float32 noise levels from 1 down to 0."""
        return self.shifted(np.linspace(1.0, 1 / steps, steps), tokens)

    def shifted(self, sigmas: Sequence[float] | np.ndarray, tokens: int) -> np.ndarray:
        """``[len(sigmas) + 1]``: ``sigmas`` shifted, and a 0 behind them."""
        return np.append(self.by_constant(self.shift, np.asarray(sigmas, np.float32)), 0).astype(np.float32)
