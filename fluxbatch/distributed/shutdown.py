"""How a run ends early: signals that ask it to drain."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

from fluxbatch.types import Exit


class Drain:
    """Whether the run has been asked to stop, asked once before each batch. The first SIGTERM or SIGINT
    lets the current batch finish; a second one, or one before ``begin``, ends the process at once (records
    on disk stay whole).

    In a replica of several processes a SIGTERM or SIGINT to any of them stops all before the same batch, by JAX's
    own notice of preemption.
    """

    def __init__(self) -> None:
        self._signalled = self._passed_on = self._began = False
        self._step = 0
        self.stopped = False

    def begin(self) -> None:
        """From now on there are batches to finish."""
        self._began = True

    def asked(self) -> bool:
        self._step += 1
        notice = jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(self._step)
        self.stopped = self.stopped or self._signalled or notice
        return self.stopped

    def _handle(self, number: int, _: object) -> None:
        if self._signalled:
            os._exit(Exit.PREEMPTED)
        self._signalled = True
        what = "finishing the current batch, then stopping" if self._began else "stopped before the first image"
        with contextlib.suppress(OSError):  # nobody may read it any more
            os.write(2, f"\nfluxbatch: {signal.Signals(number).name}: {what}\n".encode())
        if not self._began:
            os._exit(Exit.PREEMPTED)

    def _pass_on(self, *_: object) -> None:
        """To JAX, which notices SIGTERM."""
        if self._passed_on:
            os._exit(Exit.PREEMPTED)
        self._passed_on = True
        os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def drain_on_signals() -> Iterator[Drain]:
    """Installs the handlers for the length of a run; none for SIGTERM where JAX has its own."""
    drain = Drain()
    alone = jax.process_count() == 1
    handlers = (
        dict.fromkeys((signal.SIGTERM, signal.SIGINT), drain._handle) if alone else {signal.SIGINT: drain._pass_on}
    )
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield drain
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
