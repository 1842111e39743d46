"""What prompts encode to, kept for other jobs: the same bits, each prompt once, found when damaged, bounded."""

from __future__ import annotations

import json
import os
import shutil
import time

import lora_files as files
import numpy as np
import pytest
import yaml
from conftest import metadata
from safetensors.numpy import load_file, save_file
from test_lora import SMALL, opened  # noqa: F401 (a fixture)

from fluxbatch import engine, pipeline
from fluxbatch.io.cache import Cache
from fluxbatch.types import UserError

# ---- bytes by name


def names(folder):
    return sorted(path.name.removesuffix(".entry") for path in folder.iterdir())


def test_an_entry_comes_back_or_is_missing(tmp_path):
    cache = Cache(str(tmp_path / "new" / "folder"), 1000)
    assert cache.get("a") is None
    cache.put("a", b"bytes\n\0")
    cache.put("a", b"of another process, which were the same")
    cache.put("empty", b"")
    assert cache.get("a") == b"bytes\n\0" and cache.get("empty") == b""


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:20], lambda data: b"", lambda data: data[:40] + b"!" + data[41:],
                                    lambda data: b"!" + data[1:]])  # fmt: skip
def test_a_damaged_entry_is_missing_and_made_again(tmp_path, damage):
    cache = Cache(str(tmp_path), 1000)
    cache.put("a", bytes(range(100)))
    file = tmp_path / "a.entry"
    file.write_bytes(damage(file.read_bytes()))
    assert cache.get("a") is None
    cache.put("a", bytes(range(100)))
    assert cache.get("a") == bytes(range(100))


def test_the_longest_unused_go_first(tmp_path):
    cache = Cache(str(tmp_path), 3 * 132)
    for n in range(6):
        cache.put(str(n), bytes(100))
        os.utime(tmp_path / f"{n}.entry", (1000 + n, 1000 + n))
    assert cache.get("1") == bytes(100)
    old, fresh, foreign = (tmp_path / f"{name}.tmp" for name in ("01" * 16, "ab" * 16, "somebody's"))
    for file in (old, fresh, foreign):
        file.write_bytes(b"half")
    os.utime(old, (1000, 1000))
    os.utime(foreign, (1000, 1000))
    cache.trim()
    assert names(tmp_path) == ["1", "4", "5", fresh.name, foreign.name]
    cache.trim()
    assert names(tmp_path) == ["1", "4", "5", fresh.name, foreign.name]


def test_a_cache_that_cannot_be_is_told_and_one_that_fails_later_is_not(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/cache: not a directory"):
        Cache(str(tmp_path / "file" / "cache"), 1000)
    cache = Cache(str(tmp_path / "gone"), 1000)
    (tmp_path / "gone").rmdir()
    cache.put("a", b"x")
    cache.trim()
    assert cache.get("a") is None


# ---- whole runs


@pytest.fixture
def run(cli, golden, tmp_path, monkeypatch):
    """Runs a job of four rows with three prompts → the number of prompts that were encoded; no network is loaded for none."""
    rows = [{"prompt": f"prompt {n % 3}", "seed": n} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    encoded, encode = [], pipeline.Pipeline.encode

    def counted(self, clip_ids, t5_ids, rows):
        encoded.extend({row.prompt for row in rows})
        return encode(self, clip_ids, t5_ids, rows)

    monkeypatch.setattr(pipeline.Pipeline, "encode", counted)

    def call(name, *more, cache="cache", expect=0):
        encoded.clear()
        given = {"pretrained_model_name_or_path": golden / "dev", "max_sequence_length": 24, "hardware": "cpu", "output_dir": tmp_path, "run_name": name,
                 "manifest": tmp_path / "rows.jsonl", "resolution": 16, "num_inference_steps": 1, "per_device_batch_size": 2, "output.gallery": "false",
                 "text_cache_dir": cache and tmp_path / cache}  # fmt: skip
        given |= dict(word.split("=", 1) for word in more if not word.startswith("-"))
        words = [f"{key}={'null' if value is None else value}" for key, value in given.items()]
        code, err = cli(*[word for word in more if word.startswith("-")], *words)
        assert code == expect, err
        call.said = err
        engine._kept.clear()
        return len(encoded) if expect == 0 else err

    return call


def pictures(folder):
    return [record["sha256"] for record in metadata(folder)]


def loaded(folder):
    return json.loads((folder / "status.json").read_text())["load"]["bytes"]


def test_the_same_bits_and_no_encoder_is_loaded(run, tmp_path):
    assert run("without", cache=None) == 3 and not (tmp_path / "cache").exists()
    assert run("cold") == 3 and len(names(tmp_path / "cache")) == 3
    assert run("warm") == 0
    assert pictures(tmp_path / "without") == pictures(tmp_path / "cold") == pictures(tmp_path / "warm")
    assert loaded(tmp_path / "without") == loaded(tmp_path / "cold") > loaded(tmp_path / "warm") > 0
    # another picture of known words, and a new prompt among known ones
    assert run("seeds", "seed=50", "guidance_scale=1.5", "shard_size=2") == 0
    with open(tmp_path / "rows.jsonl", "a") as file:
        file.write('{"prompt": "another"}\n')
    assert run("warm") == 1 and run("more") == 0
    assert pictures(tmp_path / "more")[:4] == pictures(tmp_path / "without")


def test_a_damaged_entry_is_encoded_again(run, tmp_path):
    run("first")
    entry = next((tmp_path / "cache").iterdir())
    data = entry.read_bytes()
    entry.write_bytes(data[:-4] + b"\0\0\0\1")
    assert run("second") == 1
    assert entry.read_bytes() == data and pictures(tmp_path / "first") == pictures(tmp_path / "second")


def test_a_sweep_encodes_each_prompt_once_for_each_encoder(run, golden, tmp_path):
    """Models that differ in the transformer alone; an adapter that changes encoders: 4 jobs, 3 prompts, 2 ways to read them."""
    other = shutil.copytree(golden / "dev", tmp_path / "other")
    scale_weights(other / "transformer", 1.1)
    models = f"pretrained_model_name_or_path={golden / 'dev'},{other}"
    assert run("sweep", "-m", models, "lora_config.scale=[0.0],[0.9]", *adapter(tmp_path)) == 6
    jobs = [(yaml.safe_load(file.read_text())["sweep"], file.parent) for file in (tmp_path / "sweep").glob("*/config.yaml")]
    made = [pictures(folder) for sweep, folder in sorted(jobs, key=lambda job: (str(other) in str(job[0]), str(job[0]["lora_config.scale"])))]
    assert len(made) == 4
    assert len({picture for pictures in made for picture in pictures}) == 16
    assert run("alone", f"pretrained_model_name_or_path={other}", "lora_config.scale=[0.9]", *adapter(tmp_path), cache=None) == 3
    assert pictures(tmp_path / "alone") == made[3]


def scale_weights(folder, factor):
    file = next(folder.glob("*.safetensors"))
    save_file({name: array * np.float32(factor) for name, array in load_file(file).items()}, file)


def adapter(folder):
    """One that changes the transformer and both encoders."""
    path = files.save(folder / "a.safetensors", files.FORMATS["kohya with T5"](SMALL, files.Maker(1, size=0.12)))
    return [f"lora_config.lora_model_name_or_path=[{path}]", "lora_config.weight_name=[null]", "lora_config.adapter_name=[a]", "lora_config.from_pt=[true]"]


def test_what_decides_the_encoding_is_in_the_name(opened, golden, tmp_path):
    clip, t5 = shutil.copytree(golden / "dev", tmp_path / "clip"), shutil.copytree(golden / "dev", tmp_path / "t5")
    scale_weights(clip / "text_encoder", 1.01)
    scale_weights(t5 / "text_encoder_2", 1.01)
    flux = shutil.copytree(golden / "dev", tmp_path / "flux")
    scale_weights(flux / "transformer", 1.01)

    def name(*words, prompt="x", batch=1):
        engine, (row,) = opened([{"prompt": prompt}], *words)
        cache = engine.text_cache(str(tmp_path / "cache"), 1.0, [row])
        return cache.name(row, [ids[0] for ids in engine.tokenizers([row.prompt], [row.prompt_2])], batch)

    base, lora = name(), adapter(tmp_path)
    others = [name(prompt="y"), name(batch=2), name("max_sequence_length=16"), name("activations_dtype=bfloat16"), name("weights_dtype=bfloat16"),
              name("sharding=fsdp"), name(f"pretrained_model_name_or_path={clip}"), name(f"pretrained_model_name_or_path={t5}"),
              name(*lora, "lora_config.scale=[1.0]"), name(*lora, "lora_config.scale=[0.5]")]  # fmt: skip
    assert len({base, *others}) == 1 + len(others)
    same = [name("resolution=64", "seed=3", "guidance_scale=2.0"), name(f"pretrained_model_name_or_path={flux}"), name(*lora, "lora_config.scale=[0.0]")]
    assert set(same) == {base}


def test_the_bound(run, tmp_path):
    """T5's states of a prompt are 24 × 32 × 4 bytes here: a job of more than fit does without a cache, others share it."""
    assert run("a", "text_cache_gigabytes=9e-6") == 3 and not (tmp_path / "cache").exists()
    assert "fluxbatch: text_cache_gigabytes=9e-06: the prompts encode to 9.22e-06 GB, none is kept\n" in run.said
    assert run("a2", "text_cache_gigabytes=11e-6") == 3 and "is kept" not in run.said
    (tmp_path / "rows.jsonl").write_text('{"prompt": "other"}\n{"prompt": "words"}\n')
    time.sleep(0.01)
    assert run("b", "text_cache_gigabytes=11e-6") == 2 and len(names(tmp_path / "cache")) == 3
    assert run("c", "text_cache_gigabytes=11e-6") == 0


@pytest.mark.parametrize("word", ["text_cache_gigabytes=0", "text_cache_gigabytes=inf", "text_cache_dir=gs://b/c", "text_cache_dir=FILE"])
def test_what_cannot_be_is_told(run, tmp_path, word):
    (tmp_path / "file").write_text("")
    err = run("x", word.replace("FILE", str(tmp_path / "file")), expect=2)
    assert f"{word.partition('=')[0]}=" in err and len(err.splitlines()) == 1
