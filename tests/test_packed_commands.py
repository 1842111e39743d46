"""Runs in shards by their commands: verify and repair, replay, overwrite, resume with another batch size."""

import json

import pytest
from test_run import flags, mixed  # noqa: F401 (a fixture)

from fluxbatch.results.image_files import decode, pixel_sha256
from fluxbatch.results.packed import open_images
from fluxbatch.results.writer import Writer
from fluxbatch.storage.registry import open_store

pytestmark = pytest.mark.slow


@pytest.fixture(params=["webdataset", "parquet"])
def packed(request, cli, golden, tmp_path, mixed, monkeypatch):  # noqa: F811
    """A run of 23 rows in shards of 5: ``packed(key=value, ...)`` starts it again, and says which rows it made."""
    pytest.importorskip(request.param if request.param == "webdataset" else "pyarrow")
    made, write = [], Writer._write_image

    def counted(self, row, *given):
        made.append(row.id)
        return write(self, row, *given)

    monkeypatch.setattr(Writer, "_write_image", counted)

    class Packed:
        folder, store = tmp_path / "run", open_store(str(tmp_path / "run"))

        def __call__(self, **more):
            made.clear()
            given = {"manifest": mixed, "output": request.param, "rows_per_shard": 5, "per_device_batch_size": 4}
            code, err = cli(*flags(golden, tmp_path, **given | {"gallery": "false"} | more))
            assert code == 0, err
            return sorted(made)

        def command(self, entry, *words):
            return cli(f"output_dir={tmp_path}", "run_name=run", *words, entry=entry)

        def records(self):
            return {r["id"]: r for r in map(json.loads, (self.folder / "metadata.jsonl").read_text().splitlines())}

        def shards(self):
            return sorted(path for path in self.folder.iterdir() if path.name.startswith("shard-"))

        def check(self, digests=None):
            records, images = self.records(), open_images(self.store)
            assert len(records) == 23 and {r["shard"] for r in records.values()} == {p.name for p in self.shards()}
            assert all(pixel_sha256(decode(images.read(r["file_name"]))) == r["sha256"] for r in records.values())
            assert not list(self.store.list(".fluxbatch/spool/"))
            assert digests is None or {id: r["sha256"] for id, r in records.items()} == digests
            assert self.command("verify")[0] == 0

    run = Packed()
    assert len(run()) == 23 and len(run.shards()) == 5
    return run


def test_what_verify_repairs_is_exactly_made_again(packed):
    records = packed.records()
    digests = {id: record["sha256"] for id, record in records.items()}
    deleted, cut, flipped, *_ = packed.shards()
    deleted.unlink()
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    victim = next(record for record in records.values() if record["shard"] == flipped.name)
    image = open_images(packed.store).read(victim["file_name"])
    data = bytearray(flipped.read_bytes())
    data[data.index(image) + len(image) // 2] ^= 1
    flipped.write_bytes(data)

    code, out = packed.command("verify", "repair=true")
    missing = {line.split()[1] for line in out.splitlines() if line.startswith("  missing")}
    damaged = {line.split()[1].rstrip(":") for line in out.splitlines() if line.startswith("  damaged")}
    assert code == 3 and missing == {r["file_name"] for r in records.values() if r["shard"] == deleted.name}
    assert victim["file_name"] in damaged
    assert {r["shard"] for r in records.values() if r["file_name"] in damaged} == {cut.name, flipped.name}
    assert packed() == sorted(r["id"] for r in records.values() if r["file_name"] in missing | damaged)
    packed.check(digests)


def test_a_deleted_shard_needs_no_repair(packed):
    records = packed.records()
    gone = packed.shards()[2]
    gone.unlink()
    assert packed() == sorted(id for id, record in records.items() if record["shard"] == gone.name)
    packed.check({id: record["sha256"] for id, record in records.items()})


def test_another_batch_size_makes_only_what_is_missing(packed, mixed):  # noqa: F811
    before = packed.records()
    text = mixed.read_text()
    lines = [json.loads(line) | {"id": f"new{n}", "seed": 5000 + n} for n, line in enumerate(text.splitlines()[:3])]
    mixed.write_text(text + "".join(json.dumps(line) + "\n" for line in lines))
    assert packed(per_device_batch_size=8) == ["new0", "new1", "new2"]
    after = packed.records()
    assert {id: after[id] for id in before} == before and len(after) == 26
    assert packed.command("verify")[0] == 0


def test_replay_and_overwrite(packed):
    before = packed.records()
    assert packed.command("replay", "id=r7")[0] == 0
    first = next(record for record in before.values() if record["shard"] == packed.shards()[0].name)
    assert packed.command("replay", f"id={first['file_name']}")[0] == 0
    assert len(packed(overwrite="true", seed=7)) == 0  # every row has its own seed
    assert len(packed(overwrite="true", num_images=1, max_sequence_length=16)) == 23
    packed.check()
    assert {r["sha256"] for r in packed.records().values()} != {r["sha256"] for r in before.values()}
