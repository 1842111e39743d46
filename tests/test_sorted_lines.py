"""Records of a million rows are merged through a file: in order, whole, and within bounded memory."""

import random
import subprocess
import sys

import plain
import pytest
from test_ledger import FACTS, record
from test_storage import gcs, s3, store  # noqa: F401 (fixtures)

from fluxbatch.results import sorted_lines
from fluxbatch.results.ledger import METADATA, Ledger
from fluxbatch.results.sorted_lines import SortedLines
from fluxbatch.storage.registry import open_store


@pytest.mark.parametrize("in_memory", [1 << 20, 100])
def test_lines_come_by_number_and_then_by_their_bytes(monkeypatch, tmp_path, in_memory):
    monkeypatch.setattr(sorted_lines, "_IN_MEMORY", in_memory)
    given = [(n % 50, b"%d %d\n" % (n % 50, n % 7)) for n in range(200)] + [(-1, b"kept\n")]
    random.Random(0).shuffle(given)
    with SortedLines() as lines:
        places = [lines.add(*each) for each in given]
        assert [lines.line(place) for place in places] == [line for _, line in given]
        wanted = [line for number, line in sorted(given) if number >= 0]
        assert list(lines) == wanted
        there = open_store(str(tmp_path))
        lines.write_to(there, "all.jsonl")
        assert there.read("all.jsonl") == b"".join(wanted)
    with SortedLines() as lines:
        lines.write_to(there, "all.jsonl")
        assert there.read("all.jsonl") == b""


def test_an_open_file_is_written_whole(store, tmp_path):  # noqa: F811
    data = random.Random(0).randbytes(9 << 20)
    (tmp_path / "data").write_bytes(data)
    with open(tmp_path / "data", "rb") as file:
        file.seek(100)  # from its start all the same
        store.write_file("a/metadata.jsonl", file)
    assert store.read("a/metadata.jsonl") == data and list(store.list()) == ["a/metadata.jsonl"]


def test_a_merge_through_a_file_is_the_same(monkeypatch, tmp_path):
    rows = [plain.row(i) for i in range(60)]
    merged = []
    for in_memory in (1 << 20, 100):
        monkeypatch.setattr(sorted_lines, "_IN_MEMORY", in_memory)
        run = open_store(str(tmp_path / str(in_memory)))
        ledger = Ledger(run, FACTS, writer_id="a")
        ledger.remaining(rows)
        for k in (2, 0, 1):
            ledger.commit([record(ledger, row, f"flux_{row.index}.png") for row in rows[k * 20 : k * 20 + 20]])
        assert ledger.merge().done == 60
        grown = [
            plain.row(100, id="new"),
            *(plain.row(i + 1, prompt=f"prompt {i}", seed=42 + i, id=str(i)) for i in range(60)),
        ]
        later = Ledger(run, FACTS, writer_id="b")  # where every record stands elsewhere now
        assert [row.id for row in later.remaining(grown)] == ["new"]
        assert later.merge().done == 60 and len(list(run.list(".fluxbatch/records/"))) == 1
        merged.append([run.read(METADATA), *map(run.read, run.list(".fluxbatch/records/"))])
    assert merged[0] == merged[1] and merged[0][0].count(b"\n") == 60


MERGE = """
import json, resource, sys
sys.path[:0] = ["tests", "."]
import plain
from test_ledger import FACTS, record
from fluxbatch.results.ledger import Ledger
from fluxbatch.storage.local import LocalStore
rows = [plain.row(i) for i in range(40_000)]
ledger = Ledger(LocalStore(sys.argv[1]), FACTS, writer_id="a")
ledger.remaining(rows)
for k in range(0, 40_000, 400):
    ledger.commit([record(ledger, row, f"{row.index}.png") | {"note": "x" * 2_000} for row in rows[k : k + 400]])
ledger._batches = {}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert ledger.merge().done == 40_000
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_a_merge_does_not_hold_the_records(tmp_path):
    """40,000 records of 2.4 kB are 96 MB."""
    done = subprocess.run([sys.executable, "-c", MERGE, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(done.stdout) * unit < 60e6
