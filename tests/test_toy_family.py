"""The family seam, by a family that lives here: its folder joins ``models/``, and no other file knows of it.

``toy_family/toy`` is that folder; ``toy_family/straight.py`` draws the same pictures without any of the runner's code.
"""

from __future__ import annotations

import json
import pathlib
import sys

import numpy as np
import plain
import pytest
from conftest import images, metadata, psnr
from lora_files import arrays
from safetensors.numpy import save_file
from toy_family import straight

from fluxbatch import models
from fluxbatch.config.schema import Model, Verify
from fluxbatch.generation.pipeline import Pipeline
from fluxbatch.models import registry
from fluxbatch.models.family import Family
from fluxbatch.types import Picture
from fluxbatch.weights.checkpoint import open_checkpoint

FOLDER = pathlib.Path(__file__).parent / "toy_family"
ROWS = [
    {
        "id": f"r{i}",
        "prompt": f"prompt {i % 4}" + " and more words" * (i % 3),
        "seed": 2**40 + i // 2,
        "height": 32 if i % 3 else 20,
        "width": 24 + 12 * (i % 2),
        "num_inference_steps": 1 + 4 * (i % 3),
    }
    for i in range(10)
]
ROWS[4] = ROWS[4] | {"num_inference_steps": 3, "sigmas": [0.9, 0.5, 0.1]}
INK = straight.adapter(
    1,
    2,
    4.0,
    ("canvas", "layer_0/query", 32, 32),
    ("canvas", "layer_2/key_value", 64, 32),
    ("canvas", "layer_1/time", 64, 32),
)
VOICE = straight.adapter(2, 3, 3.0, ("reader", "line_1/inner", 48, 24), ("canvas", "brush/text_in", 32, 24))
MIXES = [{}, {"ink": 1.0}, {"voice": 0.5}, {"ink": -0.5, "voice": 1.0}]


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    """The family's folder beside those of ``fluxbatch/models``."""
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(FOLDER)])
    registry.families.cache_clear()
    yield
    registry.families.cache_clear()
    for name in [name for name in sys.modules if name.startswith("fluxbatch.models.toy")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def weights():
    return straight.weights()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, weights):
    return straight.save(tmp_path_factory.mktemp("toy") / "toybox", weights)


@pytest.fixture
def adapters(tmp_path):
    for name, tensors in (("ink", INK), ("voice", VOICE)):
        save_file({key: np.asarray(value) for key, value in tensors.items()}, tmp_path / f"{name}.safetensors")
    return arrays({name: tmp_path / f"{name}.safetensors" for name in ("ink", "voice")})


@pytest.fixture
def words(checkpoint, tmp_path):
    """A command line of these rows."""

    def call(name, rows=ROWS, *more, **keys):
        manifest = tmp_path / f"{name}.jsonl"
        manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = {
            "pretrained_model_name_or_path": checkpoint,
            "max_sequence_length": straight.LENGTH,
            "hardware": "cpu",
            "gallery": "false",
            "output_dir": tmp_path,
            "run_name": name,
            "manifest": manifest,
            "guidance_scale": 0,
        }
        return [*(f"{key}={value}" for key, value in (given | keys).items()), *more]

    return call


@pytest.fixture
def run(cli, words, tmp_path):
    def call(name, *args, **keys):
        code, err = cli(*words(name, *args, **keys))
        assert code == 0, err
        return images(tmp_path / name)

    return call


def drawn(weights, row):
    """The picture of a row, drawn straight, with its adapters."""
    for name, scale in row.get("lora", {}).items():
        weights = straight.merged(weights, {"ink": INK, "voice": VOICE}[name], scale)
    steps = row.get("sigmas") or row["num_inference_steps"]
    return straight.draw(weights, *(row[key] for key in ("prompt", "seed", "height", "width")), steps)


def alike(made, weights, rows):
    """Every picture is the straight one, to rounding."""
    assert made.keys() == {row["id"] for row in rows}
    for row in rows:
        assert np.abs(made[row["id"]].astype(int) - drawn(weights, row)).max() <= 1, row
    return made


def test_both_families_are_found():
    variants = ["flux1", "flux1-kontext", "flux1-fill", "flux1-control"]
    assert [family.name for family in registry.families()] == [
        *variants,
        "chroma",
        "flux2-dev",
        "flux2-klein",
        "flux3-klein",
        "toy",
        "zimage",
    ]


def test_a_field_that_a_family_has_no_use_for_is_refused():
    for field in (dict(image=(Picture("a.png", "a.png"),)), dict(negative_prompt="hens")):
        with pytest.raises(ValueError, match=f"{next(iter(field))}: expected none"):
            Family.resolve(None, plain.row(0, **field))


def test_pictures_are_those_drawn_straight(run, weights):
    """Sizes, step counts and prompts of all lengths in batches of three, the last ones padded."""
    made = alike(run("single", per_device_batch_size=3), weights, ROWS)
    # blind unless each of these moves the picture
    base = ROWS[1]
    for key, other in (("prompt", "quite another"), ("seed", 7), ("num_inference_steps", 2)):
        assert psnr(drawn(weights, base | {key: other}), made["r1"]) < 30, key


def test_pictures_are_the_same_on_a_mesh_of_three_axes(run, weights):
    mesh = {"ici_data_parallelism": 2, "ici_fsdp_parallelism": 2, "ici_tensor_parallelism": 2}
    alike(run("mesh", ROWS[:5], **mesh), weights, ROWS[:5])


def test_blocks_that_pass_one_at_a_time_draw_the_same(run, weights):
    alike(run("streamed", ROWS[:3], stream_blocks="true", per_device_batch_size=2), weights, ROWS[:3])


def test_each_row_has_its_own_mix_of_adapters(run, weights, adapters):
    rows = [ROWS[1] | {"id": f"m{i}", "lora": mix} for i, mix in enumerate(MIXES)]
    made = alike(run("mixes", rows, *adapters, per_device_batch_size=4), weights, rows)
    assert min(psnr(made["m0"], made[f"m{i}"]) for i in (1, 2, 3)) < 30


def test_a_start_goes_on_and_replay_draws_again(cli, run, words, tmp_path, checkpoint, weights, monkeypatch):
    """Started again with more rows; once more with all prompts from the cache; one picture replayed, all verified."""
    cached = {"text_cache_dir": tmp_path / "texts", "per_device_batch_size": 2, "shard_size": 2}
    rows = [row for row in ROWS if row["height"] == 32 and row["width"] == 36]
    run("run", rows[:2], **cached)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("*.png")}
    encoded, encode = [], Pipeline.encode
    monkeypatch.setattr(
        Pipeline, "encode", lambda self, inputs, rows: encoded.append(rows) or encode(self, inputs, rows)
    )
    alike(run("run", rows, **cached), weights, rows)
    assert before.items() <= {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("*.png")}.items()
    once = len(encoded)
    run("again", rows, **cached)
    assert 0 < once == len(encoded)  # all texts came from the cache
    (record,) = (record for record in metadata(tmp_path / "run") if record["id"] == rows[0]["id"])
    assert record["model"] == "toybox" and record["max_sequence_length"] == straight.LENGTH
    code, said = cli(f"output_dir={tmp_path}", "run_name=run", f"id={record['id']}", entry="replay")
    assert code == 0 and "the same pixels" in said
    code, said = cli(f"output_dir={tmp_path}", "run_name=run", entry="verify")
    assert code == 0, said


@pytest.mark.parametrize(
    "more",
    [
        ["target=h100-2", "sharding=fsdp"],
        ["target=v6e-4", "aot=false", "stream_blocks=true"],
        ["target=cpu", "aot=true"],
    ],
)
def test_a_plan_counts_it(cli, words, weights, more):
    code, said = cli(*words("plan", hardware="auto"), *more, entry="plan")
    assert code == 0, said
    counts = {name: sum(x.size for key, x in own.items() if key != "translation") for name, own in weights.items()}
    assert f"parameters: {', '.join(f'{name} {count / 1000:.3g} k' for name, count in counts.items())}" in said
    assert (
        "20×24, 1 steps" in said and "32×36, 5–9 steps" in said and "the reader reads 20 tokens: 6 rows are cut" in said
    )
    assert ("compiled  denoise" in said) == ("aot=true" in more)


def test_a_converted_copy_and_a_file_of_all_are_the_same_model(cli, run, words, weights, tmp_path):
    code, said = cli(*words("convert")[:1], f"to={tmp_path / 'copy'}", entry="convert")
    assert code == 0, said
    alike(run("copy", ROWS[:2], pretrained_model_name_or_path=tmp_path / "copy"), weights, ROWS[:2])
    whole = straight.save_file_of_all(tmp_path / "whole", weights)
    opened = [
        open_checkpoint(Model("", str(path), None, None, None, None, Verify.none))
        for path in (tmp_path / "copy", whole)
    ]
    assert [each.family.name for each in opened] == ["toy", "toy"]
    assert [dict(each.scheduler) for each in opened] == [{"power": straight.POWER}, {"power": 1.0}]
    configs = [{name: component.config for name, component in each.components.items()} for each in opened]
    assert configs[0] == configs[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sharding", "size"),
    [
        ("single", 1),
        ("single", 4),
        ("ddp", 1),
        ("fsdp", 1),
        ("fsdp", 2),
        ("tensor", 2),
        ("context", 1),
        ("streamed", 1),
    ],
)
def test_a_picture_depends_on_its_row_alone(run, weights, sharding, size):
    keys = {"tensor": {"ici_tensor_parallelism": 2}, "context": {"ici_context_parallelism": 2}}
    keys["streamed"] = {"sharding": "ddp", "stream_blocks": "true"}
    alike(run("run", per_device_batch_size=size, **keys.get(sharding, {"sharding": sharding})), weights, ROWS)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["fsdp", "tensor"])
def test_mixes_of_adapters_on_a_mesh(run, weights, adapters, sharding):
    keys = {"ici_tensor_parallelism": 2} if sharding == "tensor" else {"sharding": sharding}
    rows = [row | {"lora": MIXES[i % 4]} for i, row in enumerate(ROWS)]
    alike(run("mixes", rows, *adapters, **keys), weights, rows)
