"""What Hugging Face's `datasets` reads of real output, by the oldest version that is supported and by the newest."""

from __future__ import annotations

import json
import pathlib
import subprocess
import venv

import plain
import pytest
from conftest import metadata
from test_metadata import LARGE, runs  # noqa: F401 (a fixture)
from test_writer import start

from fluxbatch.results.gallery import write_contact_sheet
from fluxbatch.results.images import Files
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


@pytest.fixture(params=["2.21.0", "newest"])
def load(request, tmp_path):
    """Loads folders in an environment of that version, made once: a list of types and rows."""
    folder = FOLDERS / f"datasets-{request.param}"
    python = folder / "bin/python"
    if not (folder / "made").exists():
        venv.create(folder, clear=True, with_pip=True)
        wanted = "datasets" if request.param == "newest" else f"datasets=={request.param}"
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--retries=1"]
        if (pip := subprocess.run([*install, wanted, "pillow"], capture_output=True, text=True)).returncode:
            pytest.skip(f"pip does not install {wanted} here: {pip.stderr.strip().splitlines()[-1]}")
        (folder / "made").touch()

    def call(*folders):
        env = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PATH": ""}
        run = subprocess.run([python, "-c", LOAD, *folders], capture_output=True, text=True, env=env)
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
