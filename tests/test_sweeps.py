"""Sweeps from the command line: each job its place, its name and its exit code."""

import importlib
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from test_config import command, own  # noqa: F401

from fluxbatch import __version__, keys
from fluxbatch.config import application, overrides
from fluxbatch.config.schema import Job
from fluxbatch.types import Exit, UserError


def test_a_sweep_gives_each_job_its_place(command, tmp_path):  # noqa: F811
    jobs = command(
        "-m", "manifest=a.jsonl", "seed=range(2)", "num_inference_steps=2,4", "run_name=grid", "output_dir=out"
    )
    assert [(job.output_dir, job.run_name) for job in jobs] == [
        ("out", f"grid/num_inference_steps={steps},seed={seed}") for seed in (0, 1) for steps in (2, 4)
    ]
    assert [job.sweep for job in jobs] == [
        {"seed": seed, "sampler.num_inference_steps": steps} for seed in (0, 1) for steps in (2, 4)
    ]
    assert [*(tmp_path / "out/grid").iterdir()] == [tmp_path / "out/grid/multirun.yaml"]


@pytest.mark.parametrize("rank", ["JAX_PROCESS_ID", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"])
def test_only_the_first_process_keeps_a_sweep_s_record(command, tmp_path, monkeypatch, rank):  # noqa: F811
    words = ("-m", "manifest=a.jsonl", "seed=0,1", "run_name=grid", "output_dir=out")
    application._scratch.cache_clear()
    monkeypatch.setenv(rank, "1")
    assert [job.run_name for job in command(*words)] == ["grid/seed=0", "grid/seed=1"]
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv(rank, "0")
    command(*words)
    assert (tmp_path / "out/grid/multirun.yaml").exists()


@pytest.mark.slow
def test_a_sweep_by_joblib(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    golden = Path(__file__).parent / "golden"
    words = [
        f"pretrained_model_name_or_path={golden / 'dev'}",
        "max_sequence_length=24",
        "resolution=16",
        "hardware=cpu",
        "prompt=a fox",
        f"output_dir={tmp_path}",
        "run_name=s",
        f"jax_cache_dir={tmp_path / 'xla'}",
        f"text_cache_dir={tmp_path / 'text'}",
    ]
    command = [  # noqa: F811
        sys.executable,
        "-m",
        "fluxbatch.run",
        "-m",
        "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=2",
        "seed=0,1",
        *words,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    records = [json.loads((tmp_path / f"s/seed={n}/metadata.jsonl").read_text()) for n in range(2)]
    assert [record["seed"] for record in records] == [0, 1]


def test_what_sweeps(command, own):  # noqa: F811
    jobs = command("-m", own, "prompt='a, b','c'", "lora=anime,[anime,realistic]")
    assert [job.prompt for job in jobs] == ["a, b", "a, b", "c", "c"]
    assert jobs[1].sweep == {"prompt": "a, b", "lora": ["anime", "realistic"]}
    jobs = command("-m", "prompt=a, b", "pretrained_model_name_or_path=/a (b),gs://c", "attention=choice(flash)")
    assert [job.model.pretrained_model_name_or_path for job in jobs] == ["/a (b)", "gs://c"]
    assert [job.prompt for job in jobs] == ["a, b", "a, b"]
    assert jobs[1].sweep == {"model.pretrained_model_name_or_path": "gs://c", "hardware.attention": "flash"}


def test_a_job_of_a_sweep_keeps_its_place_when_the_sweep_is_extended(command):  # noqa: F811
    def places(*words):
        jobs = command("-m", "manifest=a.jsonl", "run_name=s", *words)
        assert len({job.run_name for job in jobs}) == len(jobs)
        return {job.run_name: (job.seed, job.sampler.num_inference_steps) for job in jobs}

    few = places("seed=0,1", "num_inference_steps=2,4")
    many = places("num_inference_steps=2,3,4", "seed=0,1,2")
    assert len(many) == 9 and few.items() <= many.items()


def test_places_of_a_sweep_tell_values_apart_that_no_file_name_can(command):  # noqa: F811
    prompts = ["a b", "a/b", "a:b", "../b", "x" * 50, "x" * 51, "ü" * 300 + "1", "ü" * 300 + "2", "-"]
    jobs = command("-m", "prompt=" + ",".join(f"'{prompt}'" for prompt in prompts), "run_name=s")
    assert [job.prompt for job in jobs] == prompts and len({job.run_name for job in jobs}) == len(prompts)
    assert all(len(job.run_name.encode()) <= 200 and job.run_name.count("/") == 1 for job in jobs)
    jobs = command(
        "-m",
        "prompt=x",
        "run_name=s",
        "lora_config.scale=[],[]",
        "attention=dot_product,flash",
        "model=flux-mini,flux-dev",
        "max_shift=null,-1",
    )
    assert len(jobs) == 16 and len({job.run_name for job in jobs}) == 8
    assert all(
        job.run_name.endswith(("max_shift=null", "max_shift=-1.0")) and "attention=" in job.run_name for job in jobs
    )


def test_a_group_of_files_about_the_whole_job_sweeps(command, tmp_path):  # noqa: F811
    for name, text in {"day": "seed: 5", "night": "seed: 7", "later/dusk": "seed: 6"}.items():
        path = tmp_path / "own/experiment" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# @package _global_\n{text}")
    jobs = command(
        "-m",
        f"--config-dir={tmp_path / 'own'}",
        "prompt=x",
        "run_name=s",
        "+experiment=day,night,later/dusk",
        "max_shift=null,1",
    )
    assert [(job.seed, job.sweep["experiment"]) for job in jobs[::2]] == [(5, "day"), (7, "night"), (6, "later/dusk")]
    assert len({job.run_name for job in jobs}) == 6 and jobs[0].run_name == "s/experiment=day,max_shift=null"


def test_sweeps_are_named_by_their_content(command):  # noqa: F811
    def place(*words):
        return {job.run_name.rpartition("/")[0] for job in command("-m", "prompt=x", *words)}

    first = place("seed=0,1")
    assert first == place("seed=0,1") == place("seed=0,1", "overwrite=true") and len(first) == 1
    assert first != place("seed=0,2")


def test_a_sweep_s_exit_code_is_its_worst(command):  # noqa: F811
    codes = {0: 0, 1: 3, 2: 2, 3: 75, 4: 0}
    ran = []

    def task(job):
        ran.append(job.seed)
        if job.seed == 2:
            raise UserError("rows.jsonl:1: bad")
        return codes[job.seed]

    command("-m", "prompt=x", "seed=0,1", task=task, expect=3)
    command("-m", "prompt=x", "seed=0,1,2", task=task, expect=2)
    ran.clear()
    command("-m", "prompt=x", "seed=2,3,4", task=task, expect=Exit.PREEMPTED)
    assert ran == [2, 3]  # a preempted job takes the rest of the sweep with it


def test_a_sweep_into_a_bucket_makes_no_directory_here(command, tmp_path, monkeypatch):  # noqa: F811
    """But one that goes with the process: another user's ``fluxbatch`` among the temporary files is in nobody's way."""
    (tmp_path / "temporary").mkdir()
    (tmp_path / "temporary" / "fluxbatch").write_text("another user's")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(application, "_scratch", application._scratch.__wrapped__)
    jobs = command("-m", "prompt=x", "seed=0,1", "output_dir=gs://bucket/out", "run_name=r")
    assert [f"{job.output_dir}/{job.run_name}" for job in jobs] == [
        "gs://bucket/out/r/seed=0",
        "gs://bucket/out/r/seed=1",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["temporary"]
    assert all(p.name == "fluxbatch" or p.name.startswith("fluxbatch-") for p in (tmp_path / "temporary").iterdir())


def test_launchers_can_send_the_task_elsewhere():
    task = application._HydraTask(print, Job, True, frozenset({"seed"}))
    assert pickle.loads(pickle.dumps(task)).fixed == {"seed"}


def test_the_package_itself_is_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "fluxbatch", "--version"], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert (done.returncode, done.stdout.strip()) == (0, f"fluxbatch {__version__}"), done.stderr


@pytest.mark.parametrize(
    ("entry", "own"),
    [("run", "--cfg job"), ("convert", "to=…"), ("verify", "repair=false"), ("replay", "id=…"), ("plan", "aot=null")],
)
def test_help_is_of_the_command(monkeypatch, capsys, entry, own):  # noqa: F811
    monkeypatch.setattr("sys.argv", ["fluxbatch", "--help"])
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"fluxbatch.{entry}").main()
    said = capsys.readouterr().out
    assert not stop.value.code and said.count("Usage:") == said.count(f"Usage: python -m fluxbatch.{entry} ") == 1
    assert f"\n  {own} " in said


def test_keys_are_explained_by_a_command(capsys):
    def said(*words, code=0):
        with pytest.raises(SystemExit) as stop:
            keys.main(words)
        assert stop.value.code == code
        return capsys.readouterr()

    page = said().out
    assert [key for key in overrides.leaves(Job) if f"\n  {key}=" not in page] == []
    assert (
        "\n  seed=0                                 a row without a seed of its own gets this plus its index\n" in page
    )
    assert "\n  sharding=ddp                           Every device holds the whole model\n" in page
    assert all(f"\n  {key}=" in page for key in ("target", "repair", "id", "to"))  # of the siblings
    assert [line for line in page.splitlines() if line.startswith("  ") and len(line.split(None, 1)) < 2] == []
    assert said("num_inference_steps=8").out.splitlines() == [
        "Keys of sampler, as sampler=dev has them",
        "  sampler.num_inference_steps=28         28 to 50",
    ]
    assert said("nothing-speaks-of-this", code=2).err.startswith(
        "fluxbatch: error: nothing-speaks-of-this: expected a word"
    )
