"""FLUX one block at a time, for devices and hosts smaller than the transformer.

Every step goes through the blocks anew; the next one is read and put on the devices while this one computes.
They come from the checkpoint, that is from the page cache as long as the host's memory holds the file, else from
disk or bucket; or, where they are held, from pinned host memory after the first step. At most two blocks (1.4 GB
of FLUX.1 in bfloat16) are on the devices, and in the host's memory if it does not hold them all.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
from flax import nnx

from fluxbatch.models.flux import DoubleBlock, Flux, SingleBlock
from fluxbatch.weights import load
from fluxbatch.weights.network import Network, moved

Part = tuple[Any, Any]  # graph definition and parameters
Name = tuple[str, int]  # of a block: its stack, and its place there


class StreamedFlux(Network):
    """As a network it is what lies in no block; ``blocks`` has the others."""

    def __init__(self, plan: load.Plan, mesh: jax.sharding.Mesh, dtype: Any, edits: load.Edits, hold: bool = False):
        """``hold``: keep the blocks in pinned host memory."""
        self._whole, self._hold, self._held = plan, hold, {}
        flux = nnx.merge(plan.graph, plan.state)
        cfg = flux.cfg
        self._names = [("double_blocks", i) for i in range(cfg.num_layers)] + [("single_blocks", i) for i in range(cfg.num_single_layers)]
        makers = {"double_blocks": lambda rngs: DoubleBlock(cfg, rngs=rngs), "single_blocks": lambda rngs: SingleBlock(cfg, rngs=rngs)}
        self._shapes = {stack: _abstract(make) for stack, make in makers.items()}
        bare = dataclasses.replace(cfg, num_layers=0, num_single_layers=0)
        graph, state = _abstract(lambda rngs: Flux(bare, rngs=rngs, attention=flux.attention, split_head_dim=flux.split_head_dim))
        pieces = {path: plan.pieces[path] for path in _paths(state)}
        super().__init__(load.Plan(plan.source, graph, state, pieces), mesh, dtype, edits)

    def __len__(self) -> int:
        return len(self._names)

    def merge(self, edits: load.Edits) -> None:
        super().merge(edits)
        self._held.clear()

    def blocks(self, steps: int) -> _Ahead:
        """All blocks in their order, ``steps`` times over; to be used with ``with``."""
        return _Ahead(itertools.chain.from_iterable(itertools.repeat(self._names, steps)), self._block)

    def _block(self, name: Name) -> Part:
        if name in self._held:
            graph, state = self._held[name]
            return graph, jax.block_until_ready(moved(state, "device"))
        (stack, layer), (graph, state) = name, self._shapes[name[0]]
        pieces = {path: [self._whole.pieces[f"{stack}.{path}"][layer]] for path in _paths(state)}
        edits = {(path, 0): edit for path in pieces if (edit := self.edits.get((f"{stack}.{path}", layer)))}
        block = nnx.split(load.load(load.Plan(self._whole.source, graph, state, pieces), self.mesh, self.dtype, edits=edits))
        if self._hold:
            self._held[name] = block[0], jax.block_until_ready(moved(block[1], "pinned_host"))
        return jax.block_until_ready(block)


def _abstract(make: Callable[[nnx.Rngs], nnx.Module]) -> Part:
    return nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param, ...)[:2]


def _paths(state: Any) -> list[str]:
    return [load.path_of(keys) for keys, _ in nnx.to_flat_state(state)]


class _Ahead:
    """What ``make`` makes of each name, the next one under way in a thread."""

    def __init__(self, names: Iterator[Name], make: Callable[[Name], Part]):
        self._names, self._make = names, make
        self._next: Future[Part] | None = None

    def __enter__(self) -> _Ahead:
        self._pool = ThreadPoolExecutor(1, "blocks")
        self._advance()
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._next = None

    def __iter__(self) -> _Ahead:
        return self

    def __next__(self) -> Part:
        if self._next is None:
            raise StopIteration
        made = self._next.result()
        self._advance()
        return made

    def _advance(self) -> None:
        name = next(self._names, None)
        self._next = None if name is None else self._pool.submit(self._make, name)
