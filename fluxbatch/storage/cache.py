"""Where caches are, and a cache of bytes by name in a local directory that processes and users share.

An entry is a SHA-256 and the bytes that it is of: a damaged one is found, and counts as missing. Entries
appear whole or not at all. When they are too many, those go whose last use is longest ago. Once the
directory is there nothing here fails a job: what cannot be kept is made again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
import stat
import time
import uuid
from pathlib import Path

from fluxbatch.types import UserError

_SUFFIX = ".entry"
_TEMP = re.compile(r"[0-9a-f]{32}\.tmp")  # the folder may be one that others use as well
_ABANDONED_AFTER = 3600.0  # seconds; a temp file that old belongs to a writer that was killed


AUTO = "auto"  # as a cache's directory: its default, which is done without where it cannot be used
_DEFAULTS = {"jax_cache_dir": "~/.cache/fluxbatch/xla", "text_cache_dir": "~/.cache/fluxbatch/text"}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a cache is. ``path`` None: nowhere. ``remark``: what a start says of it. ``error``: it was named and
    cannot be used."""

    path: str | None = None
    writable: bool = True
    remark: str | None = None
    error: UserError | None = None


def find(key: str, given: str | None) -> Place:
    """The directory of the cache that ``key`` is about, made if need be. One that can only be read is of use too."""
    if given is None or "://" in given:
        return Place(given)
    path = os.path.expanduser(_DEFAULTS[key]) if given == AUTO else given
    homeless = given == AUTO and not os.path.isabs(path)
    named = f"{key}={AUTO}: {path}" if given == AUTO else f"{key}={path}"
    if reason := "no home directory is known" if homeless else _fault(path):
        if given == AUTO:
            return Place(remark=f"{named}: {reason}: nothing is kept there; {key}=DIR names another place, null none")
        return Place(error=UserError(f"{named}: {reason}; expected a directory that can be used, or null"))
    writable = os.access(path, os.W_OK)
    return Place(path, writable, None if writable else f"{named}: can only be read: nothing new is kept there")


def _fault(path: str) -> str | None:
    """Why ``path`` cannot be a cache's directory."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # a full disk as well; a NUL in it
        return (getattr(error, "strerror", None) or str(error)).lower()
    return None if os.access(path, os.X_OK) else "permission denied"


class Cache:
    """``limit``: bytes, kept to by ``trim``. ``folder``: one that ``find`` has found."""

    def __init__(self, folder: str, limit: int):
        self._folder, self._limit = Path(folder), limit

    def get(self, name: str) -> bytes | None:
        """The entry's bytes; None when it is not there, or not what was put there."""
        path = self._path(name)
        try:
            entry = path.read_bytes()
            if hashlib.sha256(entry[32:]).digest() != entry[:32]:
                path.unlink()
                return None
        except OSError:
            return None
        with contextlib.suppress(OSError):  # another user's
            os.utime(path)  # used now
        return entry[32:]

    def put(self, name: str, data: bytes) -> None:
        """Keeps an entry, unless another process already has."""
        path = self._path(name)
        temp = path.with_name(f"{uuid.uuid4().hex}.tmp")
        with contextlib.suppress(OSError):  # a full disk, say
            if os.access(path, os.R_OK):  # one that only another user can read is of no use here
                return
            try:
                with open(temp, "xb") as file:
                    if (mode := self._folder.stat().st_mode) & (stat.S_IWGRP | stat.S_IWOTH):
                        os.fchmod(file.fileno(), 0o600 | mode & 0o044)  # who shares the directory shares what is in it
                    file.write(hashlib.sha256(data).digest())
                    file.write(data)
                os.replace(temp, path)
            finally:
                temp.unlink(missing_ok=True)

    def trim(self) -> None:
        """Removes what is over the limit, and what killed writers left half done."""
        entries, total, now = [], 0, time.time()
        with contextlib.suppress(OSError):
            for file in os.scandir(self._folder):
                with contextlib.suppress(OSError):  # another process was faster, or it is another user's
                    found = file.stat()
                    if file.name.endswith(_SUFFIX):
                        entries.append((found.st_mtime_ns, found.st_size, file.path))
                        total += found.st_size
                    elif _TEMP.fullmatch(file.name) and now - found.st_mtime > _ABANDONED_AFTER:
                        os.unlink(file.path)
            for _, size, path in sorted(entries):
                if total <= self._limit:
                    break
                with contextlib.suppress(PermissionError):  # another user's, in a directory where each removes his own
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(path)
                    total -= size

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}{_SUFFIX}"
