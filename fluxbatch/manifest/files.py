"""What ``manifest=…`` names → the files, in order, each as a stream of unpacked bytes."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, cast

from fluxbatch.config.schema import PACKED, STANDARD_INPUT, Job, manifests
from fluxbatch.storage.registry import find_files, open_stream
from fluxbatch.types import UserError

_PIECE = 1 << 20  # bytes unpacked at once
# What packed files begin with, and how they are unpacked
_PACKINGS: dict[bytes, tuple[str, Callable[[Any], Any]]] = {
    b"\x1f\x8b\x08": ("gzip", lambda stream: gzip.GzipFile(fileobj=stream, mode="rb")),
    b"BZh": ("bzip2", bz2.BZ2File),
    b"\xfd7zXZ\0": ("xz", lzma.LZMAFile),
    b"\x28\xb5\x2f\xfd": ("zstd", lambda stream: pyarrow("a manifest packed with zstd").input_stream(stream, "zstd")),
}


def find(job: Job) -> list[str]:
    """The files of ``job.manifest``: in the order of the list, and those of a pattern by name.

    Raises UserError for a pattern without a file, and for a file that comes up twice.
    """
    found: list[str] = []
    for given in manifests(job):
        files = find_files(given)
        if not files:
            raise UserError(f"manifest={given}: no file matches")
        if twice := {*found}.intersection(files):
            raise UserError(f"manifest: {min(twice)} comes up twice")
        found += files
    return found


def format_of(path: str) -> str:
    """How the file's name ends, in lower case, without the ending of its compression."""
    if path == STANDARD_INPUT:
        return "jsonl"
    return re.sub(PACKED, "", path).rpartition(".")[2].lower()


@contextlib.contextmanager
def open_unpacked(path: str) -> Iterator[io.BufferedReader]:
    """The file's bytes; unpacked where they are packed, whatever its name."""
    with _open(path) as stream:
        head = cast(io.BufferedReader, stream).peek(8)[:8]
        packing = next((packing for start, packing in _PACKINGS.items() if head.startswith(start)), None)
        if packing is None:
            yield cast(io.BufferedReader, stream)
            return
        kind, unpack = packing
        try:
            yield io.BufferedReader(unpack(stream), _PIECE)
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # the disk's
                raise
            raise UserError(f"{path}: packed with {kind}, but cannot be unpacked: {error}") from None


def _open(path: str) -> contextlib.AbstractContextManager[BinaryIO]:
    if path != STANDARD_INPUT:
        return open_stream(path)
    if sys.stdin is None:
        raise UserError(f"manifest={STANDARD_INPUT}: standard input is closed")
    return open(sys.stdin.fileno(), "rb", closefd=False)


def pyarrow(what: str) -> Any:
    """The library. UserError where it is not installed, for ``what`` needs it."""
    try:
        import pyarrow as library  # slow to import, and optional
        import pyarrow.parquet
    except ImportError:
        raise UserError(f'{what}: needs pyarrow, which is not installed: pip install "fluxbatch[datasets]"') from None
    return library
