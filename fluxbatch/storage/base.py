"""One small interface over the places that hold a run: a local directory or ``gs://bucket/prefix``.

A write is durable and whole when it returns, or it did not happen. Names are relative, with ``/``
between their parts; a name that would leave the store is refused.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import socket
import time
import uuid
from collections.abc import Iterator, Set
from pathlib import Path
from typing import BinaryIO, Protocol

from fluxbatch.types import Exit, UserError

# What no retry and no other row can cure: these stop the job.
_FATAL_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR}
_UNFORESEEN = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT}
MAX_BYTES = 255  # of a part of a name
_TEMP = re.compile(r"\.[0-9a-f]{32}\.tmp")  # other people's files may end in .tmp too
_ABANDONED_AFTER = 3600.0  # seconds; no write of ours holds a temp file that long
# What file systems answer that have no hard links (exFAT, SMB, gcsfuse), or cannot sync a directory.
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_TURN = 10.0  # seconds; to look once and to rename takes no writer that long


class StorageError(UserError):
    """The place could not be read or written: one line that names it. Never holds credentials.

    ``fatal``: every later write will fail as well (disk full, no permission, no such bucket).
    ``unforeseen``: nobody's mistake (disk full, a server that stays away): another start may find it gone, so the exit code is 1.
    """

    def __init__(self, message: str, *, fatal: bool = False, unforeseen: bool = False):
        super().__init__(message)
        self.fatal = fatal
        if unforeseen:
            self.code = 1


class NotFound(StorageError):
    """The name is not in the store."""


class Store(Protocol):
    """Whole objects by name. Every method raises ``StorageError`` and is safe to call from threads."""

    url: str

    def read(self, name: str) -> bytes:
        """The object's bytes. ``NotFound`` when it is not there."""

    def write(self, name: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Put the object there, durably and at once. False: ``if_absent`` and the name was taken."""

    def list(self, prefix: str = "") -> Iterator[str]:
        """Names that begin with ``prefix``, sorted."""

    def missing(self, names: Set[str]) -> set[str]:
        """Those of ``names`` that are not there, or are empty: cheap for a million."""

    def delete(self, name: str) -> None:
        """Remove the object; one that is not there is fine."""

    def exists(self, name: str) -> bool: ...

    def sweep(self) -> None:
        """Remove what killed writers left half done (never anything under a real name)."""

    def hold(self, name: str, *, shared: bool) -> contextlib.AbstractContextManager[None]:
        """Keep other starts out of the place until the context ends, or this process does; those that share it
        let each other in. ``StorageError`` when another has it. Does nothing where there are no locks."""


def open_store(url: str) -> Store:
    """The store at a local path or ``gs://bucket/prefix``. Creates nothing.

    Raises StorageError: the bucket is not there, or the credentials are missing or refused.
    """
    if _is_gcs(url):
        from fluxbatch.storage.gcs import GcsStore  # slow to import, and only needed here

        store = GcsStore(url)
        store.check()
        return store
    return LocalStore(url)


@contextlib.contextmanager
def open_stream(url: str) -> Iterator[BinaryIO]:
    """The file at a local path or ``gs://`` address as a byte stream, read piece by piece."""
    if _is_gcs(url):
        from fluxbatch.storage.gcs import open_object

        with open_object(url) as stream:
            yield stream
        return
    with _translated(url):
        stream = open(url, "rb")  # noqa: SIM115 (the caller's own errors must not be translated)
    with stream:
        yield stream


def read_bytes(url: str) -> bytes:
    """All bytes of the file at a local path or ``gs://`` address."""
    with open_stream(url) as stream:
        return stream.read()


def join(url: str, *names: str) -> str:
    """``url/name/…`` for local paths and ``gs://`` addresses alike."""
    return "/".join([url.rstrip("/"), *names]) if names else url


def check_name(name: str) -> None:
    """Refuses a name that could mean a place outside the store."""
    parts = name.split("/")
    bad = any(part in ("", ".", "..") or len(part.encode("utf-8", "replace")) > MAX_BYTES for part in parts)
    if bad or "\\" in name or any(ord(c) < 32 or ord(c) == 127 for c in name):
        raise StorageError(f"{name!r}: not a name inside the output place", fatal=True)


def _is_gcs(url: str) -> bool:
    if "://" in url and not url.startswith("gs://"):
        raise UserError(f"{url}: expected a local path or gs://bucket/prefix")
    return url.startswith("gs://")


class LocalStore:
    """A directory: temp file beside the target, fsync, rename, fsync of the directory."""

    def __init__(self, root: str):
        self.url = os.fspath(root)
        self._root = Path(root)

    def read(self, name: str) -> bytes:
        with _translated(self._place(name)):
            return self._path(name).read_bytes()

    def write(self, name: str, data: bytes, *, if_absent: bool = False) -> bool:
        path = self._path(name)
        temp = path.with_name(f".{uuid.uuid4().hex}.tmp")
        with _translated(self._place(name)):
            _make_directory(path.parent)
            try:
                with open(temp, "xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                if not if_absent:
                    os.replace(temp, path)
                elif not _rename_if_absent(temp, path):
                    return False
            finally:
                temp.unlink(missing_ok=True)
            _sync_directory(path.parent)
        return True

    def list(self, prefix: str = "") -> Iterator[str]:
        for path in self._walk(prefix):
            name = path.relative_to(self._root).as_posix()
            if name.startswith(prefix) and not _TEMP.fullmatch(path.name):
                yield name

    def missing(self, names: Set[str]) -> set[str]:
        # a listing would spell some names otherwise, and pass over linked folders
        return {name for name in names if not self._size(name)}

    def _size(self, name: str) -> int:
        with _translated(self._place(name)), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return os.stat(f"{self.url}/{name}").st_size
        return 0

    def delete(self, name: str) -> None:
        path = self._path(name)
        with _translated(self._place(name)), contextlib.suppress(FileNotFoundError):
            path.unlink()
            _sync_directory(path.parent)

    def exists(self, name: str) -> bool:
        with _translated(self._place(name)):
            return self._path(name).is_file()

    def sweep(self) -> None:
        for path in self._walk(""):
            if _TEMP.fullmatch(path.name):
                with _translated(str(path)), contextlib.suppress(FileNotFoundError):
                    if time.time() - path.stat().st_mtime > _ABANDONED_AFTER:
                        path.unlink()

    @contextlib.contextmanager
    def hold(self, name: str, *, shared: bool) -> Iterator[None]:
        path = self._path(name)
        with _translated(self._place(name)):
            _make_directory(path.parent)
            try:
                file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            except PermissionError:
                if not path.exists():
                    raise
                # another user's, in a place that both may write to
                file = os.open(path, os.O_RDONLY)
        try:
            if not _lock(file, shared):
                who = os.read(file, 1000).decode("utf-8", "replace").strip()
                busy = StorageError(f"another start is at work in {self.url} ({who}): wait for its end, or give another run_name=…")
                busy.code = Exit.PREEMPTED  # nobody's mistake, and it passes: schedulers try this code again
                raise busy
            with contextlib.suppress(OSError):  # who it is, as far as it can be told to others
                os.ftruncate(file, 0)
                os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            yield
        finally:
            os.close(file)

    def _walk(self, prefix: str) -> Iterator[Path]:
        """Files below the deepest directory that ``prefix`` names, in the order of their names."""
        top = self._root / prefix.rpartition("/")[0]
        with _translated(str(top)):
            entries = []
            if top.is_dir():
                entries = sorted(os.scandir(top), key=lambda e: e.name + "/" * e.is_dir(follow_symlinks=False))
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):  # a link may lead back up
                yield from self._walk(f"{Path(entry.path).relative_to(self._root).as_posix()}/")
            else:
                yield Path(entry.path)

    def _path(self, name: str) -> Path:
        check_name(name)
        return self._root / name

    def _place(self, name: str) -> str:
        return join(self.url, name)


@contextlib.contextmanager
def _translated(place: str) -> Iterator[None]:
    """Turns an OSError into a StorageError that names the place."""
    try:
        yield
    except FileNotFoundError:
        raise NotFound(f"{place}: no such file") from None
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
        if error.errno == errno.EINVAL and ":" in place:  # exFAT, SMB
            reason += " (not every file system takes a name with ':')"
        raise StorageError(f"{place}: {reason}", fatal=error.errno in _FATAL_ERRNOS, unforeseen=error.errno in _UNFORESEEN) from error
    except UnicodeEncodeError as error:
        reason = f"file names are {error.encoding} by this locale: set PYTHONUTF8=1 or a UTF-8 locale"
        raise StorageError(f"{place}: {reason}", fatal=True) from None


def _make_directory(path: Path) -> None:
    if not path.is_dir():
        _make_directory(path.parent)
        try:
            path.mkdir(exist_ok=True)
        except FileExistsError:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None
        _sync_directory(path.parent)


def _lock(file: int, shared: bool) -> bool:
    """Whether nobody else has the lock; the kernel frees it when this process ends, however it does."""
    try:
        import fcntl

        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # Windows; a file system, or its server, without locks
        pass
    return True


def _rename_if_absent(temp: Path, path: Path) -> bool:
    try:
        os.link(temp, path)  # unlike a rename, fails when the name is taken
        return True
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    # Without links one looks and renames while a file of its own name says that it does.
    turn = path.with_name(f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:32]}.tmp")
    patience = time.monotonic() + _TURN
    while not path.exists():
        try:
            os.close(os.open(turn, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            if time.monotonic() > patience:  # whoever had this turn was killed in it
                turn.unlink(missing_ok=True)
                patience += _TURN
            time.sleep(0.02)
            continue
        try:
            if path.exists():  # by now
                break
            os.replace(temp, path)
            return True
        finally:
            turn.unlink(missing_ok=True)
    return False


def _sync_directory(path: Path) -> None:
    """A rename survives a power cut only once its directory is synced."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)
