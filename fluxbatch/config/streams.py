"""Standard output and error that nobody may read, and that may not know every character."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class _Stream:
    """Standard output or error, which may be a pipe that nobody reads any more: what cannot be written is dropped."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._drop()

    def _drop(self) -> None:
        with contextlib.suppress(OSError):  # nor does what is left in the buffer, and what others write, reach anyone
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def whoever_reads() -> Iterator[None]:
    """Within, no print fails: neither for who reads it, nor for a character that the terminal does not know."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    # For those that are closed, in this order: each open takes the least free number, so no picture's file gets one
    # that compilers write to
    if sys.stdin is None:
        os.open(os.devnull, os.O_RDONLY)
    out, err = (
        _Stream(stream or open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  # open until the end
        for stream in (sys.stdout, sys.stderr)
    )
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            yield
        finally:
            for stream in (out, err):
                stream.flush()
