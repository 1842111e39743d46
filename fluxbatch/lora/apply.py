"""The adapters of a job on its model: merged into the weights, or beside them for each row at its own scales.

Merged where all rows have the same LoRA weights: no cost per step, and other LoRA weights touch only the parameters
that the old or the new ones change. Beside them otherwise: the ranks of all adapters stand side by side in one
low-rank product whose middle each row scales, so that any LoRA weights are data to one compiled program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from fluxbatch.config.schema import Job
from fluxbatch.distributed.mesh import Placement, put
from fluxbatch.lora.adapter import Adapter, LayerPath, read_adapter
from fluxbatch.lora.deltas import Delta, Replacement
from fluxbatch.lora.files import specs
from fluxbatch.models.family import Family, LoraKeys
from fluxbatch.models.layers import LowRank
from fluxbatch.types import Row, UserError
from fluxbatch.weights.load import Edit, Edits, Plan

LoraWeights = tuple[tuple[str, float], ...]  # adapter → scale, sorted by name


@dataclasses.dataclass(frozen=True)
class Loras:
    """All adapters of a job, read and checked."""

    adapters: tuple[Adapter, ...] = ()
    encoders: tuple[str, ...] = ()  # the components that read text

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(adapter.name for adapter in self.adapters)

    @property
    def own(self) -> LoraWeights:
        """What a row gets that does not say: every adapter at the job's scale."""
        return tuple(sorted((adapter.name, adapter.spec.scale) for adapter in self.adapters))

    @property
    def fingerprint(self) -> dict[str, str]:
        """What decides pixels besides the rows' scales."""
        return {adapter.name: adapter.digest for adapter in self.adapters}

    def coverage(self) -> dict[str, Any]:
        return {adapter.name: adapter.coverage() for adapter in self.adapters}

    def table(self) -> list[str]:
        return [line for adapter in self.adapters for line in adapter.table()]

    def resolve(self, rows: Sequence[Row]) -> list[Row]:
        """The rows, each with its LoRA weights; UserError for those that these adapters cannot have in one job."""
        if not self.adapters:
            return list(rows)
        rows = [row if row.lora is not None else dataclasses.replace(row, lora=self.own) for row in rows]
        distinct = self.distinct(rows)
        if len(distinct) > 1:
            used = {name for weights in distinct for name, _ in weights}
            stuck = [a for a in self.adapters if a.name in used and a.merged_only]
            if stuck:
                first = next(row for row in rows if _effective(row.lora) != distinct[0])
                must = "so all rows of a job must have the same LoRA weights"
                lines = [f"{a.spec.key}: {a.name}: {a.merged_only}, {must}" for a in stuck]
                differ = f"lora is {dict(first.lora or ())}, rows before it have {dict(distinct[0])}"
                raise UserError(*lines, f"{first.where}: {differ}")
        return rows

    def distinct(self, rows: Iterable[Row]) -> list[LoraWeights]:
        """The different LoRA weights of resolved rows, in order of appearance."""
        return list(dict.fromkeys(_effective(row.lora) for row in rows))

    def widened(self, keys: LoraKeys, inputs: int) -> Loras:
        """On a denoiser that reads so many channels of a token."""
        return dataclasses.replace(self, adapters=tuple(each.widened(keys, inputs) for each in self.adapters))

    def changes(self, component: str, weights: LoraWeights) -> dict[LayerPath, list[tuple[Delta, float]]]:
        found: dict[LayerPath, list[tuple[Delta, float]]] = {}
        scales = dict(weights)
        for adapter in self.adapters:
            if scale := scales.get(adapter.name, 0.0):
                for path, delta in adapter.changes.get(component, {}).items():
                    found.setdefault(path, []).append((delta, scale))
        return found

    def edits(self, component: str, weights: LoraWeights) -> Edits:
        """What merging ``weights`` does to each layer of each parameter that it changes."""
        return {path: _edit(changes) for path, changes in self.changes(component, weights).items()}

    def attach(self, component: str, module: nnx.Module, plan: Plan, mesh: jax.sharding.Mesh, dtype: Any) -> None:
        """Puts all adapters beside the weights of a component, on its devices."""
        paths = dict.fromkeys(path for changes in self._beside(component) for path, _ in changes)
        for path in paths:
            layers, _ = plan.shapes[path]
            a, b, ranks = self._side_by_side(component, path, layers or 1)
            if layers is None:
                a, b = a[0], b[0]
            linear: Any = module
            for name in path.split(".")[:-1]:
                linear = getattr(linear, name)
            rows, columns = linear.kernel.get_metadata()["axes"]
            placements = Placement.of(mesh, a.shape, (None, columns)), Placement.of(mesh, b.shape, (rows, None))
            down, up = (
                put(np.asarray(placement.arranged(x)).astype(dtype), placement.final)
                for x, placement in zip((a, b), placements, strict=True)
            )
            linear.lora = LowRank(down, up, ranks, (rows, columns))

    def _beside(self, component: str) -> list[Mapping[LayerPath, Delta]]:
        """What each adapter does there; nothing for one that can only be merged, as no row uses it where LoRA weights
        differ."""
        return [{} if adapter.merged_only else adapter.changes.get(component, {}) for adapter in self.adapters]

    def _side_by_side(self, component: str, path: str, layers: int) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
        """A ``[layers, R, in]``, B ``[layers, out, R]``, and how many of the R each adapter has.

        Zeros where an adapter leaves a layer out or has a smaller rank there.
        """
        blocks = [
            {layer: changes[path, layer].factors() for layer in range(layers) if (path, layer) in changes}
            for changes in self._beside(component)
        ]
        ranks = tuple(max((len(a) for a, _ in block.values()), default=0) for block in blocks)
        a, b = next(pair for block in blocks for pair in block.values())
        all_a = np.zeros((layers, sum(ranks), a.shape[1]), np.float32)
        all_b = np.zeros((layers, b.shape[0], sum(ranks)), np.float32)
        at = 0
        for block, rank in zip(blocks, ranks, strict=True):
            for layer, (a, b) in block.items():
                all_a[layer, at : at + len(a)], all_b[layer, :, at : at + len(a)] = a, b
            at += rank
        return all_a, all_b, ranks

    def scales(self, rows: Sequence[Row]) -> np.ndarray:
        """``[B, adapters]`` float32 of resolved rows."""
        distinct = [dict(row.lora or ()) for row in rows]
        return np.array([[weights.get(name, 0.0) for name in self.names] for weights in distinct], np.float32)

    def text_weights(self, row: Row) -> LoraWeights:
        """The part of the row's LoRA weights that its prompt's encoding depends on."""
        reading = {a.name for a in self.adapters if any(part in a.changes for part in self.encoders)}
        return tuple((name, scale) for name, scale in _effective(row.lora) if name in reading)


def read(job: Job, plans: Mapping[str, Plan], family: Family) -> Loras:
    """Reads the job's adapters; one UserError with the complaints about all of them."""
    adapters: list[Adapter] = []
    lines: list[str] = []
    for spec in specs(job):
        try:
            adapters.append(read_adapter(spec, plans, family.lora, job.lora_config.strict))
        except UserError as error:
            lines += error.lines
    if lines:
        raise UserError(*lines)
    return Loras(tuple(adapters), family.encoders)


def _effective(weights: LoraWeights | None) -> LoraWeights:
    return tuple((name, scale) for name, scale in weights or () if scale)


def _edit(changes: list[tuple[Delta, float]]) -> Edit:
    def edit(old: np.ndarray) -> np.ndarray:
        new = old.copy()
        for delta, scale in changes:
            new += delta.change(new if isinstance(delta, Replacement) else old, scale).reshape(old.shape)
        return new

    return edit
