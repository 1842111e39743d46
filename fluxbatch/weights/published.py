"""What is known of a published checkpoint that is not here: its configurations, from which every size follows.

``checkpoints/NAME.yaml`` has a repository's. A plan goes by them, so that it needs no download, token or network;
nothing can be generated from them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Mapping
from typing import Any, cast
from urllib.parse import unquote

import huggingface_hub
import yaml
from flax import nnx

from fluxbatch.config.schema import Model, shown
from fluxbatch.models.family import Component, Family
from fluxbatch.models.key_tables import NATIVE
from fluxbatch.models.registry import by_pipeline
from fluxbatch.types import UserError
from fluxbatch.weights.checkpoint import (
    INDEXES,
    Checkpoint,
    Opened,
    agreed,
    check_homes,
    open_checkpoint,
    open_component,
)
from fluxbatch.weights.find import EMBEDDED, PAGE
from fluxbatch.weights.load import path_of
from fluxbatch.weights.source import Source, Tensor
from fluxbatch.weights.tokenizer_files import find_tokenizer
from fluxbatch.weights.zarr import dtype_of, layer_names

Known = Mapping[str, Any]  # a file of configurations


@dataclasses.dataclass(frozen=True)
class Published(Checkpoint):
    """A checkpoint by its sizes alone."""

    def digest(self) -> str:
        return "not known"  # it is of bytes that are not here


class Named(Source):
    """A directory of which only the name is known."""

    def __init__(self, url: str):
        self.url, self.local, self.sizes = url, False, {}

    def exists(self, name: str) -> bool:
        return False


def open_or_known(model: Model) -> Checkpoint:
    """The checkpoint; one whose sizes are known is not fetched, and they stand in for it unless all of it is here.

    UserError as ``open_checkpoint`` has it, for what is not such a one or is named apart from it.
    """
    if (found := _named(model.pretrained_model_name_or_path, model.revision)) is None:
        return open_checkpoint(model)
    known, repo, file, revision = found
    folder = next(filter(None, (_cached(repo, name, revision) for name in INDEXES)), None)
    if folder and _whole(model, family_of(known), folder, file):
        here = os.path.join(folder, file) if file else folder
        return open_checkpoint(dataclasses.replace(model, pretrained_model_name_or_path=here))
    return _by_sizes(model, known, Source(folder) if folder else None)


@functools.cache
def published() -> dict[str, Known]:
    """By repository, in lower case as the Hub takes them too."""
    files = [path for path in EMBEDDED.iterdir() if path.name.endswith(".yaml")]
    read = [yaml.safe_load(path.read_text("utf-8")) for path in files]
    return {known["repository"].lower(): known for known in read}


def license_of(name: str) -> str | None:
    """What a model may be used under, as its page names it; None where that is not known."""
    card = EMBEDDED / name / "README.md" if name in {path.name for path in EMBEDDED.iterdir()} else None
    if card and card.is_file():
        return huggingface_hub.ModelCard(card.read_text("utf-8")).data.get("license")
    return known[0].get("license") if (known := _named(name)) else None


def family_of(known: Known) -> type[Family]:
    """UserError is nobody's: the file comes with the package."""
    family = by_pipeline(known["pipeline"])
    assert family is not None, known["pipeline"]
    return family


def component(name: str, definition: Component, known: Known, where: str) -> Opened:
    """What is known of one, with a tensor for each layer of each parameter of the model that it describes."""
    kept = dtype_of(known["dtype"])
    parsed = definition.config.from_json(known["components"][name])
    assert kept is not None, known["dtype"]
    tensors = {}
    for keys, leaf in nnx.to_flat_state(nnx.split(definition.module(parsed, rngs=None), nnx.Param, ...)[1]):
        shape, path = tuple(leaf.get_value().shape), path_of(keys)
        stacked = len(shape) > len(leaf.get_metadata()["axes"])
        own = shape[1:] if stacked else shape
        for layer in layer_names(path, shape[0]) if stacked else [path]:
            tensors[layer] = Tensor(layer, name, kept, own, 0, kept.itemsize * math.prod(own))
    return Opened(definition, Named(where), parsed, tensors, NATIVE, where)


def _named(name: str, revision: str | None = None) -> tuple[Known, str, str | None, str | None] | None:
    """What is known of a model, its repository, the file that is named of it and the revision; or None."""
    if page := PAGE.fullmatch(name):
        name = unquote(page["repo"] + (page["file"] or ""))
        revision = unquote(page["revision"]) if page["revision"] else revision
    elif os.path.exists(os.path.expanduser(name)) or name.endswith("/"):
        return None
    repo, file = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:]) or None
    known = published().get(repo.lower())
    return (known, repo, file, revision) if known and file in (None, known["file"]) else None


def _cached(repo: str, file: str, revision: str | None) -> str | None:
    """The folder of a repository's file among the downloads on this machine; None if it is not there."""
    try:
        path = huggingface_hub.try_to_load_from_cache(repo, file, revision=revision)
    except (OSError, ValueError):  # a cache that may not be read, or a revision that is none
        return None
    return os.path.dirname(path) if isinstance(path, str) else None


def _whole(model: Model, family: type[Family], folder: str, file: str | None) -> bool:
    """Whether a download has all files of weights that the job reads from it."""
    for name, definition in family.components.items():
        if definition.home and getattr(model, definition.home):
            continue
        if file and name == family.denoiser:
            if not os.path.exists(os.path.join(folder, file)):
                return False
        elif not _has_all(Source(folder) / name, definition.stems):
            return False
    return True


def _has_all(home: Source, stems: tuple[str, ...]) -> bool:
    for stem in stems:
        if home.exists(index := f"{stem}.safetensors.index.json"):
            listed = home.json(index).get("weight_map")
            return not isinstance(listed, dict) or all(home.exists(str(part)) for part in listed.values())
        if home.exists(f"{stem}.safetensors"):
            return True
    return False


def _apart(family: type[Family], name: str, model: Model, base: str) -> tuple[Opened, Source | None] | None:
    """A component that the configuration names apart; of a known repository by its sizes too. None if it does not."""
    definition = family.components[name]
    if not (definition.home and (given := getattr(model, definition.home))):
        return None
    if (found := _named(given)) and not found[2]:
        known, repo, _, revision = found
        folder = _cached(repo, f"{name}/config.json", revision)
        if not folder or not _has_all(Source(folder), definition.stems):
            return component(name, definition, known, known["repository"]), None
        model = dataclasses.replace(model, **cast(dict[str, Any], {definition.home: os.path.dirname(folder)}))
    return open_component(family, name, model, Named(base), None, {}, None)


def _by_sizes(model: Model, known: Known, downloaded: Source | None) -> Published:
    """``downloaded``: the part of it that is here, which may have the tokenizers."""
    repo, family = known["repository"], family_of(known)
    check_homes(family, model)
    opened = {
        part: _apart(family, part, model, repo) or (component(part, definition, known, repo), None)
        for part, definition in family.components.items()
    }
    components = {part: found for part, (found, _) in opened.items()}
    whole = agreed(family, components, known.get("index", {}))
    tokenizers = {}
    for part, files in family.tokenizers.items():
        homes = [home for home in (opened[files.component][1], downloaded) if home]
        folders = [folder for home in homes for folder in (home / part, home)]
        try:
            same = components[files.component].config.vocab_size == files.vocabulary
            tokenizers[part] = find_tokenizer(folders or [Named(repo)], files.repo if same else None)
        except UserError:
            tokenizers[part] = ""
    named = [part.where for part in components.values() if isinstance(part.source, Named)]
    names = dict.fromkeys([shown(model.pretrained_model_name_or_path), *named[1:]])
    unseen = (f"{', '.join(names)}: not here, or not all of it, so this goes by the sizes that come with fluxbatch; "
              "the checkpoint itself was not looked at")  # fmt: skip
    return Published(whole, components, tokenizers, known["scheduler"], revision=None, unseen=unseen)
