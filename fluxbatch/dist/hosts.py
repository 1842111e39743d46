"""This process: its accelerator, its compilation cache, and the signals that ask it to stop."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import time
from collections.abc import Iterator

import jax

from fluxbatch.types import Exit, UserError

PLATFORMS = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}


def start(platform: str, cache_dir: str | None) -> str:
    """Brings JAX up on ``platform`` (``auto``: the best there is) and returns its name: cpu, gpu or tpu.

    UserError when this machine does not have it.
    """
    if platform != "auto":
        jax.config.update("jax_platforms", PLATFORMS[platform])
    if cache_dir:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(cache_dir))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    try:
        found = jax.default_backend()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"hardware={platform}: JAX finds none here: {reason}") from error
    if platform not in ("auto", found):
        raise UserError(f"hardware={platform}: this process already runs on {found}")
    return found


def start_id() -> str:
    """Another word for every start of every process."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(4)}"


class Drain:
    """Whether the run has been asked to stop. The first SIGTERM or SIGINT lets the current batch
    finish; a second one ends the process at once (records on disk stay whole)."""

    requested = False

    def _handle(self, number: int, _: object) -> None:
        if self.requested:
            os._exit(Exit.PREEMPTED)
        self.requested = True
        os.write(2, f"\nfluxbatch: {signal.Signals(number).name}: finishing the current batch, then stopping\n".encode())


@contextlib.contextmanager
def drain_on_signals() -> Iterator[Drain]:
    """Installs the handlers for the length of a run."""
    drain = Drain()
    before = {number: signal.signal(number, drain._handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield drain
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
