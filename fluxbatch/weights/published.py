"""What is known of a published checkpoint that is not here: its configurations, from which every size follows.

``checkpoints/NAME.yaml`` has a repository's. A plan goes by them, so that it needs no download, token or network;
nothing can be drawn from them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

import huggingface_hub
import yaml
from flax import nnx

from fluxbatch.config.schema import Model, shown
from fluxbatch.models.flux1 import keys as tables
from fluxbatch.types import UserError
from fluxbatch.weights.checkpoint import (
    KINDS,  # fmt: skip
    TOKENIZERS,
    Checkpoint,
    Component,
    _tokenizer,
    agree,
    open_checkpoint,
    open_component,
)
from fluxbatch.weights.find import EMBEDDED, PAGE
from fluxbatch.weights.load import path_of
from fluxbatch.weights.source import Source, Tensor
from fluxbatch.weights.zarr import dtype_of, layer_names

Known = Mapping[str, Any]  # a file of configurations


@dataclasses.dataclass(frozen=True)
class Published(Checkpoint):
    """A checkpoint by its sizes alone."""

    def digest(self) -> str:
        return "not known"  # it is of bytes that are not here


class Named(Source):
    """A place of which only the name is known."""

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
    folder = _cached(repo, "model_index.json", revision)
    if folder and _whole(model, folder, file):
        here = os.path.join(folder, file) if file else folder
        return open_checkpoint(dataclasses.replace(model, pretrained_model_name_or_path=here))
    return _by_sizes(model, known, Source(folder) if folder else None)


@functools.cache
def published() -> dict[str, Known]:
    """By repository, in lower case as the Hub takes them too."""
    files = [path for path in EMBEDDED.iterdir() if path.name.endswith(".yaml")]
    read = [yaml.safe_load(path.read_text("utf-8")) for path in files]
    return {known["repository"].lower(): known for known in read}


def component(name: str, known: Known, where: str) -> Component:
    """What is known of one, with a tensor for each layer of each parameter of the model that it describes."""
    kind, kept = KINDS[name], dtype_of(known["dtype"])
    parsed = kind.config.from_json(known["components"][name])
    assert kept is not None, known["dtype"]
    tensors = {}
    for keys, leaf in nnx.to_flat_state(nnx.split(kind.module(parsed, rngs=None), nnx.Param, ...)[1]):
        shape, path = tuple(leaf.get_value().shape), path_of(keys)
        stacked = len(shape) > len(leaf.get_metadata()["axes"])
        own = shape[1:] if stacked else shape
        for layer in layer_names(path, shape[0]) if stacked else [path]:
            tensors[layer] = Tensor(layer, name, kept, own, 0, kept.itemsize * math.prod(own))
    return Component(kind, Named(where), parsed, tensors, tables.NATIVE, where)


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


def _whole(model: Model, folder: str, file: str | None) -> bool:
    """Whether a download has all files of weights that the job reads from it."""
    for name, kind in KINDS.items():
        if kind.key and getattr(model, kind.key):
            continue
        if file and name == "transformer":
            if not os.path.exists(os.path.join(folder, file)):
                return False
        elif not _has_all(Source(folder) / name, kind.stems):
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


def _apart(name: str, model: Model, base: str) -> tuple[Component, Source | None] | None:
    """A component that the configuration names apart; of a known repository by its sizes too. None if it does not."""
    kind = KINDS[name]
    if not (kind.key and (given := getattr(model, kind.key))):
        return None
    if (found := _named(given)) and not found[2]:
        known, repo, _, revision = found
        folder = _cached(repo, f"{name}/config.json", revision)
        if not folder or not _has_all(Source(folder), kind.stems):
            return component(name, known, known["repository"]), None
        model = dataclasses.replace(model, **{kind.key: os.path.dirname(folder)})
    return open_component(name, model, Named(base), None, {}, None)


def _by_sizes(model: Model, known: Known, downloaded: Source | None) -> Published:
    """``downloaded``: the part of it that is here, which may have the tokenizers."""
    repo = known["repository"]
    opened = {part: _apart(part, model, repo) or (component(part, known, repo), None) for part in KINDS}
    components = {part: found for part, (found, _) in opened.items()}
    agree(components)
    tokenizers = {}
    for part, (encoder, vocabulary, public) in TOKENIZERS.items():
        homes = [home for home in (opened[encoder][1], downloaded) if home]
        places = [place for home in homes for place in (home / part, home)]
        try:
            same = components[encoder].config.vocab_size == vocabulary
            tokenizers[part] = _tokenizer(places or [Named(repo)], public if same else None)
        except UserError:
            tokenizers[part] = ""
    named = [part.where for part in components.values() if isinstance(part.source, Named)]
    named = dict.fromkeys([shown(model.pretrained_model_name_or_path), *named[1:]])
    unseen = (f"{', '.join(named)}: not here, or not all of it, so this goes by the sizes that come with fluxbatch; "
              "the checkpoint itself was not looked at")  # fmt: skip
    return Published(components, **tokenizers, scheduler=known["scheduler"], revision=None, unseen=unseen)
