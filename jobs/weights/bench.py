"""How fast, from how many bytes and in how much memory weights load. All figures are of this machine.

    python jobs/weights/bench.py                       # a table: ours, a plain read, safetensors' own loader
    python jobs/weights/bench.py --gigabytes 8 --rounds 3
    python jobs/weights/bench.py measure FILE --mesh 1,8      # one load, as JSON

The methods take turns in one process, so that the page cache, memory that the system must first find and the
machine's other work treat them alike; the best of the rounds counts. Memory is measured in fresh processes.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

HERE = pathlib.Path(__file__)
METHODS = ("plain", "safetensors", "fluxbatch", "converted")


def anonymous() -> int:
    """Bytes of anonymous memory of this process that are resident."""
    with open("/proc/self/statm") as statm:  # a short line: reading it often hardly counts as bytes read
        _, resident, shared, *_ = map(int, statm.read().split())
    return (resident - shared) * os.sysconf("SC_PAGESIZE")


class Peak(threading.Thread):
    """The most anonymous memory held while it runs, sampled every 2 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.start_bytes = self.bytes = anonymous()
        self.running = True

    def run(self) -> None:
        while self.running:
            self.bytes = max(self.bytes, anonymous())
            time.sleep(0.002)

    def __enter__(self) -> Peak:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.running = False
        self.join()
        self.bytes = max(self.bytes, anonymous())


def bytes_read() -> int:
    """Bytes of weights that this process has read, by TensorStore's count."""
    import tensorstore as ts

    counts = [
        ts.experimental_collect_matching_metrics(f"/tensorstore/kvstore/{driver}/bytes_read")
        for driver in ("file", "http", "gcs")
    ]
    return sum(value["value"] for metrics in counts for metric in metrics for value in metric["values"])


def plain(path: str) -> Callable[[], object]:
    """Four threads read the file into fresh memory, and nothing else."""
    import numpy as np

    def read() -> object:
        size, block = os.path.getsize(path), 16 << 20
        with open(path, "rb") as file, ThreadPoolExecutor(4) as pool:

            def one(at: int) -> np.ndarray:  # in pieces: a single huge array is slower to find memory for
                buffer = np.empty(min(block, size - at), np.uint8)
                os.preadv(file.fileno(), [buffer], at)
                return buffer

            return tuple(pool.map(one, range(0, size, block)))

    return read


def safetensors(path: str) -> Callable[[], object]:
    """What most loaders do: the whole file as NumPy arrays, then onto the device."""
    import jax
    from safetensors.numpy import load_file

    return lambda: jax.block_until_ready([jax.device_put(value) for value in load_file(path).values()])


def planned(path: str):
    """The plan of a transformer from a BFL file or from a converted copy."""
    from fluxbatch.models.flux1.definition import Flux1
    from fluxbatch.models.flux1.transformer import Flux, FluxConfig
    from fluxbatch.models.key_tables import NATIVE, shapes_of
    from fluxbatch.weights import load, single_files, zarr
    from fluxbatch.weights.headers import read_header
    from fluxbatch.weights.source import Source

    folder, file = os.path.split(path)
    if marker := zarr.read_marker(Source(path)):
        source = zarr.Arrays(os.path.join(path, "transformer"))
        tensors, table = zarr.tensors(marker, "transformer", source), NATIVE
        config = FluxConfig.from_json(source.json("config.json"))
    else:
        source = Source(folder)
        component = Flux1.components["transformer"]
        tensors, table, _ = single_files.recognise(component, read_header(source, file))
        sizes = component.sizes(*shapes_of(tensors, table))
        config = FluxConfig.from_json(component.constants(sizes) | sizes)
    return load.plan(lambda rngs: Flux(config, rngs=rngs), tensors, table, source)


def fluxbatch(path: str, mesh: tuple[int, int], dtype: str) -> tuple[Callable[[], object], int]:
    """Our load; and the bytes of one copy of the weights."""
    import jax
    from flax import nnx

    from fluxbatch.distributed.mesh import make_mesh
    from fluxbatch.weights import load
    from fluxbatch.weights.precision import Precision

    plan = planned(path)
    devices, held = make_mesh(mesh), Precision.named(dtype, "bfloat16")
    return lambda: jax.block_until_ready(
        jax.tree.leaves(nnx.state(load.load(plan, devices, held), nnx.Param))
    ), plan.nbytes


def measure(args: argparse.Namespace) -> dict[str, object]:
    """One load in this process."""
    import jax

    mesh = tuple(int(n) for n in args.mesh.split(","))
    if args.processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{args.port}", args.processes, args.index)
    nbytes = os.path.getsize(args.file) if os.path.isfile(args.file) else 0
    if args.method in ("fluxbatch", "converted"):
        run, nbytes = fluxbatch(args.file, mesh, args.dtype)
    else:
        run = {"plain": plain, "safetensors": safetensors}[args.method](args.file)
    jax.device_put(0.0).block_until_ready()
    before = bytes_read()
    with Peak() as peak:
        start = time.perf_counter()
        held = run()
        seconds = time.perf_counter() - start
    result = {
        "method": args.method,
        "seconds": seconds,
        "gigabytes_per_second": nbytes / seconds / 1e9,
        "bytes": nbytes,
    }
    if isinstance(held, list):
        parts = {(i, str(shard.index)): shard.data.nbytes for i, x in enumerate(held) for shard in x.addressable_shards}
        arrays = sum(shard.data.nbytes for x in held for shard in x.addressable_shards)
        result |= {"owned": sum(parts.values()), "arrays": arrays, "read": bytes_read() - before,
                   "extra": peak.bytes - peak.start_bytes - arrays}  # fmt: skip
    return result


def compare(files: dict[str, str], rounds: int) -> dict[str, float]:
    """The least seconds of each method; all files in the page cache."""
    import jax

    methods = {"plain": plain(files["plain"]), "safetensors": safetensors(files["safetensors"])}
    methods |= {method: fluxbatch(files[method], (1, 1), "bfloat16")[0] for method in ("fluxbatch", "converted")}
    jax.device_put(0.0).block_until_ready()
    best = dict.fromkeys(methods, float("inf"))
    for _ in range(rounds):
        for method, run in methods.items():
            start = time.perf_counter()
            held = run()
            best[method] = min(best[method], time.perf_counter() - start)
            del held
    return best


def in_process(
    method: str,
    path: pathlib.Path | str,
    mesh: str = "1,1",
    dtype: str = "bfloat16",
    devices: int = 1,
    processes: int = 1,
) -> list[dict]:
    """The measurements of one load in fresh processes, one for each process of the mesh."""
    from fluxbatch.distributed.replica import hold_port

    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices // processes}",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(HERE.parents[2]), os.environ.get("PYTHONPATH")))),
    }
    with hold_port() as held:
        running = [
            subprocess.Popen(
                [sys.executable, HERE, "measure", path, "--method", method, "--mesh", mesh, "--dtype", dtype,
                 "--processes", str(processes), "--index", str(i), "--port", str(held.getsockname()[1])],
                env=environment, stdout=subprocess.PIPE, text=True)
            for i in range(processes)
        ]  # fmt: skip
        answers = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise RuntimeError(f"{method}: a measurement failed")
    return [json.loads(answer.splitlines()[-1]) for answer in answers]


def converted(file: pathlib.Path) -> pathlib.Path:
    """The transformer alone as ``fluxbatch.convert`` writes it."""
    from fluxbatch.models.flux1.definition import Flux1
    from fluxbatch.models.flux1.transformer import FluxConfig
    from fluxbatch.models.key_tables import shapes_of
    from fluxbatch.weights import convert, single_files
    from fluxbatch.weights.checkpoint import Checkpoint, Opened
    from fluxbatch.weights.headers import read_header
    from fluxbatch.weights.source import Source

    source = Source(str(file.parent))
    component = Flux1.components["transformer"]
    tensors, table, _ = single_files.recognise(component, read_header(source, file.name))
    sizes = component.sizes(*shapes_of(tensors, table))
    config = FluxConfig.from_json(component.constants(sizes) | sizes)
    transformer = Opened(component, source, config, tensors, table, str(file))
    to = file.parent / "converted"
    convert.convert(
        Checkpoint(Flux1(dict.fromkeys(Flux1.components)), {"transformer": transformer}, {}, {}, None), str(to), None
    )
    return to


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=["measure"])
    parser.add_argument("file", nargs="?")
    parser.add_argument("--method", choices=METHODS, default="fluxbatch")
    parser.add_argument("--mesh", default="1,1")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--index", type=int, default=0)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.what:
        print(json.dumps(measure(args)))
        return

    sys.path[:0] = [str(HERE.parent), str(HERE.parents[2])]
    import random_model

    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, "flux1-random.safetensors")
        size = random_model.write(file, random_model.flux_shapes(*random_model.shape_of(args.gigabytes)))
        files = {method: str(file) for method in METHODS} | {"converted": str(converted(file))}
        memory = {method: in_process(method, pathlib.Path(files[method]))[0]["extra"] for method in METHODS[1:]}
        (sharded,) = in_process("fluxbatch", file, "1,8", devices=8)
        best = compare(files, args.rounds)
        print(f"{size / 1e9:.2f} GB of bfloat16, best of {args.rounds}, {os.cpu_count()} cores")
        for method, seconds in best.items():
            extra = f"{memory[method] / 2**20:8.0f} MiB over the arrays" if method in memory else ""
            print(f"{method:12} {size / seconds / 1e9:6.2f} GB/s  {best['plain'] / seconds:5.2f} × plain {extra}")
        print(
            f"{'8 devices':12} {sharded['gigabytes_per_second']:6.2f} GB/s  {sharded['extra'] / 2**20:.0f} MiB over "
            "the arrays, "
            f"{sharded['read'] / sharded['owned']:.4f} × the bytes owned"
        )


if __name__ == "__main__":
    main()
