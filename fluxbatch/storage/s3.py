"""S3, and what speaks its language, behind the ``Store`` interface. Credentials, region and endpoint are found where
AWS's own tools find them: environment, profile, the machine's role.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import re
from collections.abc import Iterator, Set
from typing import IO, Any, BinaryIO, TypeVar, cast

from google.api_core import exceptions as api

from fluxbatch.storage.base import Bucket, NotFound, StorageError, check_name
from fluxbatch.storage.objects import ObjectStore, PieceReader, Taken, content_type, place_and_name
from fluxbatch.types import UserError

try:
    import obstore
    from obstore import exceptions
    from obstore.store import S3Store as Client

    from fluxbatch.storage import aws
except ImportError as error:
    name = (error.name or "").partition(".")[0]
    missing = f's3://… needs {name}, which is not installed: pip install "fluxbatch[s3]"'
    raise UserError(missing) from None

_TIMEOUT = (10.0, 60.0)  # seconds to connect, and for one request
_DEADLINE = 300.0  # seconds for one operation with all its attempts
_PIECE = 8 << 20  # bytes of a stream read at once
_LARGE = 64 << 20  # bytes from which an object goes up in parts, to be whole when the last has arrived
_LONG = 3600.0  # seconds for the one request of a large object that must not replace another
_PAGE = 1000  # names listed at once

T = TypeVar("T")


_KEPT = "(code: AccessDenied)"  # of one of many objects that are deleted at once: the answer as a whole is a good one


def _may_pass(error: BaseException) -> bool:
    if not isinstance(error, exceptions.GenericError) or "169.254.169.254" in str(error) or _KEPT in str(error):
        return False
    code = _code(error)
    return code is None or code in (408, 409, 429) or code >= 500


class S3Store(ObjectStore):
    """``s3://bucket/prefix``. ``timeout``: seconds to connect, and for one request. ``deadline``: seconds for one
    operation with all its attempts."""

    scheme = "s3"

    def __init__(self, url: str, *, timeout: tuple[float, float] = _TIMEOUT, deadline: float = _DEADLINE):
        super().__init__(url, _may_pass, deadline)
        found = aws.Settings()
        given = {"endpoint": found.endpoint, "region": found.region}
        config: Any = {name: value for name, value in given.items() if value}

        def client(seconds: float) -> Client:
            connect, request = (datetime.timedelta(seconds=each) for each in (timeout[0], seconds))
            is_http = bool(found.endpoint and found.endpoint.startswith("http://"))
            return Client(
                self._bucket_name,
                prefix=self._prefix or None,
                config=config,
                credential_provider=found.provider(),
                client_options={"connect_timeout": connect, "timeout": request, "allow_http": is_http},
                retry_config={"max_retries": 0, "retry_timeout": datetime.timedelta(seconds=deadline)},  # it is ours
            )

        with _translated(self.url):
            self._client, self._patient = client(timeout[1]), client(_LONG)

    def read(self, name: str) -> bytes:
        check_name(name)
        return self._attempt(name, lambda: bytes(obstore.get(self._client, name).bytes()))

    def size(self, name: str) -> int:
        check_name(name)
        return int(self._attempt(name, lambda: obstore.head(self._client, name))["size"])

    def read_range(self, name: str, start: int, size: int) -> bytes:
        check_name(name)

        def download() -> bytes:
            return bytes(obstore.get_range(self._client, name, start=start, length=size))

        return self._attempt(name, download) if size else b""

    def _put(self, name: str, data: bytes, if_absent: bool) -> None:
        check_name(name)
        is_large = len(data) > _LARGE
        obstore.put(
            self._patient if is_large and if_absent else self._client,
            name,
            data,
            mode="create" if if_absent else "overwrite",
            use_multipart=is_large and not if_absent,
            attributes={"Content-Type": content_type(name)},
        )

    def write_file(self, name: str, file: IO[bytes]) -> None:
        check_name(name)

        def upload() -> None:
            file.seek(0)
            attributes: Any = {"Content-Type": content_type(name)}
            obstore.put(self._client, name, cast(BinaryIO, file), use_multipart=True, attributes=attributes)

        self._attempt(name, upload, missing="the bucket does not exist")

    def list(self, prefix: str = "") -> Iterator[str]:
        return (each["path"] for each in self._objects(prefix))

    def missing(self, names: Set[str]) -> set[str]:
        return set(names).difference(each["path"] for each in self._objects("") if each["size"])

    def versions(self, prefix: str = "") -> Iterator[tuple[str, str]]:
        parts = ("e_tag", "version", "last_modified", "size")
        return ((each["path"], " ".join(str(each.get(part)) for part in parts)) for each in self._objects(prefix))

    def _objects(self, prefix: str) -> Iterator[Any]:
        """What is said of each; whole folders are listed, a page at a time and each from where the last one ended."""
        folder, last = prefix.rpartition("/")[0], None
        while True:
            page = self._attempt("", lambda: self._page(folder, last))  # noqa: B023 (called at once)
            for each in page:
                if each["path"].startswith(prefix):
                    yield each
            if len(page) < _PAGE:
                return
            last = page[-1]["path"]

    def _page(self, folder: str, last: str | None) -> Any:
        return next(iter(obstore.list(self._client, folder or None, offset=last, chunk_size=_PAGE)), [])

    def delete(self, *names: str) -> None:
        for name in names:
            check_name(name)
        if names:
            with contextlib.suppress(NotFound):
                self._attempt(names[0], lambda: obstore.delete(self._client, names))

    def exists(self, name: str) -> bool:
        check_name(name)
        try:
            self._attempt(name, lambda: obstore.head(self._client, name))
        except NotFound:
            return False
        return True

    def stream(self, name: str) -> BinaryIO:
        """The object as a buffered stream, always of the version that was there at the start."""
        check_name(name)
        meta = self._attempt(name, lambda: obstore.head(self._client, name))
        size, version = meta["size"], meta["e_tag"]

        def piece(start: int) -> bytes:
            options: Any = {"range": (start, min(start + _PIECE, size)), "if_match": version}
            return bytes(obstore.get(self._client, name, options=options).bytes())

        reader = PieceReader(size, lambda start: self._attempt(name, lambda: piece(start)))
        return cast(BinaryIO, io.BufferedReader(reader, _PIECE))

    def _translated(self, place: str, missing: str = "") -> contextlib.AbstractContextManager[None]:
        return _translated(place, missing)


def open_bucket(url: str) -> Bucket:
    """The store, which is there and may be used."""
    store = S3Store(url)
    store.check()
    return store


@contextlib.contextmanager
def open_object(url: str) -> Iterator[BinaryIO]:
    """The object at an ``s3://`` address as a stream. Raises StorageError."""
    place, name = place_and_name(url)
    with S3Store(place).stream(name) as stream:
        yield stream


def tensorstore_options() -> dict[str, Any]:
    """What TensorStore's driver is to be told besides bucket and path."""
    return aws.Settings().of_tensorstore()


@contextlib.contextmanager
def _translated(place: str, missing: str = "") -> Iterator[None]:
    """Turns what the client library raises into one line, of which no part is a credential."""
    try:
        yield
    except api.RetryError as error:
        reason = _reason(error.cause) if error.cause else "no answer"
        raise StorageError(f"{place}: gave up after many attempts: {reason}", unforeseen=True) from None
    except exceptions.AlreadyExistsError:
        raise Taken(f"{place}: is there already") from None
    except (exceptions.PreconditionError, exceptions.NotModifiedError):
        raise StorageError(f"{place}: changed while it was being read") from None
    except (FileNotFoundError, exceptions.GenericError) as error:
        text = str(error)
        if "NoSuchBucket" in text or (missing and isinstance(error, FileNotFoundError)):
            raise StorageError(f"{place}: {missing or 'the bucket does not exist'}", fatal=True) from None
        if isinstance(error, FileNotFoundError):
            raise NotFound(f"{place}: no such object") from None
        if "169.254.169.254" in text:  # where a machine's role would be found
            advice = "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the machine a role"
            raise StorageError(f"{place}: no usable AWS credentials; {advice}", fatal=True) from None
        if _KEPT in text:
            raise StorageError(f"{place}: permission denied: it may not be deleted", fatal=True) from None
        raise StorageError(f"{place}: {_reason(error)}", fatal=(_code(error) or 500) < 500) from None
    except exceptions.UnauthenticatedError:
        raise StorageError(f"{place}: the AWS credentials were refused", fatal=True) from None
    except (PermissionError, exceptions.PermissionDeniedError) as error:
        raise StorageError(f"{place}: permission denied: {_reason(error)}", fatal=True) from None
    except exceptions.BaseError as error:
        raise StorageError(f"{place}: {_reason(error)}") from None


def _code(error: BaseException) -> int | None:
    """The status of the server's answer, if there was one."""
    code = re.search(r"status code: (\d{3})", str(error))
    return int(code[1]) if code else None


def _reason(error: BaseException) -> str:
    """The server's own words where there are any: the library's contain whole URLs."""
    if message := re.search(r"<Message>(.*?)</Message>", str(error), re.DOTALL):
        return " ".join(message[1].split())[:200]
    return f"the server answered {code}" if (code := _code(error)) else "no connection"
