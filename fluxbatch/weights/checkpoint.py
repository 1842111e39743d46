"""A FLUX checkpoint as a set of components, opened from headers and configs alone."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.resources
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from fluxbatch.config import Model
from fluxbatch.models.clip import ClipConfig, ClipTextEncoder
from fluxbatch.models.flux import Flux, FluxConfig
from fluxbatch.models.t5 import T5Config, T5Encoder
from fluxbatch.models.vae import Decoder, VaeConfig
from fluxbatch.types import UserError
from fluxbatch.weights import load, tables
from fluxbatch.weights.rules import Table
from fluxbatch.weights.source import Source, Tensor, read_headers, sampled

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt", "spiece.model")
EMBEDDED = importlib.resources.files("fluxbatch") / "checkpoints"


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a component is: its config, model, names and the stems of its weight files."""

    config: Any
    module: Callable[..., nnx.Module]
    table: Table
    stems: tuple[str, ...]


KINDS = {
    "transformer": Kind(FluxConfig, Flux, tables.FLUX_DIFFUSERS, ("diffusion_pytorch_model", "model")),
    "text_encoder": Kind(ClipConfig, ClipTextEncoder, tables.CLIP, ("model",)),
    "text_encoder_2": Kind(T5Config, T5Encoder, tables.T5, ("model",)),
    "vae": Kind(VaeConfig, Decoder, tables.VAE_DECODER, ("diffusion_pytorch_model", "model")),
}
CLASSES = {
    "transformer": ("FluxTransformer2DModel",),
    "text_encoder": ("CLIPTextModel", "CLIPModel"),
    "text_encoder_2": ("T5EncoderModel", "T5ForConditionalGeneration", "T5Model"),
    "vae": ("AutoencoderKL",),
}


@dataclasses.dataclass(frozen=True)
class Component:
    kind: Kind
    source: Source
    config: Any
    tensors: Mapping[str, Tensor]

    def plan(self, **options: Any) -> load.Plan:
        """Which bytes fill which parameter; UserError lists every disagreement."""
        make = lambda rngs: self.kind.module(self.config, rngs=rngs, **options)  # noqa: E731
        return load.plan(make, dict(self.tensors), self.kind.table, self.source)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    components: Mapping[str, Component]
    tokenizer: str  # local directory of CLIP's tokenizer
    tokenizer_2: str  # and of T5's
    scheduler: Mapping[str, Any]
    revision: str | None  # commit of a Hugging Face snapshot

    def digest(self) -> str:
        """16 hex digits over configs, tokenizers and the weights' bytes (large files: samples)."""
        digest = hashlib.sha256(json.dumps(self.scheduler, sort_keys=True).encode())
        for name, component in sorted(self.components.items()):
            digest.update(name.encode() + component.source.read("config.json"))
            for file in sorted({tensor.file for tensor in component.tensors.values()}):
                for part in sampled(component.source, file):
                    digest.update(part)
        for folder in (self.tokenizer, self.tokenizer_2):
            for file in TOKENIZER_FILES:
                if os.path.exists(path := os.path.join(folder, file)):
                    with open(path, "rb") as f:
                        digest.update(f.read())
        return digest.hexdigest()[:16]


def open_checkpoint(model: Model) -> Checkpoint:
    """Finds the checkpoint and reads its configs and headers; UserError for anything unsound."""
    base, revision = find(model.pretrained_model_name_or_path, "model.pretrained_model_name_or_path", model.revision)
    root = Source(base)
    index = root.json("model_index.json") if root.exists("model_index.json") else {}
    if index.get("_class_name", "FluxPipeline") not in ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline"):
        raise UserError(f"{root.path('model_index.json')}: a {index['_class_name']}, expected a FluxPipeline")

    clip, clip_tokenizer = root / "text_encoder", root / "tokenizer"
    if model.clip_model_name_or_path:
        clip, clip_tokenizer = _encoder(model.clip_model_name_or_path, "model.clip_model_name_or_path", "text_encoder", "tokenizer")
    t5, t5_tokenizer = root / "text_encoder_2", root / "tokenizer_2"
    if model.t5xxl_model_name_or_path:
        t5, t5_tokenizer = _encoder(model.t5xxl_model_name_or_path, "model.t5xxl_model_name_or_path", "text_encoder_2", "tokenizer_2")
    sources = {"transformer": root / "transformer", "text_encoder": clip, "text_encoder_2": t5, "vae": root / "vae"}
    components = {name: _component(name, source) for name, source in sources.items()}

    flux, vae = components["transformer"].config, components["vae"].config
    for key, got, expected, of in (
        ("in_channels", flux.in_channels, 4 * vae.latent_channels, "4 × the VAE's latent_channels"),
        ("joint_attention_dim", flux.joint_attention_dim, components["text_encoder_2"].config.d_model, "T5's d_model"),
        ("pooled_projection_dim", flux.pooled_projection_dim, components["text_encoder"].config.hidden_size, "CLIP's hidden_size"),
    ):
        if got != expected:
            raise UserError(f"{sources['transformer'].path('config.json')}: {key} is {got}, expected {expected} ({of})")
    scheduler = root / "scheduler"
    return Checkpoint(
        components, _tokenizer(clip_tokenizer), _tokenizer(t5_tokenizer), scheduler.json("scheduler_config.json"), revision
    )


def find(name: str, key: str, revision: str | None = None, patterns: tuple[str, ...] | None = None) -> tuple[str, str | None]:
    """A directory or ``gs://`` URL for an embedded name, a path, a URL or a Hugging Face repo id,
    and the snapshot's commit if there is one."""
    if name.startswith("gs://"):
        return name, None
    if os.path.isdir(path := os.path.expanduser(name)):
        return path, None
    if "/" not in name and (EMBEDDED / name / "model_index.json").is_file():
        return str(EMBEDDED / name), None
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"{key}: {name!r} is not there: expected a directory, gs://bucket/prefix or a Hugging Face repo id")
    path = _snapshot(name, key, revision, patterns)
    return path, os.path.basename(path)


def _snapshot(repo: str, key: str, revision: str | None, patterns: tuple[str, ...] | None) -> str:
    """The cached snapshot of a Hugging Face repository (token and cache from the usual environment)."""
    import huggingface_hub
    from huggingface_hub import errors

    parts = ("transformer", "text_encoder", "text_encoder_2", "vae", "scheduler", "tokenizer", "tokenizer_2")
    patterns = patterns or ("model_index.json", *(f"{part}/*" for part in parts))
    try:
        return huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=list(patterns))
    except errors.GatedRepoError as error:
        raise UserError(
            f"{key}: {repo} is gated: accept its licence at https://huggingface.co/{repo}, "
            "then `hf auth login` or set HF_TOKEN") from error  # fmt: skip
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        at = f" at revision {revision}" if revision else ""
        raise UserError(f"{key}: {repo!r}{at} is neither a directory here nor a repository on Hugging Face that this token may read") from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{key}: {repo!r} is not a directory here, and Hugging Face cannot be reached: {reason}") from error


def _encoder(name: str, key: str, folder: str, tokenizer: str) -> tuple[Source, Source]:
    """A text encoder that lives elsewhere: in a pipeline's layout, or a model directory of its own."""
    layout = ("*.json", "*.safetensors", "*.txt", "*.model")
    base, _ = find(name, key, patterns=(*layout, f"{folder}/*", f"{tokenizer}/*"))
    source = Source(base)
    if source.exists(f"{folder}/config.json"):
        return source / folder, source / tokenizer
    return source, source


def _component(name: str, source: Source) -> Component:
    kind = KINDS[name]
    if not source.exists("config.json"):
        raise UserError(f"{source.path('config.json')}: not found: the checkpoint has no {name}")
    config = source.json("config.json")
    where = source.path("config.json")
    declared = config.get("_class_name") or next(iter(config.get("architectures") or ()), None)
    if declared is not None and declared not in CLASSES[name]:
        raise UserError(f"{where}: is a {declared}, expected {' or '.join(CLASSES[name])}")
    try:
        parsed = kind.config.from_json(config)
        if missing := [f.name for f in dataclasses.fields(parsed) if getattr(parsed, f.name) is None]:
            raise KeyError(missing[0])
    except KeyError as error:
        raise UserError(f"{where}: key {error} is missing") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: {error}") from error
    return Component(kind, source, parsed, read_headers(source, kind.stems))


def _tokenizer(source: Source) -> str:
    """A local directory with the tokenizer's files."""
    present = [name for name in TOKENIZER_FILES if source.exists(name)]
    if not {"tokenizer.json", "vocab.json", "spiece.model"} & set(present):
        raise UserError(f"{source.url}: no tokenizer: expected tokenizer.json, vocab.json with merges.txt, or spiece.model")
    if not source.url.startswith("gs://"):
        return source.url
    folder = tempfile.mkdtemp(prefix="fluxbatch-tokenizer-")
    for name in present:
        with open(os.path.join(folder, name), "wb") as file:
            file.write(source.read(name))
    return folder
