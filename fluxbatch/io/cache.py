"""A cache of bytes by name, in a local directory that any number of processes share.

An entry is a SHA-256 and the bytes that it is of: a damaged one is found, and counts as missing. Entries
appear whole or not at all. When they are too many, those go whose last use is longest ago. Once the
directory is there nothing here fails a job: what cannot be kept is made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
import uuid
from pathlib import Path

from fluxbatch.types import UserError

_SUFFIX = ".entry"
_TEMP = re.compile(r"[0-9a-f]{32}\.tmp")  # the folder may be one that others use as well
_ABANDONED_AFTER = 3600.0  # seconds; a temp file that old belongs to a writer that was killed


class Cache:
    """``limit``: bytes, kept to by ``trim``. UserError when ``folder`` cannot be made or written."""

    def __init__(self, folder: str, limit: int):
        self._folder, self._limit = Path(folder), limit
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            reason = None if os.access(self._folder, os.W_OK | os.X_OK) else "no permission to write there"
        except OSError as error:
            reason = (error.strerror or type(error).__name__).lower()
        if reason:
            raise UserError(f"{folder}: {reason}")

    def get(self, name: str) -> bytes | None:
        """The entry's bytes; None when it is not there, or not what was put there."""
        path = self._path(name)
        try:
            entry = path.read_bytes()
            if hashlib.sha256(entry[32:]).digest() != entry[:32]:
                path.unlink()
                return None
            os.utime(path)  # used now
        except OSError:
            return None
        return entry[32:]

    def put(self, name: str, data: bytes) -> None:
        """Keeps an entry, unless another process already has."""
        path = self._path(name)
        temp = path.with_name(f"{uuid.uuid4().hex}.tmp")
        with contextlib.suppress(OSError):  # a full disk, say
            if path.exists():
                return
            try:
                with open(temp, "xb") as file:
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
                with contextlib.suppress(FileNotFoundError):  # another process was faster
                    stat = file.stat()
                    if file.name.endswith(_SUFFIX):
                        entries.append((stat.st_mtime_ns, stat.st_size, file.path))
                        total += stat.st_size
                    elif _TEMP.fullmatch(file.name) and now - stat.st_mtime > _ABANDONED_AFTER:
                        os.unlink(file.path)
            for _, size, path in sorted(entries):
                if total <= self._limit:
                    break
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                total -= size

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}{_SUFFIX}"
