"""The ledger when processes die, and when several write at once."""

from __future__ import annotations

import dataclasses
import json
import threading

import plain
import pytest
from test_ledger import FACTS, Killed, MemoryStore, assign, check, open_ledger, produce, record, run

from fluxbatch.results.image_files import decode, pixel_sha256
from fluxbatch.results.ledger import Ledger
from fluxbatch.storage.base import StorageError


def states_are_sound(store):
    """What must hold at every instant: no record without its whole image."""
    for name, data in store.objects.items():
        if "/records/" in name or name == "metadata.jsonl":
            for line in map(json.loads, data.splitlines()):
                assert line["file_name"] in store.objects, f"{name}: record without its image"
                assert pixel_sha256(decode(store.objects[line["file_name"]])) == line["sha256"]


def operations(start, **options):
    """How many operations ``start`` takes when nothing goes wrong."""
    store = MemoryStore()
    start(store, **options)
    return store.operations


def test_killed_at_every_instant_and_resumed():
    rows = [plain.row(k) for k in range(8)]
    for instant in range(operations(lambda store: run(store, rows, batch_size=2))):
        store = MemoryStore(die_after=instant)
        with pytest.raises(Killed):
            run(store, rows, batch_size=2)
        states_are_sound(store)
        recorded = {
            line["id"] for n, d in store.objects.items() if "/records/" in n for line in map(json.loads, d.splitlines())
        }
        images = [name for name in store.objects if name.endswith(".png")]
        assert len(images) - len(recorded) <= 2, "more than one batch to make again"
        again = MemoryStore(store.objects)
        todo, _ = assign(open_ledger(again), rows)
        assert {row.id for row in todo} == {row.id for row in rows} - recorded
        run(again, rows, batch_size=3)
        check(again, rows)


def test_killed_at_every_instant_of_a_resume():
    rows = [plain.row(k) for k in range(6)]
    begun = MemoryStore()
    run(begun, rows, batch_size=1, batches=3)
    counted = MemoryStore(dict(begun.objects))
    run(counted, rows, batch_size=2)
    for instant in range(counted.operations):
        store = MemoryStore(dict(begun.objects), die_after=instant)
        with pytest.raises(Killed):
            run(store, rows, batch_size=2)
        states_are_sound(store)
        again = MemoryStore(store.objects)
        run(again, rows)
        check(again, rows)


@pytest.mark.parametrize("what", ["row", "configuration"])
def test_killed_at_every_instant_of_an_overwrite(what):
    rows = [plain.row(k) for k in range(5)]
    facts = FACTS
    changed = rows
    if what == "row":
        changed = [*rows[:2], dataclasses.replace(rows[2], seed=1, prompt="new"), *rows[3:]]
    else:
        facts = {**FACTS, "model_digest": "abd"}
    begun = MemoryStore()
    run(begun, rows)
    counted = MemoryStore(dict(begun.objects))
    run(counted, changed, facts=facts, overwrite=True)
    for instant in range(counted.operations):
        store = MemoryStore(dict(begun.objects), die_after=instant)
        with pytest.raises(Killed):
            run(store, changed, facts=facts, overwrite=True)
        states_are_sound(store)
        again = MemoryStore(store.objects)
        run(again, changed, facts=facts, overwrite=True)
        check(again, changed)


# --- several processes ---------------------------------------------------------------------


def test_processes_write_into_one_ledger_without_asking_each_other():
    rows = [plain.row(k) for k in range(60)]
    store = MemoryStore()
    tallies = []

    def replica(part):
        ledger = open_ledger(store)
        todo, names = assign(ledger, rows)
        mine = [row for row in todo if row.index % 3 == part]
        for start in range(0, len(mine), 2):
            produce(store, ledger, mine[start : start + 2], names)
            if start % 8 == 6:
                ledger.compact()
        tallies.append(ledger.merge())

    for _ in range(5):
        store.objects.clear()
        threads = [threading.Thread(target=replica, args=(part,)) for part in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        check(store, rows)
        assert min(tally.left for tally in tallies[-3:]) == 0  # whoever merged last, whenever it was noted


def test_a_merge_sees_what_is_committed_while_it_works():
    rows = [plain.row(k) for k in range(4)]

    class Busy(MemoryStore):
        """Another process commits its batch, and compacts, while metadata.jsonl is written."""

        other = None

        def write(self, name, data, **options):
            if name == "metadata.jsonl" and self.other:
                other, self.other = self.other, None
                other()
            return super().write(name, data, **options)

    store = Busy()
    first, second = open_ledger(store), open_ledger(store)
    _, names = assign(first, rows)
    assign(second, rows)
    produce(store, first, rows[:2], names)
    store.other = lambda: (
        produce(store, second, rows[2:3], names),
        produce(store, second, rows[3:], names),
        second.compact(),
    )
    assert first.merge().done == 4
    check(store, rows)


@pytest.mark.parametrize("others", ["other rows", "the same rows in another order", "some of them in another order"])
def test_images_that_two_starts_wrote_over_are_made_again(others):
    """Neither knew of the other, as in a bucket: whose image is under a name nobody can say."""
    mine = [plain.row(k, id=f"r{k}", seed=k) for k in range(4)]
    order = {"the same rows in another order": (3, 2, 1, 0), "some of them in another order": (0, 1, 3)}.get(others)
    theirs = (
        [dataclasses.replace(mine[k], index=n) for n, k in enumerate(order)]
        if order
        else [plain.row(k, id=f"t{k}", seed=9 + k) for k in range(3)]
    )
    store = MemoryStore()
    first, second = open_ledger(store), open_ledger(store)
    (_, names), (_, other_names) = assign(first, mine), assign(second, theirs)
    produce(store, first, mine[:2], names)
    produce(store, second, theirs, other_names)
    produce(store, first, mine[2:], names)
    left = {"other rows": (3,), "the same rows in another order": (4,), "some of them in another order": (1, 2)}[others]
    assert first.merge().left in left
    states_are_sound(MemoryStore({name: data for name, data in store.objects.items() if "/records/" not in name}))
    run(store, mine)
    check(store, mine)


def test_two_processes_with_one_writer_id_are_noticed():
    store = MemoryStore()
    ledgers = [Ledger(store, FACTS, writer_id="same") for _ in range(2)]
    ledgers[0].commit([record(ledgers[0], plain.row(0), "a.png")])
    with pytest.raises(StorageError, match="two processes have one writer id"):
        ledgers[1].commit([record(ledgers[1], plain.row(1), "b.png")])
    with pytest.raises(ValueError, match="writer_id"):
        Ledger(store, FACTS, writer_id="../x")
