"""What the stores of objects in buckets share."""

from __future__ import annotations

import abc
import contextlib
import io
import re
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeVar

from google.api_core.retry import Retry

from fluxbatch.storage.base import NotFound, StorageError, join
from fluxbatch.types import UserError

T = TypeVar("T")


class Taken(StorageError):
    """``if_absent``, and the name was taken."""


class ObjectStore(abc.ABC):
    """``SCHEME://bucket/prefix``.

    Every operation is tried again, with growing pauses, while ``may_pass`` says so of its error, and for ``deadline``
    seconds with all its attempts. All of them may be repeated: objects are written whole, so a doubled write leaves
    what a single one does.
    """

    scheme: ClassVar[str]

    def __init__(self, url: str, may_pass: Callable[[BaseException], bool], deadline: float):
        self.url = url.rstrip("/")
        self._bucket_name, _, self._prefix = self.url.removeprefix(f"{self.scheme}://").partition("/")
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*[a-z0-9]", self._bucket_name):
            raise UserError(f"{url}: expected {self.scheme}://bucket/prefix")
        self._retry = Retry(predicate=may_pass, initial=0.2, maximum=20.0, multiplier=2.0, timeout=deadline)

    @abc.abstractmethod
    def read(self, name: str) -> bytes: ...

    @abc.abstractmethod
    def list(self, prefix: str = "") -> Iterator[str]: ...

    @abc.abstractmethod
    def _put(self, name: str, data: bytes, if_absent: bool) -> None:
        """One attempt to write. What it raises where the name is taken, is ``Taken`` once it is translated."""

    @abc.abstractmethod
    def _translated(self, place: str, missing: str = "") -> contextlib.AbstractContextManager[None]:
        """Turns what the client library raises into one line, of which no part is a credential. ``missing``: what it
        means where the server finds nothing."""

    def check(self) -> None:
        """Raises StorageError when the bucket is not there or may not be used: now, not in an hour."""
        next(self.list(), None)

    def write(self, name: str, data: bytes, *, if_absent: bool = False) -> bool:
        try:
            self._attempt(name, lambda: self._put(name, data, if_absent), missing="the bucket does not exist")
        except Taken:
            # perhaps by an earlier attempt of ours, whose answer was lost
            with contextlib.suppress(NotFound):  # and was deleted meanwhile, as claims are at the end of all
                return self.read(name) == data
            return False
        return True

    def sweep(self) -> None:  # noqa: B027 (nothing to do)
        """Nothing: an upload that is cut off leaves no object."""

    def hold(self, name: str, *, shared: bool) -> contextlib.AbstractContextManager[None]:
        """Nothing: a lock on an object would outlive a killed process."""
        return contextlib.nullcontext()

    def _attempt(self, name: str, action: Callable[[], T], missing: str = "") -> T:
        with self._translated(join(self.url, name) if name else self.url, missing):
            return self._retry(action)()


def place_and_name(url: str) -> tuple[str, str]:
    """The address of an object's folder, and its name there."""
    place, _, name = url.rpartition("/")
    if place.endswith(":/") or not name:
        raise UserError(f"{url}: expected {url.partition(':')[0]}://bucket/name")
    return place, name


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
