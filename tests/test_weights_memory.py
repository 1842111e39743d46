"""Weights pass through a small window: host memory, and bytes read, by TensorStore's count."""

from __future__ import annotations

import importlib.util
import math
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from test_weights_layouts import web  # noqa: F401

from fluxbatch.models.flux1.definition import Flux1
from fluxbatch.models.flux1.transformer import Flux, FluxConfig
from fluxbatch.models.key_tables import shapes_of
from fluxbatch.weights import load, single_files
from fluxbatch.weights.source import Source, Tensor

JOB = pathlib.Path(__file__).parents[1] / "jobs/weights"
ALLOWED = load.IN_FLIGHT + (128 << 20)

TRANSFORMER = Flux1.components["transformer"]


def script(name):
    spec = importlib.util.spec_from_file_location(f"weights_{name}", JOB / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bench, random_model = script("bench"), script("random_model")


def written(folder, gigabytes):
    file = folder / "flux1-random.safetensors"
    random_model.write(file, random_model.flux_shapes(*random_model.shape_of(gigabytes)))
    return file


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("random")
    yield written(folder, 0.4)
    shutil.rmtree(folder)  # pytest would keep it


def check(result, header=1 << 20):
    assert result["extra"] <= ALLOWED, result
    # `owned` is in bfloat16, as the file is
    assert result["read"] <= 1.01 * result["owned"] + header, result


def test_memory_and_bytes_on_eight_devices(small):
    (result,) = bench.in_process("fluxbatch", small, "1,8", devices=8)
    check(result)
    shapes = random_model.flux_shapes(*random_model.shape_of(0.4)).values()
    vectors = 2 * sum(math.prod(shape) for shape in shapes if len(shape) == 1)  # every device has all of them
    assert result["owned"] == result["bytes"] and result["arrays"] == result["bytes"] + 7 * vectors


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_each_process_reads_what_it_owns(small, processes):
    results = bench.in_process("fluxbatch", small, "1,8", devices=8, processes=processes)
    for result in results:
        check(result)
        assert result["owned"] <= 1.02 * result["bytes"] / processes


@pytest.mark.slow
@pytest.mark.parametrize("gigabytes", [2, 8])
def test_memory_does_not_grow_with_the_checkpoint(tmp_path, gigabytes):
    file = written(tmp_path, gigabytes)
    try:
        check(*bench.in_process("fluxbatch", file, "1,8", devices=8))
    finally:
        file.unlink()


@pytest.mark.slow
def test_a_converted_copy_too(small):
    copy = bench.converted(small)
    check(*bench.in_process("converted", copy, "1,8", devices=8))
    for result in bench.in_process("converted", copy, "1,8", devices=8, processes=2):
        check(result)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fluxbatch", "converted"])
def test_over_the_network_too(tmp_path, web, method):  # noqa: F811
    file = written(tmp_path, 0.4)
    place = file if method == "fluxbatch" else bench.converted(file)
    try:
        for result in bench.in_process(method, f"{web}/{place.relative_to(tmp_path)}", "1,8", devices=8, processes=2):
            check(result)
            assert result["read"] >= result["owned"]
    finally:
        shutil.rmtree(tmp_path)


@pytest.mark.slow
def test_a_step_block_by_block(small):
    """What jobs/weights tells to do at full size."""
    command = [sys.executable, str(JOB / "one_step.py"), str(small), "--side", "64", "--words", "16"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" finite") == 2 and "resident memory at most" in done.stdout, done.stdout


@pytest.mark.parametrize("guidance", [True, False])
def test_the_full_size_is_covered(guidance):
    """Black Forest Labs' files of dev and schnell: every key used, every parameter filled, without weights."""
    shapes = random_model.flux_shapes(3072, 19, 38, guidance)
    tensors = {name: Tensor(name, "f", np.dtype("float16"), shape, 0, 0) for name, shape in shapes.items()}
    own, table, _ = single_files.recognise(TRANSFORMER, tensors)
    sizes = TRANSFORMER.sizes(*shapes_of(own, table))
    config = FluxConfig.from_json(TRANSFORMER.constants(sizes) | sizes)
    plan = load.plan(lambda rngs: Flux(config, rngs=rngs), own, table, Source("/"))
    assert config.num_attention_heads == 24 and config.guidance_embeds == guidance
    assert plan.nbytes == 2 * (11_901_408_320 if guidance else 11_891_178_560)
