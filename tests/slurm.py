"""A real Slurm on this machine, for tests: a controller and two nodes, out of Debian's packages."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator

from fluxbatch.distributed.replica import hold_port

DAEMONS = ("slurmctld", "slurmd", "munged", "unshare")
NODES = ("fb0", "fb1")
CONF = """\
ClusterName=fluxbatch
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=5,bf_interval=5,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=20
MpiDefault=none
NodeName=fb0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=2000
NodeName=fb1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=2000
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL PriorityTier=9 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why there can be no Slurm here."""
    if os.geteuid() != 0:
        return "starting Slurm needs root"
    if absent := [name for name in DAEMONS if _find(name) is None]:
        return f"not installed: {', '.join(absent)}"
    mounts = subprocess.run(["unshare", "-m", "mount", "--bind", "/etc/hosts", "/etc/hosts"], capture_output=True)
    return "no mount namespaces here" if mounts.returncode else None


@contextlib.contextmanager
def cluster(folder: pathlib.Path) -> Iterator[dict[str, str]]:
    """Starts it; the environment for its clients."""
    folder.chmod(0o755)
    held = [hold_port() for _ in range(3)]  # until this ends
    ports = [port.getsockname()[1] for port in held]
    host = socket.gethostname().partition(".")[0]
    (folder / "slurm.conf").write_text(CONF.format(folder=folder, host=host, ports=ports))
    (folder / "state").mkdir()
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o600)
    # the first node of a job is its coordinator: names of nodes must resolve
    (folder / "hosts").write_text(pathlib.Path("/etc/hosts").read_text() + f"127.0.0.1 {' '.join(NODES)}\n")
    env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    with contextlib.ExitStack() as daemons:

        def start(name: str, *words: object) -> None:
            log = daemons.enter_context(open(folder / f"{name}.log", "w"))
            process = subprocess.Popen([*map(str, words)], env=env, stdout=log, stderr=log)
            daemons.callback(_stop, process)

        start(
            "munged",
            _find("munged"),
            "--foreground",
            "--force",
            f"--key-file={folder / 'key'}",
            f"--socket={folder / 'munge.socket'}",
            f"--pid-file={folder / 'munged.pid'}",
            f"--log-file={folder / 'munged.own.log'}",
            f"--seed-file={folder / 'seed'}",
        )
        _wait(lambda: (folder / "munge.socket").exists(), folder)
        start("slurmctld", _find("slurmctld"), "-D", "-i", "-f", folder / "slurm.conf")
        for node in NODES:
            (folder / node).mkdir()
            script = (
                f"mount --bind {folder / 'hosts'} /etc/hosts && exec {_find('slurmd')} -D -N {node} -f "
                f"{folder / 'slurm.conf'}"
            )
            start(node, "unshare", "-m", "sh", "-c", script)
        _wait(lambda: _out(env, "sinfo", "-h", "-o", "%T", "-p", "low").split() == ["idle"], folder)
        yield env
        _out(env, "scancel", "-u", "root")
        _wait(lambda: not _out(env, "squeue", "-h"), folder)


def _find(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def _out(env: dict[str, str], *words: str) -> str:
    return subprocess.run(words, env=env, capture_output=True, text=True).stdout


def _wait(condition, folder: pathlib.Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        logs = "\n".join(f"{path.name}: {path.read_text()[-600:]}" for path in folder.glob("*.log"))
        assert time.monotonic() < end, f"Slurm does not come up or go down:\n{logs}"
        time.sleep(0.2)


def _stop(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
