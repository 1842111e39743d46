"""Noise levels that a job or a row gives: pictures, batches, records, resume, replay, plan, and what cannot be."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import plain
import pytest
from conftest import GOLDEN, images, metadata, psnr
from test_run import flags

from fluxbatch.manifest.rows import read_rows
from fluxbatch.results.resume import LATER, decisive, digest, key_under, levels, parameters
from fluxbatch.types import UserError

STEEP = [1.0, 0.9, 0.3]
EVEN = np.linspace(1.0, 1 / 3, 3).tolist()


@pytest.fixture
def write(tmp_path):
    def call(rows, name="rows.jsonl"):
        manifest = tmp_path / name
        manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return manifest

    return call


def row(**more):
    return {"prompt": "a fox", "seed": 3, "height": 32, "width": 32} | more


def test_levels_decide_the_picture_and_even_ones_change_nothing(cli, golden, tmp_path, write):
    """In one batch with rows of other step counts."""
    rows = [
        row(id="plain", num_inference_steps=3),
        row(id="even", sigmas=EVEN),
        row(id="steep", sigmas=STEEP),
        row(id="one", sigmas=[1]),
    ]
    assert cli(*flags(golden, tmp_path, manifest=write(rows), per_device_batch_size=4))[0] == 0
    made = images(tmp_path / "run")
    np.testing.assert_array_equal(made["even"], made["plain"])
    assert psnr(made["steep"], made["plain"]) < 40 and psnr(made["one"], made["plain"]) < 40
    records = {record["id"]: record for record in metadata(tmp_path / "run")}
    assert {name: record["num_inference_steps"] for name, record in records.items()} == {
        "plain": 3,
        "even": 3,
        "steep": 3,
        "one": 1,
    }
    assert [records[name]["sigmas"] for name in ("plain", "steep", "one")] == ["[]", "[1.0, 0.9, 0.3]", "[1.0]"]


def test_a_job_gives_them_to_rows_that_have_none(cli, golden, tmp_path, write):
    rows = [row(id="own", sigmas=EVEN), row(id="jobs")]
    args = flags(golden, tmp_path, manifest=write(rows), sigmas=STEEP, num_inference_steps=2)
    code, said = cli(*args, "target=cpu", entry="plan")
    assert code == 0 and "32×32, 3 steps: 2 rows" in said
    assert cli(*args)[0] == 0
    records = {record["id"]: levels(record) for record in metadata(tmp_path / "run")}
    assert records == {"own": tuple(EVEN), "jobs": tuple(STEEP)}
    code, said = cli(f"output_dir={tmp_path}", "run_name=run", "id=jobs", entry="replay")
    assert code == 0 and "jobs: the same pixels" in said
    assert cli(*args)[0] == 0  # nothing is left to do
    args[-2] = "sigmas=[1.0,0.5]"
    code, err = cli(*args)
    assert (
        code == 2
        and "rows.jsonl:2: num_inference_steps: 3 → 2, sigmas: [1.0, 0.9, 0.3] → [1.0, 0.5] since flux_1.png" in err
    )


def test_the_key_of_a_row_without_them_is_what_it_was():
    without, same = plain.row(0), decisive(plain.row(0))
    later = ("sigmas", *LATER)
    assert [same.pop(key) for key in later] == [None] * len(later)
    assert key_under(without, "facts") == digest([same, "facts"])
    given = [plain.row(0, sigmas=sigmas) for sigmas in ((), (1.0, 0.5), (1.0, 0.4))]
    assert len({key_under(each, "facts") for each in given}) == 3
    assert [levels(form(each)) for each in given for form in (decisive, parameters)] == [
        (),
        (),
        (1.0, 0.5),
        (1.0, 0.5),
        (1.0, 0.4),
        (1.0, 0.4),
    ]
    assert levels({}) == ()


def test_a_table_has_them_in_a_cell(tmp_path):
    table = tmp_path / "rows.csv"
    table.write_text('prompt,sigmas\na,"[1.0, 0.5]"\nb,\n')
    rows, _ = read_rows(plain.job(manifest=str(table)))
    assert [(each.sigmas, each.num_inference_steps) for each in rows] == [((1.0, 0.5), 2), ((), 4)]


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ("[]", "sigmas: got [], expected 1 to 1,000 numbers, got 0"),
        ("0.5", "sigmas: got 0.5 (number), expected a list of numbers like [1.0, 0.75, 0.5]"),
        ("[1.0, true]", "expected a list of numbers like [1.0, 0.75, 0.5]"),
        ("[1.0, 0.0]", "sigmas: got [1.0, 0.0], expected numbers above 0, at most 1: number 2 is 0.0"),
        ("[1.5, 0.5]", "expected numbers above 0, at most 1: number 1 is 1.5"),
        ("[0.5, 0.5]", "expected each number below the one before it: number 2 is 0.5 after 0.5"),
        (json.dumps([1 - i / 1001 for i in range(1001)]), "expected 1 to 1,000 numbers, got 1,001"),
        (
            '[1.0, 0.5], "num_inference_steps": 8',
            "num_inference_steps: got 8, expected 2, as many as sigmas has, or none",
        ),
    ],
)
def test_levels_of_a_row_that_cannot_be_are_one_line(tmp_path, given, wrong):
    manifest = tmp_path / "rows.jsonl"
    manifest.write_text(f'{{"prompt": "a", "sigmas": {given}}}\n')
    with pytest.raises(UserError) as error:
        read_rows(plain.job(manifest=str(manifest)))
    (line,) = error.value.lines
    assert line.startswith(f"{manifest}:1: ") and wrong in line


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ("[]", "expected 1 to 1,000 numbers"),
        ("[1.0,inf]", "number 2 is inf"),
        ("[1.0,nan]", "number 2 is nan"),
        ("[0.2,0.7]", "expected each number below the one before it: number 2 is 0.7 after 0.2"),
        ("[a]", "sigmas"),
        ("0.5", "sigmas"),
    ],
)
def test_levels_of_a_job_that_cannot_be_are_one_line(cli, golden, tmp_path, given, wrong):
    code, err = cli(*flags(golden, tmp_path, prompt="a", sigmas=given))
    assert code == 2 and "sigmas" in err and wrong in err and len(err.splitlines()) == 1, err


def test_a_rows_step_count_beside_the_jobs_levels_is_one_line(cli, golden, tmp_path, write):
    code, err = cli(*flags(golden, tmp_path, manifest=write([row(num_inference_steps=8)]), sigmas=STEEP))
    assert code == 2 and "num_inference_steps: got 8, expected 3, as many as sampler.sigmas has, or none" in err


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("variant", ["dev", "schnell"])
def test_pictures_are_those_of_diffusers(cli, tmp_path, write, variant):
    """With a shift by size and with a constant one; levels that begin below 1."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    spec = importlib.util.spec_from_file_location("generate", GOLDEN / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    pipe = generate.pipeline(**generate.VARIANTS[variant], seed=6)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "model")
    rows = [
        row(id="steep", sigmas=STEEP),
        row(id="late", sigmas=[0.8, 0.5, 0.2, 0.05], width=48),
        row(id="one", sigmas=[1.0]),
    ]
    rows = [each | {"guidance_scale": 2.0} for each in rows]
    args = flags(
        GOLDEN,
        tmp_path,
        pretrained_model_name_or_path=tmp_path / "model",
        manifest=write(rows),
        per_device_batch_size=2,
    )
    assert cli(*args)[0] == 0
    made = images(tmp_path / "run")
    for each in rows:
        theirs = pipe(
            prompt=each["prompt"],
            height=each["height"],
            width=each["width"],
            sigmas=each["sigmas"],
            max_sequence_length=24,
            guidance_scale=2.0,
            generator=torch.Generator("cpu").manual_seed(each["seed"]),
            output_type="pil",
        ).images[0]
        assert psnr(made[each["id"]], np.asarray(theirs)) >= 50
    even = generate.render(pipe, rows[0] | {"num_inference_steps": 3}, 24)
    assert psnr(made["steep"], even) < 40  # blind unless they move the picture
