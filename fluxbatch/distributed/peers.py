"""Which peers the environment speaks of: JAX_NUM_PROCESSES and its like, or a launcher's own variables.

A launcher's words may stand where it started nothing (a shell of salloc, a script without srun): they count where it
says that it did. Standard library only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

from fluxbatch.types import Exit, UserError

ALONE = "JAX_NUM_PROCESSES=1 JAX_PROCESS_ID=0"
ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
# Names of a count and of an index that launchers use which JAX does not know.
_OTHER_LAUNCHERS = (
    ("PMI_SIZE", "PMI_RANK"),  # MPICH, Intel MPI, Cray
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    ("JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK"),  # LSF's jsrun
    ("WORLD_SIZE", "RANK"),  # torchrun, Kubeflow
    ("NNODES", "NODE_RANK"),
    ("PET_NNODES", "PET_NODE_RANK"),
    ("HOROVOD_SIZE", "HOROVOD_RANK"),
    ("CLOUD_RUN_TASK_COUNT", "CLOUD_RUN_TASK_INDEX"),
    ("AWS_BATCH_JOB_ARRAY_SIZE", "AWS_BATCH_JOB_ARRAY_INDEX"),
    ("AWS_BATCH_JOB_NUM_NODES", "AWS_BATCH_JOB_NODE_INDEX"),
)
# Indices whose count may be missing.
_UNCOUNTED = (
    ("JOB_COMPLETION_INDEX", None),
    ("BATCH_TASK_INDEX", "BATCH_TASK_COUNT"),
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"),
)


class Peers(NamedTuple):
    """The processes of this one's replica, several."""

    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody calls
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls
    evidence: str  # the variables that say so, with their values
    start: str  # how the others are started
    address: str | None = None  # host:port of process 0; None: as JAX finds it
    device: int | None = None  # the only one that is this process's on its host; None: all
    patience: int = 300  # seconds until peers that have not come will not
    code: int = Exit.PEER_LOST  # of this process then
    detect: bool = False  # whether JAX is to look for what is None


_AT_ONCE = 30, Exit.BAD_INPUT  # of launchers that start all together: who does not come was never started


def find(env: Mapping[str, str] = os.environ) -> Peers | None:
    """None for one process. UserError where there should be peers, and the environment does not say how they meet."""
    if _get(env, COUNT) is not None:
        return _by_jax(env)
    found = _by_open_mpi(env) or _by_slurm(env) or _by_tpu(env)
    given = {name: value for name in (ADDRESS, INDEX) if (value := _get(env, name)) is not None}
    is_one = "1" in (_get(env, "OMPI_COMM_WORLD_SIZE"), _get(env, "SLURM_STEP_NUM_TASKS"))
    if found is None and given and not (is_one and INDEX not in given):
        raise UserError(f"{_shown(given)}, but {COUNT} is not set: expected it as well, or {ALONE} for one process")
    if found is not None and given.get(INDEX, str(found.index)) != str(found.index):
        raise UserError(f"{INDEX}={given[INDEX]}, but {found.evidence}: expected {COUNT} as well, or no {INDEX}")
    return found


def refuse_unknown_peers(env: Mapping[str, str] = os.environ) -> None:
    """UserError where this process is one of several that know nothing of each other: each would do all of the work."""
    found = find(env)
    if _get(env, COUNT) is not None:
        return
    for names in _OTHER_LAUNCHERS:
        values = [_get(env, name) or "" for name in names]
        count, index = (int(value) if value.isdecimal() else 0 for value in values)
        if count < 2 or not values[1]:
            continue
        # srun sets these as well, mpiexec others within it
        if found and (names[0] != "PMI_SIZE" or count == found.count):
            continue
        raise UserError(
            f"{names[0]}={count}, {names[1]}={values[1]}: processes that would each do all of the work: expected "
            f"replica_index={index} replica_count={count}, or {ADDRESS}, {COUNT} and {INDEX} for one model over all; "
            "replica_count=1 if this one has work of its own"
        )
    for name, counted in _UNCOUNTED:
        given = _get(env, name) or ""
        if found or not given.isdecimal() or int(given) == 0 or (counted and _get(env, counted)):
            continue
        if not (name == "SLURM_ARRAY_TASK_ID" and "SUBMITIT_EXECUTOR" in env):  # which makes arrays of a sweep's jobs
            what = f"{name}={given}" + (f", but {counted} is not set" if counted else "")
            line = f"{what}: there are others, which would each do all of the work"
            raise UserError(f"{line}: expected replica_count=…, or replica_count=1 if this one has work of its own")


def _by_jax(env: Mapping[str, str]) -> Peers | None:
    """JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID."""
    address, count, index = (_get(env, name) for name in (ADDRESS, COUNT, INDEX))
    if index is None and count == "1":
        return None
    if not (str(count).isdecimal() and str(index).isdecimal() and int(str(index)) < int(str(count))):
        raise UserError(f"{COUNT}={count}, {INDEX}={index}: expected a count and an index below it")
    if count == "1":
        return None
    _check_address(address)
    evidence = f"{ADDRESS}={address}, {COUNT}={count}, {INDEX}={index}"
    by_slurm = "SLURM_STEP_NODELIST" in env and "SLURM_PROCID" in env
    by_mpi = "OMPI_MCA_orte_hnp_uri" in env
    local = "OMPI_COMM_WORLD_LOCAL_RANK" if by_mpi else "SLURM_LOCALID" if by_slurm else ""
    return Peers(int(str(count)), int(str(index)), evidence, "start them as well", address, _device(env, local))


def _by_open_mpi(env: Mapping[str, str]) -> Peers | None:
    size, rank = "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"
    count, index = _number(env, size), _number(env, rank)
    if (count or 1) == 1:
        return None
    evidence = _check_index(size, rank, count, index)
    address = _get(env, ADDRESS)
    if address is not None:
        _check_address(address)
    elif _get(env, "OMPI_MCA_orte_hnp_uri") is None:
        raise UserError(
            f"{evidence}, but neither OMPI_MCA_orte_hnp_uri (Open MPI 5 does not set it) nor {ADDRESS}, to find "
            f"process 0: expected mpirun -x {ADDRESS}=host:port, or {ALONE} for one process"
        )
    device, detect = _device(env, "OMPI_COMM_WORLD_LOCAL_RANK"), address is None
    return Peers(count or 0, index or 0, evidence, "start it with mpirun", address, device, *_AT_ONCE, detect)


def _by_slurm(env: Mapping[str, str]) -> Peers | None:
    """The tasks of this step. Those of the allocation (SLURM_NTASKS) are not running before srun starts them."""
    size, rank, nodes = "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_STEP_NODELIST"
    step, tasks, index = (_number(env, name) for name in (size, "SLURM_NTASKS", rank))
    if step is None and _get(env, nodes) is not None:
        size, step = "SLURM_NTASKS", tasks
    if (step or 1) == 1:
        return None
    evidence = _check_index(size, rank, step, index)
    address = _get(env, ADDRESS)
    if address is not None:
        _check_address(address)
    else:
        job, listed, port = _number(env, "SLURM_JOB_ID"), _get(env, nodes), _number(env, "JAX_COORDINATOR_PORT")
        if job is None or listed is None:
            missing = [name for name, value in (("SLURM_JOB_ID", job), (nodes, listed)) if value is None]
            lacks = f"{evidence}, but {' and '.join(missing)} not set"
            raise UserError(f"{lacks}: expected srun's environment, or {ALONE} for one process")
        address = f"{_first_host(listed)}:{port or job % 2**12 + 2**16 - 2**12}"
        evidence = f"{evidence}, {nodes}={listed}"
    device = _device(env, "SLURM_LOCALID")
    return Peers(step or 0, index or 0, evidence, "start it with srun", address, device, *_AT_ONCE)


def _by_tpu(env: Mapping[str, str]) -> Peers | None:
    """The hosts of a TPU slice, and of several slices, as JAX counts them."""
    names, worker, size, rank = "TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID"
    hosts, slices = (_get(env, names) or "").count(",") + 1, _number(env, size) or 1
    if hosts * slices == 1:
        return None
    evidence, at = "", [0, 0]
    both = (names, _get(env, names), worker, hosts), (size, slices, rank, slices)
    for i, (name, value, index, count) in enumerate(both):
        at[i] = _number(env, index) or 0
        if count > 1:
            evidence += f"{', ' if evidence else ''}{name}={value}, {index}={_get(env, index)}"
            if _number(env, index) is None or at[i] >= count:
                raise UserError(f"{evidence}: expected an index from 0 to {count - 1}, or {ALONE} for one process")
    return Peers(hosts * slices, at[0] + at[1] * hosts, evidence, "start it on all hosts", detect=True)


def _check_index(size: str, rank: str, count: int | None, index: int | None) -> str:
    """The two as they are; UserError unless the index is below the count."""
    evidence = f"{size}={count}, {rank}={index}" if index is not None else f"{size}={count}, but {rank} is not set"
    if index is None or index >= (count or 0):
        raise UserError(f"{evidence}: expected an index from 0 to {(count or 1) - 1}, or {ALONE} for one process")
    return evidence


def _check_address(address: str | None) -> None:
    host, _, port = (address or "").rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(f"{ADDRESS}{f'={address}' if address else ' is not set'}: expected host:port of process 0")


def _device(env: Mapping[str, str], name: str) -> int | None:
    """A process's number on its host is its GPU's; but where its launcher lets it see fewer, those are all its own."""
    number, seen = _number(env, name), _get(env, "CUDA_VISIBLE_DEVICES")
    return None if number is None or (seen is not None and seen.count(",") < number) else number


def _first_host(nodes: str) -> str:
    """node[007-015,020]-ib,other: node007-ib."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])*", nodes)
    return re.sub(r"\[(\w*)[^\]]*\]", r"\1", first[0] if first else "")


def _get(env: Mapping[str, str], name: str) -> str | None:
    """Templates leave empty what they have no value for."""
    return env.get(name) or None


def _number(env: Mapping[str, str], name: str) -> int | None:
    value = _get(env, name)
    if value is not None and not value.isdecimal():
        raise UserError(f"{name}={value}: expected a whole number; {ALONE} for one process")
    return None if value is None else int(value)


def _shown(values: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())
