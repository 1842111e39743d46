"""Google Cloud Storage behind the ``Store`` interface. ``STORAGE_EMULATOR_HOST`` is honoured."""

from __future__ import annotations

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator, Set
from typing import IO, Any, BinaryIO, TypeVar, cast

import requests
import urllib3
from google.api_core import exceptions as api
from google.auth import exceptions as auth
from google.cloud import storage
from google.cloud.storage.exceptions import DataCorruption
from requests.adapters import HTTPAdapter

from fluxbatch.storage.base import Bucket, NotFound, StorageError, check_name, join
from fluxbatch.storage.log import in_parallel
from fluxbatch.storage.objects import ObjectStore, PieceReader, Taken, content_type, place_and_name

_CONNECTIONS = 64  # at once; requests' own 10 would throw away connections of the parallel writers
_TIMEOUT = (10.0, 60.0)  # seconds to connect, and without a byte from the server
_DEADLINE = 300.0  # seconds for one operation with all its attempts
_PIECE = 8 << 20  # bytes of a stream read at once, and above which an upload is resumable

_PASSING = (
    ConnectionError,
    requests.exceptions.ConnectionError,
    requests.exceptions.Timeout,
    requests.exceptions.ChunkedEncodingError,
    requests.exceptions.InvalidJSONError,  # an answer cut short
    urllib3.exceptions.HTTPError,
    auth.TransportError,
    DataCorruption,  # the checksum of what arrived is wrong
)
_PASSING_CODES = (408, 429, 500, 502, 503, 504)

T = TypeVar("T")


def _may_pass(error: BaseException) -> bool:
    return isinstance(error, _PASSING) or getattr(error, "code", None) in _PASSING_CODES


class GcsStore(ObjectStore):
    """``gs://bucket/prefix``. Raises StorageError when there are no credentials.

    ``timeout``: seconds to connect, and to wait for the next byte. ``deadline``: seconds for one
    operation with all its attempts.
    """

    scheme = "gs"

    def __init__(self, url: str, *, timeout: tuple[float, float] = _TIMEOUT, deadline: float = _DEADLINE):
        super().__init__(url, _may_pass, deadline)
        self._prefix = self._prefix and self._prefix + "/"
        self._timeout = timeout
        with _translated(self.url):
            self._client = storage.Client(project=None)
            for scheme in ("https://", "http://"):
                self._client._http.mount(scheme, HTTPAdapter(pool_maxsize=_CONNECTIONS))
        self._bucket = self._client.bucket(self._bucket_name)

    def read(self, name: str) -> bytes:
        def download() -> bytes:
            return self._blob(name).download_as_bytes(timeout=self._timeout, checksum="crc32c", retry=None)

        return self._attempt(name, download)

    def size(self, name: str) -> int:
        blob = self._blob(name)
        self._attempt(name, lambda: blob.reload(timeout=self._timeout, retry=None))
        return int(blob.size)

    def read_range(self, name: str, start: int, size: int) -> bytes:
        def download() -> bytes:
            blob = self._blob(name)
            end = start + size - 1
            return blob.download_as_bytes(start=start, end=end, timeout=self._timeout, checksum=None, retry=None)

        return self._attempt(name, download) if size else b""

    def _put(self, name: str, data: bytes, if_absent: bool) -> None:
        self._blob(name).upload_from_string(
            data,
            content_type=content_type(name),
            if_generation_match=0 if if_absent else None,
            timeout=self._timeout,
            checksum="crc32c",
            # a large object goes up in pieces, and only a lost piece is sent again
            retry=self._retry if len(data) > _PIECE else None,
        )

    def write_file(self, name: str, file: IO[bytes]) -> None:
        def upload() -> None:
            self._blob(name).upload_from_file(
                file,
                rewind=True,
                content_type=content_type(name),
                timeout=self._timeout,
                checksum="crc32c",
                retry=self._retry,  # of pieces
            )

        self._attempt(name, upload, missing="the bucket does not exist")

    def list(self, prefix: str = "") -> Iterator[str]:
        return (blob.name.removeprefix(self._prefix) for blob in self._blobs(prefix, "name"))

    def missing(self, names: Set[str]) -> set[str]:
        there = (blob.name.removeprefix(self._prefix) for blob in self._blobs("", "name,size") if blob.size)
        return set(names).difference(there)

    def versions(self, prefix: str = "") -> Iterator[tuple[str, str]]:
        blobs = self._blobs(prefix, "name,generation")
        return ((blob.name.removeprefix(self._prefix), str(blob.generation)) for blob in blobs)

    def _blobs(self, prefix: str, fields: str) -> Iterator[storage.Blob]:
        with _translated(self.url, missing="the bucket does not exist"):
            blobs = self._client.list_blobs(
                self._bucket,
                prefix=self._prefix + prefix,
                fields=f"items({fields}),nextPageToken",
                timeout=self._timeout,
                retry=self._retry,
            )
            for blob in blobs:
                if not blob.name.endswith("/"):  # consoles make such objects to show folders
                    yield blob

    def delete(self, *names: str) -> None:
        in_parallel(self._delete, names)

    def _delete(self, name: str) -> None:
        with contextlib.suppress(NotFound):
            self._attempt(name, lambda: self._blob(name).delete(timeout=self._timeout, retry=None))

    def exists(self, name: str) -> bool:
        return self._attempt(name, lambda: self._blob(name).exists(timeout=self._timeout, retry=None))

    def stream(self, name: str) -> BinaryIO:
        """The object as a buffered stream, always of the version that was there at the start; unpacked if it is
        stored with ``Content-Encoding: gzip``. The stream raises what the gzip module does where it is not."""
        blob = self._blob(name)
        self._attempt(name, lambda: blob.reload(timeout=self._timeout, retry=None))

        encoding = blob.content_encoding or "identity"
        if encoding not in ("identity", "gzip"):
            place = join(self.url, name)
            raise StorageError(f"{place}: stored with Content-Encoding: {encoding}, expected gzip or none")

        def piece(start: int) -> bytes:
            end = min(start + _PIECE, blob.size) - 1
            data = blob.download_as_bytes(
                start=start,
                end=end,
                if_generation_match=blob.generation,
                raw_download=True,  # as it is stored: a part of what is packed cannot be unpacked by itself
                timeout=self._timeout,
                checksum=None,
                retry=None,
            )
            if len(data) != end - start + 1:
                raise ConnectionError("answer cut short")
            return data

        reader = PieceReader(blob.size, lambda start: self._attempt(name, lambda: piece(start)))
        stream = io.BufferedReader(reader, _PIECE)
        return cast(BinaryIO, gzip.GzipFile(fileobj=stream)) if encoding == "gzip" else stream

    def _blob(self, name: str) -> storage.Blob:
        check_name(name)
        return self._bucket.blob(self._prefix + name)

    def _translated(self, place: str, missing: str = "") -> contextlib.AbstractContextManager[None]:
        return _translated(place, missing)


def open_bucket(url: str) -> Bucket:
    """The store, which is there and may be used."""
    store = GcsStore(url)
    store.check()
    return store


@contextlib.contextmanager
def open_object(url: str) -> Iterator[BinaryIO]:
    """The object at a ``gs://`` address as a stream. Raises StorageError."""
    place, name = place_and_name(url)
    with GcsStore(place).stream(name) as stream:
        try:
            yield stream
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise StorageError(f"{url}: stored with Content-Encoding: gzip, but cannot be unpacked: {error}") from None


@contextlib.contextmanager
def _translated(place: str, missing: str = "") -> Iterator[None]:
    """Turns what the client library raises into one line, of which no part is a credential."""
    try:
        yield
    except api.RetryError as error:
        cause = error.cause
        raise StorageError(
            f"{place}: gave up after many attempts: {_reason(cause) if cause else 'no answer'}", unforeseen=True
        ) from None
    except api.PreconditionFailed:
        raise Taken(f"{place}: is there already") from None
    except api.NotFound as error:
        if missing or "bucket does not exist" in _reason(error):  # an object's message has the bucket's name in it
            raise StorageError(f"{place}: {missing or 'the bucket does not exist'}", fatal=True) from None
        raise NotFound(f"{place}: no such object") from None
    except (api.Unauthorized, auth.RefreshError):
        raise StorageError(f"{place}: the Google Cloud credentials were refused; log in again", fatal=True) from None
    except auth.GoogleAuthError:
        advice = "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS"
        raise StorageError(f"{place}: no usable Google Cloud credentials; {advice}", fatal=True) from None
    except api.Forbidden as error:
        raise StorageError(f"{place}: permission denied: {_reason(error)}", fatal=True) from None
    except (api.GoogleAPICallError, *_PASSING) as error:
        raise StorageError(f"{place}: {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    """The server's own words where there are any: the library's contain whole URLs."""
    response: Any = getattr(error, "response", None)
    with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):
        return str(response.json()["error"]["message"]).splitlines()[0][:200]
    code = getattr(error, "code", None)
    return f"the server answered {int(code)}" if code else f"no connection ({type(error).__name__})"
