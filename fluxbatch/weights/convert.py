"""Writes a checkpoint in the converted layout of ``zarr.py``: shard by shard, resumable, marker last."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorstore as ts
from flax import nnx

from fluxbatch.types import UserError
from fluxbatch.weights import load, zarr
from fluxbatch.weights.checkpoint import Checkpoint
from fluxbatch.weights.matching import Piece
from fluxbatch.weights.source import Source
from fluxbatch.weights.staging import Index, StagingBuffer
from fluxbatch.weights.tokenizer_files import TOKENIZER_FILES

WRITING = 256 << 20  # bytes of writes under way


@dataclasses.dataclass(frozen=True)
class Array:
    """One parameter to write."""

    component: str
    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    stacked: bool
    pieces: list[Piece]
    source: Source

    @property
    def file(self) -> tuple[int, ...]:
        return zarr.grid(self.shape, self.stacked, self.dtype.itemsize)[0]

    def blocks(self) -> Iterator[tuple[int, int, list[str]]]:
        """Layers ``a`` .. ``b`` that are written at once, and the names of their files."""
        layers = self.file[0] if self.stacked else 1
        counts = [math.ceil(n / m) for n, m in zip(self.shape, self.file, strict=True)]
        for a in range(0, len(self.pieces), layers):
            within = counts[1:] if self.stacked else counts
            indices = [index if not self.stacked else (a // layers, *index) for index in np.ndindex(*within)]
            names = [f"{self.component}/{self.path}/c/{'/'.join(map(str, index))}" for index in indices]
            yield a, min(a + layers, len(self.pieces)), names


class Block(StagingBuffer):
    """Layers on their way into an array: one buffer on the host."""

    def __init__(self, array: Array, first: int, last: int):
        shape = (last - first, *array.shape[1:]) if array.stacked else array.shape
        self.shape, self._array, self._first = array.shape, array, first
        self.buffer = np.empty(shape, array.dtype)

    def open(self, layer: int, dtype: np.dtype) -> list[tuple[Index, np.ndarray]]:
        buffer = self.buffer[layer - self._first] if self._array.stacked else self.buffer
        return [(tuple((0, n) for n in buffer.shape), buffer)]

    def close(self, layer: int, scale: np.ndarray | None) -> None:
        pass

    def array(self) -> Any:
        return self.buffer


def arrays(checkpoint: Checkpoint, dtype: np.dtype | None) -> list[Array]:
    """What is to be written. ``dtype`` None: each parameter's own, and bfloat16 for fp8."""
    found = []
    for name, component in checkpoint.components.items():
        plan = component.whole_plan()
        for keys, leaf in nnx.to_flat_state(plan.state):
            path, shape = load.path_of(keys), leaf.get_value().shape
            pieces = plan.pieces[path]
            stacked = len(shape) > len(leaf.get_metadata()["axes"])
            found.append(Array(name, path, shape, dtype or _own_dtype(pieces), stacked, pieces, plan.source))
    return found


def _own_dtype(pieces: list[Piece]) -> np.dtype:
    dtypes = {piece.tensor.dtype for piece in pieces}
    (own,) = dtypes if len(dtypes) == 1 else (np.dtype(np.float32),)
    return zarr.BFLOAT16 if own.itemsize == 1 else own


def convert(checkpoint: Checkpoint, to: str, dtype: np.dtype | None, progress: load.Progress = lambda _: None) -> bool:
    """Writes the checkpoint to directory ``to`` (local, ``gs://`` or ``s3://``); False if it is there already.

    Files that an earlier, interrupted conversion of the same checkpoint has written are kept. Raises
    UserError when ``to`` holds anything else, and for what cannot be read or written.
    """
    todo = arrays(checkpoint, dtype)
    digest = origin = checkpoint.digest()
    tensors = [(a.dtype, p.tensor) for a in todo for p in a.pieces]
    if any(tensor.scale is not None or np.promote_types(tensor.dtype, to) != to for to, tensor in tensors):  # rounded
        digest = hashlib.sha256(f"{origin} {sorted({a.dtype.name for a in todo})}".encode()).hexdigest()[:16]
    header = {"format": zarr.FORMAT, "digest": digest, "revision": checkpoint.revision}
    root = Source(to)
    written = _written(root, header)
    if written is None:
        return False
    write = _Writer(root)
    write.file(zarr.STARTED, header)
    opening = {id(array): write.start_open(array) for array in todo}
    for array in todo:
        reader = load.Reader(array.source, progress)
        scales = load.read_scales(array.pieces, reader)
        for first, last, names in array.blocks():
            if written.issuperset(names):
                progress(sum(p.tensor.row_bytes * (b - a) for p in array.pieces[first:last] for a, b in p.rows))
                continue
            block = Block(array, first, last)
            for layer in range(first, last):
                load.fill(block, layer, array.pieces[layer], scales.get(id(array.pieces[layer].tensor)), reader)
            reader.drain()
            target = root.wait_written(opening[id(array)], f"{array.component}/{array.path}")
            write.block(target[first:last] if array.stacked else target, block.buffer, names[0])
    write.drain()
    _write_rest(checkpoint, write)
    index = {
        name: {a.path: dict(shape=a.shape, dtype=a.dtype.name, stacked=a.stacked) for a in todo if a.component == name}
        for name in checkpoint.components
    }
    write.file(zarr.MARKER, header | {"components": index})
    root.write(zarr.STARTED, None)
    return True


def _written(root: Source, header: Mapping[str, Any]) -> set[str] | None:
    """Files that an earlier start has written; None when all is done. UserError where another checkpoint lies."""
    if root.exists(zarr.MARKER) or root.exists(zarr.STARTED):
        name = zarr.MARKER if root.exists(zarr.MARKER) else zarr.STARTED
        there = root.json(name)
        if {key: there.get(key) for key in header} != dict(header):
            digests = f"digest {there.get('digest')}, this one has {header['digest']}"
            what = f"is of another checkpoint or of other weights_dtype ({digests})"
            raise UserError(f"{root.path(name)}: {what}: choose another directory or delete it")
        return None if name == zarr.MARKER else set(root.files())
    if (os.path.isdir(root.url) and os.listdir(root.url)) if root.local else root.files():
        raise UserError(f"{root.url}: holds something else: expected a new or empty directory")
    return set()


def _write_rest(checkpoint: Checkpoint, write: _Writer) -> None:
    """Configs and tokenizers, where diffusers has them."""
    for name, component in checkpoint.components.items():
        write.file(f"{name}/config.json", {**component.definition.saved, **dataclasses.asdict(component.config)})
    write.file("scheduler/scheduler_config.json", dict(checkpoint.scheduler))
    for name, folder in checkpoint.tokenizers.items():
        for file in TOKENIZER_FILES:
            if os.path.exists(path := os.path.join(folder, file)):
                with open(path, "rb") as f:
                    write.root.write(f"{name}/{file}", f.read())
    write.file("model_index.json", {"_class_name": checkpoint.family.pipelines[0], **checkpoint.family.index()})


class _Writer:
    """Files into a directory; every error names its file."""

    def __init__(self, root: Source):
        self.root = root
        self._pending: collections.deque[tuple[Any, str, int]] = collections.deque()

    def start_open(self, array: Array) -> ts.Future[Any]:
        url = self.root.path(f"{array.component}/{array.path}")
        return ts.open(zarr.spec(url, array.shape, array.dtype, array.stacked), open=True, create=True)

    def block(self, target: ts.TensorStore, values: np.ndarray, name: str) -> None:
        self.drain(down_to=WRITING - values.nbytes)
        self._pending.append((target.write(values), name, values.nbytes))

    def drain(self, down_to: int = 0) -> None:
        """Waits until at most so many bytes are under way."""
        while self._pending and (down_to <= 0 or sum(size for *_, size in self._pending) > down_to):
            future, name, _ = self._pending.popleft()
            self.root.wait_written(future, name)

    def file(self, name: str, value: Mapping[str, Any]) -> None:
        self.root.write(name, json.dumps(value, indent=1).encode() + b"\n")
