"""What a shard's prompts encode to, and the cache of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from fluxbatch.distributed import process_group
from fluxbatch.storage.cache import Cache
from fluxbatch.types import Row


class Encoders(Protocol):
    """What of ``pipeline.Pipeline`` is needed here."""

    def encode(self, clip_ids: np.ndarray, t5_ids: np.ndarray, rows: Sequence[Row]) -> tuple[Any, Any]: ...

    def text_mix(self, row: Row) -> Hashable: ...


Tokenize = Callable[[Sequence[str], Sequence[str]], tuple[np.ndarray, np.ndarray]]  # as tokens.Tokenizers does
State = tuple[np.ndarray, np.ndarray]  # T5's states [T, D] and CLIP's pooled vector [P] of one prompt


@dataclasses.dataclass(frozen=True)
class TextStates:
    """What a shard's distinct prompts encode to, on the host."""

    states: dict[Hashable, State]
    key: Callable[[Row], Hashable]
    encoded: frozenset[Hashable]  # the keys of those that were not in the cache

    def batch(self, rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
        """T5 states ``[B, T, D]`` and pooled CLIP vectors ``[B, P]``."""
        states, pooled = zip(*(self.states[self.key(row)] for row in rows), strict=True)
        return np.stack(states), np.stack(pooled)


@dataclasses.dataclass(frozen=True)
class TextCache:
    """What prompts encoded to in other jobs, bit by bit: an entry's name is a digest of all that decides it.

    ``of``: what that is for a row, besides its token ids, its mix of adapters and the size of a batch.
    """

    entries: Cache
    of: Callable[[Row], Hashable]

    def name(self, row: Row, ids: Sequence[np.ndarray], *more: Hashable) -> str:
        return hashlib.sha256(repr((self.of(row), *more, [x.tolist() for x in ids])).encode()).hexdigest()

    def read(self, names: Sequence[str]) -> list[State | None]:
        """The states of those names that every process of the replica has."""
        found = [_unpacked(data) if (data := self.entries.get(name)) is not None else None for name in names]
        everywhere = process_group.all_have([state is not None for state in found])
        return [state if here else None for state, here in zip(found, everywhere, strict=True)]

    def write(self, name: str, state: State) -> None:
        self.entries.put(name, _packed(state))


def _packed(arrays: Sequence[np.ndarray]) -> bytes:
    head = json.dumps([[array.dtype.name, array.shape] for array in arrays]).encode()
    return b"\n".join([head, b"".join(array.tobytes() for array in arrays)])


def _unpacked(data: bytes) -> State:
    head, _, data = data.partition(b"\n")
    arrays, at = [], 0
    for dtype, shape in json.loads(head):
        array = np.frombuffer(data, jnp.dtype(dtype), math.prod(shape), at).reshape(shape)
        arrays.append(array)
        at += array.nbytes
    t5, pooled = arrays
    return t5, pooled


def encode(rows: Iterable[Row], tokenize: Tokenize, encoders: Encoders, batch_size: int, cache: TextCache | None = None) -> TextStates:
    """Encodes each distinct (prompt, prompt_2) once, ``batch_size`` at a time (one compiled shape);
    once for each mix where adapters change the encoders. What is in ``cache`` is taken from there.
    """

    def key(row: Row) -> Hashable:
        return row.prompt, row.prompt_2, encoders.text_mix(row)

    distinct = {key(row): row for row in rows}
    keys, own = list(distinct), list(distinct.values())
    clip_ids, t5_ids = tokenize([row.prompt for row in own], [row.prompt_2 for row in own])
    names = [cache.name(row, ids, encoders.text_mix(row), batch_size) for row, *ids in zip(own, clip_ids, t5_ids, strict=True)] if cache else []
    states = {keys[i]: state for i, state in enumerate(cache.read(names) if cache else ()) if state is not None}
    lacking = [i for i, key in enumerate(keys) if key not in states]

    def collect(chunk: list[int], encoded: tuple[Any, Any]) -> None:
        t5, pooled = process_group.whole(encoded[0]), process_group.whole(encoded[1])
        for at, i in enumerate(chunk):
            states[keys[i]] = t5[at], pooled[at]
            if cache:
                cache.write(names[i], states[keys[i]])

    before = None
    for at in range(0, len(lacking), batch_size):
        chunk = lacking[at : at + batch_size]
        full = chunk + [chunk[-1]] * (batch_size - len(chunk))
        launched = encoders.encode(clip_ids[full], t5_ids[full], [own[i] for i in full])
        if before is not None:  # copied back while the device encodes the next ones
            collect(*before)
        before = chunk, launched
    if before is not None:
        collect(*before)
        if cache:
            cache.entries.trim()
    return TextStates(states, key, frozenset(keys[i] for i in lacking))
