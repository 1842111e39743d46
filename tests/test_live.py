"""Pages of a run that is still at work: there with the first shard, seldom written, small whatever the run has."""

import json
import threading

import plain
import pytest
from test_gallery import page_of, sheet_of
from test_packed import job, start
from test_run import flags, mixed  # noqa: F401 (a fixture)

from fluxbatch.config.schema import Container
from fluxbatch.results import live
from fluxbatch.results.ledger import RECORDS
from fluxbatch.results.live import LivePages
from fluxbatch.results.packed import open_images
from fluxbatch.session.finalize import Outcome
from fluxbatch.storage.base import StorageError
from fluxbatch.storage.local import LocalStore

COUNTS = {"made": 8, "before": 1, "rejected": 0, "left": 3}


class Counted(LocalStore):
    """Counts the bytes that are read, and what is written."""

    def __init__(self, url):
        super().__init__(url)
        self.bytes, self.written, self.lock = 0, [], threading.Lock()

    def read_range(self, name, start, size):
        data = super().read_range(name, start, size)
        with self.lock:
            self.bytes += len(data)
        return data

    def write(self, name, data, *, if_absent=False):
        with self.lock:
            self.written.append(name)
        return super().write(name, data, if_absent=if_absent)


def pages(store, container=Container.files, alone=True):
    return LivePages(store, open_images(store, container), "demo", lambda: COUNTS, alone=alone)


@pytest.mark.parametrize("container", list(Container), ids=lambda each: each.name)
def test_a_choice_of_what_is_there(tmp_path, container, monkeypatch):
    monkeypatch.setattr(live, "ROWS", 5)
    monkeypatch.setattr(live, "THUMBNAILS", 5)
    store = Counted(str(tmp_path))
    start(store, [plain.row(k) for k in range(9)], job(container), batches=3)
    pages(store, container).refresh()
    page = page_of(store)
    assert page.data["count"] == 5 and page.data["columns"]["index"] == sorted(page.data["columns"]["index"])
    assert page.data["note"].startswith("The run was at work when this page was written, 20")
    assert ("thumbnail" in page.data["columns"]) == (container is not Container.files)
    assert b"images so far</dt><dd>9<" in store.read("index.html") and sheet_of(store).width > 100


def test_seldom_and_never_more_than_a_share_of_the_time(tmp_path, monkeypatch):
    store, clock = Counted(str(tmp_path)), [1000.0]
    start(store, [plain.row(k) for k in range(3)], job(Container.files))
    one = pages(store)
    monkeypatch.setattr(live.time, "monotonic", lambda: clock[0])
    write, cost = live.write_gallery, [1.0]

    def slow(*given, **named):
        clock[0] += cost[0]
        write(*given, **named)

    monkeypatch.setattr(live, "write_gallery", slow)

    def writes(after):
        clock[0] += after
        before = store.written.count("index.html")
        one.refresh()
        return store.written.count("index.html") - before

    assert [writes(after) for after in (0, 1, 178, 2, 60)] == [1, 0, 0, 1, 0]
    cost[0] = 60.0
    assert writes(120) == 1
    assert [writes(after) for after in (180, 60 / live.SHARE - 60 - 181, 2)] == [0, 0, 1]


def test_replicas_take_turns(tmp_path, monkeypatch):
    store, now = Counted(str(tmp_path)), [5000.0]
    start(store, [plain.row(k) for k in range(3)], job(Container.files))
    monkeypatch.setattr(live.time, "time", lambda: now[0])
    for replica in range(3):
        pages(store, alone=False).refresh()
        assert store.written.count("index.html") == 1, replica
    now[0] += live.EVERY
    pages(store, alone=False).refresh()
    assert store.written.count("index.html") == 2


def test_what_a_page_costs_is_bounded(tmp_path, monkeypatch):
    """Of 200,000 records in 20 objects of 10,000 it reads no more than the beginnings."""
    store = Counted(str(tmp_path))
    start(store, [plain.row(0)], job(Container.files))
    (name,) = store.list(RECORDS)
    record = json.loads(store.read(name))
    for number in range(20):
        rows = range(number * 10_000, (number + 1) * 10_000)
        text = "".join(json.dumps(record | {"index": k, "file_name": f"{k}.png"}) + "\n" for k in rows)
        LocalStore.write(store, f"{RECORDS}s-{number:06}.jsonl", text.encode())
    pages(store).refresh()
    assert store.bytes <= 21 * live._BYTES and page_of(store).data["count"] == live.ROWS
    assert len(store.read("index.html")) < 1 << 20
    assert max(page_of(store).data["columns"]["index"]) > 180_000


def test_a_store_that_fails_costs_no_run(tmp_path, monkeypatch):
    store = Counted(str(tmp_path))
    start(store, [plain.row(0)], job(Container.files))

    def fails(*_, **__):
        raise StorageError("the bucket is away")

    monkeypatch.setattr(live, "write_gallery", fails)
    pages(store).refresh()


@pytest.mark.parametrize("output", ["files", "webdataset"])
def test_a_run_has_pages_with_its_first_shard(cli, golden, tmp_path, mixed, monkeypatch, output):  # noqa: F811
    """And whole ones in the end; a run of one shard writes them once."""
    if output != "files":
        pytest.importorskip(output)
    seen = []
    finished = Outcome.finished

    def ended(self, cut):
        seen.append(self.store.read("index.html").decode() if self.store.exists("index.html") else "")
        return finished(self, cut)

    monkeypatch.setattr(Outcome, "finished", ended)
    more = {} if output == "files" else {"output": output}
    given = flags(golden, tmp_path, manifest=mixed, per_device_batch_size=4, shard_size=8, **more)
    assert cli(*given)[0] == 0
    assert cli(*given, "run_name=one", "shard_size=256")[0] == 0
    assert "The run was at work when this page was written" in seen[0] and seen[1] == ""
    assert "The run was at work" not in (tmp_path / "run" / "index.html").read_text()
