"""A real Slurm: an array of replicas that is preempted and put back into the queue, and a sweep by submitit."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import time

import pytest
import slurm
from conftest import GOLDEN, metadata, xla_flags
from test_hosts import ROWS, long_manifest, pictures

ROOT = pathlib.Path(__file__).parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.skipif(slurm.missing() is not None, reason=str(slurm.missing()))]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm.cluster(tmp_path_factory.mktemp("slurm")) as env:
        path = f"{pathlib.Path(sys.executable).parent}:{env['PATH']}"
        yield env | {"PATH": path, "PYTHONPATH": str(ROOT), "XLA_FLAGS": xla_flags(1), "JAX_PLATFORMS": "cpu"}


def words(folder, **more):
    given = {
        "pretrained_model_name_or_path": GOLDEN / "dev",
        "max_sequence_length": 24,
        "output_dir": folder,
        "run_name": "run",
        "jax_cache_dir": folder / "xla",
        "text_cache_dir": folder / "text",
        "output.gallery": "false",
        "resolution": 16,
    } | more
    return [f"{key}={value}" for key, value in given.items()]


def test_an_array_of_replicas_is_preempted_and_comes_back(tmp_path, cluster):
    """Two replicas over both nodes; a job of more weight drains them (75), the script requeues them, they finish."""

    def call(*command, **more):
        done = subprocess.run([*map(str, command)], env=cluster, cwd=tmp_path, capture_output=True, text=True, **more)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def queue():
        """Task → state, restarts."""
        lines = call(
            "squeue", "-h", "-r", "-p", "low", "-O", "JobArrayID:20,StateCompact:20,RestartCnt:20"
        ).splitlines()
        return {name: (state, int(restarts)) for name, state, restarts in map(str.split, lines)}

    def until(condition, seconds=150):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, (
                queue(),
                [path.read_text()[-1500:] for path in tmp_path.glob("slurm-*.out")],
            )
            time.sleep(0.1)

    rendered = call(
        sys.executable,
        ROOT / "jobs" / "launch" / "render.py",
        "kind=slurm",
        "target=2xh100-8",
        "replica_count=2",
        "sharding=ddp",
        *words(tmp_path, manifest=long_manifest(tmp_path, steps=5), shard_size=16),
    )
    # eight H100 a node are one process on a CPU here
    script = (
        rendered.replace("--ntasks-per-node=8", "--ntasks-per-node=1")
        .replace("#SBATCH --gpus-per-node=8\n", "")
        .replace("hardware=gpu", "hardware=cpu")
    )
    assert rendered.count("8") - script.count("8") == 2
    array = call("sbatch", "--parsable", input=script).strip()
    until(lambda: pictures(tmp_path / "run") >= 12)
    call("sbatch", "-p", "high", "--nodes=2", "--exclusive", "--wrap", "true")
    until(lambda: len(queue()) == 2 and all(restarts and state != "R" for state, restarts in queue().values()))
    assert 12 <= pictures(tmp_path / "run") < ROWS
    status = [
        json.loads((tmp_path / "run" / ".fluxbatch" / "replicas" / f"{n}.json").read_text())["exit_code"]
        for n in range(2)
    ]
    assert status == [75, 75]
    until(lambda: not call("squeue", "-h", "-p", "high"))
    # Slurm itself would wait two minutes; at once, its nodes would take the new start for the one they have just ended
    call("scontrol", "update", f"job={array}", "StartTime=now+4")
    until(lambda: not queue())
    assert sorted(record["id"] for record in metadata(tmp_path / "run")) == sorted(f"r{n}" for n in range(ROWS))
    assert (
        pictures(tmp_path / "run") == ROWS
        and json.loads((tmp_path / "run" / "status.json").read_text())["exit_code"] == 0
    )


def test_a_sweep_by_submitit(tmp_path, cluster):
    """model × lora: each job is a job of Slurm's and whole, none takes itself for a replica of the others."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    command = [
        sys.executable,
        "-m",
        "fluxbatch.run",
        "-m",
        "hydra/launcher=submitit_slurm",
        "hydra.launcher.partition=low",
        "hydra.launcher.timeout_min=10",
        "model=flux-mini,flux-mini-dev",
        "lora=none,outline",
        "prompt=a red apple on a blue background",
        "seed=3",
        "hardware=cpu",
        "num_inference_steps=1",
        f"output_dir={tmp_path}",
        "run_name=s",
        f"jax_cache_dir={tmp_path / 'xla'}",
        f"text_cache_dir={tmp_path / 'text'}",
    ]
    done = subprocess.run(command, env=cluster, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    records = [
        json.loads((tmp_path / f"s/lora={lora},model={model}/metadata.jsonl").read_text())
        for model in ("flux-mini", "flux-mini-dev")
        for lora in ("none", "outline")
    ]
    assert len({record["sha256"] for record in records}) == 4 and {record["seed"] for record in records} == {3}
    assert [record["lora"] for record in records] == ["{}", '{"outline": 1.0}'] * 2
    assert not list(tmp_path.glob("s/*/.fluxbatch/claims"))
    assert len(list((tmp_path / "s" / ".submitit").glob("*/*_result.pkl"))) == 4
    assert (tmp_path / "s" / "index.html").exists()
