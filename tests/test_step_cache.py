"""The step cache: diffusers' first-block cache at batch 1, and for each row of a batch what it would do alone."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import images, metadata, psnr

from fluxbatch.models.step_cache import cached, fresh

STEPS, THRESHOLD = 14, 0.9  # of random weights, whose velocities change more from step to step than learned ones


def rows(count):
    """Rows of other step counts and guidance."""
    return [
        {"id": f"r{i}", "prompt": f"prompt {i}", "seed": i, "height": 32, "width": 32,
         "num_inference_steps": STEPS - i, "guidance_scale": 1.0 + i}
        for i in range(count)
    ]  # fmt: skip


def run(cli, golden, folder, name, manifest, *args, model="dev", code=0):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in manifest))
    status, said = cli(
        f"pretrained_model_name_or_path={golden / model}",
        f"manifest={path}",
        "max_sequence_length=24",
        "hardware=cpu",
        f"output_dir={folder}",
        f"run_name={name}",
        "gallery=false",
        *args,
    )
    assert status == code, said
    if code:
        return said
    return images(folder / name), {line["id"]: line["computed_steps"] for line in metadata(folder / name)}


def cache(threshold=THRESHOLD):
    return "step_cache=first_block", f"step_cache_threshold={threshold}"


def test_each_row_decides_by_its_own_numbers():
    """Row 0 has no cache yet, row 1 changes too much, row 2 does not, row 3 has no such step."""
    shape = (4, 3, 2)
    before, after = jnp.zeros(shape), jnp.ones(shape)
    given = fresh(4, 3, 2, jnp.float32)._replace(
        head=jnp.array([0, 0.5, 0.99, 0.5])[:, None, None] * jnp.ones(shape),
        tail=jnp.full(shape, 7.0),
        computed=jnp.array([0, 1, 2, 3], jnp.int32),
    )
    ran = []

    def rest():
        jax.debug.callback(lambda: ran.append(True))
        return jnp.full(shape, 5.0)

    live = jnp.array([True, True, True, False])
    out, left = cached(before, after, given, jnp.float32(0.05), live, rest)
    jax.effects_barrier()
    assert ran and left.computed.tolist() == [1, 2, 2, 3]
    assert out[:, 0, 0].tolist() == [5, 5, 8, 8]
    assert np.allclose(left.head[:, 0, 0], [1, 1, 0.99, 0.5]) and left.tail[:, 0, 0].tolist() == [4, 4, 7, 7]
    ran.clear()
    out, left = cached(before, after, given, jnp.float32(0.05), jnp.array([False, False, True, False]), rest)
    jax.effects_barrier()
    assert not ran and left.computed.tolist() == [0, 1, 2, 3] and out[2, 0, 0] == 8


def test_a_picture_does_not_depend_on_its_batch(cli, golden, tmp_path):
    """Eight rows at once, and one at a time; the records say what was computed, and files of both are the same."""
    together, computed = run(cli, golden, tmp_path, "eight", rows(8), *cache(), "per_device_batch_size=8")
    alone, counts = run(cli, golden, tmp_path, "one", rows(8), *cache(), "per_device_batch_size=1")
    assert counts == computed
    skipped = [STEPS - i - computed[f"r{i}"] for i in range(8)]
    assert len(set(skipped)) > 3 and sum(skipped) > 15, skipped
    for key, picture in together.items():
        assert np.abs(picture.astype(int) - alone[key].astype(int)).max() <= 1, key
    plain, counts = run(cli, golden, tmp_path, "plain", rows(8), "per_device_batch_size=8")
    assert counts == {f"r{i}": STEPS - i for i in range(8)}
    assert sum(psnr(picture, plain[key]) < 40 for key, picture in together.items()) > 5
    records = metadata(tmp_path / "eight") + metadata(tmp_path / "plain")
    said = {(line["step_cache"], line["step_cache_threshold"]) for line in records}
    assert said == {("first_block", THRESHOLD), ("", 0.0)}


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_nor_on_its_sharding(cli, golden, tmp_path, sharding):
    found, computed = run(cli, golden, tmp_path, sharding, rows(8), *cache(), f"sharding={sharding}")
    plain, counts = run(cli, golden, tmp_path, "single", rows(8), *cache(), "per_device_batch_size=8")
    assert counts == computed
    assert max(np.abs(picture.astype(int) - plain[key].astype(int)).max() for key, picture in found.items()) <= 1


@pytest.mark.slow
def test_without_tolerance_every_step_is_computed(cli, golden, tmp_path):
    found, computed = run(cli, golden, tmp_path, "zero", rows(2), *cache(0))
    plain, counts = run(cli, golden, tmp_path, "plain", rows(2))
    assert counts == computed == {"r0": STEPS, "r1": STEPS - 1}
    assert max(np.abs(picture.astype(int) - plain[key].astype(int)).max() for key, picture in found.items()) <= 1


def test_what_has_no_cache_says_so(cli, golden, tmp_path):
    said = run(cli, golden, tmp_path, "a", rows(1), *cache(), "stream_blocks=true", code=2)
    assert "sampler.step_cache=first_block: expected null with hardware.stream_blocks=true" in said
    said = run(cli, golden, tmp_path, "b", rows(1), *cache(), model="flux2-klein", code=2)
    assert "sampler.step_cache=first_block: expected null" in said and len(said.splitlines()) == 1
    said = run(cli, golden, tmp_path, "c", rows(1), *cache(-1), code=2)
    assert "sampler.step_cache_threshold" in said and "from 0 to 10" in said


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("model", ["dev", "schnell"])
@pytest.mark.parametrize("threshold", [0.05, 0.8, 1.1])
def test_the_pictures_of_diffusers(cli, golden, tmp_path, model, threshold):
    """At batch 1, with the same threshold: at least 50 dB, and as many steps computed."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.FluxPipeline.from_pretrained(golden / model)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=threshold))
    ran = []
    pipe.transformer.single_transformer_blocks[-1].proj_out.register_forward_hook(lambda *_: ran.append(1))
    found, computed = run(cli, golden, tmp_path, "ours", rows(3), *cache(threshold), model=model)
    for row in rows(3):
        ran.clear()
        image = pipe(
            prompt=row["prompt"],
            height=row["height"],
            width=row["width"],
            num_inference_steps=row["num_inference_steps"],
            guidance_scale=row["guidance_scale"],
            max_sequence_length=24,
            generator=torch.Generator().manual_seed(row["seed"]),
            output_type="np",
        ).images[0]
        assert psnr(found[row["id"]], (image * 255).round().astype(np.uint8)) >= 50, row
        assert len(ran) == computed[row["id"]]
    assert threshold < 1 or all(count < STEPS - 4 for count in computed.values()), computed
