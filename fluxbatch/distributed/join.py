"""How this process joins its peers, in a bounded time."""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator

import jax

from fluxbatch.distributed.peers import ALONE, Peers, find
from fluxbatch.types import UserError

UNKNOWN = 4  # seconds until a host that no name server knows counts as none
TELL = 5  # seconds until a process says that it waits


def join(heartbeat: int, shutdown: int) -> None:
    """Joins the replica that the environment speaks of; nothing at all for one process. UserError where none can meet.

    ``heartbeat``: seconds until a silent peer counts as lost; ``shutdown``: those that an exit waits for peers.
    """
    if jax.distributed.is_initialized() or (peers := find()) is None:
        return
    with _in_time(peers):
        if peers.address is not None:
            _check_coordinator(peers, peers.address)
        try:
            jax.distributed.initialize(
                peers.address,
                peers.count,
                peers.index,
                local_device_ids=None if "JAX_LOCAL_DEVICE_IDS" in os.environ else peers.device,
                cluster_detection_method=None if peers.detect else "deactivate",
                initialization_timeout=peers.patience + 60,  # at its end JAX would abort
                heartbeat_timeout_seconds=heartbeat,
                shutdown_timeout_seconds=shutdown,
            )
        except (ValueError, LookupError, RuntimeError, OSError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(f"{peers.evidence}: JAX cannot join them: {reason}; {_remedy(peers)}") from error
    # Runs before JAX's own, which first closes XLA's connections: a peer still in a collective would wait for ever.
    atexit.register(jax.distributed.shutdown)


def _remedy(peers: Peers) -> str:
    return f"{peers.start}, or set {ALONE} for one process"


@contextlib.contextmanager
def _in_time(peers: Peers) -> Iterator[None]:
    """Ends this process when its peers have not come in time: JAX waits in silence, and then aborts."""
    joined = threading.Event()
    others = f"the other {peers.count - 1} of {peers.count} processes ({peers.evidence})"

    def watch() -> None:
        if joined.wait(TELL):
            return
        print(f"fluxbatch: waiting for {others}, {peers.patience} s at most", file=sys.stderr, flush=True)
        if not joined.wait(peers.patience - TELL):
            late = f"have not come in {peers.patience} s: {_remedy(peers)}"
            print(f"fluxbatch: error: {others} {late}", file=sys.stderr, flush=True)
            os._exit(peers.code)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        joined.set()


def _check_coordinator(peers: Peers, address: str) -> None:
    """Refuses what nobody can reach, and what would make JAX crash or, where that port is another replica's, take its
    processes for this one's."""
    host, _, port = address.rpartition(":")
    since = time.monotonic()
    while True:
        try:
            socket.getaddrinfo(host.strip("[]"), int(port))
            break
        except (OSError, UnicodeError) as error:
            # Kubernetes knows a pod's name when the pod is there.
            if time.monotonic() - since > UNKNOWN and "KUBERNETES_SERVICE_HOST" not in os.environ:
                reason = error.strerror if isinstance(error, OSError) else "no host has such a name"
                line = f"{peers.evidence}: process 0 is to be at {address}: {reason}"
                raise UserError(f"{line}; expected a host that this one can reach; {_remedy(peers)}") from error
            time.sleep(0.5)
    if peers.index:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what the last start left there is no hindrance
        try:
            probe.bind(("", int(port)))
        except OSError as error:
            line = f"{peers.evidence}: process 0 cannot listen there: {error.strerror}"
            raise UserError(f"{line}; expected a free port in {address}") from error
