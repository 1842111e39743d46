"""Whole runs through the command line on the golden checkpoints: the pictures diffusers made, whatever
the batch size, the devices and the sharding; one compilation per shape; records that say it all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import images, metadata, pixels, psnr
from PIL import Image
from safetensors.numpy import load_file, save_file

from fluxbatch import __version__
from fluxbatch.generation.pipeline import Pipeline
from fluxbatch.results.image_files import pixel_sha256
from fluxbatch.results.location import LOCK
from fluxbatch.storage.base import StorageError
from fluxbatch.storage.local import LocalStore
from fluxbatch.storage.registry import open_store


def flags(golden, tmp_path, name="run", variant="dev", **more):
    given = {
        "pretrained_model_name_or_path": golden / variant,
        "max_sequence_length": 24,
        "hardware": "cpu",
        "output_dir": tmp_path,
        "run_name": name,
    }
    return [f"{key}={value}" for key, value in (given | more).items()]


@pytest.fixture
def mixed(tmp_path):
    """23 rows of three sizes, several step counts and guidances, repeated and long prompts."""
    sizes = [(32, 32), (32, 48), (48, 32)]
    rows = [
        {
            "id": f"r{i}",
            "prompt": f"prompt {i % 7} " + "word " * (i % 5) * 4,
            "seed": 1000 + i // 2,
            "height": sizes[i % 3][0],
            "width": sizes[i % 3][1],
            "num_inference_steps": 1 + i % 4,
            "guidance_scale": float(i % 3),
        }
        for i in range(23)
    ]
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("variant", ["dev", "schnell"])
def test_goldens(cli, golden, tmp_path, variant):
    code, _ = cli(
        *flags(golden, tmp_path, variant=variant, manifest=golden / f"{variant}.jsonl", per_device_batch_size=2)
    )
    assert code == 0
    expected = np.load(golden / f"{variant}.npz")
    made = images(tmp_path / "run")
    assert made.keys() == set(expected.files)
    for name, picture in made.items():
        assert psnr(picture, expected[name]) >= 50
    # Blind unless another row's picture is far away.
    assert psnr(made["g0"], made["g3"]) < 30


def test_a_picture_depends_on_its_row_alone(cli, golden, tmp_path, mixed):
    reference = None
    for batch, sharding in ((3, "single"), (1, "single"), (4, "single"), (1, "ddp"), (1, "fsdp"), (2, "ddp")):
        name = f"{sharding}{batch}"
        extra = {"ici_data_parallelism": 2} if name == "ddp2" else {}
        code, _ = cli(
            *flags(golden, tmp_path, name, manifest=mixed, per_device_batch_size=batch, sharding=sharding, **extra)
        )
        assert code == 0
        made = images(tmp_path / name)
        assert len(made) == 23
        reference = reference or made
        for key, picture in made.items():
            assert np.abs(picture.astype(int) - reference[key].astype(int)).max() <= 1, (name, key)


def test_one_compilation_per_shape(cli, golden, tmp_path, mixed, monkeypatch, caplog):
    """In threads, before it is called. 23 rows of three sizes: 32×48 and 48×32 have as many tokens and share a
    denoiser; prompts, seeds, guidance and steps compile nothing."""
    from fluxbatch.generation import pipeline

    made = []
    init = pipeline.Pipeline.__init__
    monkeypatch.setattr(
        pipeline.Pipeline, "__init__", lambda self, *a, **k: (init(self, *a, **k), made.append(self))[0]
    )
    jax.config.update("jax_log_compiles", True)  # as a context it would be this thread's alone
    try:
        assert cli(*flags(golden, tmp_path, manifest=mixed, per_device_batch_size=2, shard_size=8))[0] == 0
    finally:
        jax.config.update("jax_log_compiles", False)
    (one,) = made
    compiled = [record for record in caplog.records if record.message.startswith("Finished XLA compilation")]
    for name, count in {"encode": 1, "step_inputs": 1, "denoise": 2, "decode": 3}.items():
        threads = [record.threadName for record in compiled if f"({name})" in record.message]
        assert len(threads) == count and all(thread.startswith("compile") for thread in threads)
    assert one._denoise._cache_size() == 2
    assert one._decode._cache_size() == 3
    assert one._encode._cache_size() == 1


def test_the_record_says_it_all(cli, golden, tmp_path):
    rows = [
        {"prompt": "a fox", "id": "fox", "seed": 5, "category": "animals", "model": "mine"},
        {"prompt": "two", "prompt_2": "deux", "num_images": 2},
    ]
    manifest = tmp_path / "rows.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, err = cli(
        *flags(golden, tmp_path, manifest=manifest, resolution=32, num_inference_steps=2, seed=40, profile="true")
    )
    assert code == 0 and 'not carried into the metadata: "model"' in err
    folder = tmp_path / "run"
    (trace,) = folder.glob("profile/plugins/profile/*/*.xplane.pb")
    assert trace.stat().st_size > 1000
    records = metadata(folder)
    assert [r["file_name"] for r in records] == ["flux_0.png", "flux_1.png", "flux_2.png"]
    assert [r["id"] for r in records] == ["fox", "1", "2"]
    assert [r["seed"] for r in records] == [5, 41, 42]
    assert records[0]["category"] == "animals" and records[1]["prompt_2"] == "deux"
    made_by = {
        "fluxbatch_version": __version__,
        "jax_version": jax.__version__,
        "device_kind": "cpu",
        "device_count": 1,
        "per_device_batch_size": 1,
    }
    for record in records:
        assert record["model"] == "dev"  # and not its path on this machine
        assert (made_by | {"quality": 100}).items() <= record.items()
        assert {
            "height",
            "width",
            "num_inference_steps",
            "guidance_scale",
            "model",
            "model_digest",
            "seconds",
            "created",
            "key",
        } <= record.keys()
        picture = Image.open(folder / record["file_name"])
        assert record["prompt"] in " ".join(map(str, picture.text.values()))
        assert len(record["sha256"]) == hashlib.sha256().digest_size * 2
    assert records[1]["sha256"] != records[2]["sha256"]
    assert (folder / "config.yaml").read_text()
    status = json.loads((folder / "status.json").read_text())
    assert status["exit_code"] == 0 and 0 < status["speed"]["device_busy"] <= 1
    assert "<html" in (folder / "index.html").read_text()[:500].lower()


def test_a_second_start_has_nothing_to_do(cli, golden, tmp_path, mixed):
    args = flags(golden, tmp_path, manifest=mixed, per_device_batch_size=4)
    assert cli(*args)[0] == 0
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "run").glob("flux_*.png")}
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert {"load", "speed"} <= status.keys()
    assert cli(*args)[0] == 0
    assert not {"load", "speed"} & json.loads((tmp_path / "run" / "status.json").read_text()).keys()
    assert before == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "run").glob("flux_*.png")}
    code, err = cli(*args, "max_shift=2.0")
    assert code == 2 and "max_shift" in err and "run_name" in err


def test_a_start_where_another_is_at_work_changes_nothing(cli, golden, tmp_path):
    args = flags(golden, tmp_path, prompt="a fox", resolution=32, num_inference_steps=1)
    store = open_store(str(tmp_path / "run"))
    for shared, more in ((False, []), (True, []), (False, ["replica_index=0", "replica_count=2"])):
        with store.hold(LOCK, shared=shared):
            code, err = cli(*args, "overwrite=true" if not more else "overwrite=false", *more)
        assert code == 75 and f"another start is at work in {tmp_path}/run (process {os.getpid()} on" in err
        assert len(err.splitlines()) == 1
        assert list(store.list()) == [LOCK]
    with store.hold(LOCK, shared=True):  # as another replica does
        assert cli(*args, "replica_index=0", "replica_count=2")[0] == 0
    assert cli(*args)[0] == 0


def test_a_signal_while_the_run_opens_ends_it_at_once(cli, golden, tmp_path, monkeypatch):
    """As it might be fetching a checkpoint for minutes."""
    from fluxbatch.session import session

    def preempted(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("it went on")

    def ends(code):
        raise SystemExit(code)

    monkeypatch.setattr(session, "read_rows", preempted)
    monkeypatch.setattr(os, "_exit", ends)
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # or it would end the tests
    try:
        assert cli(*flags(golden, tmp_path, prompt="a fox", resolution=32))[0] == 75
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_the_other_kind_is_remarked_on(cli, golden, tmp_path):
    for model, variant, remarked in (
        ("flux-schnell", "dev", True),
        ("flux-dev", "schnell", True),
        ("flux-dev", "dev", False),
    ):
        args = flags(
            golden,
            tmp_path,
            f"{model}-{variant}",
            variant=variant,
            prompt="a fox",
            resolution=32,
            num_inference_steps=1,
        )
        code, err = cli(*args, f"model={model}")
        assert code == 0 and ("guidance embedding" in err) == remarked


def test_guidance_that_nothing_reads_is_remarked_on(cli, golden, tmp_path):
    for variant, scale, remarked in (("schnell", 2.5, True), ("schnell", 0, False), ("dev", 2.5, False)):
        args = flags(
            golden,
            tmp_path,
            f"{variant}-{scale}",
            variant=variant,
            prompt="a fox",
            resolution=32,
            num_inference_steps=1,
            guidance_scale=scale,
        )
        said = "guidance_scale decides nothing (1 rows have one)"
        for entry in ("run", "plan"):
            code, text = cli(*args, entry=entry)
            assert code == 0 and (said in text) == remarked


def test_what_was_probably_not_meant_is_said_in_a_line(cli, golden, tmp_path):
    rows = [
        {"prompt": "short", "negative_prompt": "blurry", "guidence_scale": 2.0},
        {"prompt": "word " * 40, "prompt_2": "short", "true_cfg_scale": 3.0},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, err = cli(*flags(golden, tmp_path, manifest=tmp_path / "rows.jsonl", resolution=32, num_inference_steps=1))
    said = [line.removeprefix("fluxbatch: ") for line in err.splitlines() if line.startswith("fluxbatch: ")]
    assert code == 0 and said == [
        "negative_prompt decides nothing (1 rows have one): no guidance leads away from it",
        "true_cfg_scale decides nothing (1 rows have one above 1): no negative prompt is with it, or guidance_scale is "
        "what leads away from one in this model",
        "fields that decide nothing: guidence_scale (1 rows; did you mean guidance_scale?)",
        "CLIP reads 24 tokens: 1 rows are cut: rows.jsonl:2 has 162",
    ]


def test_an_unforeseen_error_leaves_word(cli, golden, tmp_path, monkeypatch):
    def breaks(self, *_):
        status = json.loads((tmp_path / "run" / "status.json").read_text())
        assert status["exit_code"] is None  # what a killed process leaves
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Pipeline, "denoise", breaks)
    assert cli(*flags(golden, tmp_path, prompt="a fox", resolution=32))[0] == 1
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["exit_code"] == 1 and "out of memory" in status["reason"]

    def full(self, *_):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte")

    monkeypatch.setattr(Pipeline, "denoise", full)
    code, err = cli(*flags(golden, tmp_path, prompt="a fox", resolution=32, per_device_batch_size=2))
    assert code == 2 and "per_device_batch_size=2" in err and "a smaller batch" in err and "Traceback" not in err
    assert json.loads((tmp_path / "run" / "status.json").read_text())["exit_code"] == 2


@pytest.mark.parametrize(("raised", "shown"), [("RESOURCE_EXHAUSTED: Out of memory", "per_device_batch_size=1: the device's memory does not hold it: a smaller resolution"),
                                               ("broken", "RuntimeError: broken")])  # fmt: skip
def test_an_error_after_the_first_picture_leaves_what_was_made(cli, golden, tmp_path, monkeypatch, raised, shown):
    def second(self, *args, real=Pipeline.denoise, batches=[]):  # noqa: B006
        batches.append(args)
        if len(batches) == 2:
            raise RuntimeError(raised)
        return real(self, *args)

    monkeypatch.setattr(Pipeline, "denoise", second)
    code, err = cli(
        *flags(
            golden,
            tmp_path,
            prompt="a fox",
            num_images=2,
            resolution=32,
            num_inference_steps=1,
            per_device_batch_size=1,
        )
    )
    assert code == 1 and shown in err and ("Traceback" in err) == (raised == "broken")
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["exit_code"], status["counts"]["made"], status["counts"]["left"]) == (1, 1, 1) and shown in status[
        "reason"
    ]
    assert images(tmp_path / "run").keys() == {"0"}


def test_the_status_is_left_where_the_records_cannot_be_merged(cli, golden, tmp_path, monkeypatch):
    def full(self, name, data, real=LocalStore.write, **options):
        if name in ("metadata.jsonl", "flux_0.png"):
            raise StorageError(f"{name}: no space left on device", fatal=True)
        return real(self, name, data, **options)

    monkeypatch.setattr(LocalStore, "write", full)
    code, err = cli(*flags(golden, tmp_path, prompt="a fox", resolution=32, num_inference_steps=1))
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (
        code == 1
        and (status["exit_code"], status["reason"]) == (1, "flux_0.png: no space left on device")
        and status["reason"] in err
    )


def test_a_disk_that_is_full_at_the_start_is_no_mistake_of_the_user_s(cli, golden, tmp_path, monkeypatch):
    """2 tells schedulers never to try again."""

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    code, err = cli(*flags(golden, tmp_path, prompt="a fox"))
    assert code == 1 and "no space left on device" in err and len(err.splitlines()) == 1


def test_pages_and_status_are_there_before_a_word_is_printed(cli, golden, tmp_path, monkeypatch):
    from fluxbatch.reporting.terminal import Report

    def printed(*_):
        assert (tmp_path / "run" / "index.html").exists() and (tmp_path / "run/.fluxbatch/contact_sheet.png").exists()
        assert json.loads((tmp_path / "run" / "status.json").read_text())["exit_code"] == 0

    monkeypatch.setattr(Report, "summary", printed)
    assert cli(*flags(golden, tmp_path, prompt="a fox", resolution=32, num_inference_steps=1))[0] == 0


def test_replay_and_verify(cli, golden, tmp_path):
    assert (
        cli(
            *flags(
                golden, tmp_path, manifest=golden / "dev.jsonl", per_device_batch_size=4, activations_dtype="bfloat16"
            )
        )[0]
        == 0
    )
    here = [f"output_dir={tmp_path}", "run_name=run"]
    code, said = cli(*here, "id=g1", entry="replay")
    assert code == 0 and "same pixels" in said
    assert cli(*here, entry="verify")[0] == 0
    code, said = cli(*here, "id=nobody", entry="replay")
    assert code == 2 and "nobody" in said and "Traceback" not in said

    damaged = tmp_path / "run" / "flux_2.png"
    Image.fromarray(np.zeros_like(pixels(damaged))).save(damaged)
    code, said = cli(*here, entry="verify")
    assert code == 3 and "flux_2.png" in said
    lines = metadata(tmp_path / "run")
    lines[1]["sha256"] = "0" * 64
    (tmp_path / "run" / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, said = cli(*here, "id=g1", entry="replay")
    assert code == 3 and "largest difference 0 of 255" in said
    (tmp_path / "run" / "metadata.jsonl").unlink()  # as after a kill
    code, said = cli(*here, "id=g1", entry="replay")
    assert code == 0 and "same pixels" in said
    for name, text, where in (
        ("metadata.jsonl", '{"id": "g1"}\n', ":1"),
        ("metadata.jsonl", "cut o", ":1"),
        ("config.yaml", "a: [", ""),
        ("config.yaml", "a: 1", ""),
    ):
        (tmp_path / "run" / name).write_text(text)
        code, said = cli(*here, "id=g1", entry="replay")
        assert code == 2 and f"{name}{where}: " in said and "Traceback" not in said
        (tmp_path / "run" / "metadata.jsonl").unlink(missing_ok=True)


def test_replay_is_by_the_program_that_made_the_row(cli, golden, tmp_path, monkeypatch):
    """And not by that of the run's last start."""
    rows = (golden / "dev.jsonl").read_text().splitlines(keepends=True)[:3]
    manifest = tmp_path / "rows.jsonl"
    for count, size in ((1, 1), (3, 2)):
        manifest.write_text("".join(rows[:count]))
        assert cli(*flags(golden, tmp_path, manifest=manifest, per_device_batch_size=size))[0] == 0
    assert [record["per_device_batch_size"] for record in metadata(tmp_path / "run")] == [1, 2, 2]
    sizes = []
    denoise = Pipeline.denoise
    monkeypatch.setattr(
        Pipeline, "denoise", lambda self, rows, *rest: (sizes.append(len(rows)), denoise(self, rows, *rest))[1]
    )
    for words in (
        ["id=g0"],
        ["id=g1"],
        ["id=g1", "sharding=ddp", "ici_data_parallelism=2"],
        ["id=g1", "per_device_batch_size=3"],
    ):
        assert cli(f"output_dir={tmp_path}", "run_name=run", *words, entry="replay")[0] == 0
    assert sizes == [1, 2, 4, 3]


def test_replay_tells_rounding_from_another_picture(cli, golden, tmp_path):
    assert cli(*flags(golden, tmp_path, prompt="a fox", resolution=32, num_inference_steps=1))[0] == 0
    (record,), picture = metadata(tmp_path / "run"), pixels(tmp_path / "run" / "flux_0.png")
    for level, wanted, code in (
        (1, "the same to rounding: largest difference 1 of 255", 0),
        (2, "largest difference 2 of 255", 3),
    ):
        other = picture.copy()
        other[0, 0, 0] += level if other[0, 0, 0] < 128 else -level
        Image.fromarray(other).save(tmp_path / "run" / "flux_0.png")
        line = json.dumps(record | {"sha256": pixel_sha256(other), "device_count": 9})
        (tmp_path / "run" / "metadata.jsonl").write_text(line + "\n")
        got, said = cli(f"output_dir={tmp_path}", "run_name=run", "id=0", entry="replay")
        assert got == code and wanted in said and "device_count: 9 → 1" in said


def test_replay_looks_at_the_image_too(cli, golden, tmp_path):
    assert cli(*flags(golden, tmp_path, prompt="a fox", resolution=32, num_inference_steps=1))[0] == 0
    file = tmp_path / "run" / "flux_0.png"
    Image.fromarray(255 - pixels(file)).save(file)
    code, said = cli(f"output_dir={tmp_path}", "run_name=run", "id=0", entry="replay")
    assert code == 3 and "the same pixels" in said and "flux_0.png is damaged: other pixels" in said
    file.unlink()
    code, said = cli(f"output_dir={tmp_path}", "run_name=run", "id=0", entry="replay")
    assert code == 3 and "flux_0.png is not there" in said


def test_replay_does_without_the_other_machines_cache(cli, golden, tmp_path):
    cli(*flags(golden, tmp_path, prompt="x", resolution=16, num_inference_steps=1))
    config, here = tmp_path / "run" / "config.yaml", [f"output_dir={tmp_path}", "run_name=run", "id=0"]
    config.write_text(re.sub("jax_cache_dir: .*", "jax_cache_dir: /dev/null/xla", config.read_text()))
    assert cli(*here, entry="replay")[0] == 0
    code, said = cli(*here, "jax_cache_dir=/dev/null/here", entry="replay")
    assert code == 2 and "jax_cache_dir=/dev/null/here: not a directory" in said


def test_replay_is_told_where_things_are_now_and_nothing_else(cli, golden, tmp_path):
    model = shutil.copytree(golden / "dev", tmp_path / "model")
    assert (
        cli(
            *flags(
                golden,
                tmp_path,
                prompt="a fox",
                resolution=32,
                num_inference_steps=1,
                pretrained_model_name_or_path=model,
            )
        )[0]
        == 0
    )
    here = [f"output_dir={tmp_path}", "run_name=run", "id=0"]
    model = model.rename(tmp_path / "moved")
    code, said = cli(*here, entry="replay")
    assert code == 2 and "pretrained_model_name_or_path" in said
    code, said = cli(*here, f"pretrained_model_name_or_path={model}", "hardware=cpu", entry="replay")
    assert code == 0 and "the same pixels" in said
    for word in ("seed=3", "sampler=mini", "weights_dtype=bfloat16", "prompt=a cat", "model=flux-mini"):
        code, said = cli(*here, word, entry="replay")
        assert code == 2 and f"{word.partition('=')[0]}=" in said and "decides the picture" in said


def test_single_prompt_and_formats(cli, golden, tmp_path):
    for form in ("png", "jpeg", "webp"):
        args = flags(
            golden,
            tmp_path,
            form,
            prompt="a cat, (sitting) = 3: 'x'",
            resolution=32,
            num_inference_steps=1,
            output=form,
        )
        assert cli(*args)[0] == 0
        (record,) = metadata(tmp_path / form)
        assert record["prompt"] == "a cat, (sitting) = 3: 'x'"
        assert record["quality"] == (100 if form == "png" else 95)
        assert pixels(tmp_path / form / record["file_name"]).shape == (32, 32, 3)


def test_a_run_has_one_quality_where_the_format_loses_some(cli, golden, tmp_path):
    for form, refused in (("png", False), ("jpeg", True), ("webp", True)):
        args = flags(golden, tmp_path, form, prompt="a cat", resolution=32, num_inference_steps=1, output=form)
        assert cli(*args, "quality=95")[0] == 0
        code, err = cli(*args, "quality=5")
        assert (code, "quality: 95 → 5" in err) == ((2, True) if refused else (0, False))


def test_non_finite_rows_are_set_aside(cli, golden, tmp_path):
    """T5 has lost its letter z: what says it has no picture, its neighbours in the batch have theirs."""
    checkpoint = shutil.copytree(golden / "dev", tmp_path / "model")
    file = checkpoint / "text_encoder_2" / "model.safetensors"
    tensors = load_file(file)
    tensors["shared.weight"][4 + ord("z") - 33] = np.nan
    save_file(tensors, file)
    manifest = tmp_path / "rows.jsonl"
    manifest.write_text(
        '{"prompt": "a cat", "id": "good"}\n{"prompt": "a zebra", "id": "bad"}\n{"prompt": "a dog", "id": "too"}\n'
    )
    args = flags(golden, tmp_path, manifest=manifest, resolution=32, num_inference_steps=1, per_device_batch_size=3)
    whole = images(tmp_path / "whole") if cli(*args, "run_name=whole")[0] == 0 else {}
    code, _ = cli(*args, f"pretrained_model_name_or_path={checkpoint}")
    assert code == 3
    made = images(tmp_path / "run")
    assert made.keys() == {"good", "too"} and all(np.array_equal(made[key], whole[key]) for key in made)
    (reject,) = (json.loads(line) for line in (tmp_path / "run" / "rejects.jsonl").read_text().splitlines())
    assert reject["id"] == "bad" and reject["where"].endswith("rows.jsonl:2") and "finite" in reject["reason"]
    assert json.loads((tmp_path / "run" / "status.json").read_text())["exit_code"] == 3
    assert not (tmp_path / "run" / "flux_1.png").exists()


def test_multirun_gives_each_job_a_directory(cli, golden, tmp_path):
    """And a page of them all, whatever else lies beside them."""
    args = flags(golden, tmp_path, "sweep", prompt="a fox", resolution=32)
    for name, text in (("theirs", "!!python/name:os.sep"), ("other", "- a\n"), ("third", "sweep: {x: 1}\n")):
        (tmp_path / "sweep" / name).mkdir(parents=True)
        (tmp_path / "sweep" / name / "config.yaml").write_text(text)
    code, _ = cli("--multirun", *args, "num_inference_steps=1,2")
    assert code == 0 and "third" not in (tmp_path / "sweep" / "index.html").read_text()
    steps = [metadata(tmp_path / "sweep" / f"num_inference_steps={n}")[0]["num_inference_steps"] for n in (1, 2)]
    assert steps == [1, 2]
    assert (tmp_path / "sweep" / "index.html").exists()


@pytest.mark.parametrize("args,words", [
    (["pretrained_model_name_or_path=nowhere"], ["nowhere"]),
    (["resolution=33"], ["33"]),
    (["attention=flash"], ["flash", "TPU"]),
    (["attention=cudnn_flash_te"], ["cudnn_flash_te", "GPU"]),
    (["hardware=tpu"], ["tpu"]),
    (["ici_data_parallelism=16"], ["16", "8"]),
    (["lora_config.lora_model_name_or_path=[nowhere.safetensors]", "lora_config.weight_name=[null]", "lora_config.adapter_name=[a]",
      "lora_config.scale=[1.0]", "lora_config.from_pt=[true]"], ["nowhere.safetensors"]),
])  # fmt: skip
def test_mistakes_stop_before_weights(cli, golden, tmp_path, monkeypatch, args, words):
    from fluxbatch.weights import load

    monkeypatch.setattr(load, "load", lambda *a: pytest.fail("weights were read"))
    code, err = cli(*flags(golden, tmp_path, prompt="a fox", resolution=32), *args)
    assert code == 2
    assert all(word in err for word in words), err
    assert "Traceback" not in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "run" / "metadata.jsonl").exists()


def test_a_gpu_that_is_not_there_is_one_line(tmp_path):
    """In a process of its own: JAX looks for devices once."""
    command = [sys.executable, "-m", "fluxbatch.run", "prompt=a fox", "hardware=gpu", f"output_dir={tmp_path}"]
    done = subprocess.run(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if line.startswith("fluxbatch: error")]
    assert (
        done.returncode == 2
        and len(said) == 1
        and said[0].startswith("fluxbatch: error: hardware=gpu: JAX finds none here: ")
    )
    assert "Traceback" not in done.stderr


def test_parti_prompts(cli, golden, tmp_path):
    """Real prompts, where they are at hand."""
    parti = next(
        (p / "shared/data/PartiPrompts.tsv" for p in golden.parents if (p / "shared/data/PartiPrompts.tsv").exists()),
        None,
    )
    if parti is None:
        pytest.skip("PartiPrompts is not here")
    lines = parti.read_text().splitlines(keepends=True)
    (tmp_path / "parti.tsv").write_text("".join(lines[:1] + lines[100:1600:37]))
    code, _ = cli(
        *flags(
            golden,
            tmp_path,
            manifest=tmp_path / "parti.tsv",
            resolution=32,
            num_inference_steps=2,
            per_device_batch_size=8,
        )
    )
    records = metadata(tmp_path / "run")
    assert code == 0 and len(records) >= 40 and {"Category", "Challenge"} <= records[0].keys()
