"""One denoising step of a full-size FLUX, block by block, and the memory it took.

python jobs/weights/random_model.py DIR                       # 24 GB
python jobs/weights/one_step.py DIR/flux1-random.safetensors
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import numpy as np

from fluxbatch.distributed.mesh import make_mesh
from fluxbatch.generation.observer import ProgressObserver
from fluxbatch.generation.pipeline import Pipeline
from fluxbatch.models import attention
from fluxbatch.models.autoencoder import VaeConfig
from fluxbatch.models.flux1.definition import Flux1, PromptEmbeds
from fluxbatch.models.flux1.transformer import Flux, FluxConfig
from fluxbatch.models.key_tables import shapes_of
from fluxbatch.types import Row
from fluxbatch.weights import load, single_files
from fluxbatch.weights.block_streaming import StreamedWeights
from fluxbatch.weights.headers import read_header
from fluxbatch.weights.source import Source


class Nothing:
    """Stands for the VAE: a step needs none."""

    missing, here = 0, True

    def load(self, progress) -> None: ...

    def parts(self) -> None: ...


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("--side", type=int, default=128, help="pixels")
    parser.add_argument("--words", type=int, default=128, help="text tokens")
    args = parser.parse_args()
    start = time.perf_counter()
    folder, name = os.path.split(os.path.abspath(args.file))
    source = Source(folder)
    component = Flux1.components["transformer"]
    tensors, table, _ = single_files.recognise(component, read_header(source, name))
    sizes = component.sizes(*shapes_of(tensors, table))
    config = FluxConfig.from_json(component.constants(sizes) | sizes)
    plan = load.plan(
        lambda rngs: Flux(config, rngs=rngs, attention=attention.by_name("auto", "cpu", "bfloat16")),
        tensors,
        table,
        source,
    )
    print(f"opened and planned: {plan.nbytes:,} bytes of weights in {time.perf_counter() - start:.1f} s")

    mesh = make_mesh((1, 1))
    vae = VaeConfig(config.in_channels // 4, (8, 8, 8, 8), 1, 4, 1.0, 0.0, False, False, False)  # only its scale counts
    networks = {"transformer": StreamedWeights(plan, mesh, "bfloat16", {}), "vae": Nothing()}
    family = Flux1({"transformer": config, "text_encoder": None, "text_encoder_2": None, "vae": vae})
    pipeline = Pipeline(
        family,
        networks,
        mesh,
        "bfloat16",
        family.scheduler(family.published_scheduler(), None, None, None),
        ProgressObserver(),
    )
    rng = np.random.default_rng(0)
    text, pooled = (
        rng.standard_normal((1, *shape), np.float32)
        for shape in ((args.words, config.joint_attention_dim), (config.pooled_projection_dim,))
    )
    row = Row(0, "0", "", "", 0, args.side, args.side, 1, 3.5)
    for step in range(2):  # the second one compiles nothing
        start = time.perf_counter()
        out = pipeline.denoise([row], [PromptEmbeds(text, pooled)])
        finite = bool(np.isfinite(out).all())
        print(f"step {step}: {time.perf_counter() - start:.1f} s, {out.shape} {'finite' if finite else 'NOT FINITE'}")
    with open("/proc/self/status") as status:
        peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    print(f"resident memory at most {peak / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
