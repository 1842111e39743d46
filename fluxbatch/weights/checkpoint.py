"""A FLUX checkpoint as a set of components, opened from headers and configs alone.

Three layouts, told apart by what is there: diffusers' directory, single files (Black Forest Labs',
ComfyUI's), and the converted copy that ``fluxbatch.convert`` writes.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from fluxbatch.config import Model, shown
from fluxbatch.models.clip import ClipConfig, ClipTextEncoder
from fluxbatch.models.flux import Flux, FluxConfig
from fluxbatch.models.t5 import T5Config, T5Encoder
from fluxbatch.models.vae import Decoder, VaeConfig
from fluxbatch.types import UserError
from fluxbatch.weights import load, native, quantized, single, tables
from fluxbatch.weights.find import SMALL, SUFFIX, SUFFIXES, find, snapshot, split
from fluxbatch.weights.headers import held, instead, notes, read_header, read_headers, weights_file, with_scales
from fluxbatch.weights.rules import Table, lacked
from fluxbatch.weights.source import Source, Tensor, sampled
from fluxbatch.weights.verify import verify

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt", "spiece.model",
                   "added_tokens.json")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a component is: its config, model, names and the stems of its weight files."""

    config: Any
    module: Callable[..., nnx.Module]
    table: Table
    stems: tuple[str, ...]
    classes: tuple[str, ...]  # what its config.json may say it is
    key: str | None = None  # of the configuration, naming where it lives if not with the base model
    files: tuple[str, ...] = ()  # its usual names as a single file
    folders: tuple[str, ...] = ()  # ComfyUI's, beside the transformer's


CLIP_FILES = ("clip_l.safetensors",)
T5_FILES = ("t5xxl_fp16.safetensors", "t5xxl_fp8_e4m3fn_scaled.safetensors", "t5xxl_fp8_e4m3fn.safetensors")
KINDS = {
    "transformer": Kind(FluxConfig, Flux, tables.FLUX_DIFFUSERS, ("diffusion_pytorch_model", "model"), ("FluxTransformer2DModel",)),
    "text_encoder": Kind(ClipConfig, ClipTextEncoder, tables.CLIP, ("model",),
                         ("CLIPTextModel", "CLIPModel", "CLIPTextModelWithProjection"), "clip_model_name_or_path",
                         CLIP_FILES, ("text_encoders", "clip")),
    "text_encoder_2": Kind(T5Config, T5Encoder, tables.T5, ("model",), ("T5EncoderModel", "T5ForConditionalGeneration", "T5Model"),
                           "t5xxl_model_name_or_path", T5_FILES, ("text_encoders", "clip")),
    "vae": Kind(VaeConfig, Decoder, tables.VAE_DECODER, ("diffusion_pytorch_model", "model"), ("AutoencoderKL",),
                "vae_model_name_or_path", ("ae.safetensors", "ae.sft"), ("vae",)),
}  # fmt: skip
# Each tokenizer's encoder, and for FLUX.1's vocabularies the public repository that has it: single files
# come without one.
TOKENIZERS = {
    "tokenizer": ("text_encoder", 49408, "openai/clip-vit-large-patch14"),
    "tokenizer_2": ("text_encoder_2", 32128, "google/t5-v1_1-xxl"),
}


@dataclasses.dataclass(frozen=True)
class Component:
    kind: Kind
    source: Source
    config: Any
    tensors: Mapping[str, Tensor]
    table: Table
    where: str  # its config.json, or the file whose shapes gave the config
    declared: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # all that its config.json says

    def plan(self, **options: Any) -> load.Plan:
        """Which bytes fill which parameter; UserError lists every disagreement, or names a quantization."""
        make = lambda rngs: self.kind.module(self.config, rngs=rngs, **options)  # noqa: E731
        try:
            return load.plan(make, dict(self.tensors), self.table, self.source)
        except UserError as error:
            held = {t.file for t in self.tensors.values() if not isinstance(self.source, native.Arrays)}
            noted = (quantized.in_notes(notes(self.source, file), self.source.path(file)) for file in sorted(held))
            if line := quantized.in_config(self.declared, self.where) or next(filter(None, noted), None):
                raise UserError(line) from error
            raise


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    components: Mapping[str, Component]
    tokenizer: str  # local directory of CLIP's tokenizer
    tokenizer_2: str  # and of T5's
    scheduler: Mapping[str, Any]
    revision: str | None  # commit of a Hugging Face snapshot
    converted_from: str | None = None  # digest of what a converted copy was made from

    def digest(self) -> str:
        """16 hex digits over configs, tokenizers and the weights' bytes (large files: samples); of a
        converted copy, whose bytes have checksums, those of its origin."""
        if self.converted_from and all(isinstance(c.source, native.Arrays) for c in self.components.values()):
            return self.converted_from
        digest = hashlib.sha256(json.dumps(self.scheduler, sort_keys=True).encode() + self._weights(self.components))
        for folder in (self.tokenizer, self.tokenizer_2):
            for file in TOKENIZER_FILES:
                if os.path.exists(path := os.path.join(folder, file)):
                    with open(path, "rb") as f:
                        digest.update(f.read())
        return digest.hexdigest()[:16]

    def text_digest(self) -> str:
        """Likewise, over what decides the encoding of token ids: it is the same for models that share their encoders."""
        return self._weights({name: self.components[name] for name in ("text_encoder", "text_encoder_2")}).hex()

    def _weights(self, components: Mapping[str, Component]) -> bytes:
        digest = hashlib.sha256((self.converted_from or "").encode())
        for name, component in sorted(components.items()):
            digest.update(name.encode() + json.dumps(dataclasses.asdict(component.config), sort_keys=True).encode())
        for source, file, _ in files(components):
            digest.update(self._contents[source.path(file)])
        return digest.digest()

    @functools.cached_property
    def _contents(self) -> dict[str, bytes]:
        """A digest of each file of weights."""
        found = {}
        for source, file, size in files(self.components):
            digest = hashlib.sha256()
            for part in sampled(source, file, size):
                digest.update(part)
            found[source.path(file)] = digest.digest()
        return found


def files(components: Mapping[str, Component]) -> list[tuple[Source, str, int]]:
    """Each file of weights once, in a fixed order, with its size in bytes."""
    found = {}
    for _, component in sorted(components.items()):
        for file, size in sorted(component.source.sizes.items()):
            found[component.source.path(file)] = (component.source, file, size)
    return list(found.values())


def open_checkpoint(model: Model) -> Checkpoint:
    """Finds the checkpoint and reads its configs and headers; UserError for anything unsound."""
    place, revision = find(model.pretrained_model_name_or_path, "model.pretrained_model_name_or_path", model.revision, *_wanted(model))
    folder, file = split(place)
    root = Source(folder)
    index = root.json("model_index.json") if file is None and root.exists("model_index.json") else {}
    if index.get("_class_name", "FluxPipeline") not in ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline"):
        raise UserError(f"{root.path('model_index.json')}: a {index['_class_name']}, expected a FluxPipeline")
    marker = native.read_marker(root) if file is None else None
    file = file or (_only_file(root) if marker is None else None)
    whole = _read_file(root, file) if file else {}

    opened = {name: _open(name, model, root, file, whole, marker) for name in KINDS}
    components = {name: component for name, (component, _) in opened.items()}
    if file:
        prefixes = {found[2] for name in KINDS if (found := single.recognise(name, whole))}
        single.check_whole(whole, list(prefixes), root.path(file))
    if model.verify.name == "digest" and marker is None:  # a converted copy has checksums of its own
        verify(files(components))
    flux = components["transformer"]
    for key, got, expected, of in (
        ("in_channels", flux.config.in_channels, 4 * components["vae"].config.latent_channels, "4 × the VAE's latent_channels"),
        ("joint_attention_dim", flux.config.joint_attention_dim, components["text_encoder_2"].config.d_model, "T5's d_model"),
        ("pooled_projection_dim", flux.config.pooled_projection_dim, components["text_encoder"].config.hidden_size, "CLIP's hidden_size"),
    ):
        if got != expected:
            raise UserError(f"{flux.where}: {key} is {got}, expected {expected} ({of})")

    tokenizers = {}
    for name, (encoder, vocabulary, repo) in TOKENIZERS.items():
        known = repo if components[encoder].config.vocab_size == vocabulary else None
        home = opened[encoder][1]  # a model directory of its own has its tokenizer beside the weights
        tokenizers[name] = _tokenizer([*([home / name, home] if home else []), root / name], known)
    if file and not root.exists("scheduler/scheduler_config.json"):
        scheduler = single.schedule(flux.config.guidance_embeds)
    else:
        scheduler = (root / "scheduler").json("scheduler_config.json")
    return Checkpoint(components, **tokenizers, scheduler=scheduler, revision=revision or (marker or {}).get("revision"),
                      converted_from=(marker or {}).get("digest"))  # fmt: skip


def _wanted(model: Model) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What to fetch of the base model's repository; and with a transformer that is a file of it. No weights of what
    the configuration names apart."""
    weights = [name for name, kind in KINDS.items() if not (kind.key and getattr(model, kind.key))]
    beside = [f"{name}/*" for name in weights if name != "transformer"] + [*KINDS["vae"].files] * ("vae" in weights)
    return (*SMALL, *(f"{name}/*" for name in weights)), (*SMALL, *beside)


def _open(
    name: str, model: Model, root: Source, file: str | None, whole: Mapping[str, Tensor], marker: Mapping[str, Any] | None
) -> tuple[Component, Source | None]:
    """A component, and the directory of a text encoder that the configuration names apart."""
    kind = KINDS[name]
    if kind.key and (given := getattr(model, kind.key)):
        stems = (f"{folder}{stem}{end}" for folder in ("", f"{name}/") for stem in kind.stems for end in (SUFFIX, f"-*{SUFFIX}"))
        place, other = split(find(given, f"model.{kind.key}", None, (*stems, *SMALL), SMALL)[0])
        home = Source(place)
        if other:
            return _from_file(name, home, other, _read_file(home, other)), home
        return _from_directory(name, home / name if home.exists(f"{name}/config.json") else home), home
    if marker is not None:
        return _from_directory(name, root / name, marker), None
    if file and (name == "transformer" or single.recognise(name, whole)):
        return _from_file(name, root, file, whole), None
    if weights_file(root / name, kind.stems):
        return _from_directory(name, root / name), None
    folders = [root, *(root / f"../{folder}" for folder in kind.folders if root.local)]
    for folder in folders:
        for other in kind.files:
            if folder.exists(other):
                return _from_file(name, folder, other, _read_file(folder, other)), None
    if not file:
        return _from_directory(name, root / name, root=root), None  # says what is missing
    raise UserError(f"{root.path(file)}: no {name} in it or beside it: expected {root.path(name)}/ or {kind.files[0]} in "
                    f"{', '.join(folder.url for folder in folders)}, or model.{kind.key}=…")  # fmt: skip


def _only_file(root: Source) -> str | None:
    """The transformer's file in a directory of single files."""
    if weights_file(root / "transformer", KINDS["transformer"].stems):
        return None
    files = [name for name in root.top() if name.startswith("flux") and name.endswith(SUFFIXES)]
    if len(files) > 1:
        raise UserError(f"{root.url}: holds {', '.join(files)}: name one of them")
    return files[0] if files else None


def _read_file(source: Source, file: str) -> dict[str, Tensor]:
    return with_scales(read_header(source, file), source.path(file))


def _from_file(name: str, source: Source, file: str, whole: Mapping[str, Tensor]) -> Component:
    kind, where = KINDS[name], source.path(file)
    found = single.recognise(name, whole)
    if found is None:
        signs = " or ".join(dict.fromkeys(sign for sign, _ in single.NAMINGS[name]))
        names = f"its tensors are called {', '.join(list(whole)[:3])}, …"
        line = quantized.in_tensors(whole, where) or quantized.in_notes(notes(source, file), where)
        raise UserError(line or f"{where}: no {name} in it, which has {signs}: {names}")
    tensors, table, _ = found
    try:
        if line := quantized.in_tensors(tensors, where):
            raise UserError(line)
        config = single.sizes(name, tensors, table)
        beside = next((json for path in (f"{name}/config.json", "config.json") if (json := _declared(kind, source, path))), None)
        config = (beside.get("text_config", beside) if beside else single.constants(name, config)) | config
        return Component(kind, source, _parsed(kind, config), tensors, table, where)
    except KeyError as error:
        lacks = f": the file lacks {lack}" if (lack := lacked(table, error.args[0], None, tensors)) else ""
        raise UserError(f"{where}: no tensor gives the size of {error} of the {name}{lacks}") from error
    except (ValueError, TypeError, IndexError) as error:
        raise UserError(f"{where}: {error}") from error


def _declared(kind: Kind, source: Source, path: str) -> dict[str, Any] | None:
    """The config at ``path`` if it says it is of this kind."""
    config = source.json(path) if source.exists(path) else {}
    return config if _class_of(config) in kind.classes else None


def _class_of(config: Mapping[str, Any]) -> str | None:
    return config.get("_class_name") or next(iter(config.get("architectures") or ()), None)


def _from_directory(name: str, source: Source, marker: Mapping[str, Any] | None = None, root: Source | None = None) -> Component:
    kind = KINDS[name]
    if not source.exists("config.json"):
        places, where = ([source, root] if root else [source]), source.path("config.json")
        raise UserError(instead(*places) or f"{where}: not found: the checkpoint has no {name}{held(*places)}")
    config = source.json("config.json")
    where = source.path("config.json")
    declared = _class_of(config)
    if declared is not None and declared not in kind.classes:
        raise UserError(f"{where}: is a {declared}, expected {' or '.join(kind.classes)}")
    try:
        parsed = _parsed(kind, config)
    except KeyError as error:
        raise UserError(f"{where}: key {error} is missing") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: {error}") from error
    if marker is not None:
        arrays = native.Arrays(source.url)
        return Component(kind, arrays, parsed, native.tensors(marker, name, arrays), tables.NATIVE, where)
    tensors = read_headers(source, kind.stems)
    own, table, _ = single.recognise(name, tensors) or (tensors, kind.table, "")
    if len(own) < len(tensors):  # the others would be left out without a word
        own, table = tensors, kind.table
    if line := quantized.in_tensors(own, source.url, config):
        raise UserError(line)
    return Component(kind, source, parsed, own, table, where, config)


# What an entry of a config.json may be, by the type of its field.
_ENTRIES: dict[Any, tuple[Callable[[Any], bool], str]] = {
    "int": (lambda value: type(value) is int and value >= 0, "a whole number from 0"),
    "float": (lambda value: type(value) in (int, float) and math.isfinite(value), "a number"),
    "bool": (lambda value: type(value) is bool, "true or false"),
    "str": (lambda value: type(value) is str, "a string"),
    "tuple[int, ...]": (lambda value: isinstance(value, list | tuple) and all(type(n) is int and n > 0 for n in value), "a list of whole numbers from 1"),
}


def _parsed(kind: Kind, config: Mapping[str, Any]) -> Any:
    """The component's configuration; KeyError for an entry that is missing, ValueError for one that the model cannot have."""
    given = config.get("text_config", config)
    for field in dataclasses.fields(kind.config):
        sound, expected = _ENTRIES[field.type]
        if (value := given.get(field.name)) is not None and not sound(value):
            raise ValueError(f"{field.name} is {shown(json.dumps(value))}, expected {expected}")
    parsed = kind.config.from_json(config)
    if missing := [f.name for f in dataclasses.fields(parsed) if getattr(parsed, f.name) is None]:
        raise KeyError(missing[0])
    return parsed


def _tokenizer(homes: list[Source], repo: str | None) -> str:
    """A local directory with the tokenizer's files: the first of ``homes`` that has them, else ``repo``."""
    for home in homes:
        present = [file for file in TOKENIZER_FILES if home.exists(file)]
        if {"tokenizer.json", "vocab.json", "spiece.model"} & set(present):
            return home.url if home.local else _copied(home, present)
    where = homes[-1].url
    if repo is None:
        raise UserError(f"{where}: no tokenizer: expected tokenizer.json, vocab.json with merges.txt, or spiece.model")
    try:
        return snapshot(repo, where, None, TOKENIZER_FILES)
    except UserError as error:
        raise UserError(f"{where}: no tokenizer, and {repo} has it, but: {error}") from error


def _copied(source: Source, files: list[str]) -> str:
    folder = tempfile.mkdtemp(prefix="fluxbatch-tokenizer-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name in files:
        with open(os.path.join(folder, name), "wb") as file:
            file.write(source.read(name))
    return folder
