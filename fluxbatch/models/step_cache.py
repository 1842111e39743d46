"""The first-block cache: a step whose first block changes its images as the last computed step did is not computed.

As diffusers' FirstBlockCache, but each row of a batch decides by its own numbers, so that an image does not depend on
its batch. What a step saves is saved where all rows skip it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class StepCache(NamedTuple):
    """Of each row, from its last computed step."""

    head: Float[Array, "B L D"]  # what the first block added to the image tokens
    tail: Float[Array, "B L D"]  # what all other blocks added after it
    computed: Int[Array, " B"]  # how many steps were computed


def fresh(rows: int, tokens: int, width: int, dtype: jax.typing.DTypeLike) -> StepCache:
    """Before the first step, which is always computed."""
    shape = rows, tokens, width
    return StepCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(rows, jnp.int32))


def cached(
    before: Float[Array, "B L D"], after: Float[Array, "B L D"], cache: StepCache, threshold: Float[Array, ""],
    live: Bool[Array, " B"], rest: Callable[[], Array],
) -> tuple[Float[Array, "B L D"], StepCache]:  # fmt: skip
    """The image tokens ``[B, L, D]`` after all blocks, and the cache of the next step.

    ``before``, ``after``: those that the first block reads and leaves. A row is computed if what the block adds differs
    from what it added at the row's last computed step by more than ``threshold`` of it, in the mean of magnitudes.
    ``live`` ``[B]``: rows that have this step at all. ``rest``: the other blocks, run if any row is computed.
    """
    head = after - before
    change, size = (_magnitude(x) for x in (head - cache.head, cache.head))
    needed = live & ((cache.computed == 0) | (change / size > threshold))
    out = jax.lax.cond(jnp.any(needed), rest, lambda: after)
    own = needed[:, None, None]
    done = StepCache(jnp.where(own, head, cache.head), jnp.where(own, out - after, cache.tail), cache.computed + needed)
    return jnp.where(own, out, after + cache.tail), done


def _magnitude(x: Float[Array, "B L D"]) -> Float[Array, " B"]:
    return jnp.mean(jnp.abs(x.astype(jnp.float32)), axis=(1, 2))
