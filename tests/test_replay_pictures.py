"""Replay of rows with pictures, whose paths begin in several folders."""

from __future__ import annotations

import json

from conftest import images
from test_pictures import saved


def test_rows_of_two_folders(cli, golden, tmp_path, monkeypatch):
    """Two manifests whose rows name their pictures alike, and rows of the command line's own picture."""
    monkeypatch.chdir(tmp_path)
    size = dict(size=(32, 32))
    for seed, folder in enumerate("ab"):
        (tmp_path / folder / "in").mkdir(parents=True)
        saved(tmp_path / folder / "in" / "x.png", seed=seed, **size)
        saved(tmp_path / folder / "mask.png", seed=seed, mode="L", **size)
        row = {"prompt": "a fox", "seed": 1, "num_inference_steps": 2, "strength": 0.5}
        rows = [row | {"id": f"{folder}1", "image": "in/x.png", "mask_image": "mask.png"}, row | {"id": f"{folder}2"}]
        (tmp_path / folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    saved(tmp_path / "x.png", seed=2, **size)
    code, err = cli(
        f"pretrained_model_name_or_path={golden / 'dev'}", "manifest=[b/m.jsonl,a/m.jsonl]", "image=x.png",
        "run_name=r", "max_sequence_length=24", "hardware=cpu", "output_dir=out",
    )  # fmt: skip
    assert code == 0, err
    made = images(tmp_path / "out" / "r")
    assert sorted(made) == ["a1", "a2", "b1", "b2"] and (made["a1"] != made["b1"]).any()

    def replay(name):
        return cli("output_dir=out", "run_name=r", f"id={name}", entry="replay")

    for name in ("a1", "b1", "b2"):
        code, said = replay(name)
        assert code == 0 and "the same pixels" in said, said
    saved(tmp_path / "a" / "in" / "x.png", seed=9, **size)
    for folder in "ab":
        (tmp_path / folder / "mask.png").unlink()
    code, said = replay("a1")
    assert code == 2 and "a1: in/x.png: changed since the job was opened; expected the pictures" in said, said
    code, said = replay("b1")
    assert code == 2 and "b1: mask.png: not found; expected the pictures that the row was made of" in said, said
