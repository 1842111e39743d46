"""Chroma as data: FLUX.1's latents and VAE, T5 as the one text encoder, guidance away from a negative prompt."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fluxbatch.models.chroma import keys
from fluxbatch.models.chroma.lora import LORA
from fluxbatch.models.chroma.transformer import Chroma, ChromaConfig, PromptEmbeds
from fluxbatch.models.family import Conditioning, Family, Footprint, TextInput, Tokenizer, TokenizerFiles
from fluxbatch.models.flux1 import cost
from fluxbatch.models.flux1.base import Flux1
from fluxbatch.models.flux1.t5 import T5Config
from fluxbatch.models.key_tables import Naming
from fluxbatch.types import PLAIN, Mode, Row


@dataclasses.dataclass(frozen=True)
class MaskedInput(TextInput):
    """A prompt's ids with a mask: 0 where there is padding, which stands behind."""

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, ...]:
        counts = np.array(self.tokenizer.count(texts), np.int32).reshape(-1, 1)
        return *super().__call__(texts), (np.arange(self.length) < counts).astype(np.int32)

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return (self.length,), (self.length,)


class ChromaFamily(Flux1):
    """Chroma: as FLUX.1, without CLIP; any guidance above 1 leads away from a negative prompt."""

    name = "chroma"
    pipelines = ("ChromaPipeline", "ChromaImg2ImgPipeline", "ChromaInpaintPipeline")
    encoders = ("text_encoder",)
    conditioning = PromptEmbeds
    lora = LORA
    file_patterns = ("chroma*", "Chroma*")
    leftovers = Family.leftovers
    components = {
        "transformer": dataclasses.replace(
            Flux1.components["transformer"],
            config=ChromaConfig,
            module=Chroma,
            namings=(
                Naming("distilled_guidance_layer.layers.0.in_layer.weight", keys.TRANSFORMER_ORIGINAL),
                Naming("distilled_guidance_layer.layers.0.linear_1.weight", keys.TRANSFORMER_DIFFUSERS),
            ),
            classes=("ChromaTransformer2DModel",),
            saved={"_class_name": "ChromaTransformer2DModel"},
            sizes=keys.transformer_sizes,
        ),
        "text_encoder": Flux1.components["text_encoder_2"],
        "vae": Flux1.components["vae"],
    }
    tokenizers = {"tokenizer": TokenizerFiles("text_encoder", 32128, "google/t5-v1_1-xxl")}
    guided = True
    step_caches = ()

    def __init__(self, configs: Mapping[str, Any], index: Mapping[str, Any] | None = None):
        Family.__init__(self, configs, index)  # of FLUX.1's there is no CLIP
        self.transformer: ChromaConfig = configs["transformer"]
        self.t5: T5Config = configs["text_encoder"]
        self.vae = configs["vae"]
        # whether padding is left out; a key of ours, which diffusers does not look at
        self.masked = (index or {}).get("_masked_padding", False)
        if type(self.masked) is not bool:
            raise ValueError(f"_masked_padding is {json.dumps(self.masked)}, expected true or false")

    def index(self) -> dict[str, Any]:
        return {"_masked_padding": True} if self.masked else {}

    def options(self, attention: Any, split_head_dim: bool, bands: int) -> Mapping[str, Mapping[str, Any]]:
        found = super().options(attention, split_head_dim, bands)
        return {**found, self.denoiser: {**found[self.denoiser], "masked": self.masked}}

    def mismatches(self) -> Iterator[tuple[str, str, Any, Any, str]]:
        for key, expected, of in (
            ("in_channels", *self._in_channels()),
            ("joint_attention_dim", self.t5.d_model, "T5's d_model"),
        ):
            if (found := getattr(self.transformer, key)) != expected:
                yield "transformer", key, found, expected, of

    def published_scheduler(self) -> dict[str, Any]:
        return {"use_dynamic_shifting": False, "shift": 1.0}

    def warnings(self, flux_name: str) -> tuple[str, ...]:
        return ()

    def resolve(self, row: Row) -> Row:
        """A row of FLUX.1 whose true guidance is the one that it has."""
        scale, away_from = row.guidance_scale, row.negative_prompt or ""
        row = dataclasses.replace(row, true_cfg_scale=scale, negative_prompt=away_from, negative_prompt_2=None)
        row = super().resolve(row)
        return dataclasses.replace(
            row, true_cfg_scale=1.0, negative_prompt=row.negative_prompt if row.mode.negative else None
        )

    def cfg_scale(self, row: Row) -> float:
        return row.guidance_scale

    # Text

    def text_inputs(self, tokenizers: Mapping[str, Tokenizer], max_sequence_length: int) -> tuple[TextInput, ...]:
        return (MaskedInput("T5", tokenizers["tokenizer"], max_sequence_length, "prompt"),)

    def encode(self, encoders: Mapping[str, Any], inputs: Sequence[tuple[jax.Array, ...]], dtype: Any) -> Conditioning:
        """The transformer takes the first token of padding for one of the text."""
        ids, mask = inputs[0]
        kept = jnp.concatenate([jnp.ones_like(mask[:, :1]), mask[:, :-1]], axis=1)
        return PromptEmbeds(encoders["text_encoder"](ids, dtype, mask), kept.astype(dtype))

    def conditioning_shapes(self, inputs: Sequence[TextInput]) -> Conditioning:
        return PromptEmbeds((inputs[0].length, self.transformer.joint_attention_dim), (inputs[0].length,))

    def in_steps(self, conditioning: Conditioning) -> Conditioning:
        return conditioning

    # Costs

    def encode_flops(self, inputs: Sequence[TextInput]) -> int:
        return cost.t5(self.t5, inputs[0].length)

    def step_flops(self, height: int, width: int, inputs: Sequence[TextInput], mode: Mode = PLAIN) -> int:
        """With the approximator: of Chroma1-HD 0.19 T of 74.6 at 1024 × 1024."""
        return super().step_flops(height, width, inputs, mode) + self.transformer.approximator_flops

    def encode_bytes(self, at: Footprint, inputs: Sequence[TextInput]) -> int:
        return cost.t5_bytes(self.t5, at, inputs[0].length, masked=True)

    def denoise_bytes(self, at: Footprint, inputs: Sequence[TextInput]) -> int:
        """On a GPU the bias of all scores is written down, once for all heads."""
        tokens = self.tokens(at.height, at.width, at.mode) + inputs[0].length
        bias = at.images * tokens**2 // at.mesh["context"] * at.activation_bytes if at.platform == "gpu" else 0
        return super().denoise_bytes(at, inputs) + bias


FAMILIES = (ChromaFamily,)
