"""Where an address leads: the one door to every place that holds runs or manifests."""

from __future__ import annotations

import contextlib
from typing import BinaryIO

from fluxbatch.storage.base import Store
from fluxbatch.storage.local import LocalStore, open_file
from fluxbatch.types import UserError


def open_store(url: str) -> Store:
    """The store at a local path or ``gs://bucket/prefix``. Creates nothing.

    Raises StorageError: the bucket is not there, or the credentials are missing or refused.
    """
    if not _is_gcs(url):
        return LocalStore(url)
    from fluxbatch.storage.gcs import GcsStore  # slow to import, and only needed here

    store = GcsStore(url)
    store.check()
    return store


def open_stream(url: str) -> contextlib.AbstractContextManager[BinaryIO]:
    """The file at a local path or ``gs://`` address as a byte stream, read piece by piece."""
    if not _is_gcs(url):
        return open_file(url)
    from fluxbatch.storage.gcs import open_object

    return open_object(url)


def read_bytes(url: str) -> bytes:
    """All bytes of the file at a local path or ``gs://`` address."""
    with open_stream(url) as stream:
        return stream.read()


def _is_gcs(url: str) -> bool:
    if "://" in url and not url.startswith("gs://"):
        raise UserError(f"{url}: expected a local path or gs://bucket/prefix")
    return url.startswith("gs://")
