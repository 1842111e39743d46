"""What prompts encode to, kept for other jobs: the same bits, each prompt once, found when damaged, bounded."""

from __future__ import annotations

import errno
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
from test_lora import opened  # noqa: F401 (a fixture)

from fluxbatch.distributed import backend
from fluxbatch.generation import pipeline
from fluxbatch.storage.cache import Cache, Place, find
from fluxbatch.types import UserError

# ---- bytes by name


def names(folder):
    return sorted(path.name.removesuffix(".entry") for path in folder.iterdir())


def test_an_entry_comes_back_or_is_missing(tmp_path):
    cache = Cache(find("text_cache_dir", str(tmp_path / "new" / "folder")).path, 1000)
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
    with pytest.raises(UserError, match="text_cache_dir=.*file/cache: not a directory; expected"):
        raise find("text_cache_dir", str(tmp_path / "file" / "cache")).error
    cache = Cache(find("text_cache_dir", str(tmp_path / "gone")).path, 1000)
    (tmp_path / "gone").rmdir()
    cache.put("a", b"x")
    cache.trim()
    assert cache.get("a") is None


def denied(*_, **__):
    raise PermissionError(13, "Permission denied")


def test_an_entry_of_another_user_is_a_hit(tmp_path, monkeypatch):
    cache = Cache(str(tmp_path), 1000)
    cache.put("a", b"x")
    monkeypatch.setattr(os, "utime", denied)
    assert cache.get("a") == b"x"


def test_what_another_user_keeps_is_in_nobodys_way(tmp_path, monkeypatch):
    """Where each removes his own files only: the others' stay, as many of one's own go."""
    cache, unlink = Cache(str(tmp_path), 2 * 132), os.unlink
    for n in range(4):
        cache.put(str(n), bytes(100))
        os.utime(tmp_path / f"{n}.entry", (1000 + n, 1000 + n))
    monkeypatch.setattr(os, "unlink", lambda path: denied() if path.endswith("0.entry") else unlink(path))
    cache.trim()
    assert names(tmp_path) == ["0", "3"]


def test_one_that_only_its_owner_can_read_is_replaced(tmp_path, monkeypatch):
    cache, access = Cache(str(tmp_path), 1000), os.access
    cache.put("a", b"x")
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.R_OK and access(path, mode))
    before = (tmp_path / "a.entry").stat().st_ino
    cache.put("a", b"x")
    assert (tmp_path / "a.entry").stat().st_ino != before and names(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("directory", "entry"), [(0o700, 0o600), (0o755, 0o600), (0o770, 0o640), (0o2775, 0o644), (0o1777, 0o644)]
)
def test_who_shares_a_directory_shares_its_entries(tmp_path, directory, entry):
    tmp_path.chmod(directory)
    before = os.umask(0o077)
    try:
        Cache(str(tmp_path), 1000).put("a", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "a.entry").stat().st_mode & 0o777 == entry


# ---- where caches are


@pytest.fixture
def home(monkeypatch):
    """Makes another one the user's; None: a user without one."""

    def call(place):
        if place is None:
            monkeypatch.delenv("HOME")
            monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
        else:
            monkeypatch.setenv("HOME", str(place))

    return call


def test_the_default_is_below_the_home_directory(home, tmp_path):
    home(tmp_path)
    for key, name in (("text_cache_dir", "text"), ("jax_cache_dir", "xla")):
        assert (
            find(key, "auto") == Place(str(tmp_path / ".cache/fluxbatch" / name))
            and (tmp_path / ".cache/fluxbatch" / name).is_dir()
        )
        assert find(key, None) == Place(None)
    assert find("jax_cache_dir", "gs://bucket/x") == Place("gs://bucket/x")


UNUSABLE = [
    (None, "~/.cache/fluxbatch/text: no home directory is known"),
    ("relative", "relative/.cache/fluxbatch/text: no home directory is known"),
    ("/dev/null", "/dev/null/.cache/fluxbatch/text: not a directory"),
]


@pytest.mark.parametrize(("place", "reason"), UNUSABLE)
def test_a_default_that_cannot_be_used_is_left_out(home, tmp_path, monkeypatch, place, reason):
    monkeypatch.chdir(tmp_path)
    home(place)
    assert find("text_cache_dir", "auto") == Place(
        remark=(
            f"text_cache_dir=auto: {reason}: nothing is kept there; text_cache_dir=DIR names another place, null none"
        )
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT])
def test_a_directory_that_cannot_be_made(home, tmp_path, monkeypatch, error):
    def fails(*_, **__):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "mkdir", fails)
    home(tmp_path)
    reason = os.strerror(error).lower()
    assert reason in find("jax_cache_dir", "auto").remark and not find("jax_cache_dir", "auto").path
    with pytest.raises(
        UserError, match=f"jax_cache_dir={tmp_path}/x: {reason}; expected a directory that can be used, or null"
    ):
        raise find("jax_cache_dir", str(tmp_path / "x")).error


def test_a_directory_that_can_only_be_read_is_read(tmp_path, monkeypatch):
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    assert find("text_cache_dir", str(tmp_path)) == Place(
        str(tmp_path), False, f"text_cache_dir={tmp_path}: can only be read: nothing new is kept there")  # fmt: skip


def test_programs_are_not_added_to_what_can_only_be_read(tmp_path, monkeypatch):
    said = {}
    monkeypatch.setattr("jax.config.update", said.__setitem__)
    backend.start("auto", str(tmp_path), writable=False)
    assert said == {"jax_compilation_cache_dir": str(tmp_path), "jax_persistent_cache_min_compile_time_secs": 1e9}
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    backend.start("auto", str(tmp_path), writable=False)
    assert said.pop("jax_persistent_cache_enable_xla_caches") == "none"  # XLA would write there as well
    backend.start("auto", str(tmp_path))
    assert (
        "jax_persistent_cache_enable_xla_caches" not in said
        and said["jax_persistent_cache_min_compile_time_secs"] == 0.2
    )


# ---- whole runs


@pytest.fixture
def run(cli, golden, tmp_path, monkeypatch):
    """Runs a job of four rows with three prompts → the number of prompts that were encoded; no network is loaded for
    none."""
    rows = [{"prompt": f"prompt {n % 3}", "seed": n} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    encoded, encode = [], pipeline.Pipeline.encode

    def counted(self, inputs, rows):
        encoded.extend({row.prompt for row in rows})
        return encode(self, inputs, rows)

    monkeypatch.setattr(pipeline.Pipeline, "encode", counted)

    def call(name, *more, cache="cache", expect=0):
        encoded.clear()
        given = {
            "pretrained_model_name_or_path": golden / "dev",
            "max_sequence_length": 24,
            "hardware": "cpu",
            "output_dir": tmp_path,
            "run_name": name,
            "manifest": tmp_path / "rows.jsonl",
            "resolution": 16,
            "num_inference_steps": 1,
            "per_device_batch_size": 2,
            "output.gallery": "false",
            "text_cache_dir": cache and tmp_path / cache,
        }
        given |= dict(word.split("=", 1) for word in more if not word.startswith("-"))
        words = [f"{key}={'null' if value is None else value}" for key, value in given.items()]
        code, err = cli(*[word for word in more if word.startswith("-")], *words)
        assert code == expect, err
        call.said = err
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
    """Models that differ in the transformer alone; an adapter that changes encoders: 4 jobs, 3 prompts, 2 ways to read
    them."""
    other = shutil.copytree(golden / "dev", tmp_path / "other")
    scale_weights(other / "transformer", 1.1)
    models = f"pretrained_model_name_or_path={golden / 'dev'},{other}"
    assert run("sweep", "-m", models, "lora_config.scale=[0.0],[0.9]", *adapter(tmp_path)) == 6
    jobs = [
        (yaml.safe_load(file.read_text())["sweep"], file.parent) for file in (tmp_path / "sweep").glob("*/config.yaml")
    ]
    made = [
        pictures(folder)
        for sweep, folder in sorted(jobs, key=lambda job: (str(other) in str(job[0]), str(job[0]["lora_config.scale"])))
    ]
    assert len(made) == 4
    assert len({picture for pictures in made for picture in pictures}) == 16
    assert (
        run(
            "alone", f"pretrained_model_name_or_path={other}", "lora_config.scale=[0.9]", *adapter(tmp_path), cache=None
        )
        == 3
    )
    assert pictures(tmp_path / "alone") == made[3]


def scale_weights(folder, factor):
    file = next(folder.glob("*.safetensors"))
    save_file({name: array * np.float32(factor) for name, array in load_file(file).items()}, file)


def adapter(folder):
    """One that changes the transformer and both encoders."""
    path = files.save(folder / "a.safetensors", files.FORMATS["kohya with T5"](files.DEV, files.Maker(1, size=0.12)))
    return [
        f"lora_config.lora_model_name_or_path=[{path}]",
        "lora_config.weight_name=[null]",
        "lora_config.adapter_name=[a]",
        "lora_config.from_pt=[true]",
    ]


def test_what_decides_the_encoding_is_in_the_name(opened, golden, tmp_path):  # noqa: F811
    clip, t5 = shutil.copytree(golden / "dev", tmp_path / "clip"), shutil.copytree(golden / "dev", tmp_path / "t5")
    scale_weights(clip / "text_encoder", 1.01)
    scale_weights(t5 / "text_encoder_2", 1.01)
    flux = shutil.copytree(golden / "dev", tmp_path / "flux")
    scale_weights(flux / "transformer", 1.01)

    def name(*words, prompt="x", batch=1):
        engine, (row,) = opened([{"prompt": prompt}], *words)
        cache = engine.text_cache(str(tmp_path / "cache"), 1.0, [row])
        return cache.name(row, [ids[0] for each in engine.inputs for ids in each([each.text(row)])], batch)

    base, lora = name(), adapter(tmp_path)
    others = [
        name(prompt="y"),
        name(batch=2),
        name("max_sequence_length=16"),
        name("activations_dtype=bfloat16"),
        name("weights_dtype=bfloat16"),
        name("sharding=fsdp"),
        name(f"pretrained_model_name_or_path={clip}"),
        name(f"pretrained_model_name_or_path={t5}"),
        name(*lora, "lora_config.scale=[1.0]"),
        name(*lora, "lora_config.scale=[0.5]"),
    ]
    assert len({base, *others}) == 1 + len(others)
    same = [
        name("resolution=64", "seed=3", "guidance_scale=2.0"),
        name(f"pretrained_model_name_or_path={flux}"),
        name(*lora, "lora_config.scale=[0.0]"),
    ]
    assert set(same) == {base}


def test_the_bound(run, tmp_path):
    """T5's states of a prompt are 24 × 32 × 4 bytes here, CLIP's vector 32 × 4: a job of more than fit does without a
    cache, others share it."""
    assert run("a", "text_cache_gigabytes=9e-6") == 3 and not (tmp_path / "cache").exists()
    assert "fluxbatch: text_cache_gigabytes=9e-06: the prompts encode to 9.6e-06 GB, none is kept\n" in run.said
    assert run("a2", "text_cache_gigabytes=11e-6") == 3 and "is kept" not in run.said
    (tmp_path / "rows.jsonl").write_text('{"prompt": "other"}\n{"prompt": "words"}\n')
    time.sleep(0.01)
    assert run("b", "text_cache_gigabytes=11e-6") == 2 and len(names(tmp_path / "cache")) == 3
    assert run("c", "text_cache_gigabytes=11e-6") == 0


@pytest.mark.parametrize(("place", "reason"), UNUSABLE[::2])
def test_a_run_does_without_defaults_that_cannot_be_used(run, home, tmp_path, monkeypatch, place, reason):
    monkeypatch.chdir(tmp_path)
    home(place)
    before = {path.name for path in tmp_path.iterdir()}
    assert run("first", "text_cache_dir=auto", "jax_cache_dir=auto") == 3
    for key, there in (("text_cache_dir", reason), ("jax_cache_dir", reason.replace("text", "xla"))):
        assert f"fluxbatch: {key}=auto: {there}: nothing is kept there" in run.said
    assert {path.name for path in tmp_path.iterdir()} - before == {"first"}


def test_a_cache_that_can_only_be_read_hits(run, tmp_path, monkeypatch):
    assert run("first") == 3
    entries, access, replace = names(tmp_path / "cache"), os.access, os.replace
    with open(tmp_path / "rows.jsonl", "a") as file:
        file.write('{"prompt": "another"}\n')
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    monkeypatch.setattr(os, "replace", lambda old, new: denied() if new.parent.name == "cache" else replace(old, new))
    monkeypatch.setattr(os, "utime", denied)
    assert run("second") == 1 and names(tmp_path / "cache") == entries
    assert f"text_cache_dir={tmp_path / 'cache'}: can only be read: nothing new is kept there\n" in run.said
    assert "jax_cache_dir" in run.said


@pytest.mark.parametrize("key", ["text_cache_dir", "jax_cache_dir"])
def test_what_was_named_and_cannot_be_used_ends_the_run(run, tmp_path, key):
    err = run("x", f"{key}=/dev/null/x", expect=2)
    assert (
        err == f"fluxbatch: error: {key}=/dev/null/x: not a directory; expected a directory that can be used, or null\n"
    )


@pytest.mark.parametrize(
    "word", ["text_cache_gigabytes=0", "text_cache_gigabytes=inf", "text_cache_dir=gs://b/c", "text_cache_dir=FILE"]
)
def test_what_cannot_be_is_told(run, tmp_path, word):
    (tmp_path / "file").write_text("")
    err = run("x", word.replace("FILE", str(tmp_path / "file")), expect=2)
    assert f"{word.partition('=')[0]}=" in err and len(err.splitlines()) == 1
