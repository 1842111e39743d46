"""status.json while a run goes on: how far it is, and when it last said so."""

from __future__ import annotations

import json
import time

from test_run import flags, mixed  # noqa: F401 (a fixture)

from fluxbatch.generation.pipeline import Pipeline
from fluxbatch.results.writer import Writer
from fluxbatch.shards import assignment, progress
from fluxbatch.storage.base import StorageError


def test_the_status_says_how_far_a_run_is(cli, golden, tmp_path, mixed, monkeypatch):  # noqa: F811
    """From the start on, renewed whatever the devices do; and where it cannot be written for a while, the run goes
    on."""
    said, write, denoise = [], assignment.write_status, Pipeline.denoise

    def told(store, code, reason, counts, **more):
        said.append((code, reason, counts, more))
        if len(said) == 3:
            raise StorageError("the bucket is away")
        write(store, code, reason, counts, **more)
        status = json.loads((tmp_path / "run" / "status.json").read_text())
        assert status["counts"] == counts and (code is not None or status["time"][:17] in reason.replace(" UTC", ""))

    def slowly(self, *given):
        before = len(said)
        while len(said) < before + 2:  # signs of life, with nothing new to say
            time.sleep(0.01)
        return denoise(self, *given)

    monkeypatch.setattr(assignment, "write_status", told)
    monkeypatch.setattr(progress, "EVERY", 0.02)
    monkeypatch.setattr(Pipeline, "denoise", slowly)
    assert cli(*flags(golden, tmp_path, manifest=mixed, per_device_batch_size=4))[0] == 0
    codes, reasons, counts, more = zip(*said, strict=True)
    assert counts[0] == {"made": 0, "before": 0, "rejected": 0, "left": 23} and len(said) > 12
    assert codes == (None,) * (len(said) - 1) + (0,) and all(
        each.startswith("running, or killed after 20") for each in reasons[:-1]
    )
    made = [each["made"] for each in counts]
    assert made == sorted(made) and len({*made}) > 2 and all(each["made"] + each["left"] == 23 for each in counts)
    assert any(each.get("speed", {}).get("images_per_second", 0) > 0 for each in more[:-1])
    length = len(said)
    time.sleep(0.1)
    assert len(said) == length  # nobody writes after the end


def test_counts_are_there_from_the_first_batch_on(cli, golden, tmp_path, mixed, monkeypatch):  # noqa: F811
    seen, put = [], Writer.put

    def looks(self, rows, *given):
        status = tmp_path / "run" / "status.json"
        for _ in range(1000 if len(seen) == 2 else 0):  # the first one is recorded, the second is on its way
            if json.loads(status.read_text())["counts"]["made"]:
                break
            time.sleep(0.01)
        seen.append(json.loads(status.read_text())["counts"])
        put(self, rows, *given)

    monkeypatch.setattr(Writer, "put", looks)
    assert cli(*flags(golden, tmp_path, manifest=mixed, per_device_batch_size=4))[0] == 0
    assert seen[0] == {"made": 0, "before": 0, "rejected": 0, "left": 23}
    assert 0 < seen[2]["made"] <= 8 and seen[2]["made"] + seen[2]["left"] == 23
