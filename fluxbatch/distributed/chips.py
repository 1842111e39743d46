"""What is known of accelerators: the one table of peaks and memories, and how targets are named."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from fluxbatch.types import UserError

GIB = 1 << 30
# JAX's names for the share of a GPU that it takes; it refuses both at once
GPU_SHARES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
# libtpu, where it compiles for chips that are not here, looks for a TPU's metadata server and neighbours, and for
# itself in other processes. It reads this as it starts.
COMPILE_ONLY = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "JAX_TRACEBACK_FILTERING": "off",
}


def gpu_share() -> float:
    """The part of a GPU's memory that JAX takes: 0.9, unless the environment says another. Of its own accord it takes
    0.75, which is less of 40 GB than a 12B transformer and its text encoders need when the next shard's texts are
    encoded."""
    return float(next(filter(None, map(os.environ.get, GPU_SHARES)), 0.9))


@dataclass(frozen=True)
class Chip:
    """``peak``: dense bfloat16 TFLOP/s as the maker gives it, without sparsity. ``memory``: GiB that the driver
    or the compiler hands out of what the maker counts. ``reached``: the share of the peak that a 12B transformer at
    1024 × 1024 may be expected to reach; where nobody has published one, 0.4."""

    name: str
    platform: str
    peak: float
    memory: float
    kinds: tuple[str, ...]  # how JAX's device_kind begins, in lower case
    reached: float = 0.4
    host: int = 8  # chips of a host, at most

    @property
    def limit(self) -> int:
        """Bytes that a program may use; of a GPU, JAX takes a part and keeps to it."""
        share = gpu_share() if self.platform == "gpu" else 1.0
        return int(self.memory * share * GIB)


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("h100", "gpu", 989, 79.6, ("nvidia h100",), reached=0.52),  # 3.96 s an image at batch 8
        Chip("h200", "gpu", 989, 140.4, ("nvidia h200",), reached=0.52),
        Chip("a100", "gpu", 312, 79.1, ("nvidia a100-sxm4-80gb", "nvidia a100 80gb")),
        Chip("a100-40gb", "gpu", 312, 39.4, ("nvidia a100",)),
        Chip("l40s", "gpu", 362, 44.4, ("nvidia l40s",)),
        Chip("l4", "gpu", 121, 22.0, ("nvidia l4",)),
        Chip("4090", "gpu", 165, 23.5, ("nvidia geforce rtx 4090",)),
        Chip("v4", "tpu", 275, 30.75, ("tpu v4",), reached=0.33, host=4),  # 23 s for 4 images on 4 chips
        Chip("v5e", "tpu", 197, 15.75, ("tpu v5 lite", "tpu v5e")),
        Chip("v5p", "tpu", 459, 94.75, ("tpu v5", "tpu v5p"), host=4),
        Chip("v6e", "tpu", 918, 31.25, ("tpu v6 lite", "tpu v6e"), reached=0.41),  # 5.5 s for 4 images on 4 chips
    )
}
# TPU slices by their number of chips. v4 and v5p are named by cores, of which a chip has two.
FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8"}
CORES = ("v4", "v5p")


@dataclass(frozen=True)
class Target:
    """The machine of one replica. ``chip`` is None for a CPU, and for what the table does not know."""

    name: str
    platform: str
    chip: Chip | None = None
    chips: int = 1
    hosts: int = 1
    topology: str | None = None  # of a TPU slice

    def __str__(self) -> str:
        if self.chip is None:
            return self.name
        many = f" on {self.hosts} hosts" if self.hosts > 1 else ""
        each = f"{self.chip.peak:g} TFLOP/s and {self.chip.memory:g} GiB each"
        return f"{self.name}: {self.chips} × {self.chip.name}{many}, {each}"


def target(name: str) -> Target:
    """``v6e-4``, ``v4-8``, ``h100``, ``h100-8``, ``2xh100-8``, ``cpu``; UserError for what is none."""
    known = "cpu, a TPU slice (v6e-4, v5e-8, v4-8, v5p-8, …) or GPUs (h100, a100-8, 2xh100-8, …)"
    if name == "cpu":
        return Target("cpu", "cpu")
    found = re.fullmatch(
        rf"(?:(\d+)x)?({'|'.join(sorted(map(re.escape, CHIPS), key=len, reverse=True))})(?:-(\d+))?", name.lower()
    )
    if found is None:
        raise UserError(f"target={name}: expected {known}; chips are {', '.join(CHIPS)}")
    hosts, chip, count = int(found[1] or 1), CHIPS[found[2]], int(found[3] or 1)
    if chip.platform == "gpu":
        if not (1 <= count <= chip.host and hosts >= 1):
            raise UserError(f"target={name}: expected 1 to {chip.host} GPUs a host, as in 2x{chip.name}-{chip.host}")
        return Target(name, chip.platform, chip, hosts * count, hosts)
    cores = 2 if chip.name in CORES else 1
    shapes = CUBES if chip.name in CORES else FLAT
    if found[1] or count % cores or count // cores not in shapes:
        sizes = ", ".join(f"{chip.name}-{cores * n}" for n in shapes)
        raise UserError(f"target={name}: expected one of {sizes}")
    chips = count // cores
    hosts = 1 if chips <= chip.host else chips // 4
    return Target(name, chip.platform, chip, chips, hosts, shapes[chips])


def of_kind(kind: str) -> Chip | None:
    """The chip that JAX calls ``kind``."""
    matching = [(len(start), chip) for chip in CHIPS.values() for start in chip.kinds if kind.lower().startswith(start)]
    return max(matching, key=lambda pair: pair[0])[1] if matching else None
