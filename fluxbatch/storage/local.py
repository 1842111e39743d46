"""A run on a local disk."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import IO, BinaryIO

from fluxbatch.storage.base import NotFound, StorageError, check_name, join
from fluxbatch.types import Exit

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# What no retry and no other row can cure: these stop the job.
_FATAL_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR}
_UNFORESEEN = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT}
_TEMP = re.compile(r"\.[0-9a-f]{32}\.tmp")  # other people's files may end in .tmp too
_ABANDONED_AFTER = 3600.0  # seconds; no write of ours holds a temp file that long
# What file systems answer that have no hard links (exFAT, SMB, gcsfuse), or cannot sync a directory.
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_TURN = 10.0  # seconds; to look once and to rename takes no writer that long


@contextlib.contextmanager
def open_file(path: str) -> Iterator[BinaryIO]:
    """A file as a byte stream. ``StorageError`` where it cannot be opened."""
    with _translated(path):
        stream = open(path, "rb")  # noqa: SIM115 (the caller's own errors must not be translated)
    with stream:
        yield stream


class LocalStore:
    """A directory: temp file beside the target, fsync, rename, fsync of the directory."""

    def __init__(self, root: str):
        self.url = os.fspath(root)
        self._root = Path(root)

    def read(self, name: str) -> bytes:
        with _translated(self._place(name)):
            return self._path(name).read_bytes()

    def size(self, name: str) -> int:
        with _translated(self._place(name)):
            return self._path(name).stat().st_size

    def read_range(self, name: str, start: int, size: int) -> bytes:
        with _translated(self._place(name)), open(self._path(name), "rb") as file:
            file.seek(start)
            return file.read(size)

    def write(self, name: str, data: bytes, *, if_absent: bool = False) -> bool:
        return self._put(name, lambda file: file.write(data), if_absent)

    def write_file(self, name: str, file: IO[bytes]) -> None:
        file.seek(0)
        self._put(name, lambda target: shutil.copyfileobj(file, target, 1 << 20))

    def _put(self, name: str, fill: Callable[[IO[bytes]], object], if_absent: bool = False) -> bool:
        path = self._path(name)
        temp = path.with_name(f".{uuid.uuid4().hex}.tmp")
        with _translated(self._place(name)):
            _make_directory(path.parent)
            try:
                with open(temp, "xb") as file:
                    fill(file)
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

    def delete(self, *names: str) -> None:
        directories = set()
        for name in names:
            path = self._path(name)
            with _translated(self._place(name)), contextlib.suppress(FileNotFoundError):
                path.unlink()
                directories.add(path.parent)
        for directory in directories:
            with _translated(str(directory)):
                _sync_directory(directory)

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
                busy = StorageError(
                    f"another start is at work in {self.url} ({who}): wait for its end, or give another run_name=…"
                )
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
        raise StorageError(
            f"{place}: {reason}", fatal=error.errno in _FATAL_ERRNOS, unforeseen=error.errno in _UNFORESEEN
        ) from error
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
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system, or its server, without locks
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
