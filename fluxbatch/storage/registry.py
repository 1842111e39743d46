"""Where an address leads: the one door to every place that holds runs or manifests."""

from __future__ import annotations

import contextlib
import glob
import importlib
import os
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, BinaryIO

from fluxbatch.storage.base import Bucket, Store, join
from fluxbatch.storage.local import LocalStore, open_file
from fluxbatch.types import UserError

# Scheme → module with ``open_bucket(url)``, a Store that was asked for once, and ``open_object(url)``, a stream
SCHEMES = {"gs": "fluxbatch.storage.gcs", "s3": "fluxbatch.storage.s3"}


def open_store(url: str) -> Store:
    """The store at a local path, ``gs://bucket/prefix`` or ``s3://bucket/prefix``. Creates nothing.

    Raises StorageError: the bucket is not there, or the credentials are missing or refused.
    """
    if (library := _library(url)) is None:
        return LocalStore(url)
    store: Store = library.open_bucket(url)
    return store


def open_bucket(url: str) -> Bucket:
    """The same for an address in a bucket."""
    bucket: Bucket = _library(url).open_bucket(url)
    return bucket


def open_stream(url: str) -> contextlib.AbstractContextManager[BinaryIO]:
    """The file at a local path or an address in a bucket as a byte stream, read piece by piece."""
    library = _library(url)
    return open_file(url) if library is None else library.open_object(url)


def tensorstore_options(url: str) -> dict[str, Any]:
    """What TensorStore is to be told of a bucket besides its name: where AWS's settings are, and nothing elsewhere."""
    return _library(url).tensorstore_options() if url.startswith("s3://") else {}


def find_files(pattern: str) -> list[str]:
    """The files that a pattern (``*``, ``?``, ``[…]``, and ``**`` for any directories) matches, by name; the address
    itself where it is none, or of a file that is called so."""
    if not glob.has_magic(pattern):
        return [pattern]
    if "://" not in pattern:
        if os.path.lexists(pattern):
            return [pattern]
        return sorted(path for path in glob.iglob(pattern, recursive=True) if os.path.isfile(path))
    fixed = pattern[: next(i for i, c in enumerate(pattern) if c in "*?[")].rpartition("/")[0]
    if fixed.endswith("/"):
        raise UserError(f"{pattern}: expected a bucket's name without wildcards")
    wanted = pattern.removeprefix(f"{fixed}/").split("/")
    return [join(fixed, name) for name in open_store(fixed).list() if _matches(name.split("/"), wanted)]


def _matches(parts: Sequence[str], wanted: Sequence[str]) -> bool:
    if not wanted:
        return not parts
    if wanted[0] == "**":
        return _matches(parts, wanted[1:]) or (bool(parts) and _matches(parts[1:], wanted))
    return bool(parts) and fnmatchcase(parts[0], wanted[0]) and _matches(parts[1:], wanted[1:])


def read_bytes(url: str, most: int = -1) -> bytes:
    """All bytes of the file at a local path or an address in a bucket, or the first of them."""
    with open_stream(url) as stream:
        return stream.read(most)


def _library(url: str) -> Any:
    """The module that knows the address's scheme, imported now: these are slow to import. None: a local path."""
    scheme, separator, _ = url.partition("://")
    if not separator:
        return None
    if scheme not in SCHEMES:
        raise UserError(f"{url}: expected a local path, gs://bucket/prefix or s3://bucket/prefix")
    return importlib.import_module(SCHEMES[scheme])
