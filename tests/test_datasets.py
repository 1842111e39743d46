"""What Hugging Face's `datasets` and `webdataset` read of real output, by the oldest versions that are supported and by
the newest."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import subprocess
import venv

import plain
import pytest
from conftest import metadata
from test_metadata import LARGE, runs  # noqa: F401 (a fixture)
from test_packed import job
from test_packed import start as start_packed
from test_writer import start

from fluxbatch.config.schema import Container
from fluxbatch.results.card import write_card
from fluxbatch.results.contact_sheet import write_contact_sheet
from fluxbatch.results.image_files import pixel_sha256
from fluxbatch.results.images import Files
from fluxbatch.results.packed import open_images
from fluxbatch.storage.registry import open_store

FOLDERS = pathlib.Path(__file__).parents[1] / ".venv"
LOAD = """
import hashlib, json, sys
import datasets, numpy
datasets.disable_progress_bars()
for folder in sys.argv[1:]:
    rows = datasets.load_dataset("imagefolder", data_dir=folder, split="train")
    types = {name: str(getattr(feature, "dtype", None)) for name, feature in rows.features.items()}
    said = [{name: value for name, value in row.items() if name not in ("image", "prompt", "prompt_2")} for row in rows]
    for row, line in zip(rows, said):
        pixels = numpy.asarray(row["image"].convert("RGB"))
        line["pixels"] = hashlib.sha256("x".join(map(str, pixels.shape)).encode() + pixels.tobytes()).hexdigest()
    print(json.dumps({"types": types, "rows": said}, default=str))
"""


LOAD_SHARDS = """
import glob, hashlib, json, sys
import datasets, numpy
datasets.disable_progress_bars()
for folder in sys.argv[1:]:
    loads = [lambda: datasets.load_dataset(folder, split="train")]
    for kind, ending in ("webdataset", "tar"), ("parquet", "parquet"):
        if files := sorted(glob.glob(f"{folder}/*.{ending}")):
            loads.append(lambda: datasets.load_dataset(kind, data_files=files, split="train"))
            break
    for load in loads:
        found = []
        for row in load():
            said = row.get("json", row)
            pixels = numpy.asarray(row.get("image", row.get("png")).convert("RGB"))
            digest = hashlib.sha256("x".join(map(str, pixels.shape)).encode() + pixels.tobytes()).hexdigest()
            found.append([said["id"], said["prompt"], said["seed_text"], said["note"], digest])
        print(json.dumps(found))
"""


LOAD_TARS = """
import glob, hashlib, io, json, sys
import numpy, webdataset
from PIL import Image
for folder in sys.argv[1:]:
    found = []
    for sample in webdataset.WebDataset(sorted(glob.glob(f"{folder}/*.tar")), shardshuffle=False):
        said, pixels = json.loads(sample["json"]), numpy.asarray(Image.open(io.BytesIO(sample["png"])))
        digest = hashlib.sha256("x".join(map(str, pixels.shape)).encode() + pixels.tobytes()).hexdigest()
        found.append([said["id"], sample["txt"].decode(), said["seed_text"], said["note"], digest])
    print(json.dumps(found))
"""

READERS = {"oldest": ("datasets==2.21.0", "webdataset==0.2.100"), "newest": ("datasets", "webdataset")}


@pytest.fixture(params=READERS)
def load(request, tmp_path):
    """Loads folders in an environment of these versions, made once: a list of types and rows."""
    folder = FOLDERS / f"readers-{request.param}"
    python = folder / "bin/python"
    if not (folder / "made").exists():
        venv.create(folder, clear=True, with_pip=True)
        wanted = READERS[request.param]
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--retries=1"]
        if (pip := subprocess.run([*install, *wanted, "pillow"], capture_output=True, text=True)).returncode:
            pytest.skip(f"pip does not install {', '.join(wanted)} here: {pip.stderr.strip().splitlines()[-1]}")
        (folder / "made").touch()

    def call(*folders, script=LOAD):
        env = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PATH": ""}
        run = subprocess.run([python, "-c", script, *folders], capture_output=True, text=True, env=env)
        assert run.returncode == 0, run.stderr[-3000:]
        return [json.loads(line) for line in run.stdout.splitlines()]

    return call


def in_order(loaded):
    return sorted(loaded["rows"], key=lambda row: row["index"])


@pytest.mark.slow
def test_runs_and_folders_of_runs_load(runs, tmp_path, load):  # noqa: F811
    # more than 10 MB of metadata
    rows = [plain.row(k, prompt="x" * 50_000 + str(k), extra={"note": "late"}) for k in range(120)]
    for k in range(115, 120):
        rows[k] = plain.row(k, prompt=rows[k].prompt, lora=(("ink", 1.0),), seed=7, extra=rows[k].extra)
    store = open_store(str(tmp_path / "long"))
    start(store, rows)
    write_contact_sheet(store, Files(store), metadata(tmp_path / "long"))
    start(open_store(str(tmp_path / "large")), [plain.row(0, seed=LARGE), plain.row(1, seed=2**53 + 1)])
    alone, together, long, large = load(runs / "styled", runs, tmp_path / "long", tmp_path / "large")

    records = metadata(runs / "styled")
    fields = ("id", "lora", "seed", "seed_text", "flags", "created", "sha256")
    for row, record in zip(in_order(alone), records, strict=True):
        assert {field: row[field] for field in fields} == {field: record[field] for field in fields}
    assert sorted(row["seed_text"] for row in large["rows"]) == [str(LARGE), str(2**53 + 1)]
    assert alone["types"].keys() - {"image"} == records[0].keys() - {"file_name"}
    assert len(together["rows"]) == 4
    png = next(row for row in together["rows"] if row["quality"] == 100)
    assert png["pixels"] == png["sha256"] and png["lora"] == "{}"

    assert len(long["rows"]) == 120 and {row["note"] for row in long["rows"]} == {"late"}
    assert [row["lora"] for row in in_order(long)] == ["{}"] * 115 + ['{"ink": 1.0}'] * 5
    assert all(row["pixels"] == row["sha256"] for row in long["rows"])
    assert long["types"]["lora"] == long["types"]["flags"] == "string" and long["types"]["seed"] == "int64"


@pytest.mark.slow
def test_every_output_loads_as_it_lies_with_each_row_once_and_its_pixels(tmp_path, load):
    rows = [plain.row(k, extra={"note": f"n{k}"}, id=f"r{k}") for k in range(7)]
    wanted = [[row.id, row.prompt, str(row.seed), row.extra["note"], pixel_sha256(plain.pixels(row))] for row in rows]
    folders = []
    for container in Container:
        folders.append(tmp_path / container.name)
        store = open_store(str(folders[-1]))
        one = dataclasses.replace(job(container), run_name="demo")
        start_packed(store, rows, one)
        store.write("rejects.jsonl", b'{"where": "x", "reason": "none"}\n')
        write_contact_sheet(store, open_images(store), metadata(folders[-1]))
        write_card(store, one, {"images": 7, "rejected": 1}, "apache-2.0")
    found = load(*folders, script=LOAD_SHARDS)
    found += load(folders[list(Container).index(Container.webdataset)], script=LOAD_TARS)
    assert len(found) == 6 and all(sorted(each) == wanted for each in found)
