"""Replicas that share only the output directory: assigned evenly, claimed once, taken over, every row once."""

from __future__ import annotations

import dataclasses
import json
import random
import resource
import signal
import threading
import time
from collections import Counter

import gcs_faults
import pytest
import s3_faults
from conftest import images, metadata
from test_hosts import ROWS, long_manifest, pictures, replica, said
from test_ledger import FACTS, MemoryStore
from test_storage import impatient

from fluxbatch.distributed.process_group import ProcessGroup
from fluxbatch.distributed.replica import Replica, find
from fluxbatch.results.ledger import Ledger
from fluxbatch.results.resume import decisive
from fluxbatch.shards import assignment, batching, progress
from fluxbatch.shards.claims import Claims, Heartbeat, Holder
from fluxbatch.storage.base import StorageError
from fluxbatch.storage.registry import open_store
from fluxbatch.types import Row, UserError

# ---- which replica


ARRAY = {
    "SLURM_ARRAY_TASK_ID": "5",
    "SLURM_ARRAY_TASK_MIN": "1",
    "SLURM_ARRAY_TASK_MAX": "8",
    "SLURM_ARRAY_TASK_COUNT": "8",
}


@pytest.mark.parametrize(("index", "count", "env", "expected"), [
    (None, None, {}, (0, 1)),
    (2, 4, ARRAY, (2, 4)),
    (None, None, ARRAY, (4, 8)),
    (None, None, ARRAY | {"SLURM_NTASKS": "4", "JAX_NUM_PROCESSES": "4"}, (4, 8)),
    (None, None, ARRAY | {"SLURM_ARRAY_TASK_ID": "6", "SLURM_ARRAY_TASK_MIN": "2", "SLURM_ARRAY_TASK_COUNT": "4"}, (2, 4)),
    (None, None, {"BATCH_TASK_INDEX": "3", "BATCH_TASK_COUNT": "16"}, (3, 16)),
    (None, 4, {"JOB_COMPLETION_INDEX": "3"}, (3, 4)),
    # These number the processes of one replica: no replica may be made of them.
    (None, None, {"JOB_COMPLETION_INDEX": "3"}, (0, 1)),
    (None, None, {"JOB_COMPLETION_INDEX": "1", "JAX_NUM_PROCESSES": "2"}, (0, 1)),
    (None, None, {"JOB_COMPLETION_INDEX": "1", "TPU_WORKER_HOSTNAMES": "a,b"}, (0, 1)),
    (None, None, {"BATCH_TASK_INDEX": "1", "BATCH_TASK_COUNT": "2", "JAX_NUM_PROCESSES": "2"}, (0, 1)),
    (None, None, {"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, (0, 1)),
    # Said outright that it is the only one.
    (None, 1, ARRAY, (0, 1)),
    (None, 1, {"BATCH_TASK_INDEX": "3", "BATCH_TASK_COUNT": "16"}, (0, 1)),
    (None, 1, {"JOB_COMPLETION_INDEX": "3"}, (0, 1)),
    (None, 1, {"SLURM_ARRAY_TASK_ID": "x"}, (0, 1)),
    (None, None, {"JOB_COMPLETION_INDEX": "", "JAX_NUM_PROCESSES": ""}, (0, 1)),
    # Nor is a sweep's job a replica of the others.
    (None, None, ARRAY | {"SUBMITIT_EXECUTOR": "slurm"}, (0, 1)),
    (1, 2, ARRAY | {"SUBMITIT_EXECUTOR": "slurm"}, (1, 2)),
])  # fmt: skip
def test_the_scheduler_says_which_replica_this_is(index, count, env, expected):
    assert find(index, count, env) == expected


@pytest.mark.parametrize(("index", "count", "env", "word"), [
    (4, 4, {}, "from 0 to 3"),
    (None, 4, {}, "replica_index"),
    (None, 2, {"JOB_COMPLETION_INDEX": "1", "JAX_NUM_PROCESSES": "2"}, "replica_index"),
    (1, None, {}, "replica_index=1, replica_count=1"),
    (None, None, {"BATCH_TASK_INDEX": "x", "BATCH_TASK_COUNT": "2"}, "BATCH_TASK_INDEX=x"),
    (None, None, ARRAY | {"SLURM_ARRAY_TASK_COUNT": "5"}, "evenly spaced"),
    (None, 2, ARRAY, r"replica_index=4 \(SLURM_ARRAY_TASK_ID=5\), replica_count=2: .* replica_count=1"),
    (9, None, ARRAY, "replica_index=9, SLURM_ARRAY_TASK_COUNT=8: expected an index from 0 to 7"),
])  # fmt: skip
def test_an_unclear_replica_is_a_mistake(index, count, env, word):
    with pytest.raises(UserError, match=word):
        find(index, count, env)


def test_overwriting_is_for_one_replica(cli, golden, tmp_path, monkeypatch):
    code, err = cli(
        f"pretrained_model_name_or_path={golden / 'dev'}",
        "prompt=a fox",
        f"output_dir={tmp_path}",
        "overwrite=true",
        "replica_index=0",
        "replica_count=2",
    )
    assert code == 2 and "overwrite=true, replica_count=2: expected one replica" in err and len(err.splitlines()) == 1
    for name, value in ARRAY.items():
        monkeypatch.setenv(name, value)
    words = (
        f"pretrained_model_name_or_path={golden / 'dev'}",
        "prompt=a fox",
        f"output_dir={tmp_path}",
        "overwrite=true",
    )
    code, err = cli(*words)
    assert code == 2 and "overwrite=true, replica_count=8 (SLURM_ARRAY_TASK_COUNT=8): expected one replica" in err
    assert cli(*words, "replica_count=1", "resolution=16", "num_inference_steps=1", "max_sequence_length=24")[0] == 0


def test_images_that_were_written_over_are_made_again_by_the_next_start(cli, golden, tmp_path, monkeypatch):
    """Of replicas too, though what they claimed is done."""
    args = (
        f"pretrained_model_name_or_path={golden / 'dev'}",
        "prompt=a fox",
        "resolution=32",
        "num_inference_steps=1",
        "max_sequence_length=24",
        "hardware=cpu",
        f"output_dir={tmp_path}",
        "run_name=run",
        "replica_index=0",
        "replica_count=2",
        "replica_expiry=4",
    )
    commit = Ledger.commit

    def beside_another(self, records):
        commit(self, records)
        other = dict(records[0], id="other", key="0" * 32)
        (tmp_path / "run/.fluxbatch/records/other-000001.jsonl").write_text(json.dumps(other) + "\n")

    monkeypatch.setattr(Ledger, "commit", beside_another)
    assert cli(*args)[0] == 75
    monkeypatch.setattr(Ledger, "commit", commit)
    assert cli(*args)[0] == 0 and [record["id"] for record in metadata(tmp_path / "run")] == ["0"]


# ---- the deal


def mixed_rows(count):
    rng = random.Random(0)
    sizes = [(1024, 1024)] * 4 + [(768, 1344), (1344, 768), (512, 512), (1536, 1536), (832, 1216), (1216, 832)]
    return [
        Row(i, str(i), "", "", i, *rng.choice(sizes), rng.choice([4, 8, 20, 28, 28, 50]), 3.5) for i in range(count)
    ]


def imbalance(costs, count):
    """How much the costliest assignment is above the mean; every work unit is assigned once."""
    assigned = batching.assign_units(costs, count)
    assert sorted(n for units in assigned for n in units) == [n for n, cost in enumerate(costs) if cost]
    loads = [sum(costs[n] for n in units) for units in assigned]
    return max(loads) / (sum(loads) / count) - 1


def test_portions_are_whole_batches_of_one_size_and_every_row_once():
    rows = mixed_rows(20_000)
    cut = batching.work_units(rows, 8, 256)
    assert sorted(row.index for work_unit in cut for row in work_unit) == list(range(len(rows)))
    assert all(len({(row.height, row.width) for row in work_unit}) == 1 for work_unit in cut)
    shapes = Counter((work_unit[0].height, work_unit[0].width) for work_unit in cut if len(work_unit) % 8)
    assert all(count == 1 for count in shapes.values())
    assert max(map(len, cut)) <= 256 and sum(map(len, cut)) / len(cut) > 16
    # ever smaller, so that few claims are many rows and the end is even
    assert len(cut[0]) == 72 and [len(work_unit) for work_unit in cut if work_unit[0].height == 512][-2] == 8


def test_few_rows_are_divided_too():
    assert len(batching.work_units(mixed_rows(12)[:1] * 12, 4, 256)) == 3
    assert batching.work_units([], 4, 256) == [] and batching.assign_units([], 3) == [[], [], []]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16, 32])
def test_hands_cost_the_same(count):
    cut = batching.work_units(mixed_rows(30_000), 4, 256)
    costs = [sum(map(batching.cost, work_unit)) for work_unit in cut]
    assert imbalance(costs, count) <= 0.01
    # and after a restart, when half the work_units are done
    assert imbalance([cost if n % 2 else 0.0 for n, cost in enumerate(costs)], count) <= 0.01


def test_a_replica_compiles_few_sizes():
    cut = batching.work_units(mixed_rows(30_000), 4, 256)
    assigned = batching.assign_units([sum(map(batching.cost, work_unit)) for work_unit in cut], 16)
    sizes = [len({(cut[n][0].height, cut[n][0].width) for n in units}) for units in assigned]
    assert sum(sizes) / 16 < 5 < len({(work_unit[0].height, work_unit[0].width) for work_unit in cut})


@pytest.mark.slow
def test_a_million_rows_for_512_replicas(capsys):
    rows = mixed_rows(1_000_000)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    cut = batching.work_units(rows, 8, 256)
    costs = [sum(map(batching.cost, work_unit)) for work_unit in cut]
    assigned_at, worst = (
        time.monotonic(),
        max(imbalance(costs, count) for count in (1, 2, 3, 5, 8, 13, 64, 100, 255, 256, 511, 512)),
    )
    now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with capsys.disabled():
        print(
            f"\n1,000,000 rows: {len(cut):,} work units in {assigned_at - start:.1f} s, 12 assignments in "
            f"{time.monotonic() - assigned_at:.1f} s,"
            f" imbalance at most {worst:.2%}, {(now - before) >> 10} MiB above the rows' own, {now >> 10} MiB in all"
        )
    assert worst <= 0.01


# ---- claims


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def party(store, replica, clock=None, start=None, expiry=10.0):
    holder = Holder(replica, start or f"start-{replica}")
    heartbeat = Heartbeat(store, holder, 4e6, "plan")  # it beats when told to
    heartbeat.begin()
    return heartbeat, Claims(store, "plan", holder, expiry, clock or Clock())


def test_a_task_is_claimed_once_and_taken_over_when_its_holder_falls_silent():
    store, clock = MemoryStore(), Clock()
    heartbeat, first = party(store, 0)
    _, second = party(store, 1, clock)
    assert first.take("7") and not second.take("7")
    assert second.survey().claimed == {"7": 1}
    for _ in range(5):  # it lives: its sign changes
        assert second.take_over("7", 1) is None
        heartbeat._write(int(clock.now))
        clock.now += 9
    assert second.take_over("7", 1) is None
    clock.now += 10.5
    assert second.take_over("7", 1) == ["start-0"]
    assert second.take_over("7", 1) is None and first.take_over("7", 2) is None
    second.done("7")
    assert first.survey().done == {"7"} and not first.survey().claimed
    third = Claims(store, "plan", Holder(2, "start-2"), 10.0, clock)
    assert third.take_over("7", 2) is None  # replica 1 is alive


def test_who_has_ended_or_was_started_anew_is_not_waited_for():
    store = MemoryStore()
    heartbeat, first = party(store, 0)
    _, second = party(store, 1)
    assert first.take("1") and second.take_over("1", 1) is None
    heartbeat.end(75, "drained", {})
    assert second.take_over("1", 1) == ["start-0"]
    assert json.loads(store.objects[".fluxbatch/replicas/0.json"])["exit_code"] == 75
    assert second.take("2")
    party(store, 1, start="again")
    assert first.take_over("2", 1) == ["start-1"]
    assert second.take("3")
    del store.objects[".fluxbatch/replicas/1.json"]
    assert first.take_over("3", 1) == ["start-1"]


def test_a_later_start_of_a_replica_replaces_the_earlier():
    store = MemoryStore()
    old = Heartbeat(store, Holder(0, "z-old"), 0.1, "plan")
    old.begin()
    new = Heartbeat(store, Holder(0, "a-new"), 0.1, "plan")
    new.begin()
    end = time.monotonic() + 10
    while not old.replaced:
        assert time.monotonic() < end
        time.sleep(0.01)
    old.end(1, "replaced", {})
    assert not new.replaced and json.loads(store.objects[".fluxbatch/replicas/0.json"])["start"] == "a-new"
    old._write(5)  # a last gasp
    time.sleep(0.1)
    assert not new.replaced
    new.end(0, "", {})


def test_a_replica_of_another_plan_is_met_if_it_lives():
    """Nor one that was killed, one that ended, and one of the same plan are."""
    store = MemoryStore()
    others = {n: Heartbeat(store, Holder(n, f"start-{n}"), 4e6, "plan" if n == 3 else "other plan") for n in (1, 2, 3)}
    for heartbeat in others.values():
        heartbeat.begin()
    mine = Heartbeat(store, Holder(0, "start-0"), 0.04, "plan")
    mine.begin()
    others[1].end(75, "drained", {})
    for beat in range(1, 6):
        others[3]._write(beat)
        time.sleep(0.02)
    assert mine.conflicting is None  # 2 is silent
    others[2]._write(1)
    end = time.monotonic() + 10
    while mine.conflicting is None:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert mine.conflicting == 2
    mine.end(1, "", {})


def test_after_the_end_another_start_claims_anew():
    store = MemoryStore()
    _, first = party(store, 0)
    _, second = party(store, 1)
    assert first.take("1") and first.take("merge")
    first.done("1")
    first.finish()
    assert second.survey().finished  # though it was still looking
    assert not second.take("1") and second.finished and second.take_over("2", 1) is None  # or had slept
    assert [name for name in store.objects if "/claims/" in name] == [".fluxbatch/claims/plan-0/finished"]
    _, later = party(store, 1, start="later")
    assert not later.survey().finished and later.take("1")


# ---- several replicas at once, in threads


class Never:
    def asked(self):
        return False


class Killed(Exception):
    pass


def work_through(store, index, count, rows, pause, dies_after=None, expiry=0.8, made=None):
    """A replica as ``run`` has it, which commits records instead of making images; killed after some rows."""
    start = f"start{index}x{random.randrange(10**9):09}"
    ledger = Ledger(store, FACTS, writer_id=f"{start}-0")
    todo = ledger.remaining(rows)
    work = assignment.ClaimedShards(
        ProcessGroup(), Replica(index, count), store, ledger, start, batching.work_units(rows, 2, 16), todo, 2, expiry
    )
    work.started()
    drawn = 0
    try:
        for shard in work.shards(Never()):
            for batch in shard.batches:
                time.sleep(pause)
                if dies_after is not None and drawn >= dies_after:
                    raise Killed
                ledger.commit(
                    [
                        {
                            "file_name": f"{row.id}.png",
                            **decisive(row),
                            "id": row.id,
                            "index": row.index,
                            "sha256": "",
                            "key": ledger.key(row),
                        }
                        for row in batch.rows
                    ]
                )
                drawn += len(batch.rows)
                made.extend(row.id for row in batch.rows)
                for row in batch.rows:
                    work.progress.through(row, True)
            ledger.compact()
    except Killed:
        work._heartbeat._over.set()  # silence
        return None
    tally = ledger.merge() if work.merges else None
    work.ended(0, "", {"made": tally.done} if tally else {}, speed={"images_per_second": index})
    return work.merges, tally


def test_who_wakes_up_after_the_end_draws_nothing_again():
    """Of its queue, which nobody claims any more as the claims are cleared away."""
    store, rows, made = MemoryStore(), mixed_rows(100), []
    ledger = Ledger(store, FACTS, writer_id="asleep-0")
    asleep = assignment.ClaimedShards(
        ProcessGroup(),
        Replica(0, 2),
        store,
        ledger,
        "asleep",
        batching.work_units(rows, 2, 16),
        ledger.remaining(rows),
        2,
        60,
    )
    asleep.started()
    merges, tally = work_through(store, 1, 2, rows, 0, made=made)
    assert merges and tally.done == len(made) == 100
    assert list(asleep.shards(Never())) == [] and not asleep.merges
    asleep.ended(0, "", {})
    assert [name for name in store.objects if "/claims/" in name and not name.endswith("/finished")] == []


@pytest.mark.parametrize("seed", range(4))
def test_every_row_once_whoever_dies(seed):
    """Five replicas; some die at any moment, one comes late, one is slow: the others finish."""
    rng, store, rows, made, results = random.Random(seed), MemoryStore(), mixed_rows(300), [], {}

    def replica_thread(index, **how):
        results[index] = work_through(store, index, 5, rows, made=made, **how)

    how = {n: {"pause": 0.002} for n in range(5)}
    how[rng.randrange(5)]["pause"] = 0.02
    for index in rng.sample(range(5), rng.choice([1, 2, 4])):
        how[index]["dies_after"] = rng.randrange(60)
    threads = [threading.Thread(target=replica_thread, args=(n,), kwargs=how[n]) for n in range(5)]
    for thread in threads:
        thread.start()
        time.sleep(rng.random() * 0.05)
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    ended = {index: result for index, result in results.items() if result}
    assert {n for n, each in how.items() if "dies_after" not in each} <= ended.keys()
    assert sum(merges for merges, _ in ended.values()) == 1  # one merges, the others know that it did
    tally = next(tally for merges, tally in ended.values() if merges)
    assert (tally.rows, tally.done, tally.left) == (300, 300, 0)
    lines = [json.loads(line) for line in store.objects["metadata.jsonl"].splitlines()]
    assert sorted(int(line["id"]) for line in lines) == list(range(300))
    assert (
        sorted(set(map(int, made))) == list(range(300)) and len(made) == 300
    )  # nothing that was recorded is drawn again
    status = json.loads(store.objects["status.json"])
    assert (status["exit_code"], status["counts"]) == (0, {"made": 300}) and "speed" not in status  # of the run
    signs = {n: json.loads(store.objects[f".fluxbatch/replicas/{n}.json"]) for n in range(5)}
    assert all(signs[n]["speed"] == {"images_per_second": n} for n in ended)
    counts = [signs[n]["counts"] for n in ended]  # who comes late may find all done
    assert all(each["made"] + each["before"] <= 300 for each in counts) and any(each["before"] < 300 for each in counts)
    made_by_ended = sum(signs[n]["counts"]["made"] for n in ended)
    assert made_by_ended <= 300 and (len(ended) < 5 or made_by_ended == 300)


def test_a_replica_that_works_says_how_far_it_is(monkeypatch):
    """With its heartbeat, which is written anyway, and at once when the first batch is through."""
    monkeypatch.setattr(progress, "EVERY", 0.0)
    store, rows = MemoryStore(), mixed_rows(40)
    ledger = Ledger(store, FACTS, writer_id="start-0")
    work = assignment.ClaimedShards(
        ProcessGroup(),
        Replica(0, 2),
        store,
        ledger,
        "start",
        batching.work_units(rows, 2, 16),
        ledger.remaining(rows),
        2,
        1e3,
    )
    work.started()
    assert json.loads(store.objects[".fluxbatch/replicas/0.json"])["counts"] == {"made": 0, "before": 0, "rejected": 0}
    next(work.shards(Never()))
    status = json.loads(store.objects["status.json"])
    assert (status["exit_code"], status["counts"]) == (
        None,
        {"before": 0, "left": 40},
    ) and ".fluxbatch/replicas/" in status["reason"]
    for row in rows[:3]:
        work.progress.beside(row, 0)
        work.progress.through(row, True)
    end = time.monotonic() + 10
    while (sign := json.loads(store.objects[".fluxbatch/replicas/0.json"]))["counts"]["made"] < 3:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert (
        sign["counts"] == {"made": 3, "before": 0, "rejected": 0}
        and sign["speed"]["images_per_second"] > 0
        and sign["beat"] > 0
    )
    assert sign["reason"].startswith("running, or killed after 20")
    work.ended(75, "drained", {})
    sign = json.loads(store.objects[".fluxbatch/replicas/0.json"])
    assert (sign["exit_code"], sign["counts"]["made"]) == (75, 3)


def test_another_number_of_replicas_goes_on():
    store, rows, made = MemoryStore(), mixed_rows(120), []
    assert work_through(store, 2, 3, rows, 0, dies_after=30, made=made) is None
    assert work_through(store, 1, 7, rows, 0, dies_after=30, made=made) is None
    merges, tally = work_through(store, 0, 2, rows, 0, made=made)
    assert merges and tally.done == 120 and len(made) == len(set(made)) == 120


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "server"), [("gs", gcs_faults), ("s3", s3_faults)])
def test_every_row_once_in_a_bucket_that_fails(scheme, server):
    """One request in ten fails; of three replicas one dies, before the others could have done all however slow its
    requests are."""
    rows, made, results = mixed_rows(48), [], {}
    with server.serve() as proxy:
        proxy.stall, proxy.rate = 1.5, 0.1

        def replica_thread(index, **how):
            store = impatient(f"{scheme}://bucket/run")
            results[index] = work_through(store, index, 3, rows, 0.02, expiry=8, made=made, **how)

        threads = [
            threading.Thread(target=replica_thread, args=(n,), kwargs={"dies_after": 1} if n == 1 else {})
            for n in range(3)
        ]
        threads[1].start()
        threads[1].join(120)
        for thread in (threads[0], threads[2]):
            thread.start()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive()
        proxy.rate = 0.0
        store = open_store(f"{scheme}://bucket/run")
        assert results[1] is None and sum(results[n][0] for n in (0, 2)) == 1
        lines = [json.loads(line) for line in store.read("metadata.jsonl").splitlines()]
        assert sorted(int(line["id"]) for line in lines) == list(range(48)) and {*made} == {
            line["id"] for line in lines
        }
        assert json.loads(store.read("status.json"))["exit_code"] == 0 and len(proxy.met) > 5


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"rows": 39}, {"facts": {**FACTS, "weights_dtype": "bfloat16"}}, {"batch_size": 4}], ids=str
)
def test_replicas_that_were_not_started_alike_do_not_go_on(change):
    """Another manifest, configuration or batch in one output directory: the later one stops with a line."""

    def open_(index, seed=0, rows=40, facts=FACTS, batch_size=2):
        rows = [dataclasses.replace(row, seed=row.seed + seed) for row in mixed_rows(rows)]
        ledger = Ledger(store, facts, writer_id=f"start{index}-0")
        work = assignment.ClaimedShards(
            ProcessGroup(),
            Replica(index, 2),
            store,
            ledger,
            f"start{index}",
            batching.work_units(rows, batch_size, 16),
            rows,
            batch_size,
            0.04,
        )
        work.started()
        return work

    store = MemoryStore()
    works = [open_(0), open_(1, **change)]
    end = time.monotonic() + 10
    while works[1]._heartbeat.conflicting is None:
        assert time.monotonic() < end
        time.sleep(0.01)
    with pytest.raises(StorageError, match="replica_index=0 works there at the same time with another manifest"):
        next(works[1].shards(Never()))
    assert works[0]._heartbeat.conflicting is None and next(works[0].shards(Never()))
    for work in works:
        work.ended(1, "", {})


def test_who_lost_its_records_place_says_so():
    """The first process cannot claim: one line, and no claim is left behind as done."""
    store, rows = MemoryStore(), mixed_rows(40)
    ledger = Ledger(store, FACTS, writer_id="start-0")
    work = assignment.ClaimedShards(
        ProcessGroup(),
        Replica(0, 2),
        store,
        ledger,
        "start",
        batching.work_units(rows, 2, 16),
        ledger.remaining(rows),
        2,
        60,
    )
    work.started()
    shards = work.shards(Never())
    next(shards)

    def broken(*_, **__):
        raise StorageError("memory: gone")

    store.write = broken
    with pytest.raises(StorageError, match="gone"):
        next(shards)


# ---- whole runs


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("xla")


def check(folder, rows=ROWS, killed=False):
    records = metadata(folder / "run")
    assert sorted(r["id"] for r in records) == sorted(f"r{i}" for i in range(rows))
    assert pictures(folder / "run") == rows == len({r["file_name"] for r in records})
    assert json.loads((folder / "run" / "status.json").read_text())["exit_code"] == 0
    claims = (folder / "run" / ".fluxbatch" / "claims").glob("*/*")
    # a kill in the middle of writing one leaves what sweep() takes away
    assert {p.name for p in claims if not (killed and p.suffix == ".tmp")} == {"finished"}


@pytest.mark.slow
@pytest.mark.parametrize(("replicas", "processes"), [(2, 2), (3, 1)])
def test_a_replica_is_killed_for_good_and_the_others_finish(tmp_path, cache, replicas, processes):
    more = {
        "manifest": long_manifest(tmp_path),
        "resolution": 16,
        "shard_size": 16,
        "replica_count": replicas,
        "replica_expiry": 3,
    }
    started = []
    for index in range(replicas):
        name = {"processes": processes, "devices": 1, "replica_index": index, "log": f"replica{index}"}
        started.append(replica(tmp_path, cache, **name, **more))
    end = time.monotonic() + 200
    victim = tmp_path / "run" / ".fluxbatch" / "records"
    while not (victim.exists() and pictures(tmp_path / "run") >= 20):
        assert time.monotonic() < end and all(p.poll() is None for group in started for p in group), said(
            tmp_path, "replica*"
        )
        time.sleep(0.01)
    for process in started[-1]:
        process.kill()
    assert [p.wait(timeout=240) for group in started[:-1] for p in group] == [0] * (replicas - 1) * processes, said(
        tmp_path, "replica*"
    )
    assert all(p.wait() == -signal.SIGKILL for p in started[-1])
    check(tmp_path, killed=True)
    ends = [
        json.loads((tmp_path / "run" / ".fluxbatch" / "replicas" / f"{n}.json").read_text()).get("exit_code")
        for n in range(replicas)
    ]
    assert ends == [0] * (replicas - 1) + [None]


@pytest.mark.slow
def test_replicas_make_the_pictures_of_one(tmp_path, cache):
    more = {"manifest": long_manifest(tmp_path), "resolution": 16, "shard_size": 16, "devices": 1}
    started = [
        replica(tmp_path, cache, 1, log=f"replica{n}", replica_index=n, replica_count=2, **more)[0] for n in range(2)
    ]
    assert [p.wait(timeout=240) for p in started] == [0, 0], said(tmp_path, "replica*")
    check(tmp_path)
    signs = [json.loads((tmp_path / "run" / ".fluxbatch" / "replicas" / f"{n}.json").read_text()) for n in range(2)]
    assert sum(sign["counts"]["made"] for sign in signs) == ROWS and all(
        sign["speed"] and sign["load"] for sign in signs
    )
    logs = [(tmp_path / f"replica{n}.0.log").read_text() for n in range(2)]
    assert sorted(f"{sign['counts']['made']} made" in log for sign, log in zip(signs, logs, strict=True)) == [
        True,
        True,
    ]
    assert all(f"rows       {ROWS}: " in log and " by this replica, " in log for log in logs)
    assert all("%" not in log.rpartition("images: ")[2].partition("img")[0] for log in logs)
    alone = replica(tmp_path, cache, 1, name="alone", **more)
    assert alone[0].wait(timeout=240) == 0, said(tmp_path, "alone")
    one, two = images(tmp_path / "alone"), images(tmp_path / "run")
    assert one.keys() == two.keys() and all((one[k] == two[k]).all() for k in one)


@pytest.mark.slow
def test_a_drained_replica_leaves_its_work_at_once(tmp_path, cache):
    """SIGTERM to one of two: it ends with 75, the other finishes without waiting for the expiry."""
    more = {
        "manifest": long_manifest(tmp_path),
        "resolution": 16,
        "shard_size": 16,
        "devices": 1,
        "replica_count": 2,
        "replica_expiry": 600,
    }
    started = [replica(tmp_path, cache, 1, log=f"replica{n}", replica_index=n, **more)[0] for n in range(2)]
    end = time.monotonic() + 200
    while pictures(tmp_path / "run") < 20:
        assert time.monotonic() < end and all(p.poll() is None for p in started), said(tmp_path, "replica*")
        time.sleep(0.01)
    started[1].send_signal(signal.SIGTERM)
    assert [p.wait(timeout=240) for p in started] == [0, 75], said(tmp_path, "replica*")
    check(tmp_path)
    # and when it is started again there is nothing to do
    again = replica(tmp_path, cache, 1, log="again", replica_index=1, **more)[0]
    assert again.wait(timeout=120) == 0, said(tmp_path, "again")
    assert len(metadata(tmp_path / "run")) == ROWS and "loading" not in said(tmp_path, "again")
