"""What a shard's prompts encode to, and the cache of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from fluxbatch.distributed.process_group import ProcessGroup
from fluxbatch.models.family import Conditioning, Family, TextInput, padded_to
from fluxbatch.storage.cache import Cache
from fluxbatch.types import Row


class Encoders(Protocol):
    """What of ``pipeline.Pipeline`` is needed here."""

    family: Family
    group: ProcessGroup

    def encode(self, inputs: Any, rows: Sequence[Row]) -> Conditioning: ...

    def text_lora_weights(self, row: Row) -> Hashable: ...


State = tuple[np.ndarray, ...]  # the arrays of one prompt's conditioning, without the batch axis


@dataclasses.dataclass(frozen=True)
class PromptEmbeds:
    """What a shard's distinct prompts encode to, on the host."""

    states: Mapping[Any, State]
    keys: Callable[[Row], Sequence[Hashable]]  # of the row's prompt, and of its negative one if it has one
    encoded: frozenset[Hashable]  # the keys of those that were not in the cache
    conditioning: Callable[..., Conditioning]  # the family's, of its arrays

    def batch(self, rows: Sequence[Row]) -> tuple[Conditioning, ...]:
        """``[B, …]`` of the rows of a batch: of their prompts, and of their negative ones if they have such."""
        by_prompt = zip(*(self.keys(row) for row in rows), strict=True)
        columns = (zip(*(self.states[key] for key in keys), strict=True) for keys in by_prompt)
        return tuple(self.conditioning(*map(np.stack, each)) for each in columns)


@dataclasses.dataclass(frozen=True)
class TextCache:
    """What prompts encoded to in other jobs, bit by bit: an entry's name is a digest of all that decides it.

    ``of``: what that is for a row, besides its token ids, its LoRA weights and the size of a batch.
    """

    entries: Cache
    of: Callable[[Row], Hashable]

    def name(self, row: Row, ids: Sequence[np.ndarray], *more: Hashable) -> str:
        return hashlib.sha256(repr((self.of(row), *more, [x.tolist() for x in ids])).encode()).hexdigest()

    def read(self, names: Sequence[str], group: ProcessGroup) -> list[State | None]:
        """The states of those names that every process of the replica has."""
        found = [_unpacked(data) if (data := self.entries.get(name)) is not None else None for name in names]
        everywhere = group.all_have([state is not None for state in found])
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
    return tuple(arrays)


def texts(inputs: Sequence[TextInput], row: Row) -> list[tuple[str, ...]]:
    """What the text encoders read of a row: its prompt's texts, and those of its negative prompt if it has one."""
    return [tuple(each.text(row, negative) for each in inputs) for negative in (False, True)[: 1 + row.mode.negative]]


def read_of(inputs: Sequence[TextInput], row: Row) -> list[tuple[tuple[str, ...], tuple[int, ...]]]:
    """``texts``, each with the lengths that it is padded to; none where they are the job's."""
    found = texts(inputs, row)
    return list(zip(found, row.mode.texts or [()] * len(found), strict=True))


def encode(
    rows: Iterable[Row],
    inputs: Sequence[TextInput],
    encoders: Encoders,
    batch_size: int,
    cache: TextCache | None = None,
) -> PromptEmbeds:
    """Encodes each distinct prompt once, ``batch_size`` of one length at a time (one compiled shape); where adapters
    change the encoders, once for each of the LoRA weights. What is in ``cache`` is taken from there.
    """

    def keys_of(row: Row) -> list[tuple[Any, ...]]:
        return [(*each, encoders.text_lora_weights(row)) for each in read_of(inputs, row)]

    by_lengths: dict[tuple[int, ...], dict[Any, Row]] = {}
    for row in rows:
        for key in keys_of(row):
            by_lengths.setdefault(key[1], {}).setdefault(key, row)
    states: dict[Any, State] = {}
    encoded: set[Hashable] = set()
    for lengths, distinct in by_lengths.items():
        found, lacking = _encode(distinct, padded_to(inputs, lengths), encoders, batch_size, cache)
        states |= found
        encoded |= lacking
    if cache and encoded:
        cache.entries.trim()
    return PromptEmbeds(states, keys_of, frozenset(encoded), encoders.family.conditioning)


def _encode(
    distinct: Mapping[Any, Row],
    inputs: Sequence[TextInput],
    encoders: Encoders,
    batch_size: int,
    cache: TextCache | None,
) -> tuple[dict[Any, State], set[Hashable]]:
    """The states of prompts of one length, by key, and the keys of those that were not in the cache."""
    keys, own = list(distinct), list(distinct.values())
    arrays = tuple(each([key[0][i] for key in keys]) for i, each in enumerate(inputs))
    names = (
        [cache.name(row, _of(arrays, i), encoders.text_lora_weights(row), batch_size) for i, row in enumerate(own)]
        if cache
        else []
    )
    states = {
        keys[i]: state
        for i, state in enumerate(cache.read(names, encoders.group) if cache else ())
        if state is not None
    }
    lacking = [i for i, key in enumerate(keys) if key not in states]

    def collect(chunk: list[int], encoded: Conditioning) -> None:
        whole = [encoders.group.whole(array) for array in encoded]
        for at, i in enumerate(chunk):
            states[keys[i]] = tuple(array[at] for array in whole)
            if cache:
                cache.write(names[i], states[keys[i]])

    before = None
    for at in range(0, len(lacking), batch_size):
        chunk = lacking[at : at + batch_size]
        full = chunk + [chunk[-1]] * (batch_size - len(chunk))
        launched = encoders.encode(tuple(tuple(x[full] for x in each) for each in arrays), [own[i] for i in full])
        if before is not None:  # copied back while the device encodes the next ones
            collect(*before)
        before = chunk, launched
    if before is not None:
        collect(*before)
    return states, {keys[i] for i in lacking}


def _of(arrays: Sequence[Sequence[np.ndarray]], i: int) -> list[np.ndarray]:
    """What the encoders read of text ``i``."""
    return [x[i] for each in arrays for x in each]
