"""Manifests of every format, packed or not, of one file or many, from disk, a bucket or standard input: one content,
the same rows."""

import bz2
import datetime
import gc
import gzip
import json
import lzma
import os
import pathlib
import subprocess
import sys
import warnings

import plain
import pyarrow
import pyarrow.parquet
import pytest

from fluxbatch.config.schema import LoraAdapter, ManifestErrors, default_run_name
from fluxbatch.manifest import files, rows
from fluxbatch.manifest.rows import read_rows
from fluxbatch.types import UserError

ROOT = str(pathlib.Path(__file__).parents[1])
ROWS = [{"id": f"r{i}", "prompt": f"a fox, {i}", "seed": i, "kind": "ä"} for i in range(50)]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS)
TEXTS = {
    "jsonl": JSONL,
    "json": json.dumps(ROWS, indent=1),
    "csv": "id,prompt,seed,kind\n" + "".join(f'{r["id"]},"{r["prompt"]}",{r["seed"]},ä\n' for r in ROWS),
    "tsv": "id\tPrompt\tseed\tkind\n" + "".join(f"{r['id']}\t{r['prompt']}\t{r['seed']}\tä\n" for r in ROWS),
}


def zstd(data):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PACK = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


def parquet(path, rows, **options):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


def read(path, **job):
    rows, rejects = read_rows(plain.job(manifest=path if isinstance(path, list) else str(path), **job))
    return [(r.index, r.id, r.prompt, r.seed, dict(r.extra)) for r in rows], rejects


def said(path, **job):
    with pytest.raises(UserError) as error:
        read(path, **job)
    return list(error.value.lines)


WANTED = [(i, f"r{i}", f"a fox, {i}", i, {"kind": "ä"}) for i in range(50)]


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("kind", TEXTS)
def test_formats_and_packings_are_layers(tmp_path, kind, packing):
    path = tmp_path / f"m.{kind}{packing}"
    path.write_bytes(PACK[packing](TEXTS[kind].encode()))
    assert read(path) == (WANTED, [])
    (tmp_path / f"n.{kind}").write_bytes(PACK[packing](TEXTS[kind].encode()))  # the bytes tell, whatever the name
    assert read(tmp_path / f"n.{kind}") == (WANTED, [])


@pytest.mark.parametrize("name", ["m.jsonl", "m.json", "m.csv", "m.txt", "m.csv.gz", "m.jsonl.zst"])
def test_no_file_is_left_open(tmp_path, name):
    """Read to its end, or to a line at which somebody has had enough."""
    _, kind, packing = f"{name}.".split(".")[:3]
    data = TEXTS.get(kind, "a fox\n" * 50).encode()
    (tmp_path / name).write_bytes(PACK[packing and f".{packing}"](data))
    job = plain.job(manifest=str(tmp_path / name))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert len(list(rows._read(job))) == 50
        reading = rows._read(job)
        next(reading)
        reading.close()
        del reading
        gc.collect()
    assert not told


@pytest.mark.parametrize("packing", [*PACK][1:])
def test_a_packed_file_that_is_cut_is_one_line(tmp_path, packing):
    path = tmp_path / f"m.jsonl{packing}"
    path.write_bytes(PACK[packing](JSONL.encode() * 50)[:-9])
    [line] = said(path, manifest_errors=ManifestErrors["quarantine"])
    assert line.startswith(f"{path}: packed with ") and "cannot be unpacked" in line


def test_a_json_arrays_rows_have_their_lines(tmp_path):
    path = tmp_path / "m.json"
    path.write_text('[\n {"prompt": "a"}, {"prompt": ""},\n\n {"seed": 1}, {\n"prompt": "b"\n}, 7,\n{"prompt": NaN}]')
    rows, rejects = read_rows(plain.job(manifest=str(path), manifest_errors=ManifestErrors["quarantine"]))
    assert [(row.where, row.prompt, row.index) for row in rows] == [
        (f"{path}:2", "a", 0), (f"{path}:2", "", 1), (f"{path}:4", "b", 3)]  # fmt: skip
    assert [(reject.where, reject.index) for reject in rejects] == [
        (f"{path}:4", 2), (f"{path}:6", 4), (f"{path}:7", 5)]  # fmt: skip


def test_parquets_cells_are_typed(tmp_path):
    day = datetime.date(2026, 1, 2)
    rows = [
        {"Caption": "a", "Seed": 2**64 - 1, "height": 32.0, "lora": {"x": 0.5, "y": None}, "day": day, "tags": ["t"]},
        {"Caption": "b", "Seed": None, "height": None, "lora": None, "day": None, "tags": None},
    ]
    schema = pyarrow.schema(
        [
            ("Caption", pyarrow.string()), ("Seed", pyarrow.uint64()), ("height", pyarrow.float64()),
            ("lora", pyarrow.struct([("x", pyarrow.float64()), ("y", pyarrow.float64())])), ("day", pyarrow.date32()),
            ("tags", pyarrow.list_(pyarrow.string())),
            ("image", pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])),
        ]
    )  # fmt: skip
    path = tmp_path / "m.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), path)
    adapters = {"x": LoraAdapter(path="x"), "y": LoraAdapter(path="y")}
    (first, second), _ = read_rows(plain.job(manifest=str(path), lora=adapters))
    assert (first.seed, first.height, first.lora, first.where) == (2**64 - 1, 32, (("x", 0.5),), f"{path}:1")
    assert first.extra == {"day": "2026-01-02", "tags": ["t"]}  # bytes are no part of a record
    assert (second.prompt, second.seed, second.height, second.lora) == ("b", 43, 64, None)


def test_parquet_is_read_a_row_group_at_a_time(tmp_path):
    path = parquet(tmp_path / "m.parquet", ROWS, row_group_size=7)
    assert read(path) == (WANTED, [])
    parquet(path, [{"prompt": "a", "seed": -1}, {"prompt": None, "seed": 1}, {"prompt": "c", "seed": 1}])
    rows, rejects = read(path, manifest_errors=ManifestErrors["quarantine"])
    assert [row[0] for row in rows] == [2] and [r.where for r in rejects] == [f"{path}:1", f"{path}:2"]
    parquet(path, [{"words": "a"}])
    assert said(path) == [
        f'{path}: got the columns "words", expected prompt, caption or text (or name it: prompt_column=…)'
    ]
    assert read(path, prompt_column="Words")[0][0][2] == "a"
    path.write_bytes(b"PAR1" + b"x" * 100)
    assert said(path)[0].startswith(f"{path}: cannot be read as Parquet: ")


def test_an_optional_library_is_named_with_its_extra(tmp_path, monkeypatch):
    path = parquet(tmp_path / "m.parquet", ROWS)
    (tmp_path / "m.jsonl.zst").write_bytes(zstd(b"{}"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    needs = 'needs pyarrow, which is not installed: pip install "fluxbatch[datasets]"'
    assert said(path) == [f"{path}: {needs}"]
    assert said(tmp_path / "m.jsonl.zst") == [f"a manifest packed with zstd: {needs}"]


def test_many_files_are_read_in_their_order(tmp_path, monkeypatch):
    for name, text in (("b.txt", "b\n"), ("a.jsonl", '{"prompt": "a"}\n{"prompt": ""}\n'), ("sub/c.txt", "c\n")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    assert [row[:3] for row in read("*")[0]] == [(0, "0", "a"), (1, "1", ""), (2, "2", "b")]
    assert [row[2] for row in read("**/*.txt")[0]] == ["b", "c"]
    assert [row[2] for row in read(["sub/*", "a.jsonl"])[0]] == ["c", "a", ""]
    assert [row.where for row in read_rows(plain.job(manifest="[ab].*"))[0]] == ["a.jsonl:1", "a.jsonl:2", "b.txt:1"]
    assert said(["b.txt", "*.txt"]) == ["manifest: b.txt comes up twice"]
    assert said("*.csv") == ["manifest=*.csv: no file matches"]
    assert said(["a.jsonl", "x.txt"]) == ["manifest: x.txt: no such file"]
    (tmp_path / "what?.txt").write_text("itself\n")
    assert [row[2] for row in read("what?.txt")[0]] == ["itself"]
    (tmp_path / "d.txt").write_text("b\n")
    same = ManifestErrors["quarantine"]
    (tmp_path / "e.jsonl").write_text('{"prompt": "e", "id": "1"}\n')
    assert read(["a.jsonl", "e.jsonl"], manifest_errors=same)[1][0].reason == 'id: "1" is already that of a.jsonl:2'
    names = {default_run_name(plain.job(manifest=given)) for given in ("sub/*.txt", ["a.jsonl", "b.txt"], "a.jsonl")}
    assert {name[: name.index("-")] for name in names} == {"sub", "a"} and len(names) == 3


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "parquet"])
def test_a_template_combines_fields(tmp_path, kind):
    rows = [{"object": "fox", "style": "oil", "Size": 3}, {"object": "owl", "style": "ink", "Size": 4}]
    spelt = "{style}" if kind.startswith("json") else "{Style}"  # a table's columns differ in case as they like
    path = tmp_path / f"m.{kind}"
    if kind == "parquet":
        parquet(path, rows)
    elif kind == "csv":
        path.write_text("object,style,Size\nfox,oil,3\nowl,ink,4\n")
    else:
        path.write_text(json.dumps(rows) if kind == "json" else "".join(json.dumps(row) + "\n" for row in rows))
    got, _ = read(path, prompt_template=f"a {{{{big}}}} {{object}}, {spelt} {{Size}}")
    assert [row[2] for row in got] == ["a {big} fox, oil 3", "a {big} owl, ink 4"]
    assert got[0][4]["object"] == "fox"
    lines = said(path, prompt_template="{object} {of}")
    if kind.startswith("json"):
        assert lines[0].endswith('m.jsonl:1: prompt_template: "of" is missing'.replace("jsonl", kind))
    else:
        assert lines[0].endswith('got the columns "object", "style", "Size", expected "of" of prompt_template')


def test_a_templates_empty_cell_is_a_bad_line(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text("object;style\nfox;\nowl;ink\n")
    rows, rejects = read(path, prompt_template="{object}, {style}", manifest_errors=ManifestErrors["quarantine"])
    assert [row[2] for row in rows] == ["owl, ink"]
    assert [(r.where, r.reason) for r in rejects] == [(f"{path}:2", 'prompt_template: "style" is missing')]
    (tmp_path / "m.txt").write_text("a fox\n")
    assert read(tmp_path / "m.txt", prompt_template="{prompt} in oil")[0][0][2] == "a fox in oil"
    rows, _ = read_rows(plain.job(prompt="a fox", prompt_template="{prompt} in oil"))
    assert rows[0].prompt == "a fox in oil"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["prompt_template=a photo"], "prompt_template=a photo: expected names of fields in braces, as in"),
        (["prompt_template={a"], "prompt_template={a: expected names of fields in braces, as in"),
        (["prompt_template={a:3}"], "prompt_template={a:3}: expected names of fields in braces, as in"),
        (["prompt_template={a}", "prompt_column=b"], "prompt_column=b: expected null beside prompt_template"),
        (["manifest=-"], "run_name=null: expected a name, as standard input has none"),
        (["manifest=[-,a.txt]", "run_name=x"], "manifest=['-', 'a.txt']: expected - alone, or files"),
        (["manifest=[]"], "manifest=[]: expected a path, a pattern like prompts/*.jsonl, or a list of those"),
        (["manifest=[3]"], "manifest=[3]: expected a path, a pattern like prompts/*.jsonl, or a list of those"),
        (["manifest=[gs:/b/a.txt]"], "manifest=gs:/b/a.txt: expected gs://b/a.txt"),
        (["manifest=*.nothing"], "manifest=*.nothing: no file matches"),
        (
            ["manifest=-", "seed=1,2", "-m", "run_name=x"],
            "manifest=-: expected a file: standard input can be read once",
        ),
    ],
)
def test_mistakes_are_one_line(cli, words, line, tmp_path):
    given = words if any(word.startswith("manifest=") for word in words) else [*words, "manifest=m.jsonl"]
    code, err = cli(*given, f"output_dir={tmp_path}")
    assert code == 2 and f"fluxbatch: error: {line}" in err


def test_the_command_reads_lists_and_standard_input(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"object": "{name}"}}\n')
    template = "prompt_template=a {object}, big"
    command = [sys.executable, "-m", "fluxbatch.plan", "jax_cache_dir=null", template]
    for manifest, text in (("[a.jsonl, b.jsonl]", ""), ("*.jsonl", ""), ("-", '{"object": "a"}\n{"object": "b"}\n')):
        done = subprocess.run(
            [*command, f"manifest={manifest}", "run_name=x"],
            cwd=tmp_path, input=text, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ROOT},
        )  # fmt: skip
        assert done.returncode == 0 and "2 distinct prompts" in done.stdout, done.stderr


def test_patterns_match_objects_of_a_bucket(monkeypatch):
    names = ["p/a.jsonl", "p/b.txt", "p/q/c.jsonl", "p/q/r/d.jsonl"]

    class Store:
        def __init__(self, url):
            self.prefix = url.removeprefix("gs://bucket/") + "/"

        def list(self):
            return (name.removeprefix(self.prefix) for name in names if name.startswith(self.prefix))

    monkeypatch.setattr("fluxbatch.storage.registry.open_store", Store)
    for pattern, wanted in (
        ("*.jsonl", "a"),
        ("**/*.jsonl", "acd"),
        ("*/*.jsonl", "c"),
        ("[b-d].*", "b"),
        ("q/?.*", "c"),
    ):
        found = files.find(plain.job(manifest=f"gs://bucket/p/{pattern}"))
        assert [name[-7:-6] if name.endswith("l") else name[-5:-4] for name in found] == list(wanted)
    with pytest.raises(UserError, match="without wildcards"):
        files.find(plain.job(manifest="gs://*/a"))
