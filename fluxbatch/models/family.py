"""What a model family is to the rest of the program: data about its checkpoints, and a few functions.

A folder ``models/<family>/`` has a ``definition.py`` with subclasses of ``Family``, listed in ``FAMILIES`` there. Class
attributes describe checkpoints; an instance has the configs of one checkpoint. Conditioning, step inputs and positions
are pytrees that only the family understands; the runner batches, shards and caches them.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import jax
import numpy as np
from flax import nnx
from PIL import Image

from fluxbatch.models.key_tables import Naming, Rule, Table
from fluxbatch.models.network import (
    Conditioning,
    Decoder,
    Denoiser,
    Pictures,
    Positions,
    StepInputs,
    StreamedDenoiser,
    StreamParts,
)
from fluxbatch.models.schedulers import Scheduler
from fluxbatch.types import PLAIN, Mode, Row, UserError

Config = Any  # a component's frozen dataclass with ``from_json``


@dataclasses.dataclass(frozen=True)
class Component:
    """A component of a checkpoint: its config, module, names and files."""

    config: Any  # the config's class
    module: Callable[..., nnx.Module]  # of (config, rngs=…, **options)
    namings: tuple[Naming, ...]  # how its tensors are named in files; the last is a folder's
    # how those are named that stand under ``encoder`` in the module, if it is made with it
    encoder_namings: tuple[Naming, ...] = dataclasses.field(default=(), kw_only=True)
    stems: tuple[str, ...]  # of its weight files in a folder
    classes: tuple[str, ...]  # what its config.json may say it is
    saved: Mapping[str, Any]  # what a config.json says besides the config's fields
    sizes: Callable[[Mapping[str, tuple[int, ...]], Mapping[str, int]], dict[str, Any]]
    """Entries of config.json that shapes and layer counts give away; KeyError for a parameter that is not there."""
    constants: Callable[[Mapping[str, Any]], dict[str, Any]]
    """The entries that shapes do not give away: the published values; ValueError where they would be a guess."""
    home: str | None = None  # key of the configuration that names another home
    files: tuple[str, ...] = ()  # its usual names as a single file
    folders: tuple[str, ...] = ()  # of ComfyUI, beside the transformer's
    # what its names begin with in a file: nothing, or its place in a whole checkpoint
    prefixes: tuple[str, ...] = ("",)
    same: tuple[tuple[str, str], ...] = ()  # (name, other name) of a tensor that may be saved under either


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
    """Where a tokenizer comes from."""

    component: str  # the encoder whose home may have it; its config says ``vocab_size``
    vocabulary: int  # of the published encoder,
    repo: str | None  # whose tokenizer this public repository has; None: no public one is known to be the same
    open: Callable[[str], Tokenizer] | None = None  # of its folder; None: as those that read plain text are opened
    folders: tuple[str, ...] = ()  # of a checkpoint, which may have it besides the one of its name


@dataclasses.dataclass(frozen=True, eq=False)
class LoraKeys:
    """What the keys of adapter files begin with and name."""

    prefixes: tuple[tuple[str, str | None, str], ...]
    """(prefix, component, what writes it), one after another as far as they stand there: of those that lead to a
    module of the component the first holds. None: it says nothing of the component."""
    namings: Mapping[str, Mapping[str, tuple[Rule, ...]]]  # component → name of the naming → its rules
    # component → pattern of modules that inference never reads
    unread: Mapping[str, str] = dataclasses.field(default_factory=dict)
    # kernel of the main component that an adapter may give more inputs, the entry of the config that counts them, and
    # the kernel whose outputs are what a plain adapter reads there
    inputs: tuple[str, str, str] | None = None
    split_stacks: tuple[str, ...] = ()  # stacks whose parts are reported apart
    main: str = "transformer"  # the component that reports do not name
    writers: tuple[str, ...] = ()  # namings that one trainer alone writes, whatever the prefix


class Tokenizer(Protocol):
    """What is needed of one: of ``generation/tokenizers.py``, or of a family's own."""

    folder: str
    here: bool  # False: a plan's stand-in for one that is not
    unit: str  # of its counts, if it is not tokens
    max_length: Any

    def __call__(self, texts: Sequence[str], length: int) -> Any: ...
    def longer(self, texts: Iterable[str], limit: int) -> set[str]: ...
    def doubtful(self, texts: Iterable[str], limit: int) -> set[str]: ...
    def count(self, texts: Sequence[str]) -> list[int]: ...


@dataclasses.dataclass(frozen=True)
class TextInput:
    """What one text encoder reads of a row."""

    name: str  # for messages
    tokenizer: Tokenizer
    length: int  # tokens, padding included; at most so many, if it is padded to a multiple
    field: str  # of the row
    # of tokens that a text is padded to; 0: all are to ``length``
    multiple: int = dataclasses.field(default=0, kw_only=True)

    def text(self, row: Row, negative: bool = False) -> str:
        return getattr(row, f"negative_{self.field}" if negative else self.field) or ""

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, ...]:
        """Arrays ``[B, length]`` int32 of ``texts``: ids, padded and truncated."""
        return (self.tokenizer(texts, self.length),)

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of one text's arrays."""
        return ((self.length,),)

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens that each is padded to."""
        if not self.multiple:
            return [self.length] * len(texts)
        return [min(-(-count // self.multiple) * self.multiple, self.length) for count in self._counts(texts)]

    def _counts(self, texts: Sequence[str]) -> list[int]:
        return self.tokenizer.count(texts)

    def truncated(self, texts: Iterable[str]) -> set[str]:
        """Those that have more tokens than are read."""
        return self.tokenizer.longer(texts, self.length)

    def doubtful(self, texts: Iterable[str]) -> set[str]:
        """Those of which nobody can tell, for want of a tokenizer."""
        return self.tokenizer.doubtful(texts, self.length)


def padded_to(inputs: Sequence[TextInput], lengths: Sequence[int]) -> tuple[TextInput, ...]:
    """The text inputs of a prompt that is padded to these; as they are if there are none."""
    if not lengths:
        return tuple(inputs)
    return tuple(dataclasses.replace(each, length=length) for each, length in zip(inputs, lengths, strict=True))


def inputs_of(inputs: Sequence[TextInput], mode: Mode) -> list[tuple[TextInput, ...]]:
    """The text inputs of a row's prompt, and of its negative one if it has one."""
    return [padded_to(inputs, lengths) for lengths in mode.texts or [()] * (1 + mode.negative)]


@dataclasses.dataclass(frozen=True)
class Footprint:
    """What decides how many bytes activations take on one device."""

    images: int
    height: int
    width: int
    platform: str
    activation_bytes: int  # of a number
    weight_bytes: int
    mesh: Mapping[str, int]  # axis → size
    scores: bool  # whether attention writes all its scores down
    steps: int  # whose step inputs are made at once
    at_once: int  # images that are decoded together
    mode: Mode = PLAIN

    @property
    def passes(self) -> int:
        """Prompts that lead an image."""
        return 2 if self.mode.negative else 1

    def score_bytes(self, heads: int, tokens: int) -> int:
        """Of the scores of tokens that attend to each other, in float32, if they are written down."""
        return 4 * self.images * heads * tokens**2 // (self.mesh["context"] * self.mesh["tensor"]) if self.scores else 0


class Family(abc.ABC):
    """A model family. Class attributes describe its checkpoints; an instance has the configs of one."""

    name: ClassVar[str]
    pipelines: ClassVar[tuple[str, ...]]  # what model_index.json may call itself
    components: ClassVar[Mapping[str, Component]]
    encoders: ClassVar[tuple[str, ...]]  # the components that read text
    denoiser: ClassVar[str] = "transformer"
    decoder: ClassVar[str] = "vae"
    tokenizers: ClassVar[Mapping[str, TokenizerFiles]]
    conditioning: Callable[..., Conditioning]  # what makes it of its arrays; a class's, or an instance's own
    lora: ClassVar[LoraKeys]
    file_patterns: ClassVar[tuple[str, ...]] = ()  # patterns of the denoiser's file in a directory of single files
    file_words: ClassVar[tuple[str, ...]] = ()  # in its name where tensors do not tell it from a family listed before
    leftovers: ClassVar[str] = r"(?!)"  # names in a whole checkpoint that belong to no component

    def __init__(self, configs: Mapping[str, Config], index: Mapping[str, Any] | None = None):
        """``index``: what ``model_index.json`` says; ValueError for a value that it cannot have."""
        self.configs = dict(configs)

    # The checkpoint

    @classmethod
    def claims(cls, config: Mapping[str, Any]) -> bool:
        """Whether the denoiser's ``config.json`` is one of this family's, where nothing else tells."""
        declared = config.get("_class_name") or next(iter(config.get("architectures") or ()), None)
        return declared in cls.components[cls.denoiser].classes

    @classmethod
    def index_of(cls, file: str) -> Mapping[str, Any]:
        """What ``model_index.json`` would say of a single file of this name."""
        return {}

    def index(self) -> dict[str, Any]:
        """What of ``model_index.json`` decides pixels, as plain values."""
        return {}

    @abc.abstractmethod
    def mismatches(self) -> Iterator[tuple[str, str, Any, Any, str]]:
        """(component, key, found, expected, of what) where components do not fit each other."""

    @abc.abstractmethod
    def scheduler(
        self, config: Mapping[str, Any], time_shift: bool | None, base_shift: float | None, max_shift: float | None
    ) -> Scheduler:
        """From ``scheduler_config.json``; arguments that are not None win. UserError for one that this is not."""

    @abc.abstractmethod
    def published_scheduler(self) -> dict[str, Any]:
        """The ``scheduler_config.json`` of a checkpoint that comes without one."""

    def options(self, attention: Any, split_head_dim: bool, bands: int) -> Mapping[str, Mapping[str, Any]]:
        """Arguments of the components' modules besides config and layout."""
        return {
            self.denoiser: {"attention": attention, "split_head_dim": split_head_dim},
            self.decoder: {"bands": bands},
        }

    @property
    @abc.abstractmethod
    def heads(self) -> int:
        """Attention heads of the denoiser, over which tensor parallelism divides it."""

    @property
    @abc.abstractmethod
    def guided(self) -> bool:
        """Whether the checkpoint reads ``guidance_scale``."""

    @property
    def step_caches(self) -> tuple[str, ...]:
        """Those of ``sampler.step_cache`` that the checkpoint's denoiser has."""
        return ()

    def resolve(self, row: Row) -> Row:
        """The row as this checkpoint understands it, with its mode; what decides nothing is as if it were not given.
        ValueError for a field that this checkpoint has no use for."""
        if row.pictures:
            raise ValueError(f"{next(iter(row.pictures))}: expected none: this model reads no pictures")
        if row.negative_prompt or row.negative_prompt_2:
            raise ValueError("negative_prompt: expected none: this model has no guidance that leads away from a prompt")
        return row

    def default_size(self, row: Row) -> tuple[int, int]:
        """Height and width of the image that a row makes of its first picture if it does not say: the picture's own,
        made smaller to the row's area if it has more, and cut to whole tokens."""
        picture = row.image[0]
        scale = min(1.0, math.sqrt(row.height * row.width / (picture.height * picture.width)))
        multiple = self.size_multiple
        height, width = (
            max(multiple, int(side * scale) // multiple * multiple) for side in (picture.height, picture.width)
        )
        return height, width

    def cfg_scale(self, row: Row) -> float:
        """How far a row with ``mode.negative`` is led away from its negative prompt."""
        return row.true_cfg_scale

    def warnings(self, flux_name: str) -> tuple[str, ...]:
        """What of ``model.flux_name`` does not go with the checkpoint."""
        return ()

    # Text

    @abc.abstractmethod
    def text_inputs(self, tokenizers: Mapping[str, Tokenizer], max_sequence_length: int) -> tuple[TextInput, ...]:
        """What the encoders read, in the order of ``encoders``; UserError for a tokenizer that does not fit."""

    @abc.abstractmethod
    def encode(self, encoders: Mapping[str, Any], inputs: Sequence[tuple[jax.Array, ...]], dtype: Any) -> Conditioning:
        """``inputs``: the arrays of each text input ``[B, …]``."""

    @abc.abstractmethod
    def conditioning_shapes(self, inputs: Sequence[TextInput]) -> Conditioning:
        """Shapes of one row's."""

    def in_steps(self, conditioning: Conditioning) -> Conditioning:
        """What of it each step reads, with None for what only step inputs are made of."""
        return conditioning

    # Latents

    @property
    @abc.abstractmethod
    def size_multiple(self) -> int:
        """Heights and widths must be multiples of this many pixels."""

    @abc.abstractmethod
    def latent_shape(self, height: int, width: int) -> tuple[int, int]:
        """Tokens and channels of an image of this many pixels."""

    def tokens(self, height: int, width: int, mode: Mode = PLAIN) -> int:
        """Of the image, and of the reference pictures."""
        return sum(self.latent_shape(*size)[0] for size in ((height, width), *mode.references))

    @abc.abstractmethod
    def noise(self, seed: int, height: int, width: int, mode: Mode = PLAIN) -> np.ndarray:
        """``[L, C]`` float32: what diffusers draws for it, after what it draws for the row's pictures."""

    @abc.abstractmethod
    def positions(self, conditioning: Conditioning, height: int, width: int, mode: Mode = PLAIN) -> Positions:
        """Of text and image tokens, and those of reference pictures, NumPy. ``conditioning``: of a batch, or its
        shapes."""

    @abc.abstractmethod
    def unpack(self, latents: jax.Array, height: int, width: int) -> jax.Array:
        """``[B, L, C]`` → what the decoder reads, ``[B, h, w, …]``."""

    @property
    @abc.abstractmethod
    def decoder_width(self) -> int:
        """Channels of the decoder's finest level."""

    # Pictures that rows read. A family without any leaves these out, as its ``resolve`` refuses such rows

    def prepare(self, row: Row, pictures: Mapping[str, Sequence[Image.Image]]) -> dict[str, np.ndarray]:
        """What ``encode_pictures`` reads of a row, without a batch axis, float32. ``pictures``: by field, upright.
        ValueError for one that cannot be read so."""
        raise NotImplementedError

    def finish(self, row: Row, pixels: np.ndarray, pictures: Mapping[str, Sequence[Image.Image]]) -> np.ndarray:
        """The image of a row with ``padding_mask_crop``, uint8 ``[H, W, 3]``, of what was drawn for it."""
        raise NotImplementedError

    def picture_shapes(self, height: int, width: int, mode: Mode) -> dict[str, tuple[int, ...]]:
        """Of what ``prepare`` makes; none where rows of this mode read no picture."""
        return {}

    def encode_pictures(self, vae: Any, arrays: Mapping[str, jax.Array], dtype: Any) -> Pictures:
        """``arrays`` ``[B, …]`` → what the denoiser reads. ``vae``: the decoder's module, with its encoder."""
        raise NotImplementedError

    # Costs: FLOPs of one image or prompt, and bytes of activations on one device

    @abc.abstractmethod
    def encode_flops(self, inputs: Sequence[TextInput]) -> int: ...

    @abc.abstractmethod
    def step_flops(self, height: int, width: int, inputs: Sequence[TextInput], mode: Mode = PLAIN) -> int:
        """Of one evaluation: with a negative prompt a step has two."""

    @abc.abstractmethod
    def decode_flops(self, height: int, width: int) -> int: ...

    @abc.abstractmethod
    def encode_bytes(self, at: Footprint, inputs: Sequence[TextInput]) -> int: ...

    @abc.abstractmethod
    def denoise_bytes(self, at: Footprint, inputs: Sequence[TextInput]) -> int: ...

    @abc.abstractmethod
    def decode_bytes(self, at: Footprint) -> int: ...


__all__ = [
    "Component", "Conditioning", "Config", "Decoder", "Denoiser", "Family", "Footprint", "LoraKeys", "Naming",
    "Pictures", "Positions", "StepInputs", "StreamParts", "StreamedDenoiser", "Table", "TextInput", "Tokenizer",
    "TokenizerFiles", "UserError", "inputs_of", "padded_to",
]  # fmt: skip
