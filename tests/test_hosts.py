"""One replica of several processes: the pictures of one process, every row once, and an end when one dies."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import GOLDEN, images, metadata, psnr, xla_flags
from jax.experimental import multihost_utils

from fluxbatch.distributed import process_group
from fluxbatch.distributed.backend import HEARTBEAT
from fluxbatch.distributed.replica import hold_port
from fluxbatch.storage.base import StorageError
from fluxbatch.types import Exit, UserError

KILLS = int(os.environ.get("FLUXBATCH_SOAK", "2"))
ROWS = 640  # three seconds at 200 a second: whoever interferes must not come too late


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("xla")


def replica(
    folder,
    cache,
    processes,
    name="run",
    devices=2,
    log=None,
    first=(),
    program=("-m", "fluxbatch.run"),
    places=None,
    **more,
):
    """Starts the processes of a replica on this machine; ``first``: arguments that only process 0 gets; ``places``:
    for each process the words that start it elsewhere, if the first one's address is not this machine's own."""
    held = hold_port()
    flags = {
        "pretrained_model_name_or_path": GOLDEN / "dev",
        "max_sequence_length": 24,
        "hardware": "cpu",
        "output_dir": folder,
        "run_name": name,
        "jax_cache_dir": cache,
        "text_cache_dir": "null",
        "sharding": "ddp",
        "output.gallery": "false",
    } | more
    command = [sys.executable, *program, *(f"{k}={v}" for k, v in flags.items())]
    address, prefixes = places or ("127.0.0.1", [[]] * processes)
    started = []
    for index in range(processes):
        env = os.environ | {
            "XLA_FLAGS": xla_flags(devices), "JAX_COORDINATOR_ADDRESS": f"{address}:{held.getsockname()[1]}",
            "JAX_NUM_PROCESSES": str(processes), "JAX_PROCESS_ID": str(index)}  # fmt: skip
        file = open(folder / f"{log or name}.{index}.log", "w")  # noqa: SIM115
        started.append(
            subprocess.Popen(
                [*prefixes[index], *command, *(first if index == 0 else ())], env=env, stdout=file, stderr=file
            )
        )
    started[0].port = held  # as long as there is a process to look at
    return started


def said(folder, name="run"):
    return "\n".join(path.read_text()[-2000:] for path in sorted(folder.glob(f"{name}.*.log")))


@pytest.mark.slow
@pytest.mark.parametrize("count,devices,sizes", [
    (2, 2, "data=-1"), (2, 2, "fsdp=-1"), (2, 2, "data=2 fsdp=2"), (2, 2, "tensor=2 context=2"),
    (4, 2, "data=4 fsdp=2"), (4, 2, "fsdp=2 context=2 tensor=2"), (4, 2, "data=2 context=4")], ids=str)  # fmt: skip
def test_several_processes_make_the_pictures_of_one(tmp_path, cache, count, devices, sizes):
    """Of what several processes hold, one writes each picture; encoders are read anew for every shard where weights are
    split."""
    flags = {f"ici_{axis}_parallelism": size for axis, _, size in (word.partition("=") for word in sizes.split())}
    flags |= {"offload_encoders": "free", "shard_size": 2} if "fsdp" in sizes else {}
    rows = (GOLDEN / "dev.jsonl").read_text().splitlines()
    rows = rows if count == 2 else [rows[0], rows[3]]  # of one size: four processes on few cores compile for long
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    processes = replica(
        tmp_path, cache, count, devices=devices, manifest=tmp_path / "rows.jsonl", sharding="single", **flags
    )
    assert [p.wait(timeout=600) for p in processes] == [0] * count, said(tmp_path)
    expected = np.load(GOLDEN / "dev.npz")
    made = images(tmp_path / "run")
    assert sorted(r["id"] for r in metadata(tmp_path / "run")) == sorted(json.loads(row)["id"] for row in rows)
    assert all(psnr(picture, expected[name]) >= 50 for name, picture in made.items())
    assert not list((tmp_path / "run").glob("*.tmp"))


def long_manifest(folder, steps=2):
    rows = [{"id": f"r{i}", "prompt": f"prompt {i % 9}", "seed": i, "num_inference_steps": steps} for i in range(ROWS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def pictures(run):
    return len(list(run.glob("flux_*.png"))) if run.exists() else 0


def wait_for(processes, run, count):
    end = time.monotonic() + 300
    while pictures(run) < count and all(p.poll() is None for p in processes):
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_the_next_start_completes(tmp_path, cache):
    manifest = long_manifest(tmp_path)
    more = {"manifest": manifest, "resolution": 16, "shard_size": 32}
    processes = replica(tmp_path, cache, 2, **more)
    wait_for(processes, tmp_path / "run", 24)
    processes[1].kill()
    code = processes[0].wait(timeout=60)
    assert code in (76, -signal.SIGABRT), said(tmp_path)
    recorded = pictures(tmp_path / "run")
    assert 0 < recorded < ROWS
    processes = replica(tmp_path, cache, 2, **more)
    assert [p.wait(timeout=240) for p in processes] == [0, 0], said(tmp_path)
    records = metadata(tmp_path / "run")
    assert sorted(r["id"] for r in records) == sorted(f"r{i}" for i in range(ROWS))
    assert pictures(tmp_path / "run") == ROWS

    alone = replica(tmp_path, cache, 1, name="alone", **more)
    assert alone[0].wait(timeout=240) == 0, said(tmp_path, "alone")
    one, two = images(tmp_path / "alone"), images(tmp_path / "run")
    assert all(np.abs(one[k].astype(int) - two[k].astype(int)).max() <= 1 for k in one)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=str)
def test_a_signal_to_one_drains_all(tmp_path, cache, number):
    more = {"manifest": long_manifest(tmp_path), "resolution": 16, "shard_size": 32}
    processes = replica(tmp_path, cache, 2, **more)
    wait_for(processes, tmp_path / "run", 24)
    processes[1].send_signal(number)
    assert [p.wait(timeout=60) for p in processes] == [75, 75], said(tmp_path)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["exit_code"] == 75 and 0 < status["counts"]["left"] < ROWS
    assert len(metadata(tmp_path / "run")) == pictures(tmp_path / "run")


def busy():
    """What a start is told while another one is at work."""
    error = StorageError("another start is at work")
    error.code = Exit.PREEMPTED
    return error


@pytest.mark.parametrize(("error", "code"), [
    (UserError("a typo"), 2), (StorageError("a full disk", unforeseen=True), 1), (RuntimeError("a bug"), 1), (busy(), 75),
])  # fmt: skip
def test_a_process_ends_as_the_one_that_failed(monkeypatch, error, code):
    """2 tells schedulers never to try again, 75 that they shall, whichever process says it."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    words = [0, 0]

    def allgather(word):
        words[1] = int(word[0])
        return np.array([words[1], 7], np.uint32)

    monkeypatch.setattr(multihost_utils, "process_allgather", allgather)
    with pytest.raises(type(error)), process_group.ProcessGroup().together():
        raise error
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda word: np.array([words[1], word[0]], np.uint32))
    with pytest.raises(process_group.KnownToAll, match="process 0 of this replica has failed") as known:
        process_group.ProcessGroup().agree("manifest", [1])
    assert known.value.code == code


@pytest.mark.slow
def test_a_failure_of_one_is_known_to_all_at_once(tmp_path, cache):
    """While the run opens, and at its end."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "one"}\n')
    given = {"manifest": tmp_path / "rows.jsonl", "resolution": 16, "num_inference_steps": 1}
    processes = replica(tmp_path, cache, 2, "bad", first=[f"manifest={tmp_path / 'missing.jsonl'}"], **given)
    assert [p.wait(timeout=120) for p in processes] == [2, 2], said(tmp_path, "bad")
    errors = [(tmp_path / f"bad.{i}.log").read_text() for i in range(2)]
    assert "missing.jsonl" in errors[0] and "process 0 of this replica has failed" in errors[1]
    assert all("Traceback" not in error for error in errors)

    broken = (
        "from fluxbatch.results import ledger\nfrom fluxbatch.storage import base\ndef merge(self): raise "
        "base.StorageError('the bucket is gone')\n"
        "ledger.Ledger.merge = merge\nfrom fluxbatch import run\nrun.main()"
    )
    processes = replica(tmp_path, cache, 2, "end", program=("-c", broken), **given)
    assert [p.wait(timeout=120) for p in processes] == [1, 1], said(tmp_path, "end")
    assert "the bucket is gone" in (tmp_path / "end.0.log").read_text()


@pytest.mark.slow
def test_one_of_four_killed_anywhere(tmp_path, cache):
    """Nothing is lost or doubled however often it happens; the last start is left in peace."""
    more = {
        "manifest": long_manifest(tmp_path),
        "resolution": 16,
        "shard_size": 32,
        "devices": 1,
        "sharding": "single",
        "ici_data_parallelism": -1,
    }
    rng = random.Random(0)
    for _ in range(KILLS):
        processes = replica(tmp_path, cache, 4, **more)
        wait_for(processes, tmp_path / "run", pictures(tmp_path / "run") + rng.randrange(1, 12))
        time.sleep(rng.random() / 10)
        victim = processes.pop(rng.randrange(4))
        victim.kill()
        begun = time.monotonic()
        codes = [p.wait(timeout=HEARTBEAT + 10) for p in processes]
        assert time.monotonic() - begun < HEARTBEAT + 10 and victim.wait() in (0, -signal.SIGKILL)
        assert {*codes} <= {76, -signal.SIGABRT} or pictures(tmp_path / "run") == ROWS, (codes, said(tmp_path))
    processes = replica(tmp_path, cache, 4, **more)
    assert [p.wait(timeout=400) for p in processes] == [0] * 4, said(tmp_path)
    assert sorted(r["id"] for r in metadata(tmp_path / "run")) == sorted(f"r{i}" for i in range(ROWS))
    assert pictures(tmp_path / "run") == ROWS


@pytest.fixture
def two_hosts(tmp_path):
    """Two network namespaces with a link between them: (address of the first, words that start a process in each), and
    what cuts and joins the link."""
    names = [f"fluxbatch{os.getpid()}{letter}" for letter in "ab"]

    def ip(*words):
        return subprocess.run(["ip", *words], capture_output=True, text=True)

    try:
        made = [ip("netns", "add", name) for name in names] + [
            ip("link", "add", "va", "netns", names[0], "type", "veth", "peer", "vb", "netns", names[1])
        ]
        if any(done.returncode for done in made):
            pytest.skip(f"no network namespaces here: {''.join(done.stderr for done in made)}")
        (tmp_path / "hosts").write_text("127.0.0.1 localhost\n10.9.8.1 hosta\n10.9.8.2 hostb\n")
        places = []
        for name, letter, number in zip(names, "ab", "12", strict=True):
            for words in (
                ["addr", "add", f"10.9.8.{number}/24", "dev", f"v{letter}"],
                ["link", "set", f"v{letter}", "up"],
                ["link", "set", "lo", "up"],
            ):
                assert ip("-n", name, *words).returncode == 0
            there = f'mount --bind {tmp_path / "hosts"} /etc/hosts && hostname host{letter} && exec "$@"'
            places.append(["ip", "netns", "exec", name, "unshare", "-m", "-u", "sh", "-c", there, "sh"])
        yield ("10.9.8.1", places), lambda state: ip("-n", names[0], "link", "set", "va", state)
    finally:
        for name in names:
            ip("netns", "del", name)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and iproute2")
def test_a_cut_link_ends_both_sides(tmp_path, cache, two_hosts):
    """Nobody dies and nobody answers: with a heartbeat of 10 s both end within 15 s, and the next start completes."""
    places, link = two_hosts
    more = {
        "manifest": long_manifest(tmp_path),
        "resolution": 16,
        "shard_size": 32,
        "places": places,
        "devices": 1,
        "num_inference_steps": 2,
    }
    impatient = (
        "from fluxbatch.distributed import backend\nbackend.HEARTBEAT = 10\nfrom fluxbatch import run\nrun.main()"
    )
    processes = replica(tmp_path, cache, 2, program=("-c", impatient), **more)
    wait_for(processes, tmp_path / "run", 12)
    link("down")
    begun = time.monotonic()
    codes = [p.wait(timeout=60) for p in processes]
    assert time.monotonic() - begun < 15 and {*codes} <= {76, -signal.SIGABRT}, (
        codes,
        time.monotonic() - begun,
        said(tmp_path),
    )
    assert 12 <= pictures(tmp_path / "run") < ROWS
    link("up")
    processes = replica(tmp_path, cache, 2, **more)
    assert [p.wait(timeout=240) for p in processes] == [0, 0], said(tmp_path)
    assert sorted(r["id"] for r in metadata(tmp_path / "run")) == sorted(f"r{i}" for i in range(ROWS))
    assert pictures(tmp_path / "run") == ROWS


@pytest.mark.slow
def test_a_text_cache_of_which_processes_have_different_parts(tmp_path, cache):
    """What one of them lacks all encode; then nobody loads an encoder."""
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "prompt {n}", "seed": {n}}}\n' for n in range(3)))
    first, second = tmp_path / "first", tmp_path / "second"
    loaded, made = {}, []
    for name in ("cold", "holes", "warm"):
        processes = replica(
            tmp_path,
            cache,
            2,
            name,
            first=[f"text_cache_dir={first}"],
            text_cache_dir=second,
            manifest=tmp_path / "rows.jsonl",
            resolution=16,
            num_inference_steps=1,
            devices=1,
        )
        assert [p.wait(timeout=120) for p in processes] == [0, 0], said(tmp_path, name)
        loaded[name] = json.loads((tmp_path / name / "status.json").read_text())["load"]["bytes"]
        made.append(images(tmp_path / name))
        entries = [sorted(folder.iterdir()) for folder in (first, second)]
        assert [len(each) for each in entries] == [3, 3]
        if name == "cold":
            entries[0][0].unlink()
            entries[1][2].unlink()
    assert loaded["cold"] == loaded["holes"] > loaded["warm"] > 0
    assert all((made[0][row] == picture).all() for pictures in made for row, picture in pictures.items())


@pytest.mark.slow
def test_processes_that_disagree_are_told(tmp_path, cache):
    """One sees another manifest: nobody starts."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "one"}\n')
    (tmp_path / "other.jsonl").write_text('{"prompt": "two"}\n')
    processes = replica(
        tmp_path,
        cache,
        2,
        "odd",
        first=[f"manifest={tmp_path / 'other.jsonl'}"],
        manifest=tmp_path / "rows.jsonl",
        resolution=16,
    )
    assert [p.wait(timeout=120) for p in processes] == [2, 2], said(tmp_path, "odd")
    assert said(tmp_path, "odd").count("sees another manifest") == 2


@pytest.mark.parametrize("address", ["memory://b/x", "gs://b/x"])
def test_a_compilation_cache_needs_what_jax_writes_with(cli, golden, tmp_path, monkeypatch, address):
    """There it would keep nothing, or fail when the first program is compiled. A plan or a launch spec for elsewhere
    may name it."""
    asked = []
    monkeypatch.setattr("importlib.util.find_spec", asked.append)
    code, err = cli(
        f"pretrained_model_name_or_path={golden / 'dev'}",
        "prompt=a fox",
        f"output_dir={tmp_path}",
        "hardware=cpu",
        f"jax_cache_dir={address}",
    )
    assert (code, err) == (
        2,
        f"fluxbatch: error: jax_cache_dir={address}: expected a local directory, null, or gs://bucket/prefix where "
        "gcsfs is installed\n",
    )
    assert asked == ["gcsfs"] * address.startswith("gs") and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "environment,word",
    [
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_PROCESS_ID"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "5"}, "JAX_PROCESS_ID"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "JAX_COORDINATOR_ADDRESS is not set: expected host:port"),
        (
            {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1", "JAX_COORDINATOR_ADDRESS": "node0"},
            "JAX_COORDINATOR_ADDRESS=node0: expected host:port",
        ),
        (
            {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0", "JAX_COORDINATOR_ADDRESS": "busy"},
            "process 0 cannot listen there: Address already in use",
        ),
    ],
)
def test_an_unsound_environment_is_one_line(cli, golden, tmp_path, monkeypatch, environment, word):
    """Among it another program at the coordinator's port: JAX would crash there, or share it with another replica's."""
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    other = hold_port()
    other.listen()
    for name, value in environment.items():
        monkeypatch.setenv(name, value if value != "busy" else "127.0.0.1:{1}".format(*other.getsockname()))
    code, err = cli(
        f"pretrained_model_name_or_path={golden / 'dev'}", "prompt=a fox", f"output_dir={tmp_path}", "hardware=cpu"
    )
    other.close()
    assert code == 2 and word in err and "Traceback" not in err
