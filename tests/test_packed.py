"""Images in shards: whole or not there, each row in one of them, whoever dies and whatever is deleted."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
import os
import pathlib
import subprocess
import sys
import tarfile
import threading
import time

import numpy as np
import plain
import pyarrow.parquet as pq
import pytest
import yaml
from test_ledger import Killed, MemoryStore

from fluxbatch.config.schema import Container, ImageFormat
from fluxbatch.results import gallery, packer
from fluxbatch.results.card import write_card
from fluxbatch.results.image_files import EXTENSIONS, decode, pixel_sha256
from fluxbatch.results.ledger import Ledger, read_records
from fluxbatch.results.packed import Packed, open_images
from fluxbatch.results.shard_files import Item, require_package
from fluxbatch.results.spool import Spool
from fluxbatch.results.writer import Writer
from fluxbatch.storage.base import NotFound, StorageError
from fluxbatch.storage.registry import open_store
from fluxbatch.types import UserError
from fluxbatch.weights.published import license_of

ROOT = pathlib.Path(__file__).parents[1]
FACTS = {"model": "flux-mini"}
STEP = 1 if "FLUXBATCH_SOAK" in os.environ else 4  # kill at each instant, or at some
_starts = iter(range(10**9))


@pytest.fixture(params=["webdataset", "parquet"])
def container(request):
    return Container[request.param]


def job(container, rows_per_shard=3, **changes):
    output = dataclasses.replace(
        plain.job().output, container=container, filename="{i:05}", rows_per_shard=rows_per_shard, **changes
    )
    return plain.job(output=output)


def start(store, rows, job, batch_size=2, batches=None, finish=True, overwrite=False):
    """One start over ``rows``, ended after some batches; the ids that it made."""
    made = []
    ledger = Ledger(
        store, FACTS, writer_id=f"start-{next(_starts)}", container=job.output.container, overwrite=overwrite
    )
    todo = ledger.remaining(rows, look=True)
    ledger.images.recover()
    names = ledger.names(todo, job.output.filename, EXTENSIONS[job.output.format.name])
    with Writer(ledger, job, facts=FACTS, on_image=lambda row, ok: made.append(row.id)) as writer:
        for begin in range(0, len(todo), batch_size)[:batches]:
            part = todo[begin : begin + batch_size]
            writer.put(part, names, np.stack([plain.pixels(row) for row in part]), np.ones(len(part), bool))
        writer.compact()
    if finish and batches is None:
        packer.finish(ledger.images, ledger.records, job.output)
    ledger.merge()
    return made


def shards(store):
    return [name for name in store.list() if name.endswith((".tar", ".parquet"))]


def contents(store):
    """(id, image, record) of all that lies in shards, by readers that know nothing of us."""
    for shard in shards(store):
        data = io.BytesIO(store.read(shard))
        if shard.endswith(".parquet"):
            for row in pq.read_table(data).to_pylist():
                yield row["id"], row["image"]["bytes"], row
        else:
            with tarfile.open(fileobj=data) as tar:
                files = {member.name: tar.extractfile(member).read() for member in tar}
            for name in (name for name in files if name.endswith(".json")):
                record = json.loads(files[name])
                yield record["id"], files[record["file_name"]], record


def are_sound(store, container):
    """What must hold at every instant: a record has its whole image, and no shard has a row twice or unrecorded."""
    store = MemoryStore(dict(store.objects))
    images = open_images(store, container)
    recorded = {record["id"]: record["sha256"] for record in read_records(store)}
    for record in read_records(store):
        assert pixel_sha256(decode(images.read(record["file_name"]))) == record["sha256"]
    inside = {id: pixel_sha256(decode(image)) for id, image, _ in contents(store)}
    assert len(inside) == len(list(contents(store)))
    assert inside.items() <= recorded.items()


def check(store, rows):
    """Every row once, in a shard, and nothing left over."""
    expected = {row.id: pixel_sha256(plain.pixels(row)) for row in rows}
    found = [(id, pixel_sha256(decode(image))) for id, image, _ in contents(store)]
    assert sorted(found) == sorted(expected.items())
    lines = [json.loads(line) for line in store.read("metadata.jsonl").splitlines()]
    assert {line["id"]: line["sha256"] for line in lines} == expected
    assert {line["shard"] for line in lines} == set(shards(store))
    assert [name.partition(".")[0] for name in shards(store)] == [f"shard-{n:06}" for n in range(len(shards(store)))]
    assert not list(store.list(".fluxbatch/spool/"))
    assert len(list(store.list(".fluxbatch/shards/"))) == len(shards(store))


def test_shards_of_so_many_rows_and_the_records_in_them(container, tmp_path):
    rows = [plain.row(k, extra={"cat": "x", "n": k, "f": k / 2, "mixed": k if k % 2 else "a"}) for k in range(8)]
    store = open_store(str(tmp_path))
    start(store, rows, job(container))
    check(store, rows)
    lines = {json.loads(line)["id"]: json.loads(line) for line in store.read("metadata.jsonl").splitlines()}
    assert [line["shard"].partition(".")[0] for line in lines.values()] == [
        f"shard-{n:06}" for n in (0, 0, 0, 1, 1, 1, 2, 2)
    ] or len(shards(store)) == 3
    for id, _, record in contents(store):
        wanted = {key: value for key, value in lines[id].items() if key != "shard"}
        if container is Container.parquet:
            wanted["mixed"] = json.dumps(wanted["mixed"])
            record = {key: value for key, value in record.items() if key != "image"}
        assert record == wanted


def test_keys_and_members_of_a_tar(tmp_path):
    store = open_store(str(tmp_path))
    start(store, [plain.row(0), plain.row(1)], job(Container.webdataset, format=ImageFormat.webp))
    with tarfile.open(tmp_path / "shard-000000.tar") as tar:
        assert tar.getnames() == [f"0000{k}.{what}" for k in range(2) for what in ("json", "txt", "webp")]
        assert tar.extractfile("00001.txt").read() == b"prompt 1"


def test_a_parquet_column_is_an_image_to_datasets_and_row_groups_are_bounded(tmp_path, monkeypatch):
    module = importlib.import_module("fluxbatch.results.shard_files")
    monkeypatch.setattr(module, "_GROUP_ROWS", 2)
    store = open_store(str(tmp_path))
    start(store, [plain.row(k, seed=2**64 - 1 - k) for k in range(5)], job(Container.parquet, 5))
    file = pq.ParquetFile(tmp_path / "shard-000000.parquet")
    assert file.num_row_groups == 3
    features = json.loads(file.schema_arrow.metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"} and features["seed"] == {"dtype": "uint64", "_type": "Value"}
    assert list(features) == file.schema_arrow.names
    assert all(open_images(store).read(f"0000{k}.png") for k in (4, 0, 2))


def test_about_so_many_bytes(monkeypatch, tmp_path, container):
    monkeypatch.setattr(packer, "SHARD_BYTES", 3500)  # an image has some 1,400
    store = open_store(str(tmp_path))
    rows = [plain.row(k) for k in range(9)]
    start(store, rows, job(container, None))
    check(store, rows)
    assert len(shards(store)) in (3, 4)


def test_killed_at_every_instant(container):
    rows = [plain.row(k) for k in range(7)]
    counted = MemoryStore()
    start(counted, rows, job(container))
    check(counted, rows)
    for instant in range(0, counted.operations, STEP):
        store = MemoryStore(die_after=instant)
        with contextlib.suppress(Killed):  # threads make some more operations, or some fewer
            start(store, rows, job(container))
        are_sound(store, container)
        again = MemoryStore(store.objects)
        recorded = {record["id"] for record in read_records(MemoryStore(dict(store.objects)))}
        made = start(again, rows, job(container, 4), batch_size=3)
        assert recorded.isdisjoint(made)
        check(again, rows)


def test_killed_at_every_instant_of_an_overwrite(container):
    rows = [plain.row(k) for k in range(5)]
    changed = [*rows[:1], dataclasses.replace(rows[1], seed=9), *rows[2:4]]
    begun = MemoryStore()
    start(begun, rows, job(container))
    counted = MemoryStore(dict(begun.objects))
    assert set(start(counted, changed, job(container), overwrite=True)) == {"1"}
    check(counted, changed)
    for instant in range(0, counted.operations, STEP):
        store = MemoryStore(dict(begun.objects), die_after=instant)
        with contextlib.suppress(Killed):
            start(store, changed, job(container), overwrite=True)
        are_sound(store, container)
        again = MemoryStore(store.objects)
        start(again, changed, job(container), overwrite=True)
        check(again, changed)


def test_a_deleted_shard_is_exactly_its_rows_again(container, tmp_path):
    rows = [plain.row(k) for k in range(9)]
    store = open_store(str(tmp_path))
    start(store, rows, job(container), batch_size=3)
    victim = shards(store)[1]
    inside = {json.loads(line)["id"] for line in store.read("metadata.jsonl").splitlines()
              if json.loads(line)["shard"] == victim}  # fmt: skip
    store.delete(victim)
    assert set(start(store, rows, job(container))) == inside and len(inside) == 3
    check(store, rows)
    assert start(store, rows, job(container)) == []


def test_what_waits_in_the_spool_goes_into_shards_of_a_later_start(container, tmp_path):
    rows = [plain.row(k) for k in range(7)]
    store = open_store(str(tmp_path))
    start(store, rows, job(container), batches=1)
    assert not shards(store) and len(list(store.list(".fluxbatch/spool/"))) == 1  # both in one object
    assert len(start(store, rows, job(container))) == 5
    check(store, rows)


def test_of_two_images_of_a_name_the_newer_counts_and_others_stay_when_one_is_deleted():
    """A start was killed before it had recorded one, and the next made the row again."""
    store = MemoryStore()
    spool = Spool(store)
    spool.write({"a": b"old", "b": b"b", "c": b"c"})
    Spool(store).write({"a": b"new"})
    store.write(".fluxbatch/spool/mine.png", b"\x89PNG\r\n")
    spool.look()
    assert spool.read_all("abcd") == {"a": b"new", "b": b"b", "c": b"c"}
    spool.delete(["b", "x"])
    for seen in (spool, Spool(store)):
        seen.look()
        assert seen.read_all("abc") == {"a": b"new", "c": b"c"} and seen.names() == {"a", "c"}
    spool.delete("a")
    spool.look()
    assert spool.read_all("abc") == {"c": b"c"}
    spool.delete("c")
    assert list(store.objects) == [".fluxbatch/spool/mine.png"]
    spool.write({f"{k:0100}": bytes([k]) * k for k in range(200)})  # the first line is long
    again = Spool(store)
    again.look()
    assert again.read_all(again.names()) == {
        f"{k:0100}": bytes([k]) * k for k in range(1, 200)
    }  # what is empty counts for nothing
    with pytest.raises(NotFound):
        again.read("a")


def test_a_kill_costs_what_waits_and_what_is_being_written(container):
    """However slow a bucket is: no more than ``together`` batches wait, in memory as well."""

    class Slow(MemoryStore):
        def write(self, name, data, *, if_absent=False):
            if name.startswith(".fluxbatch/spool/"):
                begun.release()
                assert go.acquire(timeout=20)
            return super().write(name, data, if_absent=if_absent)

    begun, go, put = threading.Semaphore(0), threading.Semaphore(0), []
    rows, one, store = [plain.row(k) for k in range(40)], job(container, 40), Slow()
    ledger = Ledger(store, FACTS, writer_id="slow", container=container)
    todo, names = ledger.assign(rows, template="{i:05}", extension=".png")

    def work():
        with Writer(ledger, one, facts=FACTS) as writer:
            for row in todo:
                writer.put([row], names, plain.pixels(row)[None], [True])
                put.append(row)

    thread = threading.Thread(target=work)
    thread.start()
    for _ in range(4):
        assert begun.acquire(timeout=20)
        time.sleep(0.05)
        recorded = sum(1 for _ in read_records(store))
        assert len(put) - recorded <= 2 * Packed.together + 2  # one is being encoded, and the device has one
        go.release()
    go.release(40)
    thread.join()
    assert sum(1 for _ in read_records(store)) == 40


def test_images_that_cannot_be_written_are_rejects(container, monkeypatch):
    class Broken(MemoryStore):
        def write(self, name, data, *, if_absent=False):
            if name.startswith(".fluxbatch/spool/"):
                raise StorageError("the bucket is out")
            return super().write(name, data, if_absent=if_absent)

    monkeypatch.setattr("fluxbatch.results.writer._BACKOFF", 0.0)
    store, rows = Broken(), [plain.row(k) for k in range(3)]
    assert sorted(start(store, rows, job(container))) == ["0", "1", "2"]  # what each came to
    rejects = [json.loads(line) for line in store.read("rejects.jsonl").splitlines()]
    assert [line["reason"] for line in rejects] == ["the bucket is out"] * 3 and not list(read_records(store))
    assert start(MemoryStore(store.objects), rows, job(container)) and len(list(contents(store))) == 3


def test_another_container_is_another_configuration(container, tmp_path):
    rows = [plain.row(k) for k in range(3)]
    store = open_store(str(tmp_path))
    start(store, rows, job(container))
    with pytest.raises(UserError, match="container"):
        start(store, rows, job(Container.files))
    start(store, rows, job(Container.files), overwrite=True)
    assert not shards(store) and sum(name.endswith(".png") for name in store.list()) == 3
    with pytest.raises(UserError, match=f'container: null → "{container.name}"'):
        start(store, rows, job(container))
    start(store, rows, job(container), overwrite=True)
    check(store, rows)


def test_a_file_that_is_called_like_a_shard_is_not_written_over(container, tmp_path):
    name = f"shard-000000{'.tar' if container is Container.webdataset else '.parquet'}"
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=name):
        start(open_store(str(tmp_path)), [plain.row(0)], job(container))
    assert (tmp_path / name).read_text() == "mine"


def test_writers_side_by_side(container):
    """Replicas: each packs what it made, and the last one what is left of all."""
    rows = [plain.row(k) for k in range(40)]
    store = MemoryStore()
    one = job(container)

    def replica(part):
        ledger = Ledger(store, FACTS, writer_id=f"start-{next(_starts)}", container=container)
        ledgers.append(ledger)
        todo = ledger.remaining(rows, look=True)
        names = ledger.names(todo, one.output.filename, ".png")
        with Writer(ledger, one, facts=FACTS) as writer:
            for row in (row for row in todo if row.index % 3 == part):
                writer.put([row], names, plain.pixels(row)[None], [True])

    ledgers = []
    threads = [threading.Thread(target=replica, args=(part,)) for part in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(shards(store)) == 12
    packer.finish(ledgers[0].images, ledgers[0].records, one.output)
    ledgers[0].merge()
    check(store, rows)


def test_a_row_in_two_shards_is_in_one_when_the_run_has_ended(container):
    """A replica that was taken for lost lived on, and packed what another one had made again meanwhile."""
    rows = [plain.row(k) for k in range(9)]
    store = MemoryStore()
    start(store, rows, job(container), batches=2, finish=False)  # rows 0 to 3, of which 0 to 2 are in a shard
    images = open_images(store, container)
    records = {record["id"]: record for record in read_records(store)}
    items = [Item(records[id], images.read(records[id]["file_name"])) for id in ("1", "2", "3")]
    images.pack(items)
    assert len(list(contents(store))) == 6
    start(store, rows, job(container))
    check(store, rows)


def test_webdataset_reads_its_own(tmp_path):
    import webdataset

    rows = [plain.row(k, id=f"r{k}") for k in range(7)]
    start(open_store(str(tmp_path)), rows, job(Container.webdataset))
    shards = webdataset.WebDataset(str(tmp_path / "shard-{000000..000002}.tar"), shardshuffle=False)
    found = [(sample["json"], sample["txt"], pixel_sha256(sample["png"])) for sample in shards.decode("rgb8")]
    assert [(record["id"], prompt) for record, prompt, _ in found] == [(row.id, row.prompt) for row in rows]
    assert [digest for *_, digest in found] == [pixel_sha256(plain.pixels(row)) for row in rows]


def test_a_card_that_somebody_made_theirs_stays(tmp_path):
    store = open_store(str(tmp_path))
    one = dataclasses.replace(job(Container.parquet), run_name="a|b")
    write_card(store, one, {"images": 1000, "rejected": 2}, "apache-2.0")
    text = (tmp_path / "README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head["size_categories"] == "1K<n<10K" and "license" not in head  # the images' is not the model's
    assert "# a\\|b\n" in text and "| the model's license | apache-2.0 |" in text
    write_card(store, one, {"images": 1001, "rejected": 2}, None)
    assert "1,001" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("mine")
    write_card(store, one, {"images": 1002, "rejected": 2}, None)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_licenses_are_those_of_the_models_pages():
    assert license_of("flux-mini") == license_of("black-forest-labs/FLUX.1-schnell") == "apache-2.0"
    assert license_of("black-forest-labs/FLUX.1-dev") == "flux-1-dev-non-commercial-license"
    assert license_of("somebody/model") is license_of("README.md") is None


def test_writing_needs_no_torch_and_says_what_it_needs(monkeypatch):
    script = "from fluxbatch.results.shard_files import *; require_package(Container.webdataset); import sys; "
    script += "assert 'torch' not in sys.modules and 'webdataset' in sys.modules"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"container=parquet: needs the package pyarrow, .*fluxbatch\[datasets\]"):
        require_package(Container.parquet)


def test_pages_carry_small_copies_of_images_in_shards(tmp_path, container):
    rows = [plain.row(k) for k in range(4)]
    for name in ("0", "1"):
        start(open_store(str(tmp_path / name)), rows, job(container))
    store = open_store(str(tmp_path / "0"))
    lines = [json.loads(line) for line in store.read("metadata.jsonl").splitlines()]
    gallery.write_gallery(store, lines, [], "demo", {}, open_images(store))
    assert (tmp_path / "0/index.html").read_text().count("data:image/jpeg;base64,") == 4
    gallery.write_grid(open_store(str(tmp_path)), {"0": {"seed": 0}, "1": {"seed": 1}})
    assert (tmp_path / "index.html").read_text().count("data:image/jpeg;base64,") == 8


def test_what_waits_is_packed_without_reading_it_again_as_far_as_memory_goes(container, monkeypatch):
    class Reads(MemoryStore):
        def read_range(self, name, begin, size):
            data = super().read_range(name, begin, size)
            if begin and name.startswith(".fluxbatch/spool/"):  # else it is the first line
                reads.append(len(data))
            return data

    monkeypatch.setattr(Packed, "together", 0)  # batch by batch
    rows, one, found = [plain.row(k) for k in range(12)], job(container), []
    for room in (10**9, 2 * 1500 + 100, 0):
        reads, store = [], Reads()
        monkeypatch.setattr(packer, "HELD_BYTES", room)
        start(store, rows, one)
        check(store, rows)
        found.append(sum(reads))
    assert found[0] == 0 < found[1] < found[2] == sum(len(image) for _, image, _ in contents(store))
