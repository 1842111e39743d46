"""The families that there are: every folder of ``models/`` with a ``definition.py``."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from fluxbatch import models
from fluxbatch.models.family import Family


@functools.cache
def families() -> tuple[type[Family], ...]:
    """All of them, FLUX.1 first and the others by folder name, and as each definition lists its own."""
    folders = [module.name for module in pkgutil.iter_modules(models.__path__) if module.ispkg]
    folders.sort(key=lambda name: (name != "flux1", name))
    definitions = [importlib.import_module(f"{models.__name__}.{folder}.definition") for folder in folders]
    return tuple(family for definition in definitions for family in definition.FAMILIES)


def by_pipeline(name: str) -> type[Family] | None:
    """The family whose checkpoints call themselves ``name`` in model_index.json."""
    return next((family for family in families() if name in family.pipelines), None)
