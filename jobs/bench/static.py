"""One denoising step on hardware that is not here, as its compiler has it, or the decoder. Nothing runs.

    python jobs/bench/static.py v6e-4 --sharding ddp fsdp     # FLUX.1-dev; needs fluxbatch[tpu]; a minute and two
    python jobs/bench/static.py v6e-4 --part decode           # three minutes
    python jobs/bench/static.py v5e-1 --model flux2-klein-4b  # any of conf/model that fluxbatch knows the sizes of
    python jobs/bench/static.py v6e-1 --set weights_dtype=int8 matmul_dtype=int8
    python jobs/bench/static.py h100 --images 1 8             # needs jax[cuda12]; 15 seconds

TPU: milliseconds are the sum of the cycles that libtpu writes beside each instruction, an estimate. It writes none
beside Splash, whose FLOPs are counted at half the peak, and none beside waits for collectives. Synchronous collectives
are those that nothing is computed beside. The share of the peak is of the FLOPs that a step needs.

GPU: XLA times no kernel that it cannot run, so this is the memory traffic of those that are neither products nor
attention, which a step pays for beside them, and how long it takes at the memory's full speed.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import math
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from fluxbatch.distributed import chips

os.environ.update(chips.COMPILE_ONLY)

import jax

from fluxbatch.config import application
from fluxbatch.config.schema import Job
from fluxbatch.distributed.backend import set_compiler_flags
from fluxbatch.generation.model_spec import ModelSpec, open_model_spec
from fluxbatch.planning import aot
from fluxbatch.types import PLAIN, UserError
from fluxbatch.weights.published import open_or_known

jax.config.update("jax_platforms", "cpu")  # what is not here must not be looked for
MXU = {"v4": 262144, "v5e": 131072, "v5p": 262144, "v6e": 524288}  # FLOPs of a cycle
COLLECTIVE = r"all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
SPLASH = "Splash"
SIZES = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4, "pred": 1, "u8": 1, "s8": 1}
BANDWIDTH = 3.35e12  # bytes a second of the H100's memory
# What XLA must know of a GPU to compile for it
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def devices(target: chips.Target) -> list[jax.Device]:
    if target.platform == "tpu":
        return aot.devices(target)
    if target.chip is None or target.chip.name != "h100":
        sys.exit(f"static.py: {target.name}: expected a TPU slice or h100, h100-2, …")
    from jax.experimental import topologies

    return list(
        topologies.get_topology_desc(
            platform="cuda", topology_name="", target_config=H100, topology=f"1x1x{target.chips}"
        ).devices
    )


def job_of(model: str, target: chips.Target, sharding: str, text: int, more: Sequence[str]) -> Job:
    """The job that a run would have."""
    found: list[Job] = []
    words = (
        f"model={model}",
        f"hardware={target.platform}",
        f"sharding={sharding}",
        f"max_sequence_length={text}",
        *more,
    )
    with contextlib.suppress(SystemExit):
        application.main(lambda job: found.append(job) or 0, argv=[*words, "prompt=x"])
    return found[0] if found else sys.exit(2)  # it has said why


def compiled(spec: ModelSpec, side: int, images: int, part: str) -> tuple[jax.stages.Compiled, int]:
    """The program that denoises or decodes, of a run with ``images`` on each chip, and the bytes of its temporaries."""
    programs = spec.pipeline().programs(images * spec.data_parallel_size, spec.inputs, side, side, PLAIN, (part,))
    lowered = next(lowered for name, lowered in programs if name == part)
    return aot.compile_counted(lowered, spec.mesh.devices.flat[0].platform)


def bytes_of(shape: str) -> int:
    return sum(
        SIZES.get(kind, 2) * math.prod(map(int, dims.split(",") if dims else ()))
        for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape)
    )


def computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation, and the name of the one that is called from outside."""
    found: dict[str, list[str]] = {}
    body: list[str] = []  # what stands before the first
    for line in hlo.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            body = found[head[1]] = []
        elif " = " in line:
            body.append(line)
    return found, re.search(r"^ENTRY %?([\w.\-]+)", hlo, re.MULTILINE)[1]


def parsed(line: str) -> tuple[str, str, str, str]:
    """An instruction's name, shape, operation and operands."""
    found = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)", line)
    return found.groups() if found else ("", "", "", "")


def called(line: str, what: str) -> str:
    found = re.search(rf"(?:{what})=%?([\w.\-]+)", line)
    return found[1] if found else ""


def one_step(hlo: str) -> tuple[int, collections.Counter[str]]:
    """TPU: cycles of one turn of the loop over steps, and by kind of collective its bytes, by ``SPLASH`` its FLOPs; of
    a program without that loop, of all but what depends on a condition."""
    bodies, entry = computations(hlo)

    def cost(name: str) -> tuple[int, collections.Counter[str]]:
        cycles, moved = 0, collections.Counter()
        begun: dict[str, tuple[int, collections.Counter[str]]] = {}  # on the sparse cores: since which cycle, and what
        for line in bodies.get(name, ()):
            own, shape, op, operands = parsed(line)
            if op == "while":
                inner, more = cost(called(line, "body"))
                until = "\n".join(bodies[called(line, "condition")])
                # of the loop over steps it is data: one
                turns = int((re.search(r"constant\((\d+)\)", until) or ("", 1))[1])
                cycles += turns * inner
                moved.update({kind: turns * size for kind, size in more.items()})
                continue
            if op in ("call", "call-start", "async-start") and (body := called(line, "to_apply|calls")):
                inner, more = cost(body)
                if op == "call":
                    cycles += inner
                    moved.update(more)
                else:
                    begun[own] = cycles, more
                continue
            if (
                op == "call-update" and (start := operands.partition(",")[0].lstrip("%")) in begun
            ):  # it has its operands only now
                begun[own] = cycles, begun.pop(start)[1]
            if op in ("call-done", "async-done") and (start := operands.lstrip("%")) in begun:
                since, more = begun.pop(start)
                moved.update(
                    {
                        kind.replace("synchronous", "asynchronous") if cycles > since else kind: size
                        for kind, size in more.items()
                    }
                )
            if found := re.search(r'"estimated_cycles":"(\d+)"', line):
                cycles += int(found[1])
            if kind := re.match(COLLECTIVE, op):
                start = op.endswith("-start")
                if not op.endswith("-done"):
                    moved[f"{kind[0]}, {'asynchronous' if start else 'synchronous'}"] += bytes_of(shape) // (
                        2 if start else 1
                    )
            elif op == "custom-call" and own.startswith("splash"):
                heads, tokens, width = re.findall(r"\[([\d,]+),(\d+),(\d+)\]", shape)[-1]
                moved[SPLASH] += 4 * math.prod(map(int, heads.split(","))) * int(tokens) ** 2 * int(width)
            elif own.startswith("async-collective-done"):  # in parts, each fused with some computation
                moved["all-gather, asynchronous"] += bytes_of(shape)
        return cycles, moved

    return cost(entry)


def traffic(hlo: str) -> collections.Counter[str]:
    """GPU: bytes that the kernels of one turn of the loop over steps read and write, by what they are."""
    bodies, entry = computations(hlo)
    shapes = {parsed(line)[0]: parsed(line)[1] for body in bodies.values() for line in body}
    free = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant", "")

    def kind(line: str) -> str:
        inside = [line, *bodies.get(called(line, "calls"), ())]
        if any("__cudnn$fmha" in text for text in inside):
            return "attention"
        if any(" dot(" in text or "__cublas" in text for text in inside):
            return "products"
        does = {parsed(text)[2] for text in inside[1:]}
        return "weights copied" if "dynamic-slice" in does and does <= {*free, "dynamic-slice", "copy"} else "others"

    def walk(name: str, turns: int, depth: int) -> collections.Counter[str]:
        moved: collections.Counter[str] = collections.Counter()
        for line in bodies[name]:
            _, shape, op, operands = parsed(line)
            if op == "while":
                count = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                moved.update(walk(called(line, "body"), turns * int(count[1] if count else 1), depth + 1))
            elif op == "call":
                moved.update(walk(called(line, "to_apply"), turns, depth))
            elif depth and op not in free and not op.endswith("-done"):
                what = kind(line)
                written = bytes_of(re.sub(r"^\(\(.*?\), ", "", shape) if op.endswith("-start") else shape)
                read = sum(bytes_of(shapes.get(operand, "")) for operand in re.findall(r"%([\w.\-]+)", operands))
                moved[what] += turns * (2 * written if what == "weights copied" else written + read)
        return moved

    return walk(entry, 1, 0)


def report(
    target: chips.Target, program: jax.stages.Compiled, needed: float, images: int, part: str
) -> tuple[str, list[str]]:
    """The step, or the decoder, in a few words, and lines below it. ``needed``: FLOPs of an image's step."""
    hlo = program.as_text()
    if target.platform == "gpu":
        moved = traffic(hlo)
        beside = moved["weights copied"] + moved["others"]
        return f"{beside / 1e9:.0f} GB moved beside products and attention ({beside / BANDWIDTH * 1e3:.0f} ms)", [
            f"{kind}: {moved[kind] / 1e9:.1f} GB" for kind in ("weights copied", "others")]  # fmt: skip
    cycles, counted = one_step(hlo)
    peak = target.chip.peak * 1e12
    seconds, attending = cycles * MXU[target.chip.name] / peak, 2 * counted.pop(SPLASH, 0) / peak
    lines = [f"{kind}: {size / 2**30:.2f} GiB" for kind, size in sorted(counted.items())]
    if part == "decode":
        return f"{seconds * 1e3:.0f} ms to decode", lines
    share = images * needed / (seconds + attending) / peak
    said = f"{attending * 1e3:.0f} of them Splash, {share:.0%} of the peak"
    return f"{(seconds + attending) * 1e3:.0f} ms a step ({said})", lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target")
    parser.add_argument("--model", default="flux-dev", help="of conf/model")
    parser.add_argument("--sharding", nargs="+", default=["ddp"])
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--text", type=int, default=512)
    parser.add_argument("--images", type=int, nargs="+", default=[1], help="a chip")
    parser.add_argument("--part", choices=["denoise", "decode"], default="denoise", help="decode: of a TPU")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="other keys of a run")
    parser.add_argument("--save", help="directory for the compiled text")
    args = parser.parse_args()
    try:
        target = chips.target(args.target)
    except UserError as error:
        sys.exit(f"static.py: {error}")
    if args.part == "decode" and target.platform != "tpu":
        sys.exit(f"static.py: --part decode: expected a TPU slice, got {target.name}")
    jobs = {sharding: job_of(args.model, target, sharding, args.text, args.set) for sharding in args.sharding}
    hardware = jobs[args.sharding[0]].hardware
    set_compiler_flags(hardware.xla_flags, hardware.libtpu_init_args)  # which libtpu reads as it starts
    found = devices(target)
    for sharding, job in jobs.items():
        spec = open_model_spec(job, target.platform, found, target.hosts, open_or_known)
        needed = spec.family.step_flops(args.side, args.side, spec.inputs) / (
            spec.mesh.shape["tensor"] * spec.mesh.shape["context"]
        )
        for images in args.images:
            start = time.monotonic()
            program, temporaries = compiled(spec, args.side, images, args.part)
            if args.save:
                name = f"{args.model}-{target.name}-{args.part}-{sharding}-{images}.txt"
                Path(args.save).mkdir(parents=True, exist_ok=True)
                Path(args.save, name).write_text(program.as_text())
            held, seconds = program.memory_analysis(), time.monotonic() - start
            said, lines = report(target, program, needed, images, args.part)
            print(
                f"{args.model} on {target.name} {sharding}, {images} at once a chip: {said}, "
                f"{held.argument_size_in_bytes / 2**30:.2f} GiB of arguments, "
                f"{temporaries / 2**30:.2f} GiB temporary; compiled in {seconds:.0f} s",
                *lines,
                sep="\n    ",
                flush=True,
            )


if __name__ == "__main__":
    main()
