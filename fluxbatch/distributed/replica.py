"""Which replica of how many this process belongs to: as the job says, or the scheduler that started it; and where
processes meet."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import NamedTuple

from fluxbatch.types import UserError

_INDICES = "SLURM_ARRAY_TASK_ID", "BATCH_TASK_INDEX", "JOB_COMPLETION_INDEX"
_COUNTS = "SLURM_ARRAY_TASK_COUNT", "BATCH_TASK_COUNT"


class Replica(NamedTuple):
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody calls


def hold_port() -> socket.socket:
    """A socket bound to a port of this machine, for its processes to meet at: until it is closed the system gives that
    port to nobody who asks for any, and still lets one who names it listen there."""
    held = socket.socket()
    for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
        held.setsockopt(socket.SOL_SOCKET, option, 1)
    held.bind(("127.0.0.1", 0))
    return held


def find(index: int | None, count: int | None, env: Mapping[str, str] = os.environ) -> Replica:
    """``index`` and ``count`` as the job gives them; what it leaves out comes from the environment.

    A Slurm array has a task for each replica, whatever runs inside, unless submitit has made it of a sweep's jobs. The
    indices of Kubernetes and Google Cloud Batch number a replica's processes just as well, so they count only where
    this process has no peers; an indexed Kubernetes job does not say how many there are, so there the count must be
    given.
    """
    if count == 1 and index is None:  # the job says so: whatever else runs is none of its replicas
        return Replica(0, 1)
    found_index, found_count = _scheduled(env)
    given = [f"replica_index={index}", f"replica_count={count}"]
    if count is None:
        count = found_count if found_count is not None else 1
        given[1] = counted_by(env) if found_count is not None else f"replica_count={count}"
    if index is None and found_index is not None and (found_count is not None or count > 1):
        index = found_index
        given[0] = f"replica_index={index} ({', '.join(f'{name}={env[name]}' for name in _INDICES if name in env)})"
    if index is None:
        if count > 1:
            unknown = "no scheduler says which replica this is"
            raise UserError(f"replica_count={count}: expected replica_index as well; {unknown}")
        index = 0
    if not 0 <= index < count:
        wanted = f"an index from 0 to {count - 1}; replica_count=1 for a job by itself"
        raise UserError(f"{', '.join(given)}: expected {wanted}")
    return Replica(index, count)


def counted_by(env: Mapping[str, str] = os.environ) -> str:
    """The variables that say how many replicas there are, where the job does not."""
    return ", ".join(f"{name}={env[name]}" for name in _COUNTS if name in env)


def _scheduled(env: Mapping[str, str]) -> tuple[int | None, int | None]:
    """The index and the count that a scheduler has left in the environment."""

    def number(name: str) -> int | None:
        value = env.get(name)
        if value and not value.isdecimal():
            raise UserError(f"{name}={value}: expected a whole number, or replica_index and replica_count")
        return int(value) if value else None  # templates leave empty what they have no value for

    if "SUBMITIT_EXECUTOR" not in env and (task := number("SLURM_ARRAY_TASK_ID")) is not None:
        first, last, count = (number(f"SLURM_ARRAY_TASK_{word}") for word in ("MIN", "MAX", "COUNT"))
        if first is None or last is None or count is None:
            return None, None
        step = (last - first) // (count - 1) if count > 1 else 1
        if (task - first) % step or (last - first) != step * (count - 1):
            wanted = "an evenly spaced array, as --array=0-7, or replica_index and replica_count"
            raise UserError(f"SLURM_ARRAY_TASK_ID={task}: expected {wanted}")
        return (task - first) // step, count
    if (number("JAX_NUM_PROCESSES") or 1) > 1 or "," in env.get("TPU_WORKER_HOSTNAMES", ""):
        return None, None
    if (task := number("BATCH_TASK_INDEX")) is not None:
        return task, number("BATCH_TASK_COUNT")
    return number("JOB_COMPLETION_INDEX"), None
