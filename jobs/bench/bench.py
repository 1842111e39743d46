"""fluxbatch against diffusers on this machine: whole processes, taking turns, and one table.

    python jobs/bench/bench.py                         # CPU: flux-mini and middle; GPU: schnell, dev and klein-4b
    python jobs/bench/bench.py --models dev --batches 1 4 --rounds 2
    python jobs/bench/bench.py --models dev --ways fluxbatch --batches 1 --images 4 --rounds 1 --work /scratch  # and
    again

Same checkpoint, prompts, seeds, steps and dtype (float32 on a CPU, bfloat16 on a GPU); torch eager and compiled. The
first round starts with empty compilation caches, or with those that ``--work`` has kept, the later ones with what it
left. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

HERE = pathlib.Path(__file__).resolve()
ROOT = HERE.parents[2]
PATH = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
WAYS = ("fluxbatch", "eager", "compiled")
THINGS = ("apple", "cat", "boat", "tree", "clock", "house", "star", "fish")
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "pink", "grey")


@dataclasses.dataclass(frozen=True)
class Case:
    """What is drawn: rows of one size."""

    images: int
    side: int
    steps: int
    guidance: float
    text: int  # tokens of a prompt
    batches: tuple[int, ...]
    checkpoint: str  # as random_flux.py calls it
    passes: int = 1  # evaluations a step: two where guidance leads away from a negative prompt


CASES = {
    "flux-mini": Case(64, 128, 4, 0.0, 32, (1, 8, 16), "flux-mini"),
    "tiny": Case(4, 64, 2, 0.0, 32, (2,), "tiny"),
    "heads-6": Case(64, 128, 4, 0.0, 64, (1, 8), "heads-6"),
    "heads-16": Case(16, 256, 4, 0.0, 128, (1, 4), "heads-16"),
    "middle": Case(8, 512, 4, 0.0, 128, (1,), "middle"),
    "schnell": Case(
        48, 1024, 4, 3.5, 256, (1, 4, 8), "dev"
    ),  # with dev's guidance, which is no work worth naming: 34 GB less
    "dev": Case(16, 1024, 28, 3.5, 512, (1, 4, 8), "dev"),
    "klein-tiny": Case(4, 64, 2, 1.0, 128, (2,), "klein-tiny"),
    "klein-4b": Case(48, 1024, 4, 1.0, 512, (1, 4, 8), "klein-4b"),
    "flux3-tiny": Case(4, 64, 2, 1.0, 80, (2,), "flux3-tiny"),
    "flux3-klein": Case(48, 1024, 16, 1.0, 80, (1, 4, 8), "flux3-klein"),
    "z-image-tiny": Case(4, 64, 2, 0.0, 128, (2,), "z-image-tiny"),
    "z-image": Case(48, 1024, 8, 0.0, 512, (1, 4, 8), "z-image"),
    "chroma-tiny": Case(4, 64, 2, 5.0, 32, (2,), "chroma-tiny", 2),
    "chroma": Case(8, 1024, 35, 5.0, 512, (1, 4, 8), "chroma", 2),
    "flux2-dev": Case(8, 1024, 50, 4.0, 512, (1, 4), "flux2-dev"),  # 112 GB of disk, and a GPU of 80 GB and more
}


@dataclasses.dataclass(frozen=True)
class Result:
    """Seconds, images/s and bytes of one process."""

    job: float  # from start to end
    steady: float | None  # images/s after the first batch, by the times at which files were written
    load: float
    peak: int


def fluxbatch_job(argv: list[str]) -> None:
    """One run in this process, which says at its end what of the device it has used."""
    from fluxbatch import run
    from fluxbatch.config import application

    try:
        application.main(run.run, argv=argv)
    except SystemExit as stop:
        import jax

        stats = jax.local_devices()[0].memory_stats() or {}
        print(json.dumps({"peak": stats.get("peak_bytes_in_use"), "versions": f"jax {jax.__version__}"}), flush=True)
        raise SystemExit(stop.code) from None


def once(
    way: str, checkpoint: pathlib.Path, manifest: pathlib.Path, case: Case, batch: int, work: pathlib.Path
) -> tuple[Result, str]:
    """One process from its start to its end; RuntimeError with its last words if it fails."""
    out = work / "out" / "run"
    shutil.rmtree(out.parent, ignore_errors=True)
    if way == "fluxbatch":
        words = {
            "pretrained_model_name_or_path": checkpoint,
            "manifest": manifest,
            "output_dir": out.parent,
            "run_name": out.name,
            "per_device_batch_size": batch,
            "max_sequence_length": case.text,
            "jax_cache_dir": work / "xla",
            "text_cache_dir": "null",
            "filename": "{id}",
            "png_level": 6,
        }
        command = [HERE, "run", *(f"{key}={value}" for key, value in words.items())]
    else:
        command = [HERE.parent / "peer.py", checkpoint, manifest, out, batch, way]
    environment = os.environ | {
        "PYTHONPATH": PATH,
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
        "HF_HUB_OFFLINE": "1",
    }
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said = process.stdout.read()
    _, code, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if code:
        raise RuntimeError(f"{way}: " + " | ".join(said.strip().splitlines()[-3:])[-300:])
    figures = json.loads(said.strip().splitlines()[-1])
    load = figures.get("load") or json.loads((out / "status.json").read_text())["load"]["seconds"]
    peak = figures["peak"] or usage.ru_maxrss * 1024
    return Result(seconds, steady(out, case.images, batch), load, peak), figures["versions"]


def steady(out: pathlib.Path, images: int, batch: int) -> float | None:
    """Images/s between the first batch's last picture and the last one's."""
    times = sorted(path.stat().st_mtime_ns for path in out.glob("row*.png"))
    if len(times) != images:
        raise RuntimeError(f"{out}: {len(times)} images, expected {images}")
    span = times[-1] - times[min(batch, images) - 1]
    return (images - batch) / span * 1e9 if span and images > batch else None


def rows(path: pathlib.Path, case: Case) -> None:
    with open(path, "w") as file:
        for i in range(case.images):
            row = {
                "id": f"row{i}",
                "prompt": f"a {COLOURS[i % 8]} {THINGS[i // 8 % 8]}",
                "seed": i,
                "height": case.side,
                "width": case.side,
                "num_inference_steps": case.steps,
                "guidance_scale": case.guidance,
                "max_sequence_length": case.text,
            }
            file.write(json.dumps(row) + "\n")


def machine() -> tuple[str, float, float]:
    """Its name, the FLOP/s of its peak (of a CPU: of a float32 matrix product, just measured), FLOPs apart."""
    script = (
        "import jax, json; from fluxbatch.distributed import chips; from fluxbatch.planning import forecast; d = "
        "jax.devices()[0]; c = chips.of_kind(d.device_kind); "
        "print(json.dumps([d.platform, d.device_kind, c.peak if c else forecast._matmul()]))"
    )
    said = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": PATH},
        capture_output=True,
        text=True,
        check=True,
    )
    kind, name, peak = json.loads(said.stdout.splitlines()[-1])
    cpu = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.machine(),
    )
    return kind, f"{name if kind != 'cpu' else cpu}, {len(os.sched_getaffinity(0))} cores", peak * 1e12


def _lines(path: str) -> list[str]:
    return pathlib.Path(path).read_text().splitlines() if os.path.exists(path) else []


def flops(checkpoint: pathlib.Path, case: Case) -> int:
    """Of one image, from noise to picture."""
    import jax

    from fluxbatch.config import application
    from fluxbatch.generation.model_spec import open_model_spec

    jax.config.update("jax_platforms", "cpu")  # a GPU's memory is for those who race
    jobs = []
    words = (
        f"pretrained_model_name_or_path={checkpoint}",
        f"max_sequence_length={case.text}",
        "hardware=cpu",
        "prompt=x",
    )
    with contextlib.suppress(SystemExit):
        application.main(lambda job: jobs.append(job) or 0, argv=words)
    spec = open_model_spec(jobs[0], "cpu", jax.devices()[:1])
    step = spec.family.step_flops(case.side, case.side, spec.inputs)
    return case.steps * case.passes * step + spec.family.decode_flops(case.side, case.side)


def compare(model: str, case: Case, ways: Sequence[str], rounds: int, kept: pathlib.Path, peak: float) -> None:
    """Runs everything and prints the model's part of the table."""
    checkpoint, work = kept / "checkpoints" / case.checkpoint, kept / model
    if case.checkpoint == "flux-mini":
        checkpoint = ROOT / "fluxbatch/checkpoints/flux-mini"
    elif not any(checkpoint.glob("*model_index.json")):  # it is written last
        subprocess.run(
            [sys.executable, HERE.parent / "random_flux.py", checkpoint, case.checkpoint], check=True, stdout=sys.stderr
        )
    for way in ways:
        (work / way).mkdir(parents=True, exist_ok=True)
    rows(work / "rows.jsonl", case)
    results: dict[tuple[str, int], list[Result]] = {}
    for turn in range(rounds):
        for batch in case.batches:
            for way in ways:
                if turn and (way, batch) not in results:
                    continue  # it has failed
                try:
                    result, versions = once(way, checkpoint, work / "rows.jsonl", case, batch, work / way)
                except RuntimeError as error:
                    print(error, file=sys.stderr)
                    continue
                results.setdefault((way, batch), []).append(result)
                steadily = f", {result.steady:.3g} images/s steady" if result.steady else ""
                print(
                    f"{model} {way} batch {batch} turn {turn}: {result.job:.1f} s{steadily} ({versions})",
                    file=sys.stderr,
                )
    image = flops(checkpoint, case)
    print(
        f"\n**{model}**: {case.images} images of {case.side}×{case.side}, {case.steps} steps, {image / 1e12:.3g} "
        "TFLOP an image\n"
    )
    print(
        "| | batch | images/s steady | images/s whole job | first job, empty caches | s/step, all included | MFU | "
        "peak memory | load |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for (way, batch), found in results.items():
        job = case.images / min(result.job for result in found)
        speeds = [result.steady for result in found if result.steady]
        speed = max(speeds) if speeds else None
        parts = [
            way if way == "fluxbatch" else f"diffusers, {way}",
            str(batch),
            f"{speed:.3g}" if speed else "–",
            f"{job:.3g}",
            f"{found[0].job:.1f} s",
            f"{batch / speed / case.steps:.3g}" if speed else "–",
            f"{speed * image / peak:.1%}" if speed else "–",
            f"{max(r.peak for r in found) / 2**30:.2f} GiB",
            f"{min(r.load for r in found):.1f} s",
        ]
        print("| " + " | ".join(parts) + " |")
    best = {
        kind: max(
            (
                case.images / min(r.job for r in found)
                for (way, _), found in results.items()
                if (way == "fluxbatch") == kind
            ),
            default=0,
        )
        for kind in (True, False)
    }
    if all(best.values()):
        print(f"\nWhole job, each at its best batch: {best[True] / best[False]:.2f} × diffusers.", flush=True)


def main() -> None:
    if sys.argv[1:2] == ["run"]:
        return fluxbatch_job(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=CASES)
    parser.add_argument("--ways", nargs="+", choices=WAYS)
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--images", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--work", type=pathlib.Path, help="keep checkpoints and compilation caches there, for the next time"
    )
    args = parser.parse_args()
    kind, name, peak = machine()
    ways = args.ways or (WAYS if kind != "tpu" else WAYS[:1])  # diffusers does not run there
    sys.path.insert(0, str(ROOT))
    print(
        f"{name}; peak {peak / 1e12:.3g} TFLOP/s; Python {platform.python_version()}; {args.rounds} rounds, best of "
        "them"
    )
    with contextlib.nullcontext(args.work) if args.work else tempfile.TemporaryDirectory() as folder:
        for model in args.models or (["flux-mini", "middle"] if kind == "cpu" else ["schnell", "dev", "klein-4b"]):
            case = CASES[model]
            case = dataclasses.replace(
                case, batches=tuple(args.batches or case.batches), images=args.images or case.images
            )
            compare(model, case, ways, args.rounds, pathlib.Path(folder), peak)


if __name__ == "__main__":
    main()
