"""One denoising step of FLUX.1 for a TPU slice that is not here: what libtpu's compiler expects of it.

    python jobs/bench/tpu.py v6e-4 --sharding ddp fsdp        # needs fluxbatch[tpu]; three minutes and twelve

Milliseconds are the sum of the cycles that the compiler writes beside each instruction, an estimate. It writes none beside
Splash, whose FLOPs are counted at half the peak, and none beside waits for collectives. Synchronous collectives are those
that nothing is computed beside.
"""

from __future__ import annotations

import argparse
import collections
import math
import os
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from fluxbatch import aot

os.environ.update(aot.ENVIRONMENT)

import jax
from flax import nnx
from omegaconf import OmegaConf

from fluxbatch import chips, flops
from fluxbatch.dist.hosts import tell_compiler
from fluxbatch.dist.mesh import AXES, Layout, open_mesh
from fluxbatch.models import attention
from fluxbatch.models.flux import Flux, FluxConfig
from fluxbatch.models.vae import Decoder, VaeConfig
from fluxbatch.pipeline import Pipeline, Watcher
from fluxbatch.weights.load import Plan
from fluxbatch.weights.network import Network

CONF = Path(__file__).parents[2] / "conf"
DEV = FluxConfig(64, 64, 19, 38, 24, 128, 4096, 768, True, (16, 56, 56))
VAE = VaeConfig(16, (128, 256, 512, 512), 2, 32, 0.3611, 0.1159, True, False, False)
MXU = {"v4": 262144, "v5e": 131072, "v5p": 262144, "v6e": 524288}  # FLOPs of a cycle
COLLECTIVE = r"all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
SIZES = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4, "pred": 1, "u8": 1}


def compiled(target: chips.Target, sharding: str, side: int, text: int, images: int) -> jax.stages.Compiled:
    """The program that denoises, of a run with ``images`` on each chip."""
    devices = aot.devices(target)
    choice = OmegaConf.load(CONF / "sharding" / f"{sharding}.yaml")
    choice = choice.get("sharding", choice)
    axes = [choice.get(f"ici_{axis}_parallelism", 1) for axis in AXES]
    mesh = open_mesh(axes, (1, 1), devices)
    layout = Layout(mesh if mesh.size > 1 else None)
    attend = attention.by_name("flash", "tpu", "bfloat16", None, devices[0].device_kind)

    def network(module: nnx.Module) -> Network:
        graph, state = nnx.split(module)
        return Network(Plan(None, graph, state, {}), mesh, "bfloat16", {})

    networks = {"flux": network(Flux(DEV, rngs=None, attention=layout.attention(attend), layout=layout)), "vae": network(Decoder(VAE, rngs=None, layout=layout))}
    pipeline = Pipeline(networks, DEV, VAE, mesh, "bfloat16", None, Watcher())
    ways = math.prod(mesh.shape[axis] for axis in ("data", "fsdp"))
    programs = pipeline.programs(images * ways, (77, text), side, side, ("denoise",))
    return next(lowered for name, lowered in programs if name == "denoise").compile()


def bytes_of(shape: str) -> int:
    return sum(SIZES.get(kind, 2) * math.prod(map(int, dims.split(",") if dims else ())) for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape))


def one_step(hlo: str) -> tuple[int, collections.Counter[str]]:
    """Cycles of one turn of the loop over steps, and bytes by kind of collective."""
    computations: dict[str, list[str]] = {}
    body: list[str] = []  # what stands before the first
    for line in hlo.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            body = computations[head[1]] = []
        elif " = " in line:
            body.append(line)
    entry = re.search(r"^ENTRY %?([\w.\-]+)", hlo, re.MULTILINE)[1]

    def cost(name: str) -> tuple[int, collections.Counter[str]]:
        cycles, moved = 0, collections.Counter()
        for line in computations.get(name, ()):
            instruction = re.match(r".*? = (\(.*?\)|\S+) ([\w\-]+)\(", line)
            shape, op = instruction.groups() if instruction else ("", "")
            if op == "while":
                inner, more = cost(re.search(r"body=%?([\w.\-]+)", line)[1])
                until = "\n".join(computations[re.search(r"condition=%?([\w.\-]+)", line)[1]])
                turns = int((re.search(r"constant\((\d+)\)", until) or ("", 1))[1])  # of the loop over steps it is data: one
                cycles += turns * inner
                moved.update({kind: turns * size for kind, size in more.items()})
                continue
            if op in ("call", "async-start") and (called := re.search(r"(?:to_apply|calls)=%?([\w.\-]+)", line)):
                inner, more = cost(called[1])
                cycles += inner if op == "call" else 0
                moved.update(more if op == "call" else {kind.replace("synchronous", "asynchronous"): size for kind, size in more.items()})
                continue
            if found := re.search(r'"estimated_cycles":"(\d+)"', line):
                cycles += int(found[1])
            if kind := re.match(COLLECTIVE, op):
                start = op.endswith("-start")
                if not op.endswith("-done"):
                    moved[f"{kind[0]}, {'asynchronous' if start else 'synchronous'}"] += bytes_of(shape) // (2 if start else 1)
            elif "%async-collective-done" in line.partition(" = ")[0]:  # in parts, each fused with some computation
                moved["all-gather, asynchronous"] += bytes_of(shape)
        return cycles, moved

    return cost(entry)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target")
    parser.add_argument("--sharding", nargs="+", default=["ddp", "fsdp"])
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--text", type=int, default=512)
    parser.add_argument("--images", type=int, default=1, help="a chip")
    parser.add_argument("--save", help="directory for the compiled text")
    args = parser.parse_args()
    target = chips.target(args.target)
    hertz = target.chip.peak * 1e12 / MXU[target.chip.name]
    tell_compiler([], OmegaConf.load(CONF / "hardware/auto.yaml").libtpu_init_args)
    for sharding in args.sharding:
        start = time.monotonic()
        program = compiled(target, sharding, args.side, args.text, args.images)
        text = program.as_text()
        if args.save:
            Path(args.save, f"{target.name}-{sharding}.txt").write_text(text)
        cycles, moved = one_step(text)
        found = program.memory_analysis()
        tokens = (args.side // 16) ** 2
        splash = 2 * args.images * flops.flux_attention(DEV, tokens, args.text) / target.chip.peak / 1e12
        print(f"{target.name} {sharding}: {(cycles / hertz + splash) * 1e3:.0f} ms a step ({splash * 1e3:.0f} of them Splash), {found.argument_size_in_bytes / 2**30:.2f} GiB of arguments, "
              f"{found.temp_size_in_bytes / 2**30:.2f} GiB temporary; compiled in {time.monotonic() - start:.0f} s")  # fmt: skip
        for kind, size in sorted(moved.items()):
            print(f"    {kind}: {size / 2**30:.2f} GiB a step")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
