"""The writer: every row ends as a recorded image or a reject, behind the device, and one by one."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import gcs_faults
import numpy as np
import plain
import pytest
import s3_faults
from test_ledger import Killed, MemoryStore, check
from test_ledger_killed import states_are_sound

from fluxbatch.config.schema import ImageFormat, OnError, Output
from fluxbatch.results import writer as module
from fluxbatch.results.image_files import EXTENSIONS, decode, pixel_sha256
from fluxbatch.results.ledger import Ledger
from fluxbatch.results.resume import decisive, left_out
from fluxbatch.results.writer import TooManyFailures, Writer
from fluxbatch.storage.base import StorageError
from fluxbatch.storage.local import LocalStore
from fluxbatch.storage.registry import open_store

FACTS = {
    "model": "flux-mini",
    "model_digest": "abc",
    "model_revision": "",
    "max_sequence_length": 64,
    "weights_dtype": "float32",
    "activations_dtype": "float32",
}
KILLS = int(os.environ.get("FLUXBATCH_SOAK", "20"))
_starts = iter(range(10**9))


def batch(rows, size=None):
    """The pixels of a batch of ``size``, padded with noise that must never reach the disk."""
    images = [plain.pixels(row) for row in rows]
    padding = [np.full((8, 8, 3), 99, np.uint8)] * ((size or len(rows)) - len(rows))
    return np.stack([*images, *padding])


def start(store, rows, job=None, *, batch_size=3, kill=None, **options):
    """One start over ``rows``: the tally, and the writer. ``kill(k)`` is called before batch k."""
    job = job or plain.job()
    ledger = Ledger(store, {"model_digest": "abc"}, writer_id=f"start-{os.getpid()}-{next(_starts)}")
    extension = EXTENSIONS[job.output.format.name]
    todo, names = ledger.assign(rows, template=job.output.filename, extension=extension)
    with Writer(ledger, job, facts=FACTS, **options) as writer:
        for k, begin in enumerate(range(0, len(todo), batch_size)):
            if kill:
                kill(k)
            part = todo[begin : begin + batch_size]
            writer.put(part, names, batch(part, batch_size), np.ones(batch_size, bool))
            if k % 2:
                writer.compact()
    return ledger.merge(), writer


@pytest.fixture
def quick(monkeypatch):
    """No pauses between attempts."""
    monkeypatch.setattr(module, "_BACKOFF", 0.001)


def test_images_and_their_records(tmp_path):
    rows = [plain.row(k, extra={"category": "cats", "seed": "hidden"}) for k in range(7)]
    store = open_store(str(tmp_path / "run"))
    seen = []
    tally, writer = start(store, rows, on_image=lambda row, ok: seen.append((row.id, ok)))
    assert (tally.done, tally.left, writer.written, writer.rejected) == (7, 0, 7, 0)
    assert sorted(seen) == [(str(k), True) for k in range(7)]
    files = sorted(path.name for path in (tmp_path / "run").iterdir() if not path.name.startswith("."))
    assert files == [*(f"flux_{k}.png" for k in range(7)), "metadata.jsonl"]
    assert writer.bytes == sum((tmp_path / "run" / f"flux_{k}.png").stat().st_size for k in range(7))

    lines = [json.loads(line) for line in store.read("metadata.jsonl").splitlines()]
    assert list(lines[3]) == [
        *("file_name", "id", "index", "prompt", "prompt_2", "seed", "height", "width"),
        *("num_inference_steps", "guidance_scale", "sigmas", "negative_prompt", "negative_prompt_2"),
        *("true_cfg_scale", "strength", "padding_mask_crop", "inputs", "crop", "lora", "seed_text", *FACTS),
        *("sha256", "computed_steps", "seconds", "mfu", "created", "flags", "key", "category"),
    ]
    assert {key: lines[3][key] for key in FACTS} == FACTS
    assert (lines[3]["id"], lines[3]["index"], lines[3]["seed"], lines[3]["category"]) == ("3", 3, 45, "cats")
    assert [lines[3][name] for name in ("lora", "seed_text", "flags", "mfu")] == ["{}", "45", "", 0]
    assert lines[3]["created"].endswith("+00:00")
    for row, line in zip(rows, lines, strict=True):
        np.testing.assert_array_equal(decode(store.read(line["file_name"])), plain.pixels(row))
        assert line["sha256"] == pixel_sha256(plain.pixels(row)) and line["seconds"] >= 0

    from PIL import Image

    with Image.open(tmp_path / "run" / "flux_3.png") as image:
        parameters = json.loads(image.text["fluxbatch"])
        infotext = image.text["parameters"]
    assert (parameters["prompt"], parameters["seed"], parameters["model"]) == ("prompt 3", 45, "flux-mini")
    assert infotext == "prompt 3\nSteps: 4, Sampler: Euler, CFG scale: 0, Seed: 45, Size: 64x64, Model: flux-mini"


def test_fields_that_are_a_records_own_are_not_carried_and_said_to_be_left_out(tmp_path):
    store = open_store(str(tmp_path))
    start(store, [plain.row(0)], roofline=lambda row: 1e-9)
    (record,) = (json.loads(line) for line in store.read("metadata.jsonl").splitlines())
    own = [key for key in record if key not in decisive(plain.row(0)) and key != "id"]
    assert "mfu" in own
    row = plain.row(0, extra=dict.fromkeys([*own, "category"], "mine"))
    (remark,) = left_out([row], FACTS)
    named = remark.removeprefix("not carried into the metadata: ").partition(", which")[0]
    assert sorted(json.loads(f"[{named}]")) == sorted(own)
    assert left_out([plain.row(0, extra={"category": "mine"})], FACTS) == []
    start(open_store(str(tmp_path / "other")), [row])
    (line,) = (json.loads(line) for line in store.read("other/metadata.jsonl").splitlines())
    assert [key for key, value in line.items() if value == "mine"] == ["category"]


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_other_formats(tmp_path, format):
    output = Output(format=ImageFormat[format], filename="{id}", quality=95, png_level=1, gallery=False)
    store = open_store(str(tmp_path))
    start(store, [plain.row(0, id="cat")], plain.job(output=output))
    assert decode(store.read("cat" + EXTENSIONS[format])).shape == (8, 8, 3)


def test_an_image_of_one_colour_is_kept_and_flagged(tmp_path):
    store = open_store(str(tmp_path))
    ledger = Ledger(store, {}, writer_id="w")
    with Writer(ledger, plain.job(), facts={}) as writer:
        writer.put([plain.row(0)], {0: "a.png"}, np.zeros((1, 8, 8, 3), np.uint8), [True], seconds=lambda: 0.25)
    (line,) = ledger.records()
    assert line["flags"] == "flat" and line["seconds"] == 0.25 and store.exists("a.png")


def test_the_program_that_made_a_picture_is_in_its_record_alone(tmp_path):
    """Its file is the same whatever made the same pixels."""
    files = []
    for device in ("cpu", "NVIDIA H100"):
        store = open_store(str(tmp_path / device))
        ledger = Ledger(store, {}, writer_id="w")
        with Writer(ledger, plain.job(), facts=dict.fromkeys(module.PROGRAM, device)) as writer:
            writer.put([plain.row(0)], {0: "a.png"}, batch([plain.row(0)]), [True])
        (record,) = ledger.records()
        assert {record[key] for key in module.PROGRAM} == {device}
        files.append(store.read("a.png"))
    assert files[0] == files[1]


def test_a_record_says_the_share_of_the_peak(tmp_path):
    """Where the peak is known, and not in the picture's own file, which is the same however long it took."""
    from PIL import Image

    ledger = Ledger(open_store(str(tmp_path)), {}, writer_id="w")
    roofline = {0: 0.1, 1: None}
    with Writer(ledger, plain.job(), facts={}, roofline=lambda row: roofline[row.index]) as writer:
        writer.put(
            [plain.row(k) for k in roofline],
            {0: "a.png", 1: "b.png"},
            np.zeros((2, 8, 8, 3), np.uint8),
            [True] * 2,
            seconds=lambda: 0.6,
        )
    known, unknown = ledger.records()
    assert known["mfu"] == 0.333 and unknown["mfu"] == 0
    with Image.open(tmp_path / "a.png") as image:
        assert "mfu" not in json.loads(image.text["fluxbatch"])


# --- what goes wrong -----------------------------------------------------------------------


def test_rows_that_are_not_finite_are_made_again_once(tmp_path):
    rows = [plain.row(k) for k in range(4)]
    store = open_store(str(tmp_path))
    ledger = Ledger(store, {}, writer_id="w")
    _, names = ledger.assign(rows, template="flux_{i}", extension=".png")
    tried, seen = [], []

    def retry(row):
        tried.append(row.index)
        return plain.pixels(row), row.index == 1

    options = {"facts": {}, "retry": retry, "on_image": lambda row, ok: seen.append((row.index, ok))}
    with Writer(ledger, plain.job(), **options) as writer:
        writer.put(rows, names, np.zeros((4, 8, 8, 3), np.uint8), np.array([True, False, False, True]))
    tally = ledger.merge()
    assert sorted(tried) == [1, 2] and sorted(seen) == [(0, True), (1, True), (2, False), (3, True)]
    np.testing.assert_array_equal(decode(store.read("flux_1.png")), plain.pixels(rows[1]))
    assert not store.exists("flux_2.png")
    assert (writer.written, writer.rejected, tally.done) == (3, 1, 3)
    (reject,) = tally.rejects
    assert (reject.where, reject.id, reject.index) == ("m.jsonl:3", "2", 2) and "not finite" in reject.reason


class Faulty(MemoryStore):
    """Fails the writes for which ``fault(name, attempt)`` gives an error."""

    def __init__(self, fault):
        super().__init__()
        self.fault = fault
        self.attempts = {}

    def write(self, name, data, **options):
        self.attempts[name] = self.attempts.get(name, 0) + 1
        if error := self.fault(name, self.attempts[name]):
            raise error
        return super().write(name, data, **options)


def test_a_write_is_tried_again_and_then_only_its_row_is_lost(quick):
    rows = [plain.row(k) for k in range(6)]
    store = Faulty(
        lambda name, attempt: (
            StorageError(f"{name}: input/output error")
            if name == "flux_1.png" or (name in ("flux_2.png", "flux_4.png") and attempt < 3)
            else None
        )
    )
    tally, writer = start(store, rows)
    assert (writer.written, writer.rejected, tally.done, tally.left) == (5, 1, 5, 0)
    assert store.attempts["flux_1.png"] == store.attempts["flux_2.png"] == 3
    assert [(r.id, r.reason) for r in tally.rejects] == [("1", "flux_1.png: input/output error")]


def test_a_record_is_tried_again(quick):
    failed = []

    def fault(name, attempt):
        if "/records/" in name and len(failed) < 2:
            failed.append(name)
            return StorageError("busy")
        return None

    store = Faulty(fault)
    tally, _ = start(store, [plain.row(k) for k in range(6)])
    assert len(failed) == 2 and tally.done == 6


def test_a_full_disk_ends_the_job_and_what_is_written_stays(quick):
    rows = [plain.row(k) for k in range(12)]
    full = StorageError("out/flux_4.png: no space left on device", fatal=True)
    store = Faulty(lambda name, _: full if name == "flux_4.png" and store.filling else None)
    store.filling = True
    with pytest.raises(StorageError, match="flux_4.png: no space left") as error:
        start(store, rows)
    assert error.value is full and store.attempts["flux_4.png"] == 1
    states_are_sound(store)
    recorded = {
        line["id"] for n, d in store.objects.items() if "/records/" in n for line in map(json.loads, d.splitlines())
    }
    assert recorded == {"0", "1", "2", "3", "5"}  # also the others of its batch
    assert not any("/rejects/" in name for name in store.objects)
    store.filling = False
    start(store, rows)
    check(store, rows)


def test_an_error_of_the_program_surfaces(tmp_path):
    store = open_store(str(tmp_path))
    ledger = Ledger(store, {}, writer_id="w")

    def broken(row, ok):
        raise RuntimeError("a bug")

    with (
        pytest.raises(RuntimeError, match="a bug"),
        Writer(ledger, plain.job(), facts={}, on_image=broken) as writer,
    ):
        for k in range(3):  # the second or third put raises, and so would leaving the block
            writer.put([plain.row(k)], {k: f"{k}.png"}, batch([plain.row(k)]), [True])


@pytest.mark.parametrize(("options", "batches"), [({"on_error": OnError.stop}, 1), ({"max_failures": 3}, 3)])
def test_the_job_stops_at_the_failure_that_was_named(options, batches):
    store = MemoryStore()
    ledger = Ledger(store, {}, writer_id="w")
    rows = [plain.row(k) for k in range(20)]
    _, names = ledger.assign(rows, template="flux_{i}", extension=".png")
    with (
        pytest.raises(TooManyFailures, match=r"m.jsonl:\d+: the image is not finite .*stopped after . failed rows"),
        Writer(ledger, plain.job(**options), facts={}) as writer,
    ):
        for begin in range(0, 20, 2):
            writer.put(rows[begin : begin + 2], names, batch(rows[begin : begin + 2]), [True, False])
    assert writer.rejected == writer.written == batches
    assert len(ledger.merge().rejects) == batches


def test_leaving_by_an_exception_finishes_what_was_put(tmp_path):
    store = open_store(str(tmp_path))
    ledger = Ledger(store, {}, writer_id="w")
    with pytest.raises(KeyboardInterrupt), Writer(ledger, plain.job(), facts={}) as writer:
        writer.put([plain.row(0)], {0: "0.png"}, batch([plain.row(0)]), [True])
        raise KeyboardInterrupt
    assert [line["id"] for line in ledger.records()] == ["0"]


# --- behind the device ---------------------------------------------------------------------


class Slow(MemoryStore):
    """Every write takes ``seconds``."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def write(self, name, data, **options):
        time.sleep(self.seconds)
        return super().write(name, data, **options)


class OnDevice:
    """Pixels that the device is still computing, one batch after the other."""

    free_at = 0.0

    def __init__(self, pixels, seconds):
        self.pixels = pixels
        OnDevice.free_at = self.ready_at = max(OnDevice.free_at, time.monotonic()) + seconds

    def __array__(self, dtype=None, copy=None):
        assert threading.current_thread() is not threading.main_thread(), "the main thread waits for the device"
        time.sleep(max(0.0, self.ready_at - time.monotonic()))
        return self.pixels


def job_seconds(write_seconds, device_seconds=0.2, batches=10):
    rows = [plain.row(k) for k in range(4 * batches)]
    store = Slow(write_seconds)
    ledger = Ledger(store, {}, writer_id="w")
    _, names = ledger.assign(rows, template="flux_{i}", extension=".png")
    begin = time.monotonic()
    with Writer(ledger, plain.job(), facts={}) as writer:
        for k in range(batches):
            part = rows[4 * k : 4 * k + 4]
            writer.put(part, names, OnDevice(batch(part), device_seconds), [True] * 4)
    seconds = time.monotonic() - begin
    assert ledger.merge().done == 4 * batches
    shares = [line["seconds"] for line in ledger.records()]
    assert np.median(shares) == pytest.approx(device_seconds / 4, rel=0.5)
    return seconds


def test_slow_writes_hide_behind_the_device():
    """Each write 50 ms slower: only the last batch's image and record show, and not all the others."""
    fast, slow = job_seconds(0.0), job_seconds(0.05)
    assert fast < 3.0  # 10 batches of 0.2 s
    assert slow - fast < 0.4  # 0.1 when measured alone; 1.0 if every batch waited for its writes


def test_put_waits_when_the_writing_is_slower():
    rows = [plain.row(k) for k in range(4)]
    store = Slow(0.1)
    ledger = Ledger(store, {}, writer_id="w")
    with Writer(ledger, plain.job(), facts={}) as writer:
        for row in rows:
            writer.put([row], {row.index: f"{row.index}.png"}, batch([row]), [True])
            unrecorded = len([name for name in store.objects if name.endswith(".png")]) - writer.written
            assert unrecorded <= 1
    assert writer.written == 4 and writer.waited > 0.4


def test_the_end_of_a_shard_waits_for_nothing():
    """The texts of the next one are encoded meanwhile; the shard's records become one object all the same."""
    rows = [plain.row(k) for k in range(3)]
    store = MemoryStore()
    ledger = Ledger(store, {}, writer_id="w")
    ledger.assign(rows, template="{i}", extension=".png")
    drawn = threading.Event()

    class Drawing(OnDevice):
        def __array__(self, dtype=None, copy=None):
            assert drawn.wait(10)
            return self.pixels

    with Writer(ledger, plain.job(), facts={}) as writer:
        writer.put(rows, {row.index: f"{row.index}.png" for row in rows}, Drawing(batch(rows), 0), [True] * 3)
        writer.compact()
        assert writer.written == ledger.compactions == 0
        drawn.set()
    assert (writer.written, ledger.compactions) == (3, 1) and ledger.merge().done == 3


# --- killed --------------------------------------------------------------------------------


def test_killed_at_every_instant_and_resumed():
    rows = [plain.row(k) for k in range(5)]
    whole = MemoryStore()
    start(whole, rows, batch_size=2)
    for instant in range(whole.operations):
        store = MemoryStore(die_after=instant)
        with contextlib.suppress(Killed):
            start(store, rows, batch_size=2)
            assert instant > whole.operations - 5  # threads make some operations more, or fewer
        states_are_sound(store)
        again = MemoryStore(store.objects)
        start(again, rows, batch_size=3)
        check(again, rows)


def killed_and_resumed(url, rows, seconds, clock):
    """Starts a process over ``rows`` and kills it after ``seconds``; whether it was still alive."""
    script = f"import test_writer; test_writer.main({url!r}, {rows}, {clock.randint(1, 5)})"
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{Path(__file__).parents[1]}"}
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment)
    process.stdout.readline()  # it has begun
    time.sleep(seconds)
    alive = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    return alive


def main(url, rows, batch_size):
    """What ``killed_and_resumed`` runs."""
    print("begun", flush=True)
    start(open_store(url), [plain.row(k) for k in range(rows)], batch_size=batch_size, kill=lambda _: time.sleep(0.01))


def all_whole(url, count):
    """Exactly one whole image for each of ``count`` rows, by its record."""
    store = open_store(url)
    lines = [json.loads(line) for line in store.read("metadata.jsonl").splitlines()]
    assert [line["id"] for line in lines] == [str(k) for k in range(count)]
    images = [name for name in store.list() if name.endswith(".png")]
    assert sorted(images) == sorted(f"flux_{k}.png" for k in range(count))
    for k, line in enumerate(lines):
        assert (
            pixel_sha256(decode(store.read(line["file_name"])))
            == line["sha256"]
            == pixel_sha256(plain.pixels(plain.row(k)))
        )


def kill_again_and_again(url, rows, kills, longest):
    clock = random.Random(0)
    killed = sum(killed_and_resumed(url, rows, clock.uniform(0, longest), clock) for _ in range(kills))
    start(open_store(url), [plain.row(k) for k in range(rows)])
    all_whole(url, rows)
    return killed


def test_a_process_that_is_killed_again_and_again(tmp_path):
    assert kill_again_and_again(str(tmp_path / "run"), rows=150, kills=4, longest=0.25) >= 2


@pytest.mark.slow
def test_a_process_that_is_killed_many_times(tmp_path):
    # Of batches of three, 10 ms apart, no machine writes more than 45 rows until it is killed, on average.
    assert kill_again_and_again(str(tmp_path / "run"), rows=50 * KILLS, kills=KILLS, longest=0.3) >= 0.8 * KILLS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "server", "rate"), [("gs", gcs_faults, 0.0), ("gs", gcs_faults, 0.1), ("s3", s3_faults, 0.1)]
)
def test_a_process_that_is_killed_while_it_writes_to_a_bucket(scheme, server, rate):
    with server.serve(rate=rate) as proxy:
        proxy.stall = 0.2
        assert kill_again_and_again(f"{scheme}://bucket/run", rows=120, kills=6, longest=2.0) >= 3
        assert (sum(proxy.met[kind] for kind in gcs_faults.KINDS) > 10) == (rate > 0)


@pytest.mark.slow
def test_a_disk_that_fills_up(tmp_path):
    from test_storage import mounted

    rows = [plain.row(k) for k in range(400)]
    with mounted(tmp_path, "size=512k"):
        store = LocalStore(str(tmp_path / "run"))
        with pytest.raises(StorageError, match="no space left on device") as error:
            start(store, rows)
        assert error.value.fatal
        before = {line["id"] for line in Ledger(store, {"model_digest": "abc"}, writer_id="look").records()}
        assert 50 < len(before) < 400
        subprocess.run(["mount", "-o", "remount,size=16m", tmp_path], check=True)
        tally, writer = start(store, rows)
        assert tally.done == 400 and writer.written == 400 - len(before)
        all_whole(store.url, 400)
