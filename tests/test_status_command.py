"""``python -m fluxbatch.status``: counts of every record, replicas that live and those that are lost."""

import datetime
import json
import time

import plain
import pytest
import s3_faults
from test_crash import start
from test_ledger import FACTS, record
from test_storage import gcs, s3, store  # noqa: F401 (fixtures)

from fluxbatch import status
from fluxbatch.results.ledger import Ledger, read_records, write_status
from fluxbatch.results.location import CONFIG, REPLICAS
from fluxbatch.results.watch import Watch
from fluxbatch.storage.local import LocalStore
from fluxbatch.storage.registry import open_store
from fluxbatch.types import Reject

ROWS = [plain.row(i) for i in range(40)]


class Run:
    """A run of 40 rows in three replicas: ``run.sign(replica, seconds ago, made, rejected, ...)``."""

    def __init__(self, store):  # noqa: F811
        self.store = store
        Ledger(store, FACTS, writer_id="first")
        store.write(CONFIG, b"replica_expiry: 60.0\n")
        write_status(store, None, "running", {"before": 0, "left": 40})

    def sign(self, replica, ago, made, rejected=0, **more):
        time = (datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=ago)).isoformat()
        counts = {"made": made, "before": 0, "rejected": rejected}
        sign = {"replica": replica, "start": f"s{replica}", "beat": 3, "counts": counts, **more, "time": time}
        self.store.write(f"{REPLICAS}{replica}.json", json.dumps(sign).encode())

    def commit(self, replica, first, last):
        ledger = Ledger(self.store, FACTS, writer_id=f"s{replica}-{first}")
        ledger.remaining(ROWS)
        for i in range(first, last):  # an object each, as batches are
            ledger.commit([record(ledger, ROWS[i], f"flux_{i}.png")])
        return ledger


@pytest.fixture
def run(tmp_path):
    return Run(LocalStore(str(tmp_path / "out" / "run")))


def test_a_lost_replica_is_named_and_its_last_records_count(store, cli):  # noqa: F811
    """On disks, GCS and S3."""
    run = Run(store)
    run.commit(0, 0, 10)
    run.commit(1, 10, 18)
    ledger = run.commit(2, 20, 25)
    ledger.reject([Reject("m.jsonl:31", "NaN in\nthe image", "30", 30)])
    run.sign(0, 5, 10, speed={"images_per_second": 1.5})
    run.sign(1, 61, 4, speed={"images_per_second": 2.0})  # it recorded four more, and was killed
    run.sign(2, 3, 5, rejected=1, speed={"images_per_second": 0.5})
    code, out = cli(f"output_dir={store.url.removesuffix('/run')}", "run_name=run", entry="status")
    head, counts, _, *replicas, error = out.splitlines()
    assert code == 0 and head == f"{run.store.url}: running"
    assert counts == "  23 of 40 rows done (57.5%), 1 rejected, 2 images/s, 0:00:08 to go"
    assert [line.split()[:5] for line in replicas] == [
        ["0", "running", "10", "0", "1.5"],
        ["1", "lost", "4", "0", "-"],
        ["2", "running", "5", "1", "0.5"],
    ]
    assert error == "  last error  m.jsonl:31: NaN in the image"


def test_a_line_that_a_compaction_left_twice_counts_once(run):
    ledger = run.commit(0, 0, 10)
    watch = Watch(run.store)
    run.sign(0, 0, 10)
    assert watch.look().done == 10
    names = [*run.store.list(".fluxbatch/records/")]
    kept = {name: run.store.read(name) for name in names}
    ledger.compact()
    run.store.write(names[3], kept[names[3]])
    run.commit(1, 10, 12)
    assert watch.look().done == Watch(run.store).look().done == 12


def test_a_sign_that_changes_is_of_a_living_replica_whatever_its_clock_says(run):
    run.sign(0, 7200, 1)
    watch = Watch(run.store)
    assert [sign.state for sign in watch.look().replicas] == ["lost"]
    run.sign(0, 7199, 2)
    view = watch.look()
    assert view.goes_on and view.state == "running"
    run.sign(0, 1, 2, exit_code=75)
    assert [sign.state for sign in watch.look().replicas] == ["ended with 75"]
    assert Watch(run.store).look().state == "nobody is at work"


def test_a_run_by_itself_before_and_after_its_end(run, tmp_path, cli, monkeypatch):
    write_status(run.store, None, "running", {"made": 3, "before": 1, "rejected": 0, "left": 36})
    run.commit(0, 0, 5)
    view = Watch(run.store).look()
    assert view.goes_on and (view.done, view.rows) == (5, 40)

    def end(seconds):
        counts = {"rows": 40, "made": 38, "before": 1, "rejected": 1, "left": 0}
        write_status(run.store, 3, "finished; some rows were rejected", counts)

    monkeypatch.setattr(status.time, "sleep", end)
    code, out = cli(f"output_dir={tmp_path}/out", "watch=true", entry="status")  # without a name, every run there
    first, last = out.split(f"{run.store.url}: ")[1:]
    assert code == 0 and first.startswith("running\n  5 of 40 rows done (12.5%), 0 rejected\n")
    assert last == "finished; some rows were rejected\n  39 of 40 rows done (97.5%), 1 rejected\n"


def test_a_place_without_a_run_is_a_mistake(cli, tmp_path):
    code, err = cli(f"output_dir={tmp_path}/out", "run_name=no", entry="status")
    assert code == 2 and f"{tmp_path}/out/no: no run in it" in err


@pytest.mark.slow
def test_three_replicas_at_work_of_which_one_is_killed(tmp_path, cli):
    """Processes that work in a bucket: the killed one is named while the others go on, and every record counts."""
    rows = [{"id": f"r{i}", "prompt": f"prompt {i % 9}", "seed": i, "num_inference_steps": 4} for i in range(4000)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with s3_faults.serve():
        replicas = {"output_dir": "s3://bucket/out", "replica_count": 3, "replica_expiry": 3, "shard_size": 32}
        started = [start(tmp_path, "run", batch=4, replica_index=n, **replicas) for n in range(3)]
        try:
            there = open_store("s3://bucket/out/run")
            end = time.monotonic() + 120

            def wait(condition):
                while not condition():
                    assert time.monotonic() < end and all(each.poll() is None for each in started[::2])
                    time.sleep(0.2)

            wait(lambda: len(list(there.list(REPLICAS))) == 3)
            watch = Watch(there)
            wait(lambda: all(each.counts["made"] for each in watch.look().replicas))
            started[1].kill()
            wait(lambda: "lost" in [each.state for each in watch.look().replicas])
            before = sum(1 for _ in read_records(there))
            view = Watch(there).look()
            assert before <= view.done <= sum(1 for _ in read_records(there)) < 4000 == view.rows
            assert [each.state for each in view.replicas] == ["running", "lost", "running"]
            _, out = cli("output_dir=s3://bucket/out", "run_name=run", entry="status")
            assert [line.split()[:2] for line in out.splitlines() if line.split()[1:2] == ["lost"]] == [["1", "lost"]]
        finally:
            for each in started:
                each.kill()
                each.wait()
        assert Watch(there).look().done == sum(1 for _ in read_records(there))
