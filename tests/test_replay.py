"""Replay: a row is found by its id or its image, and the picture that was made may be kept."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import metadata, pixels
from PIL import Image
from test_run import flags

from fluxbatch.generation import model_spec


@pytest.fixture
def run(cli, golden, tmp_path):
    """A run of two rows, the second of which is called as the image of the first, but for the folder."""
    manifest = tmp_path / "rows.jsonl"
    rows = {"id": "fox", "prompt": "a fox"}, {"id": "fox.png", "prompt": "a cat"}
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = {"resolution": 32, "num_inference_steps": 1, "filename": "{i}/{id}"}
    assert cli(*flags(golden, tmp_path, manifest=manifest, **more))[0] == 0
    return tmp_path / "run"


def test_a_row_is_found_by_its_id_or_its_image(cli, run):
    first, second = metadata(run)
    assert (first["file_name"], second["id"]) == ("0/fox.png", "fox.png")
    here = [f"output_dir={run.parent}", "run_name=run"]
    for name, record in (("fox", first), ("0/fox.png", first), (run / "0/fox.png", first), ("fox.png", second)):
        code, said = cli(*here, f"id={name}", entry="replay")
        assert code == 0 and f"the same pixels, sha256 {record['sha256']}" in said
    code, said = cli(*here, "id=1/fox", entry="replay")
    assert code == 2 and "id=1/fox: " in said and "no record of such a row, nor of such an image" in said


def test_the_picture_that_was_made_is_saved(cli, run, tmp_path):
    here = [f"output_dir={run.parent}", "run_name=run", "id=fox"]
    again = tmp_path / "new folder/again.png"
    code, said = cli(*here, f"save={again}", entry="replay")
    assert code == 0 and f"fox: saved as {again}\n" in said and again.read_bytes() == (run / "0/fox.png").read_bytes()
    assert cli(*here, f"save={tmp_path}/again.WEBP", entry="replay")[0] == 0
    assert Image.open(tmp_path / "again.WEBP").format == "WEBP"

    Image.fromarray(255 - pixels(again)).save(run / "0/fox.png")  # what was made is saved, not what is there
    assert cli(*here, f"save={tmp_path}/other.png", entry="replay")[0] == 3
    np.testing.assert_array_equal(pixels(tmp_path / "other.png"), pixels(again))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("run/0/fox.png", "is there already; expected the name of a new file"),
        ("again.gif", "expected a file's name that ends in .png, .jpg, .webp, .jpeg"),
        ("again", "expected a file's name that ends in"),
        ("folder/", "expected a file's name that ends in"),
    ],
)
def test_where_it_cannot_be_saved_is_told_before_a_weight_is_read(cli, run, monkeypatch, name, expected):
    monkeypatch.setattr(model_spec, "open_model_spec", None)
    before = (run / "0/fox.png").read_bytes()
    place = f"save={run.parent}/{name}"
    code, said = cli(f"output_dir={run.parent}", "run_name=run", "id=fox", place, entry="replay")
    assert code == 2 and f"error: {place}: {expected}" in said and (run / "0/fox.png").read_bytes() == before
