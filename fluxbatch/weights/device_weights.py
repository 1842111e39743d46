"""One model\'s weights: onto the mesh when they are first needed, out of its memory while they are not."""

from __future__ import annotations

import contextlib
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from fluxbatch.distributed.process_group import ProcessGroup
from fluxbatch.weights import load
from fluxbatch.weights.load import Edits
from fluxbatch.weights.precision import Precision

PROC, CGROUPS = pathlib.Path("/proc"), pathlib.Path("/sys/fs/cgroup")


class DeviceWeights:
    """Nothing is read before the first `load`; what an edit changes is read again by the next one."""

    def __init__(
        self, plan: load.Plan, mesh: jax.sharding.Mesh, dtype: Any, edits: load.Edits, policy: str = "keep",
        attach: Callable[[nnx.Module], None] = lambda module: None,
    ):  # fmt: skip
        """``dtype``: one for all, or a Precision. ``policy`` for weights that are not needed: keep, host (pinned
        memory) or free. ``attach`` puts beside the weights what does not come from the checkpoint."""
        self.plan, self.mesh, self.dtype, self.edits, self.policy = plan, mesh, Precision.of(dtype), edits, policy
        self._attach = attach
        self._graph: Any = None
        self._state: Any = None  # on the devices
        self._aside: Any = None  # the same in host memory
        self._stale: set[str] = set()

    @property
    def missing(self) -> int:
        """Bytes that `load` would read in this process."""
        paths = self._stale if self._state is not None or self._aside is not None else None
        return load.to_read(self.plan, self.mesh, self.edits, paths)

    @property
    def here(self) -> bool:
        """Whether there are weights on the devices."""
        return self._state is not None

    def load(self, progress: load.Progress) -> None:
        """Brings the weights onto the devices, from host memory or from the checkpoint, as ``edits`` has them."""
        if self._state is not None and not self._stale:
            return
        if self._state is None and self._aside is not None:
            self._state = moved(self._aside, "device")
        if self._state is None:
            module = load.load(self.plan, self.mesh, self.dtype, progress, self.edits)
            self._attach(module)
            self._graph, self._state = nnx.split(module)
        elif self._stale:
            state, self._state, self._aside = self._state, None, None  # half of it would be worse than none
            self._state = load.reload(self.plan, state, self._stale, self.mesh, self.dtype, progress, self.edits)
        self._stale = set()
        jax.block_until_ready(self._state)

    def parts(self) -> tuple[Any, Any]:
        """Graph definition and parameters, once loaded."""
        return self._graph, self._state

    def abstract(self) -> tuple[Any, Any]:
        """What ``parts`` will be once loaded: shapes, dtypes and shardings. (Adapters beside the weights are there.)"""
        module = load.abstract(self.plan, self.mesh, self.dtype)
        self._attach(module)
        return nnx.split(module)

    def merge(self, edits: Edits) -> None:
        """Other edits from the next `load` on, which reads what these or the ones before change."""
        self._stale |= {path for path, _ in (*self.edits, *edits)}
        self.edits = edits

    def leave(self, again: bool = True) -> None:
        """Makes room on the devices, as ``policy`` says; ``again``: whether the weights will be needed once more."""
        if self.policy == "keep" or self._state is None:
            return
        if self.policy == "host" and again:  # the copy stays there: later ones cost no transfer
            if self._aside is None:
                self._aside = moved(self._state, "pinned_host")
            jax.block_until_ready(self._aside)
        jax.tree.map(lambda x: x.delete(), self._state)
        self._state = None


def moved(state: Any, kind: str) -> Any:
    """The same arrays in another memory of their devices."""
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind(kind)), state)


def offload_policy(
    offload: bool | str, mesh: jax.sharding.Mesh, held: int, group: ProcessGroup = ProcessGroup()
) -> str:
    """The policy for ``held`` bytes of weights that are not needed: for True pinned host memory if the hosts have
    room for it, else the checkpoint; on the CPU, whose device memory is the host's, they stay."""
    if offload in (True, "host"):
        if not pinned(mesh):
            return "keep" if load.on_host(mesh) else "free"
        return "host" if offload == "host" or room(held, group) else "free"
    return "free" if offload == "free" else "keep"


def crowded(text: int, denoising: int, limit: int | None) -> bool:
    """Whether ``text`` bytes of encoders and ``denoising`` of all else are too many for a device's ``limit``, with a
    little for activations. They take turns then."""
    return limit is not None and text + denoising > 0.95 * limit


def device_memory(mesh: jax.sharding.Mesh) -> int | None:
    """Bytes that programs may use of an accelerator; None where it does not say, or the memory is the host's."""
    stats = None
    with contextlib.suppress(RuntimeError):  # a device that only a compiler knows
        stats = None if load.on_host(mesh) else mesh.local_devices[0].memory_stats()
    return (stats or {}).get("bytes_limit")


def room(held: int, group: ProcessGroup) -> bool:
    """Whether all hosts have the memory for ``held`` bytes each; the page cache wants some too."""
    return group.all_say(held <= host_memory() // 2)


def pinned(mesh: jax.sharding.Mesh) -> bool:
    """Whether the devices are accelerators that read pinned host memory."""
    return not load.on_host(mesh) and "pinned_host" in {
        memory.kind for memory in mesh.devices.flat[0].addressable_memories()
    }


def host_memory() -> int:
    """Bytes of memory that this host, or any of the groups around this process (a container's, a Slurm job's), has
    left."""
    left = sys.maxsize
    with contextlib.suppress(OSError, KeyError, ValueError):
        left = 1024 * _numbers(PROC / "meminfo")["MemAvailable:"]
    own = CGROUPS
    with contextlib.suppress(OSError, StopIteration):
        own /= next(line[4:] for line in (PROC / "self/cgroup").read_text().splitlines() if line.startswith("0::/"))
    for group in (own, *own.parents):
        with contextlib.suppress(OSError, KeyError, ValueError):
            used = int((group / "memory.current").read_text()) - _numbers(group / "memory.stat")["file"]
            left = min(left, int((group / "memory.max").read_text()) - used)
    return left


def _numbers(file: pathlib.Path) -> dict[str, int]:
    return {words[0]: int(words[1]) for line in file.read_text().splitlines() if len(words := line.split()) > 1}
