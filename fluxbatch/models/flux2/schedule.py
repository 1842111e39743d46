"""Noise levels of FLUX.2: FLUX.1's Euler times, with a shift that depends on steps as well as on tokens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fluxbatch.models.schedulers import Euler
from fluxbatch.types import UserError

# The shift for 10 and for 200 steps is a line over the tokens; above MANY tokens the latter holds for all.
TEN, TWO_HUNDRED = (8.73809524e-05, 1.89833333), (0.00016927, 0.45666666)
MANY = 4300


def empirical_mu(tokens: int, steps: int) -> float:
    """The shift of an image of so many tokens, those of references not counted. It jumps at ``MANY`` tokens: of 4 steps
    from 2.31 to 1.18."""
    at_10, at_200 = (slope * tokens + offset for slope, offset in (TEN, TWO_HUNDRED))
    if tokens > MANY:
        return at_200
    slope = (at_200 - at_10) / 190.0
    return slope * steps + (at_200 - 200.0 * slope)


@dataclasses.dataclass(frozen=True)
class Flux2Schedule(Euler):
    """Flow-matching Euler times, as diffusers' FlowMatchEulerDiscreteScheduler has them for FLUX.2."""

    time_shift: bool  # by ``empirical_mu``, else by the constant ``shift``
    shift: float

    @classmethod
    def of(
        cls,
        config: Mapping[str, Any],
        time_shift: bool | None = None,
        base_shift: float | None = None,
        max_shift: float | None = None,
    ) -> Flux2Schedule:
        """From ``scheduler_config.json``; ``time_shift`` wins if it is not None. UserError for samplers that this is
        not."""
        for key, value in (("base_shift", base_shift), ("max_shift", max_shift)):
            if value is not None:
                raise UserError(
                    f"sampler.{key}={value:g}: expected null: FLUX.2's schedule has its own shift for each number "
                    "of tokens and steps"
                )
        cls.check(config)
        if (shift := cls.number(config, "shift", 1.0)) <= 0:
            raise UserError(f"scheduler_config.json: shift is {shift:g}, expected a number above 0")
        return cls(bool(config.get("use_dynamic_shifting", False) if time_shift is None else time_shift), float(shift))

    def sigmas(self, steps: int, tokens: int) -> np.ndarray:
        """``[steps + 1]`` float32 noise levels from 1 down to 0 for an image of ``tokens`` tokens."""
        return self.shifted(np.linspace(1.0, 1 / steps, steps), tokens)

    def shifted(self, sigmas: Sequence[float] | np.ndarray, tokens: int) -> np.ndarray:
        """``[len(sigmas) + 1]``: ``sigmas`` shifted, as of so many steps, and a 0 behind them."""
        sigmas = np.asarray(sigmas, np.float32)
        if self.time_shift:
            factor = math.exp(empirical_mu(tokens, len(sigmas)))
            sigmas = (factor / (factor + (1 / sigmas - 1))).astype(np.float32)
        else:
            sigmas = self.by_constant(self.shift, sigmas)
        return np.append(sigmas, 0).astype(np.float32)
