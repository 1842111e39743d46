"""The toy as data. Its checkpoints call themselves ToyboxPipeline; nothing of it is FLUX.1's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from fluxbatch.models.toy.modules import Canvas, CanvasConfig, Painter, PainterConfig, Reader, ReaderConfig

from fluxbatch.models.family import Component, Family, Footprint, LoraKeys, TextInput, Tokenizer, TokenizerFiles
from fluxbatch.models.key_tables import Naming, Rule, Table, linear
from fluxbatch.types import PLAIN, Mode

FIRST_HALF, SECOND_HALF = ((0, 1, 2),), ((1, 2, 2),)
PAD = 0


def _canvas(layer: str, to: str) -> tuple[Rule, ...]:
    return (
        *linear(layer + "time", to + "time"),
        *linear(layer + "query", to + "q"),
        *linear(layer + "key_value", to + "k", FIRST_HALF),
        *linear(layer + "key_value", to + "v", SECOND_HALF),
        *(rule for name in ("out", "up", "down") for rule in linear(layer + name, to + name)),
    )


CANVAS = Table(
    (
        *(
            rule
            for name in ("latents_in", "text_in", "time_in", "latents_out")
            for rule in linear(f"brush/{name}", name)
        ),
        *linear("brush/place_in", "place_in", bias=False),
        *_canvas(r"layer_(\d+)/", "layers[{0}]."),
    )
)
READER = Table(
    (
        Rule("letters", "letters.table"),
        Rule(r"line_(\d+)/norm", "layers[{0}].norm.scale"),
        *(rule for name in ("inner", "outer") for rule in linear(rf"line_(\d+)/{name}", f"layers[{{0}}].{name}")),
    ),
    ignored=("translation",),
)
PAINTER = Table((*linear("smear", "conv"), *linear("colours", "colours")))

LORA = LoraKeys(
    (("toybox:", "canvas", "toybox"), ("toybox-reader:", "reader", "toybox")),
    {"canvas": {"toybox": CANVAS.rules}, "reader": {"toybox": READER.rules}},
    main="canvas",
)


class Text(NamedTuple):
    states: Any  # [B, T, D]
    mask: Any  # [B, T], 1 where there is a token


class MaskedInput(TextInput):
    """Ids, and where there are any."""

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, ...]:
        (ids,) = super().__call__(texts)
        return ids, (ids != PAD).astype(np.int32)

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return (self.length,), (self.length,)


@dataclasses.dataclass(frozen=True)
class Cosine:
    """Levels along a quarter of a cosine, to a power; the network says what the image is without its noise."""

    power: float

    def sigmas(self, steps: int, tokens: int) -> np.ndarray:
        return self.shifted(np.cos(np.arange(steps) / steps * np.pi / 2), tokens)

    def shifted(self, sigmas: Sequence[float] | np.ndarray, tokens: int) -> np.ndarray:
        return np.append(np.power(sigmas, self.power), 0).astype(np.float32)

    @staticmethod
    def step(latents: jax.Array, velocity: jax.Array, sigma: jax.Array, next_sigma: jax.Array) -> jax.Array:
        kept = jnp.where(sigma > 0, next_sigma / jnp.where(sigma > 0, sigma, 1), 0)[:, None, None]
        return kept * latents + (1 - kept) * velocity.astype(jnp.float32)

    def facts(self) -> Mapping[str, Any]:
        return dataclasses.asdict(self)


class Toy(Family):
    name = "toy"
    pipelines = ("ToyboxPipeline",)
    encoders = ("reader",)
    denoiser = "canvas"
    decoder = "painter"
    conditioning = Text
    lora = LORA
    file_patterns = ("toybox*",)
    components = {
        "reader": Component(
            ReaderConfig,
            Reader,
            namings=(Naming("letters", READER),),
            stems=("letters",),
            classes=("ToyReader",),
            saved={"_class_name": "ToyReader"},
            prefixes=("", "reader>"),
            sizes=lambda shapes, layers: {
                "vocab_size": shapes["letters.table"][0],
                "width": shapes["letters.table"][1],
                "layers": layers["layers"],
            },
            constants=lambda sizes: {},
        ),
        "canvas": Component(
            CanvasConfig,
            Canvas,
            namings=(Naming("brush/latents_in.weight", CANVAS),),
            stems=("strokes",),
            classes=("ToyCanvas",),
            saved={"_class_name": "ToyCanvas"},
            prefixes=("", "canvas>"),
            sizes=lambda shapes, layers: {
                "channels": shapes["latents_in.kernel"][1],
                "width": shapes["latents_in.kernel"][0],
                "layers": layers["layers"],
                "text_width": shapes["text_in.kernel"][1],
            },
            constants=lambda sizes: {"heads": 2},
        ),
        "painter": Component(
            PainterConfig,
            Painter,
            namings=(Naming("smear.weight", PAINTER),),
            stems=("strokes",),
            classes=("ToyPainter",),
            saved={"_class_name": "ToyPainter"},
            prefixes=("", "painter>"),
            sizes=lambda shapes, layers: {
                "channels": shapes["conv.kernel"][1],
                "width": shapes["conv.kernel"][0],
                "scale": math.isqrt(shapes["colours.kernel"][0] // 3),
            },
            constants=lambda sizes: {},
        ),
    }
    tokenizers = {"alphabet": TokenizerFiles("reader", -1, "nobody/nothing")}

    def __init__(self, configs: Mapping[str, Any], index: Mapping[str, Any] | None = None):
        super().__init__(configs, index)
        self.reader: ReaderConfig = configs["reader"]
        self.canvas: CanvasConfig = configs["canvas"]
        self.painter: PainterConfig = configs["painter"]

    def mismatches(self) -> Iterator[tuple[str, str, Any, Any, str]]:
        for key, expected, of in (
            ("channels", self.painter.channels, "the painter's"),
            ("text_width", self.reader.width, "the reader's width"),
        ):
            if (found := getattr(self.canvas, key)) != expected:
                yield "canvas", key, found, expected, of

    def scheduler(
        self, config: Mapping[str, Any], time_shift: bool | None, base_shift: float | None, max_shift: float | None
    ) -> Cosine:
        return Cosine(float(config["power"]))

    def published_scheduler(self) -> dict[str, Any]:
        return {"power": 1.0}

    def options(self, attention: Any, split_head_dim: bool, bands: int) -> Mapping[str, Mapping[str, Any]]:
        return {"canvas": {"attention": attention}}

    @property
    def heads(self) -> int:
        return self.canvas.heads

    @property
    def guided(self) -> bool:
        return False

    # Text

    def text_inputs(self, tokenizers: Mapping[str, Tokenizer], max_sequence_length: int) -> tuple[TextInput, ...]:
        return (MaskedInput("the reader", tokenizers["alphabet"], max_sequence_length, "prompt"),)

    def encode(self, encoders: Mapping[str, Any], inputs: Sequence[tuple[jax.Array, ...]], dtype: Any) -> Text:
        ((ids, mask),) = inputs
        return Text(*encoders["reader"](ids, mask, dtype))

    def conditioning_shapes(self, inputs: Sequence[TextInput]) -> Text:
        return Text((inputs[0].length, self.reader.width), (inputs[0].length,))

    # Latents: a token is a latent pixel

    @property
    def size_multiple(self) -> int:
        return self.painter.scale

    def latent_shape(self, height: int, width: int) -> tuple[int, int]:
        return (height // self.painter.scale) * (width // self.painter.scale), self.canvas.channels

    def noise(self, seed: int, height: int, width: int, mode: Mode = PLAIN) -> np.ndarray:
        return np.random.Generator(np.random.Philox(seed)).standard_normal(self.latent_shape(height, width), np.float32)

    def positions(self, conditioning: Text, height: int, width: int, mode: Mode = PLAIN) -> dict[str, np.ndarray]:
        rows, columns = (np.arange(size // self.painter.scale, dtype=np.float32) / 8 for size in (height, width))
        return {"grid": np.stack(np.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2)}

    def unpack(self, latents: jax.Array, height: int, width: int) -> jax.Array:
        return latents.reshape(len(latents), height // self.painter.scale, width // self.painter.scale, -1)

    @property
    def decoder_width(self) -> int:
        return self.painter.width

    # Costs

    def encode_flops(self, inputs: Sequence[TextInput]) -> int:
        return 8 * self.reader.layers * inputs[0].length * self.reader.width**2

    def step_flops(self, height: int, width: int, inputs: Sequence[TextInput], mode: Mode = PLAIN) -> int:
        tokens, d = self.tokens(height, width), self.canvas.width
        both = tokens + inputs[0].length
        return self.canvas.layers * (12 * tokens * d * d + 4 * both * d * d + 4 * tokens * both * d)

    def decode_flops(self, height: int, width: int) -> int:
        cfg = self.painter
        return 2 * self.tokens(height, width) * cfg.width * (9 * cfg.channels + 3 * cfg.scale**2)

    def encode_bytes(self, at: Footprint, inputs: Sequence[TextInput]) -> int:
        return 4 * at.images * inputs[0].length * self.reader.width * at.activation_bytes

    def denoise_bytes(self, at: Footprint, inputs: Sequence[TextInput]) -> int:
        tokens, d = self.tokens(at.height, at.width), self.canvas.width
        steps = at.images * at.steps * d * (2 * self.canvas.layers + 1)
        return (steps + 8 * at.images * (tokens + inputs[0].length) * d) * at.activation_bytes

    def decode_bytes(self, at: Footprint) -> int:
        return 4 * at.at_once * self.tokens(at.height, at.width) * self.painter.width * at.activation_bytes


FAMILIES = (Toy,)
