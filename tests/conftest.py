"""What the tests share: eight CPU devices, the golden checkpoints, and the command line in-process."""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import sys
from importlib.metadata import version

# Before JAX starts: sharded runs need devices to shard over; other tests use the first one.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
if "xla_backend_optimization_level=0" in os.environ["XLA_FLAGS"] and version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] += (
        " --xla_cpu_use_fusion_emitters=false"  # half of what is left of compiling; later ones do not know it
    )
os.environ["HF_HUB_OFFLINE"] = "1"
# What one test has compiled the next one need not compile, nor the next time.
CACHE = pathlib.Path(__file__).parents[1] / ".pytest_cache/xla"
os.environ |= {"JAX_COMPILATION_CACHE_DIR": str(CACHE), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}

import jaxtyping
import numpy as np
import pytest
from PIL import Image

# Shapes and dtypes that annotations name are checked as programs are traced.
SHAPED = (
    "generation.programs",
    "models.attention",
    "models.dit",
    "models.latents",
    "models.step_cache",
)
jaxtyping.install_import_hook([f"fluxbatch.{module}" for module in SHAPED], "beartype.beartype")

GOLDEN = pathlib.Path(__file__).parent / "golden"


def xla_flags(devices: int) -> str:
    """Of a process that sees so many CPU devices: the last of equal flags counts."""
    return f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal to noise of two uint8 images, in dB; 99 when they are equal."""
    assert a.shape == b.shape
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return 99.0 if error == 0 else float(10 * np.log10(255**2 / error))


def pixels(path: pathlib.Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def metadata(folder: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def images(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Pixels by row id."""
    return {record["id"]: pixels(folder / record["file_name"]) for record in metadata(folder)}


def filled(module):
    """A module without values, given some. (JAX compiles a program for each shape that it draws, for seconds.)"""
    import jax
    from flax import nnx

    rng = np.random.default_rng(1)
    graph, state = nnx.split(module)
    return nnx.merge(graph, jax.tree.map(lambda x: jax.numpy.asarray(rng.normal(0, 0.2, x.shape), "float32"), state))


@pytest.fixture
def golden() -> pathlib.Path:
    return GOLDEN


@pytest.fixture
def cli(monkeypatch, capsys):
    """Runs ``python -m fluxbatch.ENTRY ARGS`` in this process: (exit code, standard error; output)."""
    import jax

    jax.devices()  # the eight, before a plan can take 256

    def call(*args: object, entry: str = "run") -> tuple[int, str]:
        command = importlib.import_module(f"fluxbatch.{entry}")
        words = [*map(str, args)]
        for key, value in {"text_cache_dir": "null", "jax_cache_dir": CACHE}.items() if entry == "run" else ():
            if not any(word.startswith(f"{key}=") for word in words):  # every test encodes its prompts
                words.append(f"{key}={value}")
        monkeypatch.setattr(sys, "argv", [f"fluxbatch.{entry}", *words])
        with pytest.raises(SystemExit) as stop:
            command.main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), err if entry == "run" else err + out

    return call
