"""The ledger: done once, never lost; a change is refused by name; any instant may be the last."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import threading
import time

import plain
import pytest

from fluxbatch.results import ledger as module
from fluxbatch.results.image_files import decode, encode, pixel_sha256
from fluxbatch.results.ledger import Ledger, read_records, row_key, write_status
from fluxbatch.results.location import open_location
from fluxbatch.results.resume import decisive
from fluxbatch.storage.base import NotFound, StorageError, check_name
from fluxbatch.storage.registry import open_store
from fluxbatch.types import Reject, UserError

FACTS = {"model_digest": "abc", "sampler": {"base_shift": 0.5, "max_shift": 1.15}}


class MemoryStore:
    """A store in a dictionary; ``die_after`` operations its process is dead, halfway through one."""

    url = "memory"

    def __init__(self, objects: dict[str, bytes] | None = None, die_after: int | None = None):
        self.objects = {} if objects is None else objects
        self.operations = 0
        self.die_after = die_after
        self.lock = threading.Lock()

    def _step(self) -> None:
        with self.lock:
            self.operations += 1
            if self.die_after is not None and self.operations > self.die_after:
                raise Killed

    def read(self, name):
        check_name(name)
        self._step()
        try:
            return self.objects[name]
        except KeyError:
            raise NotFound(name) from None

    def size(self, name):
        return len(self.read(name))

    def read_range(self, name, start, size):
        return self.read(name)[start : start + size]

    def write(self, name, data, *, if_absent=False):
        check_name(name)
        self._step()  # dead before it is durable
        with self.lock:
            if if_absent and name in self.objects:
                return False
            self.objects[name] = bytes(data)
        self._step()  # dead before anyone hears of it
        return True

    def list(self, prefix=""):
        self._step()
        return iter(sorted(name for name in list(self.objects) if name.startswith(prefix)))

    def delete(self, *names):
        for name in names:
            check_name(name)
            self._step()
            self.objects.pop(name, None)
            self._step()

    def exists(self, name):
        return name in self.objects

    def missing(self, names):
        self._step()
        return {name for name in names if not self.objects.get(name)}

    def sweep(self):
        pass


class Killed(BaseException):
    """Stands for SIGKILL: no handler of the program sees it."""


_starts = iter(range(10**9))


def open_ledger(store, facts=FACTS, **options):
    return Ledger(store, facts, writer_id=f"start-{next(_starts)}", **options)


def assign(ledger, rows, bad_lines=(), template="flux_{i}"):
    return ledger.assign(rows, bad_lines, template=template, extension=".png")


def record(ledger, row, file_name):
    facts = {"file_name": file_name, "id": row.id, "index": row.index, **decisive(row)}
    return facts | {"sha256": pixel_sha256(plain.pixels(row)), "key": ledger.key(row), **row.extra}


def produce(store, ledger, rows, names):
    """One batch: the images, then their records."""
    for row in rows:
        store.write(names[row.index], encode(plain.pixels(row), "png", text={}, png_level=1, quality=90))
    ledger.commit([record(ledger, row, names[row.index]) for row in rows])


def run(store, rows, batch_size=3, batches=None, facts=FACTS, **options):
    """One start of a job over ``rows``, ended after some ``batches``; its tally."""
    ledger = open_ledger(store, facts, **options)
    todo, names = assign(ledger, rows)
    starts = range(0, len(todo), batch_size)
    for k, start in enumerate(starts[:batches]):
        produce(store, ledger, todo[start : start + batch_size], names)
        if k % 2:
            ledger.compact()
    return ledger.merge()


def metadata(store):
    return [json.loads(line) for line in store.objects["metadata.jsonl"].splitlines()]


def check(store, rows):
    """Every row once, with its own picture; no picture beside them; metadata in the rows' order."""
    lines = metadata(store)
    assert [line["id"] for line in lines] == [row.id for row in rows]
    for line, row in zip(lines, rows, strict=True):
        image = decode(store.objects[line["file_name"]])
        assert line["sha256"] == pixel_sha256(image) == pixel_sha256(plain.pixels(row))
        assert line["index"] == row.index
    images = [name for name in store.objects if name.endswith(".png")]
    assert sorted(images) == sorted(line["file_name"] for line in lines)


# --- keys ----------------------------------------------------------------------------------


def test_the_key_is_of_everything_that_decides_the_pixels_and_of_nothing_else():
    row = plain.row(3)
    key = row_key(row, FACTS)
    for change in (
        {"prompt": "x"},
        {"prompt_2": "x"},
        {"seed": 1},
        {"height": 32},
        {"width": 32},
        {"num_inference_steps": 5},
        {"guidance_scale": 1.0},
        {"lora": (("anime", 0.5),)},
    ):
        assert row_key(dataclasses.replace(row, **change), FACTS) != key, change
    for change in ({"lora": ()}, {"index": 9}, {"id": "x"}, {"named": True}, {"where": "x"}, {"extra": {"a": 1}}):
        assert row_key(dataclasses.replace(row, **change), FACTS) == key, change
    assert row_key(row, {**FACTS, "model_digest": "abd"}) != key
    assert row_key(row, {**FACTS, "sampler": {"base_shift": 0.5, "max_shift": 1.2}}) != key
    assert row_key(row, dict(reversed(FACTS.items()))) == key
    assert open_ledger(MemoryStore()).key(row) == key


# --- resume --------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [True, False])
def test_another_start_goes_on_and_a_third_has_nothing_to_do(named):
    rows = [plain.row(k, **({"id": f"r{k}"} if named else {})) for k in range(10)]
    store = MemoryStore()
    tally = run(store, rows, batch_size=3, batches=2)
    assert (tally.rows, tally.done, tally.left, tally.rejects) == (10, 6, 4, ())
    assert run(store, rows, batch_size=4).left == 0
    check(store, rows)
    before = dict(store.objects)
    assert assign(open_ledger(store), rows) == ([], {})
    assert run(store, rows).done == 10
    assert store.objects == before  # nothing is written again


def test_rows_may_be_appended_and_removed():
    rows = [plain.row(k) for k in range(6)]
    store = MemoryStore()
    run(store, rows[:4])
    todo, names = assign(open_ledger(store), rows)
    assert todo == rows[4:] and names == {4: "flux_4.png", 5: "flux_5.png"}
    tally = run(store, rows[:2])  # the records of the others are kept
    assert (tally.rows, tally.done) == (2, 2)
    assert [line["id"] for line in metadata(store)] == ["0", "1", "2", "3"]
    run(store, rows)
    check(store, rows)


def shuffled(rows, own_seeds):
    """The same rows in another order; without seeds of their own they would get other seeds."""
    order = list(rows)
    random.Random(1).shuffle(order)
    return [
        dataclasses.replace(
            row,
            index=k,
            id=row.id if row.named else str(k),
            seed=row.seed if own_seeds else 42 + k,
            where=f"m.jsonl:{k + 1}",
        )
        for k, row in enumerate(order)
    ]


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("own_seeds", [True, False])
def test_rows_may_come_in_another_order(named, own_seeds):
    rows = [plain.row(k, **({"id": f"r{k}"} if named else {})) for k in range(12)]
    store = MemoryStore()
    run(store, rows, batches=2)
    done = {line["prompt"]: line for line in metadata(store)}
    again = shuffled(rows, own_seeds)
    todo, names = assign(open_ledger(store), again)
    assert sorted(row.prompt for row in todo) == sorted(row.prompt for row in rows if row.prompt not in done)
    assert not {*names.values()} & {line["file_name"] for line in done.values()}
    run(store, again)
    lines = metadata(store)
    assert [(line["id"], line["index"]) for line in lines] == [(row.id, row.index) for row in again]
    assert len({line["file_name"] for line in lines}) == 12
    for line in lines:
        made = done.get(line["prompt"], line)
        assert (line["seed"], line["sha256"], line["file_name"]) == (made["seed"], made["sha256"], made["file_name"])
    run(store, rows)  # and back
    assert [line["prompt"] for line in metadata(store)] == [row.prompt for row in rows]


def test_ids_that_count_the_rows_are_ids_all_the_same():
    rows = [plain.row(k, id=str(k)) for k in range(4)]
    store = MemoryStore()
    run(store, rows)
    before = {line["id"]: line["sha256"] for line in metadata(store)}
    order = [
        plain.row(0, id="new"),
        *(dataclasses.replace(rows[k], index=1 + i, seed=43 + i) for i, k in enumerate((2, 0, 3, 1))),
    ]
    assert assign(open_ledger(store), order)[0] == order[:1]
    assert run(store, order).left == 0
    lines = metadata(store)
    assert [line["id"] for line in lines] == ["new", "2", "0", "3", "1"]
    assert {line["id"]: line["sha256"] for line in lines[1:]} == before
    with pytest.raises(UserError, match=r'm.jsonl:1: prompt: "prompt 0" → "prompt 1".*\(id "0"\)'):
        assign(open_ledger(store), [plain.row(0, id="0", prompt="prompt 1", seed=9)])


@pytest.mark.parametrize("own_seeds", [True, False])
def test_a_row_that_is_to_have_more_images_keeps_the_one_it_has(own_seeds):
    first = [plain.row(k, id=f"r{k}", **({"seed": 7} if own_seeds else {})) for k in range(3)]
    store = MemoryStore()
    run(store, first)
    before = {line["prompt"]: line["sha256"] for line in metadata(store)}
    rows = [
        plain.row(2 * k + n, id=f"r{k}-{n}", prompt=f"prompt {k}", seed=(7 if own_seeds else 42 + 2 * k) + n)
        for k in range(3)
        for n in range(2)
    ]
    todo, _ = assign(open_ledger(store), rows)
    assert [row.id for row in todo] == ["r0-1", "r1-1", "r2-1"]
    run(store, rows)
    lines = metadata(store)
    assert [line["id"] for line in lines] == [row.id for row in rows]
    assert {line["prompt"]: line["sha256"] for line in lines[::2]} == before
    other = [plain.row(0, id="r0-0", prompt="another", seed=7)]
    assert assign(open_ledger(store), other)[0] == other


def test_equal_rows_are_matched_once_each():
    rows = [plain.row(k, prompt="same", seed=7) for k in range(4)]
    store = MemoryStore()
    run(store, rows[:2])
    todo, _ = assign(open_ledger(store), rows)
    assert [row.index for row in todo] == [2, 3]
    moved = [plain.row(0, prompt="other"), *(plain.row(k, prompt="same", seed=7) for k in range(1, 4))]
    todo, names = assign(open_ledger(store), moved)
    assert [row.prompt for row in todo] == ["other", "same"] and names[0] == "flux_2.png"


def test_a_changed_row_is_refused_by_name():
    rows = [plain.row(k, id=f"r{k}") for k in range(3)] + [plain.row(3)]
    store = MemoryStore()
    run(store, rows)
    before = dict(store.objects)
    changed = list(rows)
    changed[1] = dataclasses.replace(rows[1], guidance_scale=3.5, prompt="new")
    changed[3] = dataclasses.replace(rows[3], num_inference_steps=8)
    with pytest.raises(UserError) as error:
        assign(open_ledger(store), changed)
    first, second, way_out = error.value.lines
    assert first == (
        'm.jsonl:2: prompt: "prompt 1" → "new", guidance_scale: 0.0 → 3.5 since flux_1.png was made (id "r1")'
    )
    assert second == 'm.jsonl:4: num_inference_steps: 4 → 8 since flux_3.png was made (id "3")'
    assert "run_name=" in way_out and "overwrite=true" in way_out
    assert store.objects == before

    tally = run(store, changed, overwrite=True)
    assert tally.left == 0
    check(store, changed)
    kept = {line["id"]: line for line in metadata(store)}
    old = {line["id"]: line for line in map(json.loads, before["metadata.jsonl"].splitlines())}
    assert (kept["r0"], kept["r2"]) == (old["r0"], old["r2"])


def test_what_changed_alike_is_told_once():
    """A setting of the job changes every row, the job's seed every row's by the same number."""
    rows = [plain.row(k) for k in range(40)]
    store = MemoryStore()
    run(store, rows)
    changed = [dataclasses.replace(row, num_inference_steps=8, seed=row.seed + 10) for row in rows[:30]]
    changed += [dataclasses.replace(row, prompt=f"{row.prompt} else") for row in rows[30:]]
    changed[3] = dataclasses.replace(changed[3], seed=7)
    with pytest.raises(UserError) as error:
        assign(open_ledger(store), changed)
    all_alike, alone, *others, _ = error.value.lines
    assert all_alike == (
        "m.jsonl:1 and likewise 28 more rows: seed: 42 → 52, num_inference_steps: 4 → 8 since flux_0.png was made "
        '(id "0")'
    )
    assert alone == 'm.jsonl:4: seed: 45 → 7, num_inference_steps: 4 → 8 since flux_3.png was made (id "3")'
    assert len(others) == 10 and all("else" in line for line in others)


def test_a_changed_configuration_is_refused_by_key():
    rows = [plain.row(k) for k in range(3)]
    store = MemoryStore()
    run(store, rows)
    before = dict(store.objects)
    facts = {"model_digest": "abd", "sampler": {"base_shift": 0.5, "max_shift": 1.2}, "lora": {"anime": 1.0}}
    with pytest.raises(UserError) as error:
        open_ledger(store, facts)
    assert error.value.lines[:-1] == (
        "memory: holds a job with another configuration",
        'model_digest: "abc" → "abd"',
        "sampler.max_shift: 1.15 → 1.2",
        "lora.anime: null → 1.0",
    )
    assert "run_name=" in error.value.lines[-1] and "overwrite=true" in error.value.lines[-1]
    assert store.objects == before

    other = [plain.row(k) for k in range(2)]
    ledger = open_ledger(store, facts, overwrite=True)
    assert [name for name in store.objects if name.endswith((".png", "s.jsonl"))] == []
    assert assign(ledger, other)[0] == other
    run(store, other, facts=facts, overwrite=True)
    check(store, other)
    # asked for again, as by a scheduler that repeats the command: what is there is kept
    assert assign(open_ledger(store, facts, overwrite=True), other)[0] == []


def test_a_configuration_may_change_while_nothing_is_made_yet():
    store = MemoryStore()
    open_ledger(store, {"a": 1})
    open_ledger(store, {"a": 2})
    assert json.loads(store.objects[".fluxbatch/job.json"]) == {"a": 2, "layout": 2}


@pytest.mark.parametrize(
    "name", ["flux_0.png", "metadata.jsonl", "rejects.jsonl", "status.json", "config.yaml", "index.html"]
)
def test_files_of_unknown_origin_are_not_written_over(name):
    store = MemoryStore({name: b"somebody's"})
    store.sweep = lambda: pytest.fail("the place is somebody else's")
    with pytest.raises(UserError, match=rf"{name}: is there already, without a record; .*overwrite=true"):
        open_ledger(store)
    assert store.objects == {name: b"somebody's"}
    del store.sweep
    open_ledger(store, overwrite=True)
    open_ledger(MemoryStore({"prompts.jsonl": b"", "sub/metadata.jsonl": b""}))


def test_a_run_does_not_write_over_its_own_manifest(tmp_path):
    """By whatever path, whether a job has begun there or not."""
    run = tmp_path / "exp" / "foo"
    run.mkdir(parents=True)
    (run / "metadata.jsonl").write_text('{"prompt": "a fox"}\n')
    (tmp_path / "link.jsonl").symlink_to(run / "metadata.jsonl")
    (tmp_path / "other.jsonl").write_text('{"prompt": "a fox"}\n')
    for _begun in (False, True):
        for manifest in (run / "metadata.jsonl", run / ".." / "foo" / "metadata.jsonl", tmp_path / "link.jsonl"):
            job = plain.job(manifest=str(manifest), output_dir=str(tmp_path / "exp"), run_name="foo", overwrite=True)
            with pytest.raises(
                UserError, match=r"manifest=.*: the run would write its metadata.jsonl there; give another run_name"
            ):
                open_location(job)
        open_ledger(open_location(dataclasses.replace(job, manifest=str(tmp_path / "other.jsonl"))), overwrite=True)


def test_a_sweep_s_page_is_not_written_over_somebody_s(tmp_path):
    root, job = tmp_path / "s", plain.job(output_dir=str(tmp_path), run_name="s/seed=0", sweep={"seed": 0})
    job.output.gallery = True
    open_location(job)
    root.mkdir()
    (root / "index.html").write_bytes(b"somebody's")
    for _ in range(2):
        with pytest.raises(UserError, match=r"s/index.html: is there already, and no sweep's; .*overwrite=true"):
            open_location(job)
        open_ledger(open_store(str(root)), overwrite=True)  # nor over that of a run by itself
    job.output.gallery = False
    open_location(job)
    job.output.gallery = True
    shutil.rmtree(root / ".fluxbatch")
    open_ledger(open_store(str(root / "seed=1")))  # a job of the sweep that has left the page
    open_location(job)


def test_what_else_a_row_says_may_change():
    rows = [plain.row(k, extra={"category": "cats", "seed": "x"}) for k in range(3)]
    store = MemoryStore()
    run(store, rows[:2])
    before = metadata(store)
    ledger = dict(store.objects)
    now = [dataclasses.replace(rows[0], extra={"split": "train"}), rows[1], rows[2]]
    run(store, now)
    first, second, third = metadata(store)
    assert first == {**{key: value for key, value in before[0].items() if key != "category"}, "split": "train"}
    assert second == before[1] and third["category"] == "cats"
    assert {name: store.objects[name] for name in ledger if name.endswith(".png")} == {
        name: data for name, data in ledger.items() if name.endswith(".png")
    }
    run(store, now[1:])  # a row that is gone says what it said when it was made
    assert metadata(store)[0] == before[0]


# --- rejects -------------------------------------------------------------------------------


def test_rejected_rows_are_listed_and_tried_again():
    rows = [plain.row(k) for k in (0, 1, 3)]
    bad_line = Reject("m.jsonl:3", "not JSON", index=2)
    store = MemoryStore()
    ledger = open_ledger(store)
    todo, names = assign(ledger, rows, [bad_line])
    produce(store, ledger, todo[:1], names)
    ledger.reject([Reject("m.jsonl:2", "first reason", "1", 1)])
    ledger.reject([Reject("m.jsonl:4", "NaN", "3", 3)])
    tally = ledger.merge()
    assert (tally.rows, tally.done, tally.left, len(tally.rejects)) == (4, 1, 0, 3)
    lines = [json.loads(line) for line in store.objects["rejects.jsonl"].splitlines()]
    assert lines == [
        {"where": "m.jsonl:2", "index": 1, "id": "1", "prompt": "prompt 1", "reason": "first reason"},
        {"where": "m.jsonl:3", "index": 2, "id": None, "reason": "not JSON"},
        {"where": "m.jsonl:4", "index": 3, "id": "3", "prompt": "prompt 3", "reason": "NaN"},
    ]

    ledger = open_ledger(store)
    todo, names = assign(ledger, rows, [bad_line])
    assert [row.id for row in todo] == ["1", "3"]
    produce(store, ledger, todo[1:], names)
    ledger.reject([Reject("m.jsonl:2", "second reason", "1", 1)])
    tally = ledger.merge()
    assert [reject.reason for reject in tally.rejects] == ["second reason", "not JSON"]

    fixed = sorted([*rows, plain.row(2)], key=lambda row: row.index)
    assert run(store, fixed).rejects == ()
    assert "rejects.jsonl" not in store.objects
    check(store, fixed)


# --- compaction ----------------------------------------------------------------------------


def test_a_million_rows_do_not_mean_a_million_objects(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 100)
    store = MemoryStore()
    rows = [plain.row(k) for k in range(1000)]
    ledger = open_ledger(store)
    assign(ledger, rows)
    for start in range(0, 1000, 2):
        ledger.commit([record(ledger, row, f"flux_{row.index}.png") for row in rows[start : start + 2]])
        if start % 20 == 18:
            ledger.compact()
            objects = len([name for name in store.objects if "/records/" in name])
            assert objects == (start + 2) / 20
    ledger.merge()
    assert len([name for name in store.objects if "/records/" in name]) == 10
    before = dict(store.objects)
    ledger = open_ledger(store)
    assert assign(ledger, rows)[0] == []
    ledger.merge()
    assert store.objects == before  # large objects are left alone


def test_a_doubled_record_counts_once():
    rows = [plain.row(k) for k in range(4)]
    store = MemoryStore()
    run(store, rows)
    (name,) = (name for name in store.objects if "/records/" in name)
    store.objects[name.replace("start", "copy")] = store.objects[name]
    assert run(store, rows).done == 4
    check(store, rows)
    (name,) = (name for name in store.objects if "/records/" in name)
    assert len(store.objects[name].splitlines()) == 4


def test_records_that_are_compacted_while_they_are_read_are_seen():
    rows = [plain.row(k) for k in range(40)]

    class Compacted(MemoryStore):
        """Another process compacts after the first object was read."""

        def read(self, name):
            data = super().read(name)
            if "/records/" in name and self.other:
                other, self.other = self.other, None
                other.compact()
            return data

    store = Compacted()
    store.other = None
    ledger = open_ledger(store)
    _, names = assign(ledger, rows)
    for row in rows:
        produce(store, ledger, [row], names)
    again = open_ledger(store)
    store.other = ledger
    assert sorted(int(line["id"]) for line in again.records()) == list(range(40))
    assert len(again.merge().rejects) == 0


def test_a_start_does_not_wait_for_others_to_pause():
    """Many replicas commit more often than a bucket can be listed: one that comes later still begins."""
    rows = [plain.row(k) for k in range(40)]

    class Busy(MemoryStore):
        """Another process commits a batch before each listing."""

        def list(self, prefix=""):
            if prefix.endswith("/records/") and self.batches:
                produce(self, *self.batches.pop())
            return super().list(prefix)

    store = Busy()
    store.batches = []
    other, late = open_ledger(store), open_ledger(store)
    _, names = assign(other, rows)
    produce(store, other, rows[:4], names)
    store.batches = [(other, [row], names) for row in rows[4:]]
    todo, _ = assign(late, rows)
    assert len(store.batches) > 30 and not {row.id for row in todo} & {row.id for row in rows[:4]}


def test_a_run_of_another_format_is_refused_in_one_line():
    store = MemoryStore()
    Ledger(store, {"a": 1}, writer_id="w")
    for document in (b'{"a": 1}', b'{"a": 1, "layout": 9}'):
        store.objects[".fluxbatch/job.json"] = document
        with pytest.raises(
            UserError, match=r"job.json: layout [19], expected 2: another version .* run_name="
        ) as error:
            Ledger(store, {"a": 1}, writer_id="w")
        assert len(error.value.lines) == 1
    Ledger(store, {"a": 1}, writer_id="w", overwrite=True)
    assert json.loads(store.objects[".fluxbatch/job.json"]) == {"a": 1, "layout": 2}


def test_a_damaged_record_is_named_with_its_line():
    store = MemoryStore()
    run(store, [plain.row(k) for k in range(4)])
    (name,) = (name for name in store.objects if "/records/" in name)
    store.objects[name] = store.objects[name][:-20]
    with pytest.raises(StorageError, match=f"memory/{name}:4: not a line of JSON"):
        assign(open_ledger(store), [plain.row(0)])
    store.objects[".fluxbatch/job.json"] = b"{"
    with pytest.raises(UserError, match="job.json: not a JSON object"):
        open_ledger(store)


@pytest.mark.parametrize(
    "line,told",
    [(b"null", "no JSON object"), (b"{}", "without file_name, height, id, index, key"), (b'{"id": "a"}', "without ")],
)
def test_a_line_that_is_no_record_is_named(line, told):
    store, rows = MemoryStore(), [plain.row(k) for k in range(4)]
    run(store, rows)
    for name, words in (
        (".fluxbatch/rejects/other-000001.jsonl", told[:8]),
        (".fluxbatch/records/other-000001.jsonl", told),
    ):
        store.objects[name] = line + b"\n"
        with pytest.raises(StorageError, match=f"memory/{name}:1: {words}"):
            run(store, rows)
    for name in [name for name in store.objects if "/records/" in name]:  # as in a copy without the ledger
        del store.objects[name]
    store.objects["metadata.jsonl"] = line + b"\n"
    with pytest.raises(StorageError, match=f"memory/metadata.jsonl:1: {told}"):
        list(read_records(store))


@pytest.mark.parametrize("log", ["records", "rejects"])
def test_an_empty_object_is_damage_and_no_merge_waits_for_its_lines(log):
    store, rows = MemoryStore(), [plain.row(k) for k in range(4)]
    run(store, rows)
    store.objects[f".fluxbatch/{log}/other-000001.jsonl"] = b""
    with pytest.raises(StorageError, match=f"memory/.fluxbatch/{log}/other-000001.jsonl: empty"):
        run(store, rows)


def test_a_last_line_without_its_end_is_a_line_of_its_own_when_others_follow():
    """An editor may have saved it so, when its user took a record out to have the picture made again."""
    store, rows = MemoryStore(), [plain.row(k) for k in range(6)]
    run(store, rows[:4])
    (name,) = (name for name in store.objects if "/records/" in name)
    store.objects[name] = store.objects[name].rstrip(b"\n")
    for _ in range(2):
        assert run(store, rows).done == len(rows)
        check(store, rows)


# --- and ------------------------------------------------------------------------------------


def test_status():
    store = MemoryStore()
    write_status(store, 75, "preempted", {"done": 3})
    status = json.loads(store.objects["status.json"])
    assert (status["exit_code"], status["reason"], status["counts"]) == (75, "preempted", {"done": 3})


def seconds_of(count):
    """Processor time to open, match, name and merge a ledger of ``count`` records."""
    store = MemoryStore()
    rows = [
        plain.row(k, id=f"row-{k}", prompt=f"a prompt of the usual length, of a cat on a mat, number {k}")
        for k in range(count)
    ]
    ledger = open_ledger(store)
    for start in range(0, count, 5000):
        ledger.commit(
            [record(ledger, row, f"flux_{row.index}.png") for row in rows[start : start + 5000] if row.index % 10]
        )
    start = time.process_time()
    again = open_ledger(store)
    todo, names = assign(again, rows)
    assert len(todo) == len(names) == count // 10
    assert again.merge().left == count // 10
    return time.process_time() - start


def test_ten_times_the_records_take_ten_times_as_long(monkeypatch):
    """So that a million are read in minutes: anything quadratic would take a hundred times as long."""
    fixed = plain.pixels(plain.row(0))
    monkeypatch.setattr(plain, "pixels", lambda row: fixed)
    seconds_of(1000)  # imports and caches
    assert seconds_of(30_000) < 30 * seconds_of(3000)
