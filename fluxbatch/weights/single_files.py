"""Components in single files, recognised by keys alone.

Black Forest Labs and ComfyUI ship single files without configs: a transformer, a VAE, a text encoder, or
all of them under prefixes in one file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from fluxbatch.models.family import Component
from fluxbatch.models.key_tables import Table
from fluxbatch.types import UserError
from fluxbatch.weights.source import Tensor


def recognise(component: Component, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Table, str] | None:
    """The component's tensors without their prefix, their table and the prefix; None if it is not there."""
    for prefix in component.prefixes:
        for naming in component.namings:
            if naming.signs(prefix) <= tensors.keys():
                own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
                for name, other in component.same:
                    if name not in own and other in own:
                        own[name] = own.pop(other)
                return own, naming.table_for(own), prefix
    return None


def check_whole(tensors: Mapping[str, Tensor], prefixes: list[str], leftovers: str, where: str) -> None:
    """UserError for names in a whole that belong to no component, nor to what may be left over."""
    strange = [name for name in tensors if not name.startswith(tuple(prefixes)) and not re.fullmatch(leftovers, name)]
    if strange:
        raise UserError(f"{where}: {len(strange)} tensors belong to no component, the first is {strange[0]}")
