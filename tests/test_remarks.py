"""What a start says of what is allowed and probably not meant."""

from __future__ import annotations

import json

import plain
import pytest

from fluxbatch.config.schema import LoraAdapter
from fluxbatch.manifest.rows import read_rows
from fluxbatch.reporting import startup_warnings


@pytest.fixture
def rows(tmp_path):
    def rows(*lines):
        path = tmp_path / "m.jsonl"
        path.write_text("\n".join(json.dumps({"prompt": f"p{i}", **line}) for i, line in enumerate(lines)))
        return read_rows(plain.job(manifest=str(path), lora={"ink": LoraAdapter(path="a")}))[0]

    return rows


@pytest.mark.parametrize(
    ("key", "fields", "own"),
    [
        ("sampler.guidance_scale", {"guidance_scale": 2}, "a guidance_scale"),
        ("sampler.num_inference_steps", {"num_inference_steps": 2}, "a num_inference_steps"),
        ("sampler.height", {"height": 64}, "a height"),
        ("sampler.width", {"width": 64}, "a width"),
        ("sampler.resolution", {"width": 64, "height": 32}, "height and width"),
        ("seed", {"seed": 0}, "a seed"),
        ("num_images", {"num_images": 1}, "a num_images"),
        ("prompt_2", {"prompt_2": "x"}, "a prompt_2"),
        ("lora", {"lora": {}}, "a lora"),
        ("lora.ink.scale", {"lora": {"ink": 1}}, "a lora"),
        ("lora_config.scale", {"lora": {"ink": 1}}, "a lora"),
    ],
)
def test_a_swept_key_that_rows_override_is_named(rows, key, fields, own):
    made = rows({}, fields, fields, dict.fromkeys(fields))
    assert [*startup_warnings.overridden({"hardware.attention": "flash", key: 1}, made)] == [
        f"{key} is swept, and decides nothing for 2 of 4 rows, which have {own} of their own: "
        "the same pictures in every job"]  # fmt: skip
    assert [*startup_warnings.overridden({key: 1}, rows({}, {}))] == []
    assert [*startup_warnings.overridden({}, made)] == []


def test_what_a_row_has_in_part_a_swept_key_still_decides(rows):
    made = rows({"height": 64}, {"lora": {"ink": 1}, "note": 3})
    assert [*startup_warnings.overridden({"sampler.resolution": 64, "lora.ink.path": "b", "model": "x"}, made)] == []
    assert [row.given for row in made] == [{"prompt", "height"}, {"prompt", "lora"}]


def test_run_and_plan_say_it(cli, golden, tmp_path):
    manifest = tmp_path / "m.jsonl"
    manifest.write_text('{"prompt": "a", "guidance_scale": 2}\n{"prompt": "b"}\n')
    words = [
        f"pretrained_model_name_or_path={golden / 'dev'}",
        "max_sequence_length=24",
        "resolution=16",
        "hardware=cpu",
        f"manifest={manifest}",
        f"output_dir={tmp_path}",
        "run_name=s",
        "num_inference_steps=1",
    ]
    said = (
        "sampler.guidance_scale is swept, and decides nothing for 1 of 2 rows, which have a guidance_scale of their own"
    )
    code, err = cli("-m", "guidance_scale=1,3", *words)
    assert code == 0 and err.count(said) == 2
    code, err = cli("-m", "guidance_scale=1,3", *words, entry="plan")
    assert code == 0 and err.count(said) == 2
    code, err = cli("guidance_scale=3", *words, "run_name=alone")
    assert code == 0 and "is swept" not in err


def test_fields_by_their_usual_names_are_named_with_what_was_meant(rows):
    [made] = rows({"steps": 8, "cfg": 3, "n": 2, "guidance": 3, "note": 1, "size": 512})
    said = startup_warnings.unread([made])
    for field, near in {
        "steps": "num_inference_steps",
        "cfg": "guidance_scale",
        "n": "num_images",
        "guidance": "guidance_scale",
    }.items():
        assert f"{field} (1 rows; did you mean {near}?)" in said
    assert "note (1 rows)" in said and "size (1 rows)" in said  # a row has none
