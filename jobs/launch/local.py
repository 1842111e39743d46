"""Replicas of several processes on this machine.

    python jobs/launch/local.py REPLICAS PROCESSES manifest=prompts.jsonl sharding=ddp …

The GPUs in CUDA_VISIBLE_DEVICES are divided evenly. A replica that lost a process is started again. Ctrl-C or SIGTERM
drains all.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from fluxbatch.distributed.replica import hold_port
from fluxbatch.types import Exit

AGAIN = {Exit.PREEMPTED, Exit.PEER_LOST, -signal.SIGABRT, -signal.SIGKILL}
processes: set[subprocess.Popen[bytes]] = set()
stopping = False


def main(replicas: int, each: int, words: list[str]) -> int:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    with ThreadPoolExecutor(replicas) as pool:
        return max(pool.map(lambda index: replica(index, replicas, each, words), range(replicas)))


def replica(index: int, replicas: int, each: int, words: list[str]) -> int:
    """Starts a replica until it ends for good; the worst exit code of its processes then."""
    gpus = list(filter(None, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")))
    share = len(gpus) // (replicas * each)
    for _ in range(20):
        started = []
        with hold_port() as held:
            for process in range(each):
                at = (index * each + process) * share
                env = os.environ | ({"CUDA_VISIBLE_DEVICES": ",".join(gpus[at : at + share])} if share else {})
                env |= {
                    "JAX_COORDINATOR_ADDRESS": "{}:{}".format(*held.getsockname()),
                    "JAX_NUM_PROCESSES": str(each),
                    "JAX_PROCESS_ID": str(process),
                }
                command = [
                    sys.executable,
                    "-m",
                    "fluxbatch.run",
                    f"replica_index={index}",
                    f"replica_count={replicas}",
                    *words,
                ]
                # Ctrl-C reaches them through `stop`
                started.append(subprocess.Popen(command, env=env, start_new_session=True))
            processes.update(started)
            for process in started if stopping else ():  # asked while they were being started
                process.send_signal(signal.SIGTERM)
            codes = [process.wait() for process in started]
            processes.difference_update(started)
        if stopping or not AGAIN & {*codes}:
            break
    return max((code if code >= 0 else 128 - code for code in codes), default=0)


def stop(number: int, _: object) -> None:
    global stopping
    stopping = True
    for process in list(processes):
        process.send_signal(signal.SIGTERM)


if __name__ == "__main__":
    if len(sys.argv) < 3 or not all(word.isdecimal() and int(word) for word in sys.argv[1:3]):
        sys.exit(__doc__)
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
