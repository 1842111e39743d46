"""What is in pictures, remembered: a start need not read again those that no other has changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping

from fluxbatch.storage.base import NotFound, Store
from fluxbatch.storage.picture import Seen
from fluxbatch.storage.versions import versions
from fluxbatch.storage.web import SCHEMES


class Digests:
    """What was found in pictures, by their address and version, in an object of a run's own.

    The object is no more than a memory: without it, or if it is damaged, everything is read."""

    def __init__(self, store: Store, name: str):
        self._store, self._name = store, name
        self._before = self._read()
        self._versions: dict[str, str] = {}
        self._now: dict[str, tuple[str, Seen]] = {}

    def known(self, urls: Iterable[str]) -> dict[str, Seen]:
        """What earlier starts found in those that are as they were."""
        # a server is asked only for what may be known: with a file comes its version
        self._versions = versions(url for url in urls if not url.startswith(SCHEMES) or _handle(url) in self._before)
        found = {}
        for url, version in self._versions.items():
            before = self._before.get(_handle(url))
            if before is not None and before[0] == version:
                found[url] = before[1]
                self._now[_handle(url)] = before
        return found

    def saw(self, seen: Mapping[str, Seen]) -> None:
        """What has been found in others, after ``known``."""
        for url, each in seen.items():
            if each.version:
                self._now[_handle(url)] = each.version, each._replace(version=None)
        alone = (url for url, each in seen.items() if url in self._versions and not each.version)
        for url, version in versions(alone).items():
            if version == self._versions[url]:  # it has not changed while it was read
                self._now[_handle(url)] = version, seen[url]

    def save(self) -> None:
        """Raises StorageError."""
        if self._now != self._before:
            lines = (json.dumps([handle, version, *seen[:3]]) for handle, (version, seen) in self._now.items())
            self._store.write(self._name, "".join(f"{line}\n" for line in lines).encode())

    def _read(self) -> dict[str, tuple[str, Seen]]:
        try:
            lines = self._store.read(self._name).splitlines()
            found = {}
            for line in lines:
                handle, version, sha256, height, width = json.loads(line)
                found[handle] = version, Seen(sha256, height, width)
            return found
        except (NotFound, ValueError, TypeError):
            return {}


def _handle(url: str) -> str:
    """The address may tell of a machine, and lies with what is published."""
    return hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()[:32]
