"""Z-Image as data: a distilled model, Turbo, and what it was made from, with classifier-free guidance."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from fluxbatch.models import autoencoder_cost
from fluxbatch.models.autoencoder import VaeConfig
from fluxbatch.models.family import Component, Family, Footprint, TextInput, Tokenizer, TokenizerFiles
from fluxbatch.models.flux1.base import Flux1
from fluxbatch.models.flux1.pictures import draws
from fluxbatch.models.flux2 import cost as flux2_cost
from fluxbatch.models.flux2 import keys as flux2_keys
from fluxbatch.models.flux2 import text
from fluxbatch.models.key_tables import Naming
from fluxbatch.models.schedulers import FlowMatchEuler
from fluxbatch.models.zimage import cost, keys, latents
from fluxbatch.models.zimage.lora import LORA
from fluxbatch.models.zimage.qwen3 import CHAT, Qwen3Config, Qwen3Encoder
from fluxbatch.models.zimage.transformer import (
    MULTIPLE,
    Positions,
    PromptEmbeds,
    ZImage,
    ZImageConfig,
    padding,
    rope_tables,
)
from fluxbatch.types import PLAIN, Mode, Row, UserError


class ZImageFamily(Family):
    """Z-Image: Qwen3 reads the prompt; the VAE is FLUX.1's. Any guidance above 0 leads away from a negative prompt."""

    name = "zimage"
    pipelines = ("ZImagePipeline",)
    encoders = ("text_encoder",)
    conditioning = PromptEmbeds
    lora = LORA
    file_patterns = ("z_image*", "z-image*")
    components = {
        "transformer": Component(
            ZImageConfig, ZImage,
            namings=(
                Naming(("x_embedder.weight", "cap_pad_token"), keys.TRANSFORMER_ORIGINAL),
                Naming("all_x_embedder.2-1.weight", keys.TRANSFORMER_DIFFUSERS),
            ),
            stems=("diffusion_pytorch_model", "model"),
            classes=("ZImageTransformer2DModel",),
            saved={"_class_name": "ZImageTransformer2DModel"},
            sizes=keys.transformer_sizes,
            constants=keys.transformer_constants,
            prefixes=("", "model.diffusion_model.", "diffusion_model.", "transformer."),
        ),
        "text_encoder": Component(
            Qwen3Config, Qwen3Encoder,
            namings=tuple(Naming(f"{p}embed_tokens.weight", keys.qwen3_of) for p in ("", "model.")),
            stems=("model",),
            classes=("Qwen3ForCausalLM", "Qwen3Model"),
            saved={"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
            sizes=flux2_keys.decoder_sizes,
            constants=keys.qwen3_constants,
            files=("qwen_3_4b.safetensors",),
            folders=("text_encoders", "clip"),
        ),
        "vae": Flux1.components["vae"],
    }  # fmt: skip
    tokenizers = {
        "tokenizer": TokenizerFiles(
            "text_encoder", 151936, "Qwen/Qwen3-4B", functools.partial(text.ChatTokenizer, chat=CHAT)
        )
    }
    guided = True

    def __init__(self, configs: Mapping[str, Any], index: Mapping[str, Any] | None = None):
        super().__init__(configs, index)
        self.transformer: ZImageConfig = configs["transformer"]
        self.qwen3: Qwen3Config = configs["text_encoder"]
        self.vae: VaeConfig = configs["vae"]

    # The checkpoint

    def mismatches(self) -> Iterator[tuple[str, str, Any, Any, str]]:
        for key, expected, of in (
            ("in_channels", self.vae.latent_channels, "the VAE's latent_channels"),
            ("cap_feat_dim", self.qwen3.hidden_size, "Qwen3's hidden_size"),
        ):
            if (found := getattr(self.transformer, key)) != expected:
                yield "transformer", key, found, expected, of

    def scheduler(
        self, config: Mapping[str, Any], time_shift: bool | None, base_shift: float | None, max_shift: float | None
    ) -> FlowMatchEuler:  # fmt: skip
        return FlowMatchEuler.of(config, time_shift, base_shift, max_shift)

    def published_scheduler(self) -> dict[str, Any]:
        return {"use_dynamic_shifting": False, "shift": 3.0}

    @property
    def heads(self) -> int:
        return self.transformer.n_heads

    def resolve(self, row: Row) -> Row:
        if row.pictures:
            raise ValueError(f"{next(iter(row.pictures))}: expected none: this model reads no pictures")
        for key, most in zip(("height", "width"), self.transformer.axes_lens[1:], strict=True):
            if (found := getattr(row, key)) > most * self.size_multiple:
                raise ValueError(f"{key}: got {found}, expected at most {most * self.size_multiple}, as was learned")
        negative = row.guidance_scale > 0
        if not negative and row.negative_prompt is None and row.true_cfg_scale == row.strength == 1.0:
            return row
        return dataclasses.replace(
            row,
            negative_prompt=(row.negative_prompt or "") if negative else None,
            negative_prompt_2=None,
            true_cfg_scale=1.0,
            strength=1.0,
            mode=Mode(negative=negative),
        )

    def cfg_scale(self, row: Row) -> float:
        """A guidance of g adds g times what the prompt changes, where others multiply it by g."""
        return row.guidance_scale + 1

    # Text

    def text_inputs(self, tokenizers: Mapping[str, Tokenizer], max_sequence_length: int) -> tuple[TextInput, ...]:
        most = (self.transformer.axes_lens[0] - 2) // MULTIPLE * MULTIPLE  # the image stands behind the text
        if max_sequence_length % MULTIPLE or max_sequence_length > most:
            raise UserError(
                f"sampler.max_sequence_length={max_sequence_length}: expected a multiple of {MULTIPLE} up to {most}"
            )
        given = "Qwen3", tokenizers["tokenizer"], max_sequence_length, "prompt", CHAT.size
        return (text.ChatInput(*given, multiple=MULTIPLE),)

    def encode(self, encoders: Mapping[str, Any], inputs: Sequence[tuple[jax.Array, ...]], dtype: Any) -> PromptEmbeds:
        ids, mask = inputs[0]
        return PromptEmbeds(encoders["text_encoder"](ids, mask, dtype), mask.astype(dtype))

    def conditioning_shapes(self, inputs: Sequence[TextInput]) -> PromptEmbeds:
        return PromptEmbeds((inputs[0].length, self.transformer.cap_feat_dim), (inputs[0].length,))

    # Latents

    @property
    def size_multiple(self) -> int:
        return 2 * self.vae.scale

    def latent_shape(self, height: int, width: int) -> tuple[int, int]:
        rows, cols = self._grid(height, width)
        return rows * cols, 4 * self.vae.latent_channels

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        return height // self.size_multiple, width // self.size_multiple

    def noise(self, seed: int, height: int, width: int, mode: Mode = PLAIN) -> np.ndarray:
        return latents.pack(draws(seed, 1, height, width, self.vae)[0])

    def positions(self, conditioning: PromptEmbeds, height: int, width: int, mode: Mode = PLAIN) -> Positions:
        return rope_tables(self.transformer, conditioning.states.shape[-2], *self._grid(height, width))

    def unpack(self, latents_: jax.Array, height: int, width: int) -> jax.Array:
        return latents.unpack(latents_, height // self.vae.scale, width // self.vae.scale)

    @property
    def decoder_width(self) -> int:
        return self.vae.block_out_channels[0]

    # Costs

    def _padded(self, height: int, width: int) -> int:
        tokens = self.tokens(height, width)
        return tokens + padding(tokens)

    def encode_flops(self, inputs: Sequence[TextInput]) -> int:
        return flux2_cost.encode(self.qwen3, self.qwen3.layers, inputs[0].length)

    def step_flops(self, height: int, width: int, inputs: Sequence[TextInput], mode: Mode = PLAIN) -> int:
        return cost.step(self.transformer, self._padded(height, width), inputs[0].length)

    def decode_flops(self, height: int, width: int) -> int:
        return autoencoder_cost.decode_flops(self.vae, height, width)

    def encode_bytes(self, at: Footprint, inputs: Sequence[TextInput]) -> int:
        return flux2_cost.encode_bytes(self.qwen3, self.qwen3.layers, at, inputs[0].length)

    def denoise_bytes(self, at: Footprint, inputs: Sequence[TextInput]) -> int:
        return cost.denoise_bytes(self.transformer, at, self._padded(at.height, at.width), inputs[0].length)

    def decode_bytes(self, at: Footprint) -> int:
        return autoencoder_cost.decode_bytes(self.vae, at)


FAMILIES = (ZImageFamily,)
