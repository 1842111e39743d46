"""A transformer one block at a time, for devices and hosts smaller than the transformer.

Every step goes through the blocks anew; the next one is read and put on the devices while this one computes.
The layers that make their step inputs have passed before, once for all steps. Blocks that are the same in all steps
pass in the first one alone.
They come from the checkpoint, that is from the page cache as long as the host's memory holds the file, else from
disk or bucket; or, where they are held, from pinned host memory after the first step. At most two blocks (0.9 GB
of a 12B transformer in bfloat16) are on the devices, and in the host's memory if it does not hold them all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
from flax import nnx

from fluxbatch.weights import load
from fluxbatch.weights.device_weights import DeviceWeights, moved

Part = tuple[Any, Any]  # graph definition and parameters
Reading = Callable[[], contextlib.AbstractContextManager[load.Progress]]
Name = tuple[str, int]  # of a block or a step layer: its stack, and its number there
Ahead = contextlib.AbstractContextManager[Iterator[tuple[Name, Part]]]


def _unreported() -> contextlib.AbstractContextManager[load.Progress]:
    return contextlib.nullcontext(lambda count: None)


class StreamedWeights(DeviceWeights):
    """By itself it is what lies in no block; ``blocks`` has the others."""

    def __init__(self, plan: load.Plan, mesh: jax.sharding.Mesh, dtype: Any, edits: load.Edits, hold: bool = False):
        """``hold``: keep the blocks in pinned host memory."""
        self._whole, self._hold = plan, hold
        self._held: dict[Name, Any] = {}
        self._stream = nnx.merge(plan.graph, plan.state).stream()
        self._names = [(stack, i) for stack, count in self._stream.blocks for i in range(count)]
        self._shapes = {path: _abstract(make) for path, make in self._stream.makers.items()}
        graph, state = _abstract(self._stream.rest)
        pieces = {path: plan.pieces[path] for path in _paths(state)}
        super().__init__(load.Plan(plan.source, graph, state, pieces), mesh, dtype, edits)
        self._block_dtype = dataclasses.replace(self.dtype, block=True)

    def merge(self, edits: load.Edits) -> None:
        super().merge(edits)
        self._held.clear()

    def step_layers(self, reading: Reading = _unreported) -> Ahead:
        """The layers that make the blocks' step inputs, with their names; to be used with ``with``. ``reading``: what
        surrounds each one's reading and gets its bytes' count, in a thread."""
        return _ahead(
            itertools.chain.from_iterable(map(self.step_layers_of, self._names)), functools.partial(self._part, reading)
        )

    def step_layers_of(self, name: Name) -> list[Name]:
        """The names of a block's own."""
        return [(layer, name[1]) for layer in self._stream.step_layers[name[0]]]

    def passes(self, steps: int, references: bool) -> list[list[Name]]:
        """The names of the blocks that each step needs, in order; ``references``: whether there are such pictures."""
        first = [name for name in self._names if references or name[0] not in self._stream.references]
        return [first, *[[name for name in first if name[0] not in self._stream.still]] * (steps - 1)]

    def still(self, name: Name, x: Any) -> dict[str, Any]:
        """What later steps need of ``x`` after the block of this name, which they are without."""
        field = self._stream.still.get(name[0])
        return {field: getattr(x, field)} if field else {}

    def blocks(self, names: Iterable[Name], reading: Reading = _unreported) -> Ahead:
        """The blocks of these names; as ``step_layers``."""
        return _ahead(iter(names), functools.partial(self._part, reading))

    def _part(self, reading: Reading, name: Name) -> Part:
        if name in self._held:
            graph, state = self._held[name]
            return graph, jax.block_until_ready(moved(state, "device"))
        (stack, layer), (graph, state) = name, self._shapes[name[0]]
        pieces = {path: [self._whole.pieces[f"{stack}.{path}"][layer]] for path in _paths(state)}
        edits = {(path, 0): edit for path in pieces if (edit := self.edits.get((f"{stack}.{path}", layer)))}
        with reading() as progress:
            plan = load.Plan(self._whole.source, graph, state, pieces)
            part = nnx.split(load.load(plan, self.mesh, self._block_dtype, progress, edits))
            jax.block_until_ready(part)
        if self._hold:
            self._held[name] = part[0], jax.block_until_ready(moved(part[1], "pinned_host"))
        return part


def _abstract(make: Callable[[nnx.Rngs | None], nnx.Module]) -> Part:
    return nnx.split(make(None), nnx.Param, ...)[:2]


def _paths(state: Any) -> list[str]:
    return [load.path_of(keys) for keys, _ in nnx.to_flat_state(state)]


@contextlib.contextmanager
def _ahead(names: Iterator[Name], make: Callable[[Name], Part]) -> Iterator[Iterator[tuple[Name, Part]]]:
    """Each name and what ``make`` makes of it, the next one under way in a thread."""
    pool = ThreadPoolExecutor(1, "blocks")
    under_way: list[tuple[Name, Future[Part]]] = []

    def advance() -> None:
        under_way.extend((name, pool.submit(make, name)) for name in itertools.islice(names, 1))

    def parts() -> Iterator[tuple[Name, Part]]:
        while under_way:
            name, future = under_way.pop()
            part = [future.result()]
            del future  # nor does this frame keep the part, while another one computes with it
            advance()
            yield name, part.pop()

    advance()
    try:
        yield parts()
    finally:
        pool.shutdown(cancel_futures=True)
