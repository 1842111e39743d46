"""Environments that speak of peers: they are met, or there is one process, or one line."""

from __future__ import annotations

import os
import pathlib
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from fluxbatch.distributed import backend, join, peers, process_group
from fluxbatch.distributed.mesh import open_mesh
from fluxbatch.distributed.replica import hold_port
from fluxbatch.types import Exit, UserError

ROOT = pathlib.Path(__file__).parent.parent
ALONE = {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}
SALLOC = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}
SBATCH = SALLOC | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
STEP = SBATCH | {"SLURM_STEP_NODELIST": "node[007-009],other", "SLURM_STEP_NUM_TASKS": "4"}
MPI4 = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
JAX = {"JAX_COORDINATOR_ADDRESS": "node0:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
TPU = {"TPU_WORKER_HOSTNAMES": "t0,t1", "TPU_WORKER_ID": "1"}
SLICES = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"}


@pytest.fixture
def environment(monkeypatch):
    """Sets the variables given, and no others that peers are known by."""
    for name in [*os.environ]:
        if name.startswith(("SLURM_", "OMPI_", "PMI_", "JAX_COORD", "JAX_NUM_PROC", "JAX_PROC", "TPU_", "MEGASCALE_")):
            monkeypatch.delenv(name)

    def put(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


@pytest.mark.parametrize("env", [
    {}, SALLOC, SBATCH, SBATCH | {"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_TASKS": "1"},
    STEP | ALONE, MPI4 | ALONE, TPU | ALONE, {"SLURM_NTASKS": "x"} | ALONE,
    ALONE | {"JAX_COORDINATOR_ADDRESS": "node0"},
    {"JAX_NUM_PROCESSES": "1"}, {"JAX_NUM_PROCESSES": "", "JAX_PROCESS_ID": "", "JAX_COORDINATOR_ADDRESS": ""},
    {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
    {"OMPI_COMM_WORLD_SIZE": "1", "JAX_COORDINATOR_ADDRESS": "node0:1"},
    {"SLURM_STEP_NUM_TASKS": "1", "JAX_COORDINATOR_ADDRESS": "node0:1"}, {"TPU_WORKER_HOSTNAMES": "localhost"},
])  # fmt: skip
def test_one_process(env):
    assert peers.find(env) is None
    peers.refuse_unknown_peers(env)


@pytest.mark.parametrize(("env", "count", "index", "address", "device"), [
    (JAX, 4, 3, "node0:1234", None),
    (STEP, 4, 0, "node007:61441", 0),
    (STEP | {"SLURM_NTASKS": "9", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}, 4, 3, "node007:61441", 1),
    (STEP | {"SLURM_LOCALID": "3", "CUDA_VISIBLE_DEVICES": "0"}, 4, 0, "node007:61441", None),  # --gpus-per-task=1
    (STEP | {"SLURM_LOCALID": "3", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 4, 0, "node007:61441", 3),
    (STEP | {"JAX_COORDINATOR_PORT": "77"}, 4, 0, "node007:77", 0),
    (STEP | {"JAX_COORDINATOR_ADDRESS": "a:5", "JAX_PROCESS_ID": "0"}, 4, 0, "a:5", 0),
    (SBATCH | {"SLURM_STEP_NODELIST": "n1"}, 4, 0, "n1:61441", 0),
    (STEP | {"OMPI_COMM_WORLD_SIZE": "1"}, 4, 0, "node007:61441", 0),
    (MPI4 | {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp://10.0.0.1:5"}, 4, 1, None, 1),
    (MPI4 | {"JAX_COORDINATOR_ADDRESS": "a:5"}, 4, 1, "a:5", 1),  # Open MPI 5
    # mpirun's daemons are srun's tasks
    (MPI4 | STEP | {"SLURM_STEP_NUM_TASKS": "2", "JAX_COORDINATOR_ADDRESS": "a:5"}, 4, 1, "a:5", 1),
    (TPU, 2, 1, None, None),
    (SLICES, 2, 1, None, None),
    (TPU | SLICES, 4, 3, None, None),
    (JAX | STEP, 4, 3, "node0:1234", 0),
])  # fmt: skip
def test_peers(env, count, index, address, device):
    found = peers.find(env)
    assert found[:2] == (count, index) and (found.address, found.device) == (address, device)
    peers.refuse_unknown_peers(env)


@pytest.mark.parametrize(("nodes", "first"), [
    ("node001", "node001"), ("node001,host2", "node001"), ("node[001-0015],host2", "node001"),
    ("node[001,007-015],host2", "node001"), ("gpu[07-09]-ib,x", "gpu07-ib"), ("r[1-2]n[3,5]", "r1n3"),
])  # fmt: skip
def test_the_first_host_of_a_step(nodes, first):
    assert peers.find(STEP | {"SLURM_STEP_NODELIST": nodes}).address == f"{first}:61441"


@pytest.mark.parametrize(("env", "words"), [
    ({"SLURM_NTASKS": "x"}, ["SLURM_NTASKS=x: expected a whole number"]),
    (STEP | {"SLURM_STEP_NUM_TASKS": "4(x2)"}, ["SLURM_STEP_NUM_TASKS=4(x2)"]),
    (STEP | {"SLURM_PROCID": "4"}, ["SLURM_STEP_NUM_TASKS=4, SLURM_PROCID=4", "from 0 to 3"]),
    (STEP | {"SLURM_PROCID": ""}, ["SLURM_STEP_NUM_TASKS=4, but SLURM_PROCID is not set"]),
    (STEP | {"SLURM_LOCALID": "x"}, ["SLURM_LOCALID=x"]),
    (STEP | {"SLURM_JOB_ID": "x"}, ["SLURM_JOB_ID=x"]),
    (STEP | {"SLURM_STEP_NODELIST": ""}, ["SLURM_STEP_NODELIST not set", "srun"]),
    (STEP | {"JAX_PROCESS_ID": "2"}, ["JAX_PROCESS_ID=2", "SLURM_PROCID=0"]),
    (MPI4, ["OMPI_COMM_WORLD_SIZE=4, OMPI_COMM_WORLD_RANK=1", "OMPI_MCA_orte_hnp_uri", "mpirun -x JAX_COORD"]),
    ({"OMPI_COMM_WORLD_SIZE": "x"}, ["OMPI_COMM_WORLD_SIZE=x"]),
    ({"OMPI_COMM_WORLD_SIZE": "4"}, ["OMPI_COMM_WORLD_SIZE=4, but OMPI_COMM_WORLD_RANK is not set"]),
    ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_PROCESS_ID": "1"}, ["JAX_COORDINATOR_ADDRESS=a:1, JAX_PROCESS_ID=1, but"]),
    ({"JAX_PROCESS_ID": "0"}, ["JAX_PROCESS_ID=0, but JAX_NUM_PROCESSES is not set"]),
    ({"JAX_COORDINATOR_ADDRESS": "a:1"}, ["JAX_COORDINATOR_ADDRESS=a:1, but JAX_NUM_PROCESSES is not set"]),
    ({"JAX_COORDINATOR_ADDRESS": "a:1", "NNODES": "4", "NODE_RANK": "2"}, ["but JAX_NUM_PROCESSES is not set"]),
    (SBATCH | {"JAX_COORDINATOR_ADDRESS": "a:1"}, ["but JAX_NUM_PROCESSES is not set"]),
    ({"SLURM_STEP_NUM_TASKS": "1", "JAX_PROCESS_ID": "3"}, ["JAX_PROCESS_ID=3, but JAX_NUM_PROCESSES is not set"]),
    (JAX | {"JAX_NUM_PROCESSES": "x"}, ["JAX_NUM_PROCESSES=x, JAX_PROCESS_ID=3"]),
    (TPU | {"TPU_WORKER_ID": ""}, ["TPU_WORKER_HOSTNAMES=t0,t1, TPU_WORKER_ID=None"]),
    (TPU | {"TPU_WORKER_ID": "2"}, ["TPU_WORKER_ID=2: expected an index from 0 to 1"]),
    (TPU | {"MEGASCALE_NUM_SLICES": "2"}, ["MEGASCALE_SLICE_ID=None"]),
])  # fmt: skip
def test_an_environment_that_does_not_say_how_peers_meet_is_one_line(env, words):
    with pytest.raises(UserError) as caught:
        peers.find(env)
    assert len(caught.value.lines) == 1 and "JAX_NUM_PROCESSES" in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(("env", "word"), [
    ({"WORLD_SIZE": "4", "RANK": "2", "MASTER_ADDR": "a"}, "WORLD_SIZE=4, RANK=2"),
    ({"NNODES": "4", "NODE_RANK": "2"}, "NNODES=4, NODE_RANK=2"),
    ({"PMI_SIZE": "4", "PMI_RANK": "2"}, "PMI_SIZE=4, PMI_RANK=2"),
    ({"CLOUD_RUN_TASK_COUNT": "4", "CLOUD_RUN_TASK_INDEX": "2"}, "replica_index=2 replica_count=4"),
    (STEP | {"PMI_SIZE": "8", "PMI_RANK": "5"}, "PMI_SIZE=8, PMI_RANK=5"),  # two of mpiexec's on each of srun's
    ({"JOB_COMPLETION_INDEX": "2"}, "JOB_COMPLETION_INDEX=2: there are others"),
    ({"BATCH_TASK_INDEX": "2"}, "BATCH_TASK_INDEX=2, but BATCH_TASK_COUNT is not set"),
    ({"SLURM_ARRAY_TASK_ID": "2"}, "SLURM_ARRAY_TASK_ID=2, but SLURM_ARRAY_TASK_COUNT is not set"),
])  # fmt: skip
def test_peers_that_know_nothing_of_each_other_do_not_each_do_all(env, word):
    with pytest.raises(UserError, match=word) as caught:
        peers.refuse_unknown_peers(env)
    assert "replica_count=1 if this" in str(caught.value)
    peers.refuse_unknown_peers(env | ALONE)


@pytest.mark.parametrize("env", [
    {"WORLD_SIZE": "1", "RANK": "0"}, {"WORLD_SIZE": "4"}, {"RANK": "2"}, {"NNODES": "many", "NODE_RANK": "2"},
    STEP | {"PMI_SIZE": "4", "PMI_RANK": "0"}, STEP | {"WORLD_SIZE": "8", "RANK": "0"},
    JAX | {"JOB_COMPLETION_INDEX": "3"}, {"JOB_COMPLETION_INDEX": "0"},
    {"SLURM_ARRAY_TASK_ID": "2", "SUBMITIT_EXECUTOR": "slurm"},
])  # fmt: skip
def test_what_says_nothing_of_others_is_no_hindrance(env):
    peers.refuse_unknown_peers(env)


ONE = ("prompt=a fox", "hardware=cpu", "resolution=16", "num_inference_steps=1", "max_sequence_length=24",
       "run_name=run", "output.gallery=false")  # fmt: skip


@pytest.mark.parametrize(("env", "more", "code", "word"), [
    (SBATCH | {"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_TASKS": "1"}, [], 0, "1 made"),
    ({"WORLD_SIZE": "4", "RANK": "2"}, [], 2, "WORLD_SIZE=4"),
    ({"WORLD_SIZE": "4", "RANK": "2"}, ["replica_count=1"], 0, "1 made"),
    ({"NNODES": "4", "NODE_RANK": "2", "JAX_COORDINATOR_ADDRESS": "a:1"}, [], 2, "JAX_NUM_PROCESSES is not set"),
    (MPI4, [], 2, "OMPI_COMM_WORLD_SIZE=4"),
])  # fmt: skip
def test_a_run_in_such_an_environment(cli, golden, tmp_path, environment, env, more, code, word):
    environment(env)
    got, err = cli(f"pretrained_model_name_or_path={golden / 'dev'}", f"output_dir={tmp_path}", *ONE, *more)
    assert got == code and "Traceback" not in err
    if code:
        assert word in err and len(err.splitlines()) == 1 and not list(tmp_path.iterdir())
    else:
        assert (tmp_path / "run" / "metadata.jsonl").exists()


def test_a_coordinator_that_nobody_knows_is_told_within_seconds(environment, monkeypatch):
    monkeypatch.setattr(join, "UNKNOWN", 0.1)

    def unknown(*_):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    for env, start in ((STEP, "start it with srun"), (JAX, "start them as well")):
        environment(env)
        begun = time.monotonic()
        with pytest.raises(UserError, match=f"Name or service not known; .*{start}, or set JAX_NUM_PROCESSES=1"):
            join.join(30, 15)
        assert time.monotonic() - begun < 3


@pytest.mark.parametrize(("env", "code", "seconds"), [
    (STEP | {"SLURM_STEP_NODELIST": "localhost"}, Exit.BAD_INPUT, 30),
    (JAX | {"JAX_COORDINATOR_ADDRESS": "localhost:1234"}, Exit.PEER_LOST, 300),
])  # fmt: skip
def test_peers_that_do_not_come_are_waited_for_so_long(environment, monkeypatch, capsys, env, code, seconds):
    """JAX itself is silent for five minutes, and aborts."""
    environment(env)
    found = peers.find()
    assert (found.code, found.patience) == (code, seconds)
    gone = threading.Event()
    codes = []

    def ends(code):
        codes.append(code)
        gone.set()

    def initialize(*given, initialization_timeout, **_):
        assert given == (found.address, 4, found.index) and initialization_timeout > 1
        assert gone.wait(10)

    monkeypatch.setattr(os, "_exit", ends)
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(join, "TELL", 0.1)
    monkeypatch.setattr(join, "find", lambda: found._replace(patience=0.3))
    join.join(30, 15)
    assert codes == [code]
    waits, late = capsys.readouterr().err.splitlines()
    assert waits.startswith(f"fluxbatch: waiting for the other 3 of 4 processes ({found.evidence})")
    assert late.startswith("fluxbatch: error: the other 3 of 4 processes")
    assert late.endswith(f"{found.start}, or set JAX_NUM_PROCESSES=1 JAX_PROCESS_ID=0 for one process")


def test_what_jax_cannot_read_is_one_line(environment, monkeypatch):
    environment(MPI4 | {"OMPI_MCA_orte_hnp_uri": "junk"})
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: False)
    with pytest.raises(UserError, match="^OMPI_COMM_WORLD_SIZE=4, .*: JAX cannot join them: invalid literal"):
        join.join(30, 15)


MEETING = """
import faulthandler
faulthandler.dump_traceback_later(90, exit=True)
import jax
from fluxbatch.distributed import backend
from fluxbatch.distributed.process_group import ProcessGroup
backend.start("cpu", None)
print(f"process {jax.process_index()} of {jax.process_count()}", flush=True)
ProcessGroup().meet()
"""


def tasks_of_two(*indices):
    """What each of a step's two tasks does, of those that are really started: (its code, all it says)."""
    held = hold_port()
    step = {"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_TASKS": "2"}
    step["JAX_COORDINATOR_PORT"] = str(held.getsockname()[1])
    tasks = []
    for index in indices:
        env = os.environ | STEP | step | {"SLURM_PROCID": index, "SLURM_LOCALID": index}
        words = [sys.executable, "-c", MEETING]
        both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        tasks.append(subprocess.Popen(words, cwd=ROOT, env=env, text=True, **both))
    output = [task.communicate(timeout=120)[0] for task in tasks]
    held.close()
    return [(task.returncode, text) for task, text in zip(tasks, output, strict=True)]


def test_the_tasks_of_a_step_meet():
    first, second = tasks_of_two("0", "1")
    assert first[0] == second[0] == 0 and "process 0 of 2" in first[1] and "process 1 of 2" in second[1]


@pytest.mark.slow
@pytest.mark.parametrize("index", ["0", "1"])
def test_a_task_whose_peer_was_never_started_ends_with_a_line(index):
    ((code, text),) = tasks_of_two(index)
    assert code == 2 and "have not come in 30 s: start it with srun" in text and len(text.splitlines()) == 2


@pytest.mark.parametrize("variable", ["JAX_PLATFORMS", "JAX_PLATFORM_NAME"])
def test_a_platform_that_is_not_here_is_named_by_its_variable(monkeypatch, variable):
    def nothing():
        raise RuntimeError("Unable to initialize backend 'cuda'\nmore")

    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv(variable, "cuda")
    monkeypatch.setattr(jax, "default_backend", nothing)
    with pytest.raises(UserError, match=f"^{variable}=cuda: JAX finds none here: Unable .*; .* {variable} unset"):
        backend.start("auto", None)
    before = jax.config.jax_platforms
    try:
        with pytest.raises(UserError, match="^hardware=gpu: JAX finds none here"):
            backend.start("gpu", None)
    finally:
        jax.config.update("jax_platforms", before)


def test_tasks_with_a_job_of_their_own_each_are_told_how_to_start(monkeypatch):
    """With srun they would be taken for processes of one job."""
    way_out = "JAX_NUM_PROCESSES=1 JAX_PROCESS_ID=0 set"
    with pytest.raises(ValueError, match=f"sharding=ddp does where they share one job; .* {way_out}: srun env"):
        open_mesh((1, 1, 1, 1), (1, 1), jax.devices()[:2], processes=2)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda word: np.array([word[0], 7], np.uint32))
    with pytest.raises(UserError, match=f"process 1 .* sees another manifest than process 0: .* {way_out}"):
        process_group.ProcessGroup().agree("manifest", [1])
