"""What tells a file from any other that has had its name, without a look into it."""

from __future__ import annotations

import itertools
import os
import posixpath
import time
from collections import defaultdict
from collections.abc import Iterable

from fluxbatch.storage import web
from fluxbatch.storage.base import StorageError
from fluxbatch.storage.registry import SCHEMES, open_bucket

_SETTLED = 3.0  # seconds: a file that changes twice within less may have the same times before and after
_BESIDE = 20  # objects that are listed for each one that is wanted


def versions(urls: Iterable[str]) -> dict[str, str]:
    """Of each file its version; of none that is not there, that has just changed, or of which nobody can tell."""
    found: dict[str, str] = {}
    in_buckets: defaultdict[str, set[str]] = defaultdict(set)
    on_servers: list[str] = []
    now = time.time()
    for url in urls:
        scheme, _, rest = url.partition("://")
        if not rest:
            if version := _of_file(url, now):
                found[url] = version
        elif scheme in SCHEMES:
            bucket, _, name = rest.partition("/")
            in_buckets[f"{scheme}://{bucket}"].add(name)
        elif url.startswith(web.SCHEMES):
            on_servers.append(url)
    for bucket, names in in_buckets.items():
        found |= {f"{bucket}/{name}": version for name, version in _of_objects(bucket, names)}
    return found | web.versions(on_servers)


def _of_file(path: str, now: float) -> str | None:
    try:
        stat = os.stat(path)
    except (OSError, ValueError):
        return None
    if now - max(stat.st_mtime, stat.st_ctime) < _SETTLED:
        return None
    # whoever sets back the time of the last change cannot set back that of the inode
    return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"


def _of_objects(bucket: str, names: set[str]) -> list[tuple[str, str]]:
    """By listing, as far as that takes less than to ask for each."""
    last, limit = max(names), 1000 + _BESIDE * len(names)
    folder = posixpath.commonpath([posixpath.dirname(f"/{name}") for name in names]).strip("/")
    try:
        listed = itertools.islice(open_bucket(bucket).versions(f"{folder}/" if folder else ""), limit)
        return [each for each in itertools.takewhile(lambda each: each[0] <= last, listed) if each[0] in names]
    except StorageError:  # of which those that read the objects tell
        return []
