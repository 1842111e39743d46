"""Which adapters a job names, where their files lie, and what stands beside their tensors."""

from __future__ import annotations

import collections
import dataclasses
import json
import re
from typing import Any

from fluxbatch.config.schema import Job, shown
from fluxbatch.types import UserError
from fluxbatch.weights.find import NO_PICKLES, PICKLED, SUFFIX, SUFFIXES, find, split
from fluxbatch.weights.source import Source

USUAL = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
PEFT = "adapter_config.json"  # beside the latter
SPLIT = ("pissa", "olora", "corda", "loftq", "lora_ga")  # starts that take a part of the weights out, or round them


@dataclasses.dataclass(frozen=True)
class Spec:
    """An adapter as the job names it."""

    name: str
    path: str
    weight_name: str | None
    scale: float
    from_pt: bool
    key: str  # of the configuration, for messages


def specs(job: Job) -> list[Spec]:
    """All adapters of a job, those of the ``lora`` group first."""
    found = [Spec(name, a.path, a.weight_name, a.scale, a.from_pt, f"lora.{name}.path") for name, a in job.lora.items()]
    arrays = job.lora_config
    for i, path in enumerate(arrays.lora_model_name_or_path):
        key = f"lora_config.lora_model_name_or_path[{i}]"
        found.append(Spec(arrays.adapter_name[i], path, arrays.weight_name[i], arrays.scale[i], arrays.from_pt[i], key))
    return found


def locate(spec: Spec) -> tuple[Source, str]:
    """The directory and the file; UserError if there is none, or it is a pickle."""
    if spec.weight_name is not None and spec.weight_name.endswith(PICKLED):
        raise UserError(f"{spec.key}: weight_name {spec.weight_name!r}: expected a {SUFFIX} file: {NO_PICKLES}")
    wanted = [spec.weight_name] if spec.weight_name else [f"*{suffix}" for suffix in SUFFIXES]
    path, _ = find(spec.path, spec.key, None, (*wanted, f"*{PEFT}"), (f"*{PEFT}",))
    folder, file = split(path)
    if file is not None and spec.weight_name not in (None, file):
        raise UserError(f"{spec.key}: {spec.path!r} is a file; weight_name is {spec.weight_name!r}, expected null")
    source = Source(folder)
    if file is None and (file := spec.weight_name) is None:
        held = [name for name in source.files() if name.endswith(SUFFIXES)]
        chosen = [name for name in USUAL if name in held] or held
        if len(chosen) != 1:
            have = f"{len(held)} ({', '.join(held[:5])}{', …' if len(held) > 5 else ''})" if held else "none"
            one = f"expected one {SUFFIX} file, or weight_name to say which"
            raise UserError(f"{spec.key}: {source.url}: {one}; it has {have}")
        file = chosen[0]
    if not source.exists(file):
        raise UserError(f"{spec.key}: {source.path(file)}: not found")
    return source, file


def settings_of(source: Source, file: str, data: bytes) -> dict[str, dict[str, Any]]:
    """What PEFT keeps beside the tensors (alpha, ranks, …), by component: in ``adapter_config.json``,
    or in the header, as diffusers writes it. UserError where PEFT's own file has lost it, and for what is unsound."""
    folder, _, name = file.rpartition("/")
    beside = f"{folder}/{PEFT}" if folder else PEFT
    if name == USUAL[1] and source.exists(beside):
        return {"transformer": _sound(source.json(beside), source.path(beside))}
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    text = (header.get("__metadata__") or {}).get("lora_adapter_metadata")
    if name == USUAL[1] and not text and not any(key.endswith(".alpha") for key in header):
        rank = "a file by any other name, without alphas, is read with the rank for alpha"
        raise UserError(f"{source.path(beside)}: not found: it says how strong {name} is ({rank})")
    where = f"{source.path(file)}: lora_adapter_metadata"
    by_component: dict[str, dict[str, Any]] = collections.defaultdict(dict)
    try:
        for key, value in (json.loads(text) if text else {}).items():
            component, _, name = key.partition(".")
            by_component[component][name] = value
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{where} is {shown(text)}: expected a JSON object in a string") from error
    return {component: _sound(settings, where) for component, settings in by_component.items()}


def _sound(settings: dict[str, Any], where: str) -> dict[str, Any]:
    """PEFT's settings themselves; UserError for those of another kind, and of adapters that stand on other weights than
    the model's."""

    def number(value: Any) -> bool:
        return type(value) in (int, float)

    for key in ("lora_alpha", "alpha", "r"):
        if (value := settings.get(key)) is not None and not number(value):
            raise UserError(f"{where}: {key} is {shown(value)}, expected a number")
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = settings.get(key) or {}
        try:
            sound = all(number(value) for value in patterns.values()) and all(map(re.compile, patterns))
        except (AttributeError, re.error):
            sound = False
        if not sound:
            raise UserError(f"{where}: {key} is {shown(patterns)}, expected numbers by regular expressions")
    if str(start := settings.get("init_lora_weights")).lower().startswith(SPLIT):
        made = "made for what this start has left of the model's weights, not for them whole"
        wanted = "what PEFT's save_pretrained(path_initial_model_for_weight_conversion=…) makes of it"
        raise UserError(f"{where}: init_lora_weights is {shown(start)}: {made}; expected {wanted}")
    return settings
