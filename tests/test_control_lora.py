"""Control LoRAs: adapters that have a text-to-image checkpoint read a control image."""

from __future__ import annotations

import json

import lora_files as files
import numpy as np
import pytest
from conftest import images, metadata
from test_pictures import MESHES, saved

from fluxbatch.lora.deltas import Decomposed, Hadamard, Kronecker, Product, Replacement, Whole

SIZE = files.DEV
ROW = dict(prompt="a fox", control_image="map.png", height=32, width=32, num_inference_steps=2)


@pytest.fixture
def run(cli, golden, tmp_path):
    """A command on rows with adapters that are called by the letters of ``names``: (exit code, what is said)."""
    saved(tmp_path / "map.png")

    def run(rows, names, *words, entry="run", model="dev"):
        (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = [f"output_dir={tmp_path}", "max_sequence_length=24", "hardware=cpu", f"manifest={tmp_path}/m.jsonl"]
        given += [f"pretrained_model_name_or_path={golden / model}", *words]
        if names:
            paths = ",".join(str(tmp_path / f"{name}.safetensors") for name in names)
            each = {"weight_name": "null", "scale": "1.0", "from_pt": "true"}
            given += [f"lora_config.{key}=[{','.join([value] * len(names))}]" for key, value in each.items()]
            given += [f"lora_config.adapter_name=[{','.join(names)}]", f"lora_config.lora_model_name_or_path=[{paths}]"]
        return cli(*given, entry=entry)

    return run


def control(path, norm=True, seed=0):
    return files.save(path, files.control(SIZE, files.Maker(seed, size=0.15), norm))


def test_a_run_reads_control_images_as_an_adapter_says(run, cli, tmp_path):
    """Another map makes another image, which alone is made again; all of it is as on a checkpoint that reads maps."""
    control(tmp_path / "c.safetensors")
    saved(tmp_path / "other.png", seed=1)
    rows = [dict(ROW, id="a"), dict(ROW, id="b", control_image="other.png"), dict(ROW, id="c", seed=7)]
    for row in rows:
        row.setdefault("seed", 3)
    code, said = run(rows, "c", entry="plan")
    assert code == 0 and "with a control image" in said, said
    code, err = run(rows, "c", "run_name=one")
    assert code == 0 and "img_in" in err, err
    first = images(tmp_path / "one")
    assert np.abs(first["a"].astype(int) - first["b"]).mean() > 2
    assert run(rows, "c", "run_name=two", "per_device_batch_size=3")[0] == 0
    assert all(np.abs(first[key].astype(int) - x).max() <= 1 for key, x in images(tmp_path / "two").items())
    record = metadata(tmp_path / "one")[0]
    assert json.loads(record["inputs"])["control_image"][0]["path"] == "map.png"
    assert run(rows, "c", "run_name=one")[0] == 0 and metadata(tmp_path / "one")[0] == record
    saved(tmp_path / "other.png", seed=2)
    code, err = run(rows, "c", "run_name=one")
    assert code == 2 and "m.jsonl:2: inputs" in err and "m.jsonl:1" not in err
    for entry, words in (("verify", []), ("replay", ["id=a"])):
        code, said = cli(f"output_dir={tmp_path}", "run_name=one", *words, entry=entry)
        assert code == 0, said


@pytest.mark.slow
def test_it_is_the_same_on_every_mesh(run, tmp_path):
    control(tmp_path / "c.safetensors")
    rows = [dict(ROW, id=str(i), seed=i) for i in range(2)]
    assert run(rows, "c", "run_name=one")[0] == 0
    expected = images(tmp_path / "one")
    for name, words in MESHES.items():
        code, err = run(rows, "c", f"run_name={name}", *words)
        assert code == 0, err
        found = images(tmp_path / name)
        assert all(np.abs(found[key].astype(int) - x).max() <= 1 for key, x in expected.items()), name


@pytest.mark.slow
def test_rows_have_it_at_scales_of_their_own(run, tmp_path):
    """One without norms, as diffusers' trainer writes them, beside one that reads no map: merged and row by row."""
    maker = files.Maker(3, size=0.15)
    wide = maker.peft({"transformer.x_embedder": (SIZE.width, 2 * SIZE.channels)})
    files.save(tmp_path / "c.safetensors", maker.peft(files.dots("transformer.", files.diffusers(SIZE))) | wide)
    files.save(tmp_path / "s.safetensors", maker.peft(files.dots("transformer.", files.diffusers(SIZE))))
    mixes = {"a": {"c": 1.0}, "b": {"c": 0.5, "s": 0.5}, "c": {"s": 1.0}, "d": {}}
    rows = [dict(ROW, id=name, lora=mix, seed=3) for name, mix in mixes.items()]
    code, err = run(rows, "cs", "run_name=mixed", "per_device_batch_size=4")
    assert code == 0, err
    together = images(tmp_path / "mixed")
    for row in rows:
        assert run([row], "cs", f"run_name={row['id']}")[0] == 0
        alone = images(tmp_path / row["id"])[row["id"]].astype(int)
        assert np.abs(alone - together[row["id"]]).max() <= 1, row["id"]
        assert row["id"] == "a" or np.abs(alone - together["a"]).mean() > 2


def test_what_does_not_go_together_is_one_line(run, tmp_path):
    control(tmp_path / "c.safetensors")

    def line(rows, names, **more):
        code, err = run(rows, names, **more)
        assert code == 2 and "Traceback" not in err, err
        return err

    assert "m.jsonl:1: control_image: expected none: this model reads none, nor has an adapter" in line([ROW], "")
    without = dict(ROW, control_image=None)
    assert "m.jsonl:2: control_image: expected one" in line([ROW, without], "c")
    assert "it changes biases or norms, so all rows" in line([ROW, dict(ROW, lora={"c": 0.5})], "c")
    assert "key that leads nowhere in this model: guidance_in.in_layer.lora_A.weight" in line(
        [ROW], "c", model="schnell"
    )
    assert "key that leads nowhere in this model" in line([ROW], "c", model="flux2-klein")
    odd = files.control(SIZE, files.Maker(0))
    odd["img_in.lora_A.weight"] = odd["img_in.lora_A.weight"][:, : SIZE.channels + 4]
    files.save(tmp_path / "c.safetensors", odd)
    assert f"c.safetensors: reads {SIZE.channels + 4} channels of a token, expected the model's" in line([ROW], "c")
    odd["img_in.lora_A.weight"] = np.zeros((len(odd["img_in.lora_A.weight"]), 3 * SIZE.channels), np.float32)
    odd["img_in.lora_A.weight"][:] = 0.1
    files.save(tmp_path / "c.safetensors", odd)
    assert f"in_channels is {3 * SIZE.channels}, expected" in line([ROW], "c")


def test_a_change_of_a_wider_weight_is_the_same_before_zeros():
    """Of any kind, at any scale."""
    rng = np.random.default_rng(0)

    def x(*shape):
        return rng.normal(size=shape).astype(np.float32)

    product = Product(x(2, 6), x(4, 2), 0.5)
    for delta in (
        product,
        Hadamard((x(4, 2), x(2, 6)), (x(4, 3), x(3, 6)), 2.0),
        Kronecker((x(2, 3),), (x(2, 2),), 0.5),
        Whole(x(4, 6)),
        Replacement(x(4, 6)),
        Decomposed(product, np.abs(x(4, 1)), inside=True),
        Decomposed(product, np.abs(x(1, 6)), inside=False),
    ):
        old = x(4, 6)
        wide = delta.widened(9).change(np.pad(old, ((0, 0), (0, 3))), 0.7)
        assert np.abs(wide[:, :6] - delta.change(old, 0.7)).max() < 1e-6 and not wide[:, 6:].any(), delta
