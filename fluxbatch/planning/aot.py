"""A job's programs compiled ahead of time, for TPUs that are not here: what the compiler says they need.

job, target, size ─ subprocess with libtpu ─ the run's own programs, from shapes ─ bytes of a device
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import pickle
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.experimental import topologies

from fluxbatch.config.schema import Job
from fluxbatch.distributed import backend
from fluxbatch.distributed.chips import COMPILE_ONLY, Target
from fluxbatch.generation.model_spec import ModelSpec, open_model_spec
from fluxbatch.types import PLAIN, Mode, UserError
from fluxbatch.weights.published import open_or_known

# others, with a color, lie on the chip
ASSIGNED = re.compile(r"^allocation \d+: size (\d+),(?: page \d+,)? preallocated-temp:", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Need:
    """What one program takes of a device, in bytes: ``held`` are its weights, ``more`` everything else."""

    name: str
    held: int
    more: int
    temporaries: int
    seconds: float  # of compiling
    fault: str = ""  # why it does not compile


def available() -> bool:
    return importlib.util.find_spec("libtpu") is not None


def devices(target: Target) -> list[jax.Device]:
    """Those of a TPU target, as far as the compiler needs them."""
    assert target.chip is not None
    options: Mapping[str, Any] = {}
    if target.chip.name == "v4":
        options = {"chip_config_name": "megacore"}
    elif target.chips == 1:
        options = {"chips_per_host_bounds": (1, 1, 1)}
    name = f"{target.chip.name}:{target.topology}"
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)


def needs(
    spec: ModelSpec,
    batch: int,
    height: int,
    width: int,
    mode: Mode = PLAIN,
    parts: Sequence[str] = ("encode", "denoise", "decode"),
) -> Iterator[Need]:
    """Compiles the programs of one size and mode for the spec's mesh. No weight is read."""
    pipeline = dataclasses.replace(spec, keep=False).pipeline()
    for name, lowered in pipeline.programs(batch, spec.inputs, height, width, mode, parts):
        if name not in parts:  # what makes step inputs runs once for many steps
            continue
        start = time.monotonic()
        try:
            program, temporaries = compile_counted(lowered, spec.mesh.devices.flat[0].platform)
        except jax.errors.JaxRuntimeError as error:
            yield Need(name, 0, 0, 0, time.monotonic() - start, " ".join(str(error).split())[:300])
            continue
        leaves = jax.tree.leaves(lowered.args_info[0], is_leaf=lambda x: isinstance(x, nnx.State))
        inputs = [x for x in leaves if not isinstance(x, nnx.State)]
        given = sum(info.dtype.itemsize * math.prod(info.shape) for info in inputs) // spec.data_parallel_size
        found = program.memory_analysis()
        more = given + temporaries + found.output_size_in_bytes - found.alias_size_in_bytes
        yield Need(name, found.argument_size_in_bytes - given, more, temporaries, time.monotonic() - start)


def compile_counted(lowered: Any, platform: str) -> tuple[Any, int]:
    """The compiled program, and the bytes of its temporaries on a device.

    On a TPU those of the compiler's buffer assignment, by which it decides what fits: what it says then is their sum
    with the arguments, to the byte. Its ``temp_size_in_bytes`` is up to 40 % more where weights are gathered.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True} if platform == "tpu" else None
        program = lowered.compile(compiler_options=options)
        assigned = [ASSIGNED.findall(file.read_text()) for file in Path(folder).glob("*buffer-assignment.txt")]
    sizes = [int(size) for found in assigned for size in found]
    return program, sum(sizes) if sizes else program.memory_analysis().temp_size_in_bytes


def compiled(job: Job, target: Target, height: int, width: int, mode: Mode) -> list[Need]:
    """The programs that generate images of one size and mode, compiled for ``target`` in a process of its own."""
    plain = Job(**{field.name: getattr(job, field.name) for field in dataclasses.fields(Job)})
    asked = pickle.dumps((plain, target, height, width, mode))
    done = subprocess.run(
        [sys.executable, "-m", "fluxbatch.planning.aot"],
        input=asked,
        env=os.environ | COMPILE_ONLY,
        capture_output=True,
    )
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip().splitlines()[-1]
        raise UserError(f"target={target.name}: the program cannot be compiled: {reason}")
    return [Need(**line) for line in map(json.loads, done.stdout.splitlines())]


def main() -> None:
    """The subprocess's part."""
    job, target, height, width, mode = pickle.load(sys.stdin.buffer)
    backend.set_compiler_flags(job.hardware.xla_flags, job.hardware.libtpu_init_args)
    spec = open_model_spec(job, target.platform, devices(target), target.hosts, open_or_known)
    batch = job.sharding.per_device_batch_size * spec.data_parallel_size
    spec = spec.with_encoder() if mode.reads_pictures else spec
    for need in needs(spec, batch, height, width, mode, ("denoise", "decode")):
        print(json.dumps(dataclasses.asdict(need)), flush=True)


if __name__ == "__main__":
    main()
