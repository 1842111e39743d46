"""metadata.jsonl as other programs read it: one type a column, in every row and run, as the documentation says."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re

import lora_files
import plain
import pytest
from conftest import metadata
from test_run import flags
from test_writer import start

from fluxbatch.reporting import columns
from fluxbatch.results.ledger import Ledger
from fluxbatch.results.location import SHEET
from fluxbatch.results.resume import left_out, mix, with_extra
from fluxbatch.storage.registry import open_store
from fluxbatch.types import UserError

DOCS = pathlib.Path(__file__).parents[1] / "jobs/docs/metadata.md"
TYPES = {"text": str, "whole number": int, "number": float}
LARGE = 2**64 - 1


def documented():
    """Field → type, as the table has them."""
    found = {}
    for names, types in re.findall(r"^\| (`.*?) \| (.*?) \|", DOCS.read_text(), re.MULTILINE):
        names, types = re.findall(r"`(\w+)`", names), types.split(", ")
        found |= dict(zip(names, types * (len(names) // len(types)), strict=True))
    return {name: TYPES[kind] for name, kind in found.items()}


@pytest.fixture
def runs(cli, golden, tmp_path):
    """A folder of two runs that differ in all that may: adapters row by row, and the format."""
    tensors = lora_files.FORMATS["diffusers"](lora_files.DEV, lora_files.Maker(0, size=0.12))
    adapter = lora_files.save(tmp_path / "peft.safetensors", tensors)
    rows = [{"prompt": "a fox"}, {"prompt": "a cat", "lora": {}}, {"prompt": "a dog", "lora": {"peft": 0.5}}]
    common = {"resolution": 32, "num_inference_steps": 1, "gallery": "true"}
    out = tmp_path / "out"
    for name, few, more in (
        ("plain", rows[:1], []),
        ("styled", rows, ["output=webp", *lora_files.arrays({"peft": adapter})]),
    ):
        manifest = tmp_path / f"{name}.jsonl"
        manifest.write_text("".join(json.dumps(row) + "\n" for row in few))
        code, err = cli(*flags(golden, out, name, manifest=manifest, **common), *more)
        assert code == 0, err
    return out


def test_a_field_has_one_type_in_every_row_of_every_run(runs):
    records = [record for name in ("plain", "styled") for record in metadata(runs / name)]
    assert len(records) == 4
    for record in records:
        assert {name: type(value) for name, value in record.items()} == {
            name: kind for name, kind in documented().items() if name != "shard"
        }
    assert [json.loads(record["lora"]) for record in records] == [{}, {"peft": 1.0}, {}, {"peft": 0.5}]
    assert [record["quality"] for record in records] == [100, 95, 95, 95]
    for name in ("plain", "styled"):
        images = (path for path in (runs / name).rglob("*.*") if path.suffix in (".png", ".webp"))
        shown = {path.relative_to(runs / name).as_posix() for path in images}
        assert shown == {record["file_name"] for record in metadata(runs / name)} | {SHEET}


def test_the_largest_seed_is_exact_in_a_number_and_a_text(tmp_path):
    start(open_store(str(tmp_path)), [plain.row(0, seed=LARGE)])
    assert '"seed": 18446744073709551615, ' in (tmp_path / "metadata.jsonl").read_text()
    assert metadata(tmp_path)[0]["seed_text"] == str(LARGE)


def test_replay_and_verify_read_it(cli, runs):
    for row in "012":
        code, said = cli(f"output_dir={runs}", "run_name=styled", f"id={row}", entry="replay")
        assert code == 0 and "the same pixels" in said
    assert cli(f"output_dir={runs}", entry="verify")[0] == 0


def test_a_start_reads_it(tmp_path):
    """Rows that moved keep their pictures, and a mix that changed is told as such."""
    store = open_store(str(tmp_path))
    rows = [plain.row(k, lora=lora) for k, lora in enumerate([(("ink", 1.0),), (("anime", 0.5), ("ink", 1.0)), ()])]
    start(store, rows)
    moved = [dataclasses.replace(row, index=k, id=str(k), seed=42 + k) for k, row in enumerate([plain.row(9), *rows])]
    moved[3] = dataclasses.replace(moved[3], lora=None)  # which is the same
    ledger = Ledger(store, {"model_digest": "abc"}, writer_id="next")
    assert ledger.remaining(moved) == moved[:1]
    changed = [rows[0], dataclasses.replace(rows[1], lora=(("anime", 0.75),)), rows[2]]
    with pytest.raises(UserError, match=r"m.jsonl:2: lora.anime: 0.5 → 0.75, lora.ink: 1.0 → null since flux_1.png"):
        ledger.remaining(changed)


def test_older_records_are_read_too():
    assert [mix({"lora": lora}) for lora in (None, {"a": 0.5}, '{"a": 0.5}', "{}")] == [{}, {"a": 0.5}, {"a": 0.5}, {}]


def test_sha256_is_computed_as_documented(cli, golden, tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert code.count("\n") == 4
    more = {"height": 32, "width": 48, "num_inference_steps": 1}
    assert cli(*flags(golden, tmp_path / "outputs", "demo", prompt="a fox", **more))[0] == 0
    monkeypatch.chdir(tmp_path)
    exec(code, {})  # as a reader would
    (record,) = metadata(tmp_path / "outputs/demo")
    assert capsys.readouterr().out == record["sha256"] + "\n"


# --- the manifest's own fields ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "carried"),
    [
        ("image", "ref.png", False), ("image", 3, False), ("file_names", ["a.png"], False),
        ("ref_file_name", "a.png", False), ("ref_file_names", ["a.png"], False),
        ("_file_name", "a.png", False), ("a\nb_file_name", "a.png", False),
        ("seed_text", "7", False), ("quality", 3, False),
        ("source", {"ref_file_name": "a.png"}, False), ("source", [{"a": [{"file_name": "a.png"}]}], False),
        ("image_url", "a.png", True), ("images", ["a.png"], True), ("filename", "a.png", True),
        ("source", {"image": "a.png"}, True), ("File_Name", "a.png", True),
        ("file_name_old", "a.png", True), ("source", [["file_name"]], True),
    ],
)  # fmt: skip
def test_what_an_image_folder_takes_for_pictures_is_not_carried(field, value, carried):
    row = plain.row(0, extra={"category": "x", field: value})
    record = with_extra({"file_name": "a.png", "quality": 100, "key": "k", "category": "old", field: "old"}, row)
    assert (record.get(field) == value) == carried and record["category"] == "x" and record["file_name"] == "a.png"
    said = left_out([row, row], {"quality": 100})
    assert said == [] if carried else len(said) == 1 and json.dumps(field) in said[0] and "category" not in said[0]


def remarks(*extras, seed=7, prompt="x"):
    return list(columns.lines([plain.row(k, extra=extra, seed=seed, prompt=prompt) for k, extra in enumerate(extras)]))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (["x", 3], "category (text at m.jsonl:1, number at m.jsonl:2)"),
        ([None, 1.5, 2, "x"], "category (number at m.jsonl:2, text at m.jsonl:4)"),
        ([True, 1], "category (true or false at m.jsonl:1, number at m.jsonl:2)"),
        ([["x"], "x"], "category (list at m.jsonl:1, text at m.jsonl:2)"),
        ([["x"], [1]], "category[] (text at m.jsonl:1, number at m.jsonl:2)"),
        ([["x", 1]], "category[] (text at m.jsonl:1, number at m.jsonl:1)"),
        ([{"a": 1}, {"a": {"b": 1}}], "category.a (number at m.jsonl:1, object at m.jsonl:2)"),
    ],
)
def test_a_field_of_more_than_one_type_is_named(values, said):
    (line,) = remarks(*({"category": value} for value in values))
    assert line == f"fields of more than one type, which `datasets` refuses to load: {said}"


@pytest.mark.parametrize("values", [["x", None, "2024-01-01"], [1, 2.5], [[], ["x"]], [{"a": 1}, {"b": "x"}]])
def test_what_a_short_file_may_hold_is_no_matter(values):
    assert remarks(*({"category": value} for value in values), {}) == []


@pytest.mark.parametrize(
    ("first", "last", "lost"),
    [
        (None, "x", True), ([], ["x"], True), ({"a": 1}, {"b": 1}, True), (1, 1.5, True), ("2024-01-01", "x", True),
        (None, {}, True), (1.5, 1, False), ("x", None, False), ("x", "2024-01-01", False), (["x"], [], False),
    ],
)  # fmt: skip
def test_of_a_long_file_the_first_part_gives_the_types(first, last, lost):
    said = remarks(*[{"note": first}] * 120, {"note": last}, prompt="x" * 50_000)
    assert len(said) == lost and all("note (m.jsonl:121)" in line and "first 10 MB" in line for line in said)
    assert remarks(*[{}] * 120, {"note": "x"}, prompt="x" * 50_000) != []
    assert remarks({"note": first}, {"note": last}, *[{}] * 120, prompt="x" * 50_000) == []


def test_whole_numbers_of_more_than_63_bits_are_told():
    assert remarks({}, seed=2**63 - 1) == remarks({"count": -(2**63)}) == []
    (line,) = remarks({"count": 2**63}, {"count": -(2**64)}, {}, seed=2**63)
    assert "seed (3 rows), count (2 rows); seed_text has every digit" in line


def test_a_start_and_the_plan_say_so(cli, golden, tmp_path):
    manifest = tmp_path / "rows.jsonl"
    rows = {"prompt": "a", "category": "x", "thumb_file_name": "a"}, {"prompt": "b", "category": 3, "seed": LARGE}
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = flags(golden, tmp_path, manifest=manifest, resolution=32, num_inference_steps=1)
    for said in (cli(*args, "aot=false", entry="plan"), cli(*args)):
        assert said[0] == 0 and "category (text at rows.jsonl:1, number at rows.jsonl:2)" in said[1]
        assert 'not carried into the metadata: "thumb_file_name", which ImageFolder takes' in said[1]
        assert "seed (1 rows)" in said[1]
    assert [record.get("thumb_file_name") for record in metadata(tmp_path / "run")] == [None, None]
