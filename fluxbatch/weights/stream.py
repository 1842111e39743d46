"""FLUX one block at a time, for devices and hosts smaller than the transformer.

Every step reads the blocks anew, from the page cache as long as the host's memory holds the file, else from
disk or bucket; the next block is read and put on the devices while this one computes. At most two blocks
(1.4 GB of FLUX.1 in bfloat16) are in memory, on the host and on the devices.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fluxbatch.models.flux import DoubleBlock, Flux, SingleBlock
from fluxbatch.weights import load


class StreamedFlux:
    """The transformer of a plan; only what is not in a block stays on the devices."""

    def __init__(self, plan: load.Plan, mesh: jax.sharding.Mesh, dtype: Any, edits: load.Edits | None = None):
        self.plan, self.mesh, self.dtype, self.edits = plan, mesh, dtype, edits or {}
        whole = nnx.merge(plan.graph, plan.state)
        self.cfg = cfg = whole.cfg
        self._names = [("double_blocks", i) for i in range(cfg.num_layers)] + [("single_blocks", i) for i in range(cfg.num_single_layers)]
        self._make = {"double_blocks": lambda rngs: DoubleBlock(cfg, rngs=rngs), "single_blocks": lambda rngs: SingleBlock(cfg, rngs=rngs)}
        bare = dataclasses.replace(cfg, num_layers=0, num_single_layers=0)
        options = dict(attention=whole.attention, split_head_dim=whole.split_head_dim)
        self._rest = self._load(lambda rngs: Flux(bare, rngs=rngs, **options))

    def velocity(self, img: jax.Array, txt: jax.Array, pooled: jax.Array, t: jax.Array, guidance: jax.Array, rope: Any,
                 blocks: Iterator[nnx.Module]) -> jax.Array:  # fmt: skip
        """What ``Flux.__call__`` returns, with the blocks of one step taken from ``blocks``."""
        img, txt, vec = _embed(self._rest, img, txt, pooled, t, guidance)
        x, words = (img, txt), txt.shape[1]
        for name, _ in self._names:
            if name == "single_blocks" and isinstance(x, tuple):
                x = jnp.concatenate(x[::-1], axis=1)
            x = _block(next(blocks), self._rest, x, vec, rope)
            jax.block_until_ready(x)  # or blocks would pile up behind the computation
        return _finish(self._rest, x[0] if isinstance(x, tuple) else x[:, words:], vec)

    def denoise(self, latents: jax.Array, text: jax.Array, pooled: jax.Array, sigmas: jax.Array, counts: jax.Array,
                guidance: jax.Array, rope: Any, compute: Any) -> jax.Array:  # fmt: skip
        """Euler steps as the pipeline takes them: latents ``[B, L, 4C]`` float32, sigmas ``[B, S + 1]``,
        counts ``[B]``; ``compute`` is the dtype of the activations."""
        steps = int(np.max(jax.device_get(counts)))
        with self.blocks(steps) as blocks:
            for i in range(steps):
                velocity = self.velocity(latents.astype(compute), text, pooled, sigmas[:, i], guidance, rope, blocks)
                latents = _euler(latents, velocity, sigmas[:, i], sigmas[:, i + 1], i < counts)
        return latents

    def blocks(self, steps: int) -> _Ahead:
        """All blocks in their order, ``steps`` times over; to be used with ``with``."""
        names = itertools.chain.from_iterable(itertools.repeat(self._names, steps))
        return _Ahead(names, lambda name: self._load(self._make[name[0]], *name))

    def _load(self, make: Callable[[nnx.Rngs], nnx.Module], stack: str = "", layer: int = 0) -> nnx.Module:
        """The module that ``make`` builds, from its part of the plan: one layer of a stack, or what is in none."""
        graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param, ...)[:2]
        paths = [load.path_of(keys) for keys, _ in nnx.to_flat_state(state)]
        whole = {path: f"{stack}.{path}" if stack else path for path in paths}
        pieces = {path: [self.plan.pieces[whole[path]][layer]] for path in paths}
        edits = {(path, 0): edit for path in paths if (edit := self.edits.get((whole[path], layer)))}
        return load.load(load.Plan(self.plan.source, graph, state, pieces), self.mesh, self.dtype, edits=edits)


class _Ahead:
    """What ``make`` makes of each name, the next one under way in a thread."""

    def __init__(self, names: Iterator[Any], make: Callable[[Any], Any]):
        self._names, self._make = iter(names), make

    def __enter__(self) -> _Ahead:
        self._pool = ThreadPoolExecutor(1, "blocks")
        self._advance()
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._next = None

    def __iter__(self) -> _Ahead:
        return self

    def __next__(self) -> Any:
        if self._next is None:
            raise StopIteration
        made = self._next.result()
        self._advance()
        return made

    def _advance(self) -> None:
        name = next(self._names, None)
        self._next = None if name is None else self._pool.submit(self._make, name)


@nnx.jit
def _embed(rest: Flux, img: jax.Array, txt: jax.Array, pooled: jax.Array, t: jax.Array, guidance: jax.Array):
    return rest.embed(img, txt, pooled, t, guidance)


@nnx.jit
def _block(block: nnx.Module, rest: Flux, x: Any, vec: jax.Array, rope: Any):
    return block(*x, vec, rope, rest) if isinstance(block, DoubleBlock) else block(x, vec, rope, rest)


@nnx.jit
def _finish(rest: Flux, img: jax.Array, vec: jax.Array) -> jax.Array:
    return rest.finish(img, vec)


@functools.partial(jax.jit, donate_argnums=0)
def _euler(x: jax.Array, velocity: jax.Array, now: jax.Array, then: jax.Array, moves: jax.Array) -> jax.Array:
    moved = x + (then - now)[:, None, None] * velocity.astype(jnp.float32)
    return jnp.where(moves[:, None, None], moved, x)
