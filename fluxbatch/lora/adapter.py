"""An adapter file, read and checked against the model before any of the model's weights are.

Every key must lead to a parameter of the model and every tensor fit there; what does not is listed, and
ends the job unless ``lora_config.strict`` is false.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from fluxbatch.lora.deltas import Decomposed, Delta, Hadamard, Kronecker, Product, Replacement, Whole
from fluxbatch.lora.files import Spec, locate, settings_of
from fluxbatch.lora.formats import KINDS, Site, Target, read_key, split_key
from fluxbatch.models.family import LoraKeys
from fluxbatch.types import UserError, public
from fluxbatch.weights.find import NO_PICKLES
from fluxbatch.weights.headers import read_header
from fluxbatch.weights.load import Plan, read_layer
from fluxbatch.weights.matching import listed, unwrapped
from fluxbatch.weights.source import FLOATS, Tensor

PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")

LayerPath = tuple[str, int]  # path of a parameter, layer


@dataclasses.dataclass(frozen=True)
class Part:
    """A line of the coverage table: what an adapter does to one part of the model."""

    part: str
    layers: int
    of: int
    modules: tuple[str, ...]
    rank: tuple[int, int]  # smallest and largest
    alpha: tuple[float, float]
    parameters: int
    norm: float


@dataclasses.dataclass(frozen=True)
class Adapter:
    spec: Spec
    file: str
    digest: str  # of the file's bytes and of how they are read
    format: str
    changes: Mapping[str, Mapping[LayerPath, Delta]]  # by component
    parts: tuple[Part, ...]
    skipped: tuple[str, ...]  # complaints that strict=false let pass
    zeros: tuple[str, ...] = ()  # modules that the model lacks and the file leaves as they are

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def merged_only(self) -> str | None:
        """Why rows cannot have it at scales of their own, if it cannot."""
        for changes in self.changes.values():
            for (path, _), delta in changes.items():
                if delta.merged_only:
                    return delta.merged_only
                if not path.endswith(".kernel"):
                    return "it changes an embedding"
        return None

    def inputs(self, keys: LoraKeys) -> int:
        """Of each token that it has the denoiser read; 0 if it does not say."""
        delta = self.changes.get(keys.main, {}).get((keys.inputs[0], 0)) if keys.inputs else None
        return delta.shape[1] if delta else 0

    def widened(self, keys: LoraKeys, inputs: int) -> Adapter:
        """On a denoiser that reads so many."""
        if not self.inputs(keys) or not keys.inputs:
            return self
        own, at = self.changes[keys.main], (keys.inputs[0], 0)
        changes = {**self.changes, keys.main: {**own, at: own[at].widened(inputs)}}
        return dataclasses.replace(self, changes=changes)

    def coverage(self) -> dict[str, Any]:
        """What the metadata say of it."""
        about = {"file": self.file, "digest": self.digest, "format": self.format, "scale": self.spec.scale}
        parts = [
            {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(part).items()}
            for part in self.parts
        ]
        return about | {"parts": parts} | ({"skipped": list(self.skipped)} if self.skipped else {})

    def table(self) -> Iterator[str]:
        """The same, in lines for people."""
        parameters = sum(part.parameters for part in self.parts)
        what = f"{parameters:,} parameters" if self.parts else "biases and norms alone"
        yield f"{self.name} × {self.spec.scale:g}: {self.format}, {what}, {self.file}"
        wide = max((len(part.part) for part in self.parts), default=0)
        for part in self.parts:
            rank, alpha = ("–".join(f"{x:g}" for x in dict.fromkeys(pair)) for pair in (part.rank, part.alpha))
            yield (f"  {part.part:{wide}}  {part.layers:>2} of {part.of:<2} layers  rank {rank:<5} alpha {alpha:<5} "
                   f"{part.parameters:>11,} parameters  norm {part.norm:<8.4g} {' '.join(part.modules)}")  # fmt: skip
        yield from (f"  warning: left out: {line}" for line in self.skipped)
        if self.zeros:
            more = f" and {len(self.zeros) - 3} more" if len(self.zeros) > 3 else ""
            yield f"  zeros, which change nothing, are left out: {', '.join(self.zeros[:3])}{more}"


def read_adapter(spec: Spec, plans: Mapping[str, Plan], keys: LoraKeys, strict: bool) -> Adapter:
    """Reads the file and finds the parameter that each tensor changes; UserError lists those that change none."""
    source, file = locate(spec)
    data = source.read(file)
    where = source.path(file)
    if data.startswith(PICKLES) and data[8:9] != b"{":  # a header's length may begin like a pickle
        raise UserError(f"{spec.key}: {where}: is a pickle whatever its name says; {NO_PICKLES}")
    tensors = read_header(source, file)
    settings = settings_of(source, file, data)
    described = json.dumps([spec.from_pt, settings], sort_keys=True)
    digest = hashlib.sha256(data + described.encode()).hexdigest()[:16]

    problems: list[str] = []
    unknown: list[str] = []
    groups: dict[tuple[str, str], dict[str, np.ndarray]] = collections.defaultdict(dict)
    sites: dict[tuple[str, str], Site] = {}
    kinds: dict[str, None] = {}
    # by module and role: the key, and whether all is zeros
    strays: dict[str, dict[str, tuple[str, bool]]] = collections.defaultdict(dict)

    def value_of(tensor: Tensor) -> np.ndarray:
        return np.frombuffer(data, tensor.dtype, math.prod(tensor.shape), tensor.start).reshape(tensor.shape)

    for key, tensor in tensors.items():
        site = read_key(key, keys)
        if site is None or not all(_fits(plans[site.component], target) for target in site.targets):
            module, role = split_key(key) or (key, "")
            strays[module][role] = key, not value_of(tensor).any()
            unknown.append(key)
        elif site.targets:
            at = site.component, site.module
            if site.role in groups.get(at, {}):
                problems.append(f"{key}: {site.module} has its {site.role} already")
                continue
            if tensor.dtype not in FLOATS.values() and site.role not in ("alpha", "reshape"):
                problems.append(f"{key}: dtype {tensor.dtype}, expected one of {', '.join(FLOATS)}")
                continue
            value = value_of(tensor)
            is_1x1 = value.ndim == 4 and value.shape[2:] == (1, 1)
            groups[at][site.role] = value.reshape(value.shape[:2]) if is_1x1 else value
            sites[at] = site
            if site.role in KINDS:
                kinds[f"{KINDS[site.role]} as {site.writer} names it"] = None

    reader = _Reader(plans, keys, spec, settings)
    reader.zeros += [module for module, roles in strays.items() if _changes_nothing(roles)]
    dropped = {key for module in reader.zeros for key, _ in strays[module].values()}
    unknown = [key for key in unknown if key not in dropped]
    for at, group in groups.items():
        try:
            reader.add(sites[at], group)
        except ValueError as error:
            problems.append(f"{sites[at].module}: {error}")
    lines = listed(unknown, "key that leads nowhere in this model") + listed(problems, "unusable")
    if (strict and lines) or not reader.changes:
        nothing = [] if reader.changes else ["holds no adapter for this model"]
        hint = [f"{spec.key}: lora_config.strict=false leaves these keys out"] if reader.changes else []
        raise UserError(*(f"{where}: {line}" for line in [*lines, *nothing]), *hint)
    left_out = (*unknown, *problems), tuple(reader.zeros)
    return Adapter(spec, public(where), digest, ", ".join(kinds), reader.changes, reader.parts(), *left_out)


def _changes_nothing(roles: Mapping[str, tuple[str, bool]]) -> bool:
    """Whether a module's tensors, of which it is known which are zeros, leave it as it is."""
    zero = {role: zeros for role, (_, zeros) in roles.items()}
    if {"down", "up"} <= zero.keys() <= {"down", "up", "alpha", "reshape"}:
        return zero["down"] or zero["up"]
    return bool(zero) and zero.keys() <= {"diff", "diff_b"} and all(zero.values())


def _fits(plan: Plan, target: Target) -> bool:
    layers, _ = plan.shapes.get(target.at(), (0, ()))
    return target.layer < (1 if layers is None else layers)


class _Reader:
    """Turns the tensors of one module after the other into changes of the model's parameters."""

    def __init__(
        self, plans: Mapping[str, Plan], keys: LoraKeys, spec: Spec, settings: Mapping[str, Mapping[str, Any]]
    ):
        self.plans, self.keys, self.spec, self.settings = plans, keys, spec, settings
        self.changes: dict[str, dict[LayerPath, Delta]] = {}
        self.zeros: list[str] = []
        self._lines: dict[str, list[tuple[str, str, int, int, float, int, float]]] = collections.defaultdict(list)
        self._of: dict[str, int] = {}

    def add(self, site: Site, given: dict[str, np.ndarray]) -> None:
        """ValueError says what is wrong with the module's tensors."""
        tensors = {role: value if self.spec.from_pt else value.T for role, value in given.items()}
        count = sum(value.size for role, value in tensors.items() if role not in ("alpha", "reshape"))
        made = list(self._deltas(site, tensors))
        if tensors or not made:
            raise ValueError(f"{', '.join(tensors or given)} without what belongs to it")
        found: dict[LayerPath, Delta] = {}
        for leaf, delta, alpha in made:
            for target in site.targets:
                path = target.at(leaf)
                if path not in self.plans[site.component].shapes:
                    raise ValueError(f"the model has no {path}")
                part = delta.take(_rows(delta, target))
                if not path.endswith(".kernel") and not isinstance(part, Replacement | Decomposed) and not part.norm2():
                    if len(part.shape) > 1:
                        self.zeros.append(site.module)
                    continue  # a bias or an embedding as it was is no reason to use this adapter with no other
                _, shape = self.plans[site.component].shapes[path]
                if self.keys.inputs and path == self.keys.inputs[0]:
                    plain = self.plans[site.component].shapes[self.keys.inputs[2]][1][0]
                    if part.shape[-1] == plain < shape[1]:  # an adapter of latents alone
                        part = part.widened(shape[1])
                    shape = shape[0], max(part.shape[-1], shape[1])  # more make it another model: Adapter.inputs
                if part.shape != shape:
                    raise ValueError(f"shape {list(part.shape)}, the model expects {list(shape)} for {path}")
                if (path, target.layer) in found | self.changes.get(site.component, {}):
                    raise ValueError(f"another module of the file has changed {path}[{target.layer}] already")
                norm2 = part.norm2()
                if not math.isfinite(norm2):
                    raise ValueError("holds NaN or infinity, or numbers whose products are")
                found[path, target.layer] = part
                if len(part.shape) > 1:
                    self._cover(site.component, target, part.rank, alpha, count, norm2)
                    count = 0  # a fused layer's factors are counted once
        if found:
            self.changes.setdefault(site.component, {}).update(found)

    def _deltas(self, site: Site, tensors: dict[str, np.ndarray]) -> Iterator[tuple[str, Delta, float]]:
        """(leaf if not the weight's own, change, alpha) of what the tensors are; takes them out."""
        pop = tensors.pop
        given = pop("alpha", None)
        if given is not None and given.size != 1:
            raise ValueError(f"alpha of shape {list(given.shape)}, expected one number")
        alpha = None if given is None else float(given.reshape(()))
        delta: Delta | None = None
        if {"down", "up"} <= tensors.keys():
            a, b = _matrices(pop("down"), pop("up"))
            if len(a) != b.shape[1]:
                raise ValueError(f"rank {len(a)} below and {b.shape[1]} above")
            scale, alpha = self._scale(site, len(a), alpha)
            delta = Product(a, b, scale)
            if "up_bias" in tensors:
                yield "bias", Whole(pop("up_bias"), scale), alpha
        elif {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"} <= tensors.keys():
            w1, w2 = (_matrices(pop(f"hada_{w}_a"), pop(f"hada_{w}_b")) for w in ("w1", "w2"))
            shapes = {(len(a), b.shape[1]) for a, b in (w1, w2)}
            if any(a.shape[1] != len(b) for a, b in (w1, w2)) or len(shapes) > 1:
                raise ValueError("the Hadamard factors' shapes disagree")
            scale, alpha = self._scale(site, len(w1[1]), alpha)
            delta = Hadamard((w1[0], w1[1]), (w2[0], w2[1]), scale)
        elif any(role.startswith("lokr_") for role in tensors):
            left, right = (_lokr_factor(tensors, w) for w in ("w1", "w2"))
            rank = next((w[1].shape[0] for w in (left, right) if len(w) == 2), None)
            scale, alpha = self._scale(site, rank, alpha)
            delta = Kronecker(left, right, scale)
        elif "diff" in tensors:
            delta = Whole(pop("diff"))
        elif "set_weight" in tensors:
            delta = Replacement(pop("set_weight"))
        elif "set" in tensors and site.targets[0].leaf == "scale":
            delta = Replacement(pop("set"))
        if delta is not None and tensors.keys() & {"dora_scale", "dora_peft"}:
            delta = self._decomposed(site, delta, tensors)
        if delta is not None and "reshape" in tensors and (wanted := pop("reshape").tolist()) != list(delta.shape):
            raise ValueError(f"reshape_weight {wanted}, the change has {list(delta.shape)}")
        if delta is not None:
            yield "", delta, alpha or 0.0
        if "diff_b" in tensors:
            yield "bias", Whole(pop("diff_b")), 0.0
        elif "set_bias" in tensors:
            yield "bias", Replacement(pop("set_bias")), 0.0

    def _decomposed(self, site: Site, delta: Delta, tensors: dict[str, np.ndarray]) -> Decomposed:
        inside = "dora_peft" in tensors
        magnitude = tensors.pop("dora_peft" if inside else "dora_scale")
        magnitude = magnitude.reshape(-1, 1) if magnitude.ndim == 1 else magnitude
        if magnitude.shape not in ((delta.shape[0], 1), (1, delta.shape[1])):
            what = f"shape {list(magnitude.shape)} for a weight of shape {list(delta.shape)}"
            raise ValueError(f"DoRA lengths of {what}: expected one length for each output, or for each input")
        if not np.isfinite(magnitude.astype(np.float32)).all():
            raise ValueError("DoRA lengths hold NaN or infinity")
        fused = magnitude.shape[1] > 1 and len(site.targets) > 1
        columns = _columns(self.plans[site.component], site, delta) if fused else None
        return Decomposed(delta, magnitude, inside, columns)

    def _scale(self, site: Site, rank: int | None, alpha: float | None) -> tuple[float, float]:
        """alpha / rank, and alpha: the file's, or what PEFT's settings say, or the rank itself."""
        if rank is None and alpha is not None:
            return 1.0, alpha  # LoKr of two whole matrices is not scaled
        settings = self.settings.get(site.component, {})
        if alpha is None and (given := settings.get("lora_alpha", settings.get("alpha"))) is not None:
            names = re.sub(r"^base_model\.model\.", "", site.module).removeprefix(f"{site.component}."), site.name
            rank = rank or _by_pattern(settings, "rank_pattern", names, settings.get("r"))
            alpha = float(_by_pattern(settings, "alpha_pattern", names, given))
            if rank and settings.get("use_rslora"):
                return alpha / math.sqrt(rank), alpha
        return (1.0, float(rank or 1)) if alpha is None or not rank else (alpha / rank, alpha)

    def _cover(self, component: str, target: Target, rank: int, alpha: float, count: int, norm2: float) -> None:
        first, _, rest = (target.path or target.leaf).partition(".")
        part = first
        if first in self.keys.split_stacks:
            second, _, rest = rest.partition(".")
            part = f"{first}.{second}"
        part = part if component == self.keys.main else f"{component} {part}"
        self._of[part] = self.plans[component].shapes[target.at()][0] or 1
        self._lines[part].append((rest or first, target.path, target.layer, rank, alpha, count, norm2))

    def parts(self) -> tuple[Part, ...]:
        parts = []
        for part, lines in self._lines.items():
            names, _, layers, ranks, alphas, counts, norms = zip(*lines, strict=True)
            rank, alpha = ((min(values), max(values)) for values in (ranks, alphas))
            own = tuple(dict.fromkeys(names))
            norm = math.sqrt(sum(norms))
            parts.append(Part(part, len(set(layers)), self._of[part], own, rank, alpha, sum(counts), norm))
        return tuple(parts)


def _matrices(*values: np.ndarray) -> tuple[np.ndarray, ...]:
    for value in values:
        if value.ndim != 2:
            raise ValueError(f"shape {list(value.shape)}, expected a matrix")
    return values


def _lokr_factor(tensors: dict[str, np.ndarray], w: str) -> tuple[np.ndarray, ...]:
    if f"lokr_{w}" in tensors:
        return _matrices(tensors.pop(f"lokr_{w}"))
    if f"lokr_{w}_a" not in tensors or f"lokr_{w}_b" not in tensors:
        raise ValueError(f"no lokr_{w}, nor its two factors")
    a, b = _matrices(tensors.pop(f"lokr_{w}_a"), tensors.pop(f"lokr_{w}_b"))
    if a.shape[1] != len(b):
        raise ValueError(f"lokr_{w}: rank {a.shape[1]} and {len(b)}")
    return a, b


def _columns(plan: Plan, site: Site, inner: Delta) -> Callable[[float], np.ndarray]:
    """The lengths of the columns of a fused layer with ``inner`` at a scale: its parts lie apart in the model."""

    @functools.lru_cache(maxsize=1)  # its parts ask one after another
    def lengths(scale: float) -> np.ndarray:
        squares = np.zeros((1, inner.shape[1]))
        for target in site.targets:
            old, part = read_layer(plan, target.at(), target.layer), inner.take(_rows(inner, target))
            squares += np.sum(np.square(old + part.change(old, scale)), axis=0, keepdims=True)
        return np.sqrt(squares).astype(np.float32)

    return lengths


def _rows(delta: Delta, target: Target) -> tuple[tuple[int, int], ...]:
    """Those of a module's change that belong to one of its targets."""
    return tuple((delta.shape[0] * a // n, delta.shape[0] * b // n) for a, b, n in target.rows)


def _by_pattern(settings: Mapping[str, Any], patterns: str, names: tuple[str, ...], otherwise: Any) -> Any:
    """PEFT's rule: the first pattern that the end of the module's name matches."""
    for pattern, value in (settings.get(patterns) or {}).items():
        if any(re.match(rf"(.*\.)?({one})$", name) for one in (pattern, unwrapped(pattern)) for name in names):
            return value
    return otherwise
