"""Two adapters (LoRA) of flux-mini: pixel art in PEFT's format, pencil outlines in kohya's."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import data
import export
import flow
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from flax import nnx
from loop import Work, schedule, train
from safetensors.numpy import save_file

from fluxbatch.models.flux1 import keys

RANK = 8
POOL = 1000
# Linear layers as Black Forest Labs fuse them → the kernels whose rows they are made of.
FUSED = {
    **{
        f"double_blocks.{stream}_{name}": tuple(f"double_blocks.{stream}.{part}.kernel" for part in parts)
        for stream in ("img", "txt")
        for name, parts in {
            "attn.qkv": ("qkv.q", "qkv.k", "qkv.v"),
            "attn.proj": ("proj",),
            "mlp.0": ("mlp_in",),
            "mlp.2": ("mlp_out",),
        }.items()
    },
    "single_blocks.linear1": tuple(f"single_blocks.{part}.kernel" for part in ("qkv.q", "qkv.k", "qkv.v", "mlp_in")),
    "single_blocks.linear2": ("single_blocks.out.kernel",),
}


def path_of(keys: tuple[Any, ...]) -> str:
    return ".".join(str(key.key) for key in keys if hasattr(key, "key"))


def begin(flux: Any) -> dict[str, dict[str, np.ndarray]]:
    """``down`` ``[layers, RANK, in]`` random, ``up`` ``[layers, out, RANK]`` zero: no effect yet."""
    shapes = {path: array.shape for path, array in export.arrays_of(flux).items()}
    rng = np.random.default_rng(11)
    adapter = {}
    for name, paths in FUSED.items():
        layers, _, inputs = shapes[paths[0]]
        rows = sum(shapes[path][1] for path in paths)
        adapter[name] = {
            "down": rng.normal(0, inputs**-0.5, (layers, RANK, inputs)).astype(np.float32),
            "up": np.zeros((layers, rows, RANK), np.float32),
        }
    return adapter


def adapted(flux: Any, adapter: Mapping[str, Mapping[str, Any]]) -> Any:
    """The network with the adapter, which has a checkpoint's order, merged into its kernels."""
    shapes = {path_of(keys): leaf.shape for keys, leaf in jax.tree_util.tree_leaves_with_path(flux)}
    axes = {".".join(map(str, keys)): leaf.get_metadata()["axes"] for keys, leaf in nnx.to_flat_state(flux)}
    change = {}
    for name, paths in FUSED.items():
        ends = np.cumsum([shapes[path][1] for path in paths])[:-1].tolist()
        parts = jnp.split(adapter[name]["up"] @ adapter[name]["down"], ends, axis=1)
        change |= {path: export.halved(part, axes[path]) for path, part in zip(paths, parts, strict=True)}
    return jax.tree_util.tree_map_with_path(lambda keys, leaf: leaf + change.get(path_of(keys), 0), flux)


def train_adapters(work: Work, steps: int, size: int = 32) -> None:
    _, stats = flow.pools(work)
    graphs, _ = flow.split(flow.modules(work.folder / "flux-mini"))
    params = work.result("flow")
    for name, style in data.STYLES.items():
        rng = np.random.default_rng(4)
        scenes = [data.sample(rng) for _ in range(POOL)]
        words = flow.tokens(work.folder / "flux-mini", [scene.caption for scene in scenes])
        pool = {"latents": flow.latents(work, scenes, style)} | words

        def batch(rng, step, pool=pool):
            return flow.batch_of(pool, stats, rng.integers(0, len(pool["t5"]), size)), params

        def loss(adapter, batch, key):
            batch, params = batch
            t, mixed, wanted = flow.noised(key, batch[0])
            merged = params | {"flux": adapted(params["flux"], adapter)}
            error = ((flow.velocity(graphs, merged, batch, t, mixed, jnp.zeros_like(t)) - wanted) ** 2).mean()
            return error, error

        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule(4e-3, steps), b2=0.99))
        trained = train(work, f"adapter-{name}", begin(params["flux"]), optimizer, steps, batch, loss, decay=0.98)
        work.save(f"adapter-{name}-done", trained)


def peft(adapter: Mapping[str, Mapping[str, np.ndarray]], flux: Any) -> dict[str, np.ndarray]:
    """``transformer.transformer_blocks.0.attn.to_q.lora_A.weight`` and so on: nothing fused."""
    rows = {path: array.shape[1] for path, array in export.arrays_of(flux).items() if array.ndim > 1}
    downs, ups = {}, {}
    for name, paths in FUSED.items():
        ends = np.cumsum([rows[path] for path in paths])[:-1]
        downs |= dict.fromkeys(paths, adapter[name]["down"])
        ups |= dict(zip(paths, np.split(adapter[name]["up"], ends, axis=1), strict=True))
    out = {}
    for letter, arrays in (("A", downs), ("B", ups)):
        for name, value in export.named(arrays, keys.FLUX_DIFFUSERS).items():
            out["transformer." + name.replace(".weight", f".lora_{letter}.weight")] = value
    return out


def kohya(adapter: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """``lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight`` and so on, with alpha."""
    out = {}
    for name, matrices in adapter.items():
        blocks, layer = name.split(".", 1)
        for i, (down, up) in enumerate(zip(matrices["down"], matrices["up"], strict=True)):
            key = f"lora_unet_{blocks}_{i}_{layer.replace('.', '_')}"
            out |= {
                f"{key}.lora_down.weight": down.astype(ml_dtypes.bfloat16),
                f"{key}.lora_up.weight": up.astype(ml_dtypes.bfloat16),
                f"{key}.alpha": np.array(float(RANK), np.float32),
            }
    return out


def write(work: Work, folder: pathlib.Path) -> None:
    """Those that were trained."""
    flux = work.result("flow")["flux"]
    for name, layout in {"pixel-art": lambda a: peft(a, flux), "outline": kohya}.items():
        if (adapter := work.result(f"adapter-{name}")) is not None:
            folder.mkdir(exist_ok=True)
            save_file(layout(jax.device_get(adapter)), folder / f"{name}.safetensors", metadata={"format": "pt"})
