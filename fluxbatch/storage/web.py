"""Files of web servers, and what they say of a file's version."""

from __future__ import annotations

import contextlib
import email.message
import email.utils
import http.client
import urllib.request
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import cast

SCHEMES = ("http://", "https://")
_SECONDS = 30  # without a byte from a server
_SETTLED = 3.0  # a file that changes twice within a second has the same date before and after
_THREADS = 16


def read(url: str, most: int) -> tuple[bytes, str | None]:
    """The file, or so many of its first bytes, and its version. Raises OSError or HTTPException."""
    with urllib.request.urlopen(url, timeout=_SECONDS) as answer:
        data = cast(bytes, answer.read(most))
        if len(data) < most and answer.length:  # cut off, which it tells only those who ask for everything
            raise http.client.IncompleteRead(data, answer.length)
        return data, _version(answer.headers)


def versions(urls: Iterable[str]) -> dict[str, str]:
    """Of each file its version, as a server says that is asked for nothing else; of none that it says nothing of."""
    urls = list(urls)
    if not urls:
        return {}
    with ThreadPoolExecutor(_THREADS, "version") as pool:
        return {url: said for url, said in zip(urls, pool.map(_asked, urls), strict=True) if said}


def _asked(url: str) -> str | None:
    with contextlib.suppress(OSError, http.client.HTTPException, ValueError):  # of which those tell that read it
        request = urllib.request.Request(url, method="HEAD")
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
            return _version(answer.headers)
    return None


def _version(headers: email.message.Message) -> str | None:
    """A strong ETag; else the date of the last change, if it is past, and the length."""
    tag, length, changed, now = (headers[key] for key in ("ETag", "Content-Length", "Last-Modified", "Date"))
    if tag and not tag.startswith("W/"):  # a weak one is of what means the same
        return str(tag)
    with contextlib.suppress(TypeError, ValueError):
        dates = [email.utils.parsedate_to_datetime(date).timestamp() for date in (changed, now)]
        if length and dates[1] - dates[0] >= _SETTLED:
            return f"{changed} {length}"
    return None
