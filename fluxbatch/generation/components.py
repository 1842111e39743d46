"""The components of a job's model, as headers have them, with the adapters on them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from fluxbatch.config.schema import Job
from fluxbatch.distributed.mesh import Layout
from fluxbatch.lora import apply
from fluxbatch.lora.apply import Loras
from fluxbatch.models.family import Family
from fluxbatch.models.registry import families
from fluxbatch.types import UserError
from fluxbatch.weights import load
from fluxbatch.weights.checkpoint import Checkpoint, agreed


@dataclasses.dataclass(frozen=True)
class Parts:
    family: Family
    plans: Mapping[str, load.Plan]  # of each component
    lora: Loras
    open_encoder: Callable[[], load.Plan]  # the decoder's plan, with what encodes pictures beside it


def open_parts(job: Job, checkpoint: Checkpoint, layout: Layout, options: Mapping[str, Mapping[str, Any]]) -> Parts:
    """Which bytes fill which parameter, and what adapters change; UserError lists all that does not fit.

    An adapter that reads more of a token than the denoiser does makes it a model of another family: as a control LoRA
    does, whose weights for a control image stand behind those that the checkpoint has.
    """
    family, name = checkpoint.family, checkpoint.family.denoiser
    makers = {
        part: functools.partial(component.plan, layout=layout, **options.get(part, {}))
        for part, component in checkpoint.components.items()
    }
    plans = _collect(makers)
    lora = apply.read(job, plans, family)
    if family.lora.inputs:
        path, field, _ = family.lora.inputs
        inputs = plans[name].shapes[path][1][1]
        widest = max(lora.adapters, key=lambda adapter: adapter.inputs(family.lora), default=None)
        if widest is not None and (wanted := widest.inputs(family.lora)) > inputs:
            component = checkpoint.components[name]
            config = dataclasses.replace(component.config, **{field: wanted})
            said = {**component.definition.saved, **dataclasses.asdict(config)}
            kind = next((each for each in families() if each.claims(said)), None)
            if kind is None:
                got = f"reads {wanted} channels of a token"
                raise UserError(f"{widest.spec.key}: {widest.file}: {got}, expected the model's {inputs}")
            opened = dataclasses.replace(component, config=config, where=widest.file)
            family = agreed(kind, {**checkpoint.components, name: opened}, family.index())
            plans[name] = component.widened(config, plans[name], layout=layout, **options.get(name, {}))
            lora = lora.widened(family.lora, wanted)
    return Parts(family, plans, lora, functools.partial(makers[family.decoder], encoder=True))


def _collect(makers: Mapping[str, Callable[[], load.Plan]]) -> dict[str, load.Plan]:
    """Every component's plan, or one error with the complaints of all of them."""
    plans: dict[str, load.Plan] = {}
    lines: list[str] = []
    for name, make in makers.items():
        try:
            plans[name] = make()
        except UserError as error:
            lines += error.lines
    if lines:
        raise UserError(*lines)
    return plans
