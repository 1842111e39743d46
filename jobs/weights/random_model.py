"""Writes a FLUX checkpoint of random weights in Black Forest Labs' layout, a tensor at a time.

    python jobs/weights/random_model.py DIR --width 3072 --double 19 --single 38      # 24 GB, FLUX.1-dev's shape
    python jobs/weights/random_model.py DIR --gigabytes 2                             # fewer and narrower blocks

For measurements: how weights stream does not depend on what they are.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib

import ml_dtypes
import numpy as np

HEAD, JOINT, POOLED, CHANNELS = 128, 4096, 768, 64
BLOCK = 64 << 20  # bytes of random numbers, written again and again


def flux_shapes(width: int, double: int, single: int, guidance: bool = True) -> dict[str, tuple[int, ...]]:
    """Names and shapes of ``flux1-dev.safetensors``."""
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, d_in: int, d_out: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (d_out, d_in), (d_out,)

    linear("img_in", CHANNELS, width)
    linear("txt_in", JOINT, width)
    for name, d_in in {"time_in": 256, "vector_in": POOLED, **({"guidance_in": 256} if guidance else {})}.items():
        linear(f"{name}.in_layer", d_in, width)
        linear(f"{name}.out_layer", width, width)
    for i in range(double):
        for stream in ("img", "txt"):
            at = f"double_blocks.{i}.{stream}_"
            linear(f"{at}mod.lin", width, 6 * width)
            linear(f"{at}attn.qkv", width, 3 * width)
            linear(f"{at}attn.proj", width, width)
            linear(f"{at}mlp.0", width, 4 * width)
            linear(f"{at}mlp.2", 4 * width, width)
            shapes |= {f"{at}attn.norm.{n}_norm.scale": (HEAD,) for n in ("query", "key")}
    for i in range(single):
        at = f"single_blocks.{i}."
        linear(f"{at}modulation.lin", width, 3 * width)
        linear(f"{at}linear1", width, 7 * width)
        linear(f"{at}linear2", 5 * width, width)
        shapes |= {f"{at}norm.{n}_norm.scale": (HEAD,) for n in ("query", "key")}
    linear("final_layer.adaLN_modulation.1", width, 2 * width)
    linear("final_layer.linear", width, CHANNELS)
    return shapes


def write(path: pathlib.Path, shapes: dict[str, tuple[int, ...]], seed: int = 0) -> int:
    """A bfloat16 safetensors file of small random numbers; returns its bytes."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    numbers = np.random.default_rng(seed).standard_normal(BLOCK // 2, np.float32) * np.float32(0.02)
    block = memoryview(numbers.astype(ml_dtypes.bfloat16).view(np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for at in range(0, end, BLOCK):
            file.write(block[: min(BLOCK, end - at)])
    return 8 + len(text) + end


def shape_of(gigabytes: float) -> tuple[int, int, int]:
    """Width, double and single blocks of about that many bytes, FLUX.1's proportions at a third of its width."""
    width = 1024
    per_double, per_single = 36 * width**2 * 2, 15 * width**2 * 2
    double = max(1, round(gigabytes * 1e9 / (per_double + 2 * per_single)))
    return width, double, 2 * double


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dir", type=pathlib.Path)
    parser.add_argument("--gigabytes", type=float)
    parser.add_argument("--width", type=int, default=3072)
    parser.add_argument("--double", type=int, default=19)
    parser.add_argument("--single", type=int, default=38)
    args = parser.parse_args()
    sizes = shape_of(args.gigabytes) if args.gigabytes else (args.width, args.double, args.single)
    size = write(args.dir / "flux1-random.safetensors", flux_shapes(*sizes))
    print(f"{args.dir / 'flux1-random.safetensors'}: {size:,} bytes")
