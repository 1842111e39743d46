"""Work that comes one by one and is done together, as much as has come meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Grouped(Generic[T]):
    """Calls ``action``, which raises nothing, in a thread, with all that came since its last call began.

    ``most``: how many may wait, then ``add`` does too. 0: no thread, ``add`` calls it.
    """

    def __init__(self, action: Callable[[list[T]], None], most: int):
        self._action, self._most = action, most
        self._changed = threading.Condition()
        self._items: list[T] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="record")

    def add(self, item: T) -> None:
        if not self._most:
            return self._action([item])
        with self._changed:
            self._changed.wait_for(lambda: len(self._items) < self._most)
            self._items.append(item)
        self._thread.submit(self._all)

    def then(self, task: Callable[[], None]) -> None:
        """Call it once all that came before is through."""
        self._thread.submit(task)

    def close(self) -> None:
        """Wait until all is through."""
        self._thread.shutdown()

    def _all(self) -> None:
        with self._changed:
            items, self._items = self._items, []
            self._changed.notify()
        if items:  # else an earlier call took them along
            self._action(items)
