"""What the stores of objects in buckets share."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any


class PieceReader(io.RawIOBase):
    """``size`` bytes, of which ``piece(start)`` brings some that begin at ``start``."""

    def __init__(self, size: int, piece: Callable[[int], bytes]):
        self._size = size
        self._piece = piece
        self._position = 0
        self._held = b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: self._size}[whence]
        self._position, self._held = max(0, start + offset), b""
        return self._position

    def tell(self) -> int:
        return self._position - len(self._held)

    def readinto(self, buffer: Any) -> int:  # a memoryview: BufferedReader's
        if not self._held and self._position < self._size:
            self._held = self._piece(self._position)
            self._position += len(self._held)
        given, self._held = self._held[: len(buffer)], self._held[len(buffer) :]
        buffer[: len(given)] = given
        return len(given)


def content_type(name: str) -> str:
    """What browsers are to make of an object of this name."""
    types = {"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp", "html": "text/html; charset=utf-8"}
    types |= {"json": "application/json", "jsonl": "application/x-ndjson", "yaml": "application/yaml"}
    return types.get(name.rpartition(".")[2], "application/octet-stream")
