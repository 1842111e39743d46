"""Whole processes killed and started again: in the end every row once, pixel for pixel what the
uninterrupted run made, and no more than a batch made twice for each kill.

``make soak`` runs the long form (``FLUXBATCH_SOAK`` kills)."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import GOLDEN, images, metadata, xla_flags
from PIL import Image

from fluxbatch.results.image_files import decode, pixel_sha256
from fluxbatch.storage.registry import open_store

ROWS, BATCH = 600, 8  # rows for a second and more: whoever interferes must not come too late
IN_BUCKET = 200  # where each takes longer
KILLS = int(os.environ.get("FLUXBATCH_SOAK", "4"))

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A manifest, a cache of compiled programs, and the uninterrupted run."""
    folder = tmp_path_factory.mktemp("crash")
    rows = [
        {"id": f"r{i}", "prompt": f"prompt {i % 40}", "seed": i, "num_inference_steps": 1 + i % 3} for i in range(ROWS)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert start(folder, "whole").wait() == 0
    return folder


def start(folder, name, batch=BATCH, devices=1, output_dir=None, env=None, **more):
    flags = {
        "pretrained_model_name_or_path": GOLDEN / "schnell",
        "max_sequence_length": 24,
        "resolution": 16,
        "hardware": "cpu",
        "manifest": folder / "rows.jsonl",
        "output_dir": output_dir or folder,
        "run_name": name,
        "per_device_batch_size": batch,
        "jax_cache_dir": folder / "xla",
        "text_cache_dir": "null",
        "sharding": "ddp" if devices > 1 else "single",
        "shard_size": 48,
        "output.gallery": "false",
    } | more
    environment = os.environ | {"XLA_FLAGS": xla_flags(devices)} | (env or {})
    command = [sys.executable, "-m", "fluxbatch.run", *(f"{k}={v}" for k, v in flags.items())]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def images_on_disk(run):
    return len(list(run.glob("flux_*.png"))) if run.exists() else 0


def wait_until(process, condition, seconds=120):
    end = time.monotonic() + seconds
    while process.poll() is None and not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)


def check(folder, name, exact=True):
    """Every row once, each record with its image, each image as in the uninterrupted run."""
    records, whole = metadata(folder / name), {r["id"]: r for r in metadata(folder / "whole")}
    assert sorted(r["id"] for r in records) == sorted(whole)
    assert len({r["file_name"] for r in records}) == images_on_disk(folder / name) == len(whole)
    if exact:
        assert all(record["sha256"] == whole[record["id"]]["sha256"] for record in records)
    expected, made = images(folder / "whole"), images(folder / name)
    for key, picture in made.items():
        assert np.abs(picture.astype(int) - expected[key].astype(int)).max() <= (0 if exact else 1)


def recorded(run, field="id"):
    while True:
        try:
            files = [*(run / ".fluxbatch" / "records").glob("*.jsonl")]
            return {json.loads(line)[field] for file in files for line in file.read_text().splitlines()}
        except FileNotFoundError:  # compacted meanwhile
            continue


@pytest.mark.parametrize("exact", [True, False], ids=["same batch size", "other batch sizes and devices"])
def test_sigkill_at_random_instants(place, exact):
    """``KILLS`` runs, half of each kind: each killed once or twice, anywhere from its start to its end."""
    rng, landed = random.Random(exact), 0
    for n in range(-(-KILLS // 2)):
        name = f"killed-{exact}-{n}"
        run = place / name
        for _ in range(rng.choice([1, 1, 2])):
            batch, devices = (BATCH, 1) if exact else (rng.choice([3, 8, 16]), rng.choice([1, 2]))
            process = start(place, name, batch=batch, devices=devices)
            goal = images_on_disk(run) + rng.randrange(ROWS)
            wait_until(process, lambda: images_on_disk(run) >= goal)  # noqa: B023
            time.sleep(rng.random() * 0.1)
            process.kill()
            landed += process.wait() == -signal.SIGKILL
            # What was made and not recorded is made again: at most the batch that was on its way.
            assert images_on_disk(run) - len(recorded(run)) <= batch * devices
            assert all((run / file).stat().st_size for file in os.listdir(run) if file.endswith(".png"))
        assert start(place, name, batch=batch, devices=devices).wait() == 0
        check(place, name, exact)
    assert landed >= KILLS // 4, "most runs had ended before they were killed"


# of each model, with how many pictures each mode reads
MODES = {
    "dev": (
        {},
        {"negative_prompt": "hens", "true_cfg_scale": 2.0},
        {"image": 1, "strength": 0.5},
        {"image": 1, "strength": 0.5, "mask_image": "mask.png"},
        {"image": 1, "strength": 0.5, "negative_prompt": "", "true_cfg_scale": 3.0},
    ),
    "flux2-klein": ({}, {"image": 1}, {"image": 2}),
}


@pytest.mark.parametrize(
    ("model", "count", "side", "kills"), [("dev", 200, 16, KILLS // 2), ("flux2-klein", 48, 64, 1)]
)
def test_rows_of_every_mode(tmp_path, model, count, side, kills):
    """Rows with and without pictures, masks and negative prompts, killed at random: every row once, and its pixels
    those of the uninterrupted run. Ten pictures that are replaced then: their rows are made again, and no others."""
    random_pixels = np.random.default_rng(0)

    def draw(name, *shape):
        Image.fromarray(random_pixels.integers(0, 256, shape, np.uint8)).save(tmp_path / name)

    draw("mask.png", 16, 16)
    draw("shared.png", side, side, 3)
    rows = []
    for i in range(count):
        mode = MODES[model][i % len(MODES[model])]
        row = {"id": f"r{i}", "prompt": f"prompt {i % 20}", "seed": i, "num_inference_steps": 4, **mode}
        if "image" in row:
            row["image"] = [f"{i}.png", "shared.png"][: row["image"]]
            draw(f"{i}.png", side + 8, side + 4, 3)
        rows.append({**row, "height": 16, "width": 16})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"pretrained_model_name_or_path": GOLDEN / model, "max_sequence_length": 64}
    assert start(tmp_path, "whole", **options).wait() == 0
    rng, run, landed, lost = random.Random(1), tmp_path / "killed", 0, set()
    while landed < kills:
        process = start(tmp_path, "killed", **options)
        goal = images_on_disk(run) + rng.randrange(count // KILLS)
        wait_until(process, lambda: images_on_disk(run) >= goal)  # noqa: B023
        time.sleep(rng.random() * 0.1)
        process.kill()
        landed += process.wait() == -signal.SIGKILL
        # Those of the kill before may still be there: rows of another mode are perhaps made first.
        before, lost = lost, {path.name for path in run.glob("flux_*.png")} - recorded(run, "file_name")
        assert len(lost - before) <= BATCH and images_on_disk(run) < count
    assert start(tmp_path, "killed", **options).wait() == 0
    check(tmp_path, "killed")

    before, made = {r["id"]: r for r in metadata(run)}, {p.name: p.stat().st_mtime_ns for p in run.glob("flux_*.png")}
    replaced = rng.sample([i for i in range(count) if "image" in rows[i]], 10)
    for i in replaced:
        draw(f"{i}.png", side + 8, side + 4, 3)
    assert start(tmp_path, "killed", overwrite="true", **options).wait() == 0
    after = {r["id"]: r for r in metadata(run)}
    names = {record["file_name"] for record in after.values()}
    assert after.keys() == before.keys() and names == {p.name for p in run.glob("flux_*.png")}
    assert {id for id in after if after[id]["sha256"] != before[id]["sha256"]} == {f"r{i}" for i in replaced}
    assert sum(made.get(p.name) != p.stat().st_mtime_ns for p in run.glob("flux_*.png")) == 10


def shard_rows(run):
    """(id, sha256 of its pixels) of every row in the shards that are there, each of which must be whole."""
    found = []
    for path in [*run.glob("*.tar"), *run.glob("*.parquet")]:
        if path.suffix == ".parquet":
            found += [(row["id"], row["image"]["bytes"]) for row in pq.read_table(path).to_pylist()]
            continue
        with tarfile.open(path) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}
        found += [(json.loads(files[name])["id"], files[name[:-4] + "png"]) for name in files if name.endswith("json")]
    return [(id, pixel_sha256(decode(image))) for id, image in found]


@pytest.mark.parametrize("container", ["webdataset", "parquet"])
def test_sigkill_at_random_instants_with_shards(place, container):
    """No torn shard is ever there, no row in two of them, and in the end every row in one."""
    rng, landed = random.Random(container), 0
    whole = {record["id"]: record["sha256"] for record in metadata(place / "whole")}
    options = {"output": container, "rows_per_shard": 40}
    for n in range(-(-KILLS // 4)):
        name = f"{container}-{n}"
        run = place / name
        for _ in range(rng.choice([1, 2])):
            process = start(place, name, **options)
            goal = len(recorded(run)) + rng.randrange(ROWS)
            wait_until(process, lambda: len(recorded(run)) >= goal)  # noqa: B023
            time.sleep(rng.random() * 0.1)
            process.kill()
            landed += process.wait() == -signal.SIGKILL
            found = shard_rows(run)
            assert len(found) == len(dict(found)) and dict(found).items() <= whole.items()
        before = recorded(run)
        made = {p.name: p.stat().st_mtime_ns for p in run.glob("shard-*")}
        assert start(place, name, **options).wait() == 0
        assert made.items() <= {p.name: p.stat().st_mtime_ns for p in run.glob("shard-*")}.items()
        assert before <= recorded(run)
        assert sorted(shard_rows(run)) == sorted(whole.items())
        assert {record["shard"] for record in metadata(run)} == {p.name for p in run.glob("shard-*")}
        assert not [name for name in os.listdir(run / ".fluxbatch/spool") if not name.endswith(".tmp")]
    assert landed >= KILLS // 4, "most runs had ended before they were killed"


# What the shards lie in, their format, the share of requests that fail, and replicas, of which one is killed for good
PLACES = [
    ("gs", "webdataset", 0.1, 1), ("s3", "parquet", 0.1, 1), ("s3", "webdataset", 0.0, 2),
    *([(scheme, container, rate, replicas) for scheme in ("file", "gs", "s3") for container in ("webdataset", "parquet")
       for rate in (0.0, 0.1) for replicas in (1, 3) if scheme != "file" or not rate] if KILLS > 4 else []),
]  # fmt: skip


@pytest.mark.parametrize(("scheme", "container", "rate", "replicas"), PLACES)
def test_sigkill_with_shards_anywhere(place, scheme, container, rate, replicas, tmp_path):
    """On disks and in buckets, some of which fail: no torn shard is ever there, and in the end every row in one."""
    rng = random.Random(f"{scheme}{container}{rate}{replicas}{KILLS}")
    rows = (place / "rows.jsonl").read_text().splitlines()[:64]
    (place / "fewer.jsonl").write_text("\n".join(rows) + "\n")
    ids = {json.loads(row)["id"] for row in rows}
    whole = {r["id"]: r["sha256"] for r in metadata(place / "whole") if r["id"] in ids}
    out = f"{tmp_path}/out" if scheme == "file" else f"{scheme}://bucket/out"
    options = {"output_dir": out, "manifest": place / "fewer.jsonl", "output": container}
    options |= {"rows_per_shard": 8, "shard_size": 8} | ({"replica_count": replicas} if replicas > 1 else {})
    (tmp_path / "read").mkdir()
    read, landed = set(), 0

    def found():
        """(id, sha256) of all in shards: one that was there never changes."""
        for name in [name for name in store.list() if name.startswith("shard-") and name not in read]:
            (tmp_path / "read" / name).write_bytes(store.read(name))
            read.add(name)
        inside = shard_rows(tmp_path / "read")
        assert len(inside) == len(dict(inside)) and dict(inside).items() <= whole.items()
        return dict(inside)

    server = {"file": None, "gs": "gcs_faults", "s3": "s3_faults"}[scheme]
    with pytest.importorskip(server).serve(rate=rate) if server else contextlib.nullcontext():
        store = open_store(f"{out}/run")
        for _ in range(max(1, KILLS // 10)):
            more = [{"replica_index": n, "replica_expiry": 6} for n in range(replicas)] if replicas > 1 else [{}]
            started = [start(place, "run", **options, **each) for each in more]
            victim, begun = rng.choice(started), len(list(store.list(".fluxbatch/records/")))
            if rng.random() < 0.8:
                wait_until(victim, lambda: len(list(store.list(".fluxbatch/records/"))) != begun)  # noqa: B023
            else:
                time.sleep(8 * rng.random())
            time.sleep(rng.random())
            victim.kill()
            landed += victim.wait() == -signal.SIGKILL
            found()
            codes = [each.wait(timeout=200) for each in started if each is not victim]
            assert codes == [0] * (replicas - 1)
            if codes:
                break  # they have done all
        assert start(place, "run", **options, **({"replica_index": 0} if replicas > 1 else {})).wait() == 0
        assert found() == whole and read == {name for name in store.list() if name.startswith("shard-")}
        records = [json.loads(line) for line in store.read("metadata.jsonl").splitlines()]
        assert {r["id"]: r["sha256"] for r in records} == whole and {r["shard"] for r in records} == read
        assert not [name for name in store.list(".fluxbatch/spool/") if not name.endswith(".tmp")]
        print(f"{landed} killed at work")


@pytest.mark.parametrize("rate", [0.0, 0.1], ids=["a bucket", "a bucket that fails one request in ten"])
@pytest.mark.parametrize(("scheme", "server"), [("gs", "gcs_faults"), ("s3", "s3_faults")])
def test_sigkill_on_cloud_storage(place, scheme, server, rate):
    server, out = pytest.importorskip(server), f"{scheme}://bucket/out"

    rows = (place / "rows.jsonl").read_text().splitlines()[:IN_BUCKET]
    (place / "few.jsonl").write_text("\n".join(rows) + "\n")
    ids = {json.loads(row)["id"] for row in rows}
    whole = {r["id"]: r["sha256"] for r in metadata(place / "whole") if r["id"] in ids}
    with server.serve(rate=rate):
        store = open_store(f"{out}/run")
        killed = 0
        while True:
            process = start(place, "run", output_dir=out, manifest=place / "few.jsonl")
            before = sum(name.endswith(".png") for name in store.list())
            if killed < max(1, KILLS // 5):
                goal = before + IN_BUCKET // (max(1, KILLS // 5) + 1)
                wait_until(process, lambda: sum(name.endswith(".png") for name in store.list()) >= goal)  # noqa: B023
                process.kill()
            if process.wait() == 0:
                break
            killed += 1
        assert killed, "the run had ended before it was killed"
        records = [json.loads(line) for line in store.read("metadata.jsonl").splitlines()]
        assert {r["id"]: r["sha256"] for r in records} == whole and len(records) == IN_BUCKET
        assert sum(name.endswith(".png") for name in store.list()) == IN_BUCKET
        assert all(pixel_sha256(decode(store.read(r["file_name"]))) == r["sha256"] for r in records[::7])


def test_sigterm_drains_and_the_next_start_goes_on(place):
    run = place / "drained"
    process = start(place, "drained", batch=4)
    wait_until(process, lambda: images_on_disk(run) >= 20)
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 75
    assert time.monotonic() - asked < 20
    status = json.loads((run / "status.json").read_text())
    assert status["exit_code"] == 75 and 0 < status["counts"]["left"] < ROWS
    assert len(metadata(run)) == images_on_disk(run)  # nothing half done
    assert start(place, "drained", batch=4).wait() == 0
    check(place, "drained", exact=False)


def test_a_second_signal_stops_at_once(place):
    run = place / "twice"
    process = start(place, "twice", batch=2)
    wait_until(process, lambda: images_on_disk(run) >= 20)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 75
    assert start(place, "twice", batch=8).wait() == 0
    check(place, "twice", exact=False)


def test_a_longer_manifest_in_another_order(place):
    """Rows appended, all shuffled: only the new ones are made."""
    run = place / "grown"
    text = (place / "rows.jsonl").read_text().splitlines()
    (place / "part.jsonl").write_text("\n".join(text[:120]) + "\n")
    random.Random(0).shuffle(text)
    (place / "shuffled.jsonl").write_text("\n".join(text) + "\n")
    assert start(place, "grown", manifest=place / "part.jsonl").wait() == 0
    before = {p.name: p.stat().st_mtime_ns for p in run.glob("flux_*.png")}
    assert start(place, "grown", manifest=place / "shuffled.jsonl").wait() == 0
    after = {p.name: p.stat().st_mtime_ns for p in run.glob("flux_*.png")}
    assert len(before) == 120 and before.items() <= after.items()
    check(place, "grown", exact=False)
