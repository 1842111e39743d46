"""One training loop for all stages: Muon, a moving average, and saving often enough."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import pickle
import time
from collections.abc import Callable
from typing import Any

import data
import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, muon

SAVE_SECONDS = 120


@dataclasses.dataclass
class Work:
    """The working directory: saved states and the finished checkpoint."""

    folder: pathlib.Path
    pixels: int

    def save(self, name: str, value: Any) -> None:
        temporary = self.folder / f"{name}.tmp"
        temporary.write_bytes(pickle.dumps(jax.device_get(value)))
        os.replace(temporary, self.folder / f"{name}.pkl")

    def load(self, name: str) -> Any:
        path = self.folder / f"{name}.pkl"
        return pickle.loads(path.read_bytes()) if path.exists() else None

    def result(self, name: str) -> Any:
        """What a stage has trained: its end, or its average so far; None when it was not begun."""
        done, state = self.load(f"{name}-done"), self.load(name)
        trained = state["average"] if done is None and state else done
        return jax.tree.map(jnp.asarray, trained)

    def draw(
        self, scenes: list[data.Scene], style: Callable[[np.ndarray], np.ndarray] = lambda image: image
    ) -> np.ndarray:
        """``[B, h, w, 3]`` float32 in -1..1, shrunk from 128 to ``pixels`` on the short side."""
        images = np.stack([style(data.render(scene)) for scene in scenes]).astype(np.float32) / 127.5 - 1
        by = 128 // self.pixels
        b, h, w, _ = images.shape
        return images.reshape(b, h // by, by, w // by, by, 3).mean((2, 4))


def report(step: int, started: float, **figures: float) -> None:
    print(step, f"{time.monotonic() - started:.0f}s", *(f"{k}={v:.4f}" for k, v in figures.items()), flush=True)


def train(
    work: Work, name: str, params: Any, optimizer: Any, steps: int, batch: Any, loss: Any, decay: float = 0.0
) -> Any:
    """Minimises ``loss(params, batch, key) → (loss, figure)``; returns the (averaged) parameters."""
    state = {"step": 0, "params": params, "optimizer": optimizer.init(params), "average": params}
    state |= work.load(name) or {}

    @jax.jit
    def update(params, moments, average, batch, key):
        (value, figure), gradient = jax.value_and_grad(loss, has_aux=True)(params, batch, key)
        change, moments = optimizer.update(gradient, moments, params)
        params = optax.apply_updates(params, change)
        return params, moments, optax.incremental_update(params, average, 1 - decay), value, figure

    started = saved = time.monotonic()
    figures = []
    for step in range(state["step"], steps):
        key = jax.random.fold_in(jax.random.key(1), step)
        state["params"], state["optimizer"], state["average"], value, figure = update(
            state["params"], state["optimizer"], state["average"], batch(np.random.default_rng([7, step]), step), key
        )
        figures.append(float(figure))
        if step % 100 == 99:
            report(step + 1, started, loss=float(value), figure=float(np.mean(figures[-100:])))
        if time.monotonic() - saved > SAVE_SECONDS or step == steps - 1:
            state["step"], saved = step + 1, time.monotonic()
            work.save(name, state)
    return state["average"]


def schedule(peak: float, steps: int) -> optax.Schedule:
    """Up, flat, and down to nothing over the last quarter: more ``--steps`` lengthen a run that has begun."""
    up, down = min(200, steps // 10), steps // 4
    return lambda step: peak * jnp.minimum(jnp.minimum(1.0, (step + 1) / up), jnp.maximum(0.0, (steps - step) / down))


def matrices_by_muon(peak: float, adam_peak: float, steps: int) -> optax.GradientTransformation:
    """Muon on every kernel (it needs about half of Adam's steps at this size), Adam on the rest."""

    def dimensions(tree):
        """Inputs and outputs of a kernel: ``[layers, out, in]`` (each layer on its own), ``[out, in, k, k]``."""

        def of(path, p):
            if "kernel" not in str(path):
                return None
            return MuonDimensionNumbers((1, 2, 3), 0) if p.ndim == 4 else MuonDimensionNumbers(p.ndim - 1, p.ndim - 2)

        return jax.tree_util.tree_map_with_path(of, tree)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        muon(
            schedule(peak, steps),
            adam_learning_rate=schedule(adam_peak, steps),
            adam_b2=0.99,
            muon_weight_dimension_numbers=dimensions,
        ),
    )
