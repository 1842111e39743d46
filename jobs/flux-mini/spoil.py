"""Runs ``fluxbatch.run`` with one thing broken on purpose, for ``evaluate.py --spoil``.

python jobs/flux-mini/spoil.py rope manifest=prompts.jsonl
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import jax.numpy as jnp

from fluxbatch import run
from fluxbatch.models import dit
from fluxbatch.models.flux1 import t5, transformer


def rope() -> None:
    """RoPE with base 1,000 in place of 10,000."""
    transformer.ROPE_BASE = 1_000


def modulation() -> None:
    """Shift and scale take each other's place."""
    right = transformer.modulate
    transformer.modulate = lambda x, shift, scale: right(x, scale, shift)


def text() -> None:
    """The T5 tokens say nothing; the pooled CLIP vector stays."""
    right = t5.T5Encoder.__call__
    t5.T5Encoder.__call__ = lambda *args, **kwargs: jnp.zeros_like(right(*args, **kwargs))


def timestep() -> None:
    """The angles of the timestep embedding in bfloat16."""
    half = dit.TIME_CHANNELS // 2

    def embedding(t):
        freqs = jnp.exp(-jnp.log(10_000.0) * jnp.arange(half) / half).astype(jnp.bfloat16)
        angles = ((dit.TIME_FACTOR * t).astype(jnp.bfloat16)[:, None] * freqs).astype(jnp.float32)
        return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)

    transformer.timestep_embedding = embedding


SPOILS: dict[str, Callable[[], None]] = {f.__name__: f for f in (rope, modulation, text, timestep)}

if __name__ == "__main__":
    SPOILS[sys.argv.pop(1)]()
    run.main()
