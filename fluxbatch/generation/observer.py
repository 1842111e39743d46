"""What a pipeline tells whoever watches it."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

from fluxbatch.weights.load import Progress


class ProgressObserver:
    """What a pipeline tells while it runs. This one tells nobody."""

    def loading(self, total: int) -> AbstractContextManager[Progress]:
        """Within it ``total`` bytes are read, and what it yields is told of them."""
        return contextlib.nullcontext(lambda count: None)

    def streaming(self) -> AbstractContextManager[Progress]:
        """As ``loading``, in a thread while the devices compute."""
        return contextlib.nullcontext(lambda count: None)

    def compiling(self) -> AbstractContextManager[None]:
        """Within it nothing happens but a wait for the compiler."""
        return contextlib.nullcontext()

    def launched(self, since: float, outputs: Any, pictures: bool) -> None:
        """``since`` a monotonic time the devices have had programs to run, until ``outputs`` are there; ``pictures``:
        to draw some, and not to encode texts."""
