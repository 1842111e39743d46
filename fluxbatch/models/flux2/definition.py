"""FLUX.2 as data: klein (distilled, or a base with classifier-free guidance) and dev (guidance embedded)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from fluxbatch.models import autoencoder_cost
from fluxbatch.models.family import (
    Component,
    Family,
    Footprint,
    Pictures,
    Positions,
    TextInput,
    Tokenizer,
    TokenizerFiles,
)
from fluxbatch.models.flux2 import cost, keys, latents, mistral, qwen3, references, text
from fluxbatch.models.flux2.autoencoder import Decoder, Encoder, Flux2VaeConfig
from fluxbatch.models.flux2.decoder import DecoderConfig
from fluxbatch.models.flux2.lora import LORA
from fluxbatch.models.flux2.schedule import Flux2Schedule
from fluxbatch.models.flux2.transformer import Flux2, Flux2Config, PromptEmbeds, rope_table
from fluxbatch.models.key_tables import Naming
from fluxbatch.models.noise import torch_normal
from fluxbatch.models.schedulers import Scheduler
from fluxbatch.types import PLAIN, Mode, Row

TRANSFORMER = Component(
    Flux2Config, Flux2,
    namings=(
        Naming("single_stream_modulation.lin.weight", keys.bfl_of),
        Naming("single_stream_modulation.linear.weight", keys.diffusers_of),
    ),
    stems=("diffusion_pytorch_model", "model"),
    classes=("Flux2Transformer2DModel",),
    saved={"_class_name": "Flux2Transformer2DModel"},
    sizes=keys.transformer_sizes,
    constants=keys.transformer_constants,
    prefixes=("", "model.diffusion_model.", "diffusion_model.", "transformer."),
)  # fmt: skip
# Dev's has one more sign: its embedding of guidance.
DEV_TRANSFORMER = dataclasses.replace(TRANSFORMER, namings=(
    Naming(("single_stream_modulation.lin.weight", "guidance_in.in_layer.weight"), keys.bfl_of),
    Naming(
        ("single_stream_modulation.linear.weight", "time_guidance_embed.guidance_embedder.linear_1.weight"),
        keys.diffusers_of,
    ),
))  # fmt: skip
VAE = Component(
    Flux2VaeConfig, Decoder,
    namings=(
        Naming("decoder.norm_out.weight", keys.vae_bfl_of),
        Naming("decoder.conv_norm_out.weight", keys.VAE_DECODER_DIFFUSERS),
    ),
    encoder_namings=(
        Naming("encoder.norm_out.weight", keys.VAE_ENCODER_BFL),
        Naming("encoder.conv_norm_out.weight", keys.VAE_ENCODER_DIFFUSERS),
    ),
    stems=("diffusion_pytorch_model", "model"),
    classes=("AutoencoderKLFlux2",),
    saved={"_class_name": "AutoencoderKLFlux2"},
    sizes=keys.vae_sizes,
    constants=keys.vae_constants,
    home="vae_model_name_or_path",
    files=("flux2-vae.safetensors", "ae.safetensors"),
    folders=("vae",),
    prefixes=("", "vae.", "first_stage_model."),
)  # fmt: skip


class Flux2Family(Family):
    """What klein and dev share: all but the text encoder, and what guidance is."""

    encoders = ("text_encoder",)
    lora = LORA
    file_patterns = ("flux*",)
    title: ClassVar[str] = "FLUX.2"  # for messages
    reads: ClassVar[str]  # the text encoder's name, likewise
    layers: ClassVar[tuple[int, ...]]  # whose states are read
    chat: ClassVar[text.Chat]

    conditioning = PromptEmbeds

    def __init__(self, configs: Mapping[str, Any], index: Mapping[str, Any] | None = None):
        super().__init__(configs, index)
        self.transformer: Flux2Config = configs["transformer"]
        self.text: DecoderConfig = configs["text_encoder"]
        self.vae: Flux2VaeConfig = configs["vae"]
        self.cfg = False  # whether guidance leads away from a negative prompt

    # The checkpoint

    def mismatches(self) -> Iterator[tuple[str, str, Any, Any, str]]:
        cfg = self.transformer
        for key, expected, of in (
            ("in_channels", 4 * self.vae.latent_channels, "4 × the VAE's latent_channels"),
            (
                "joint_attention_dim",
                len(self.layers) * self.text.hidden_size,
                f"{len(self.layers)} × {self.reads}'s hidden_size",
            ),
            ("out_channels", cfg.in_channels, "in_channels"),
        ):
            if (found := getattr(cfg, key)) != expected:
                yield "transformer", key, found, expected, of

    def scheduler(
        self, config: Mapping[str, Any], time_shift: bool | None, base_shift: float | None, max_shift: float | None
    ) -> Scheduler:  # fmt: skip
        return Flux2Schedule.of(config, time_shift, base_shift, max_shift)

    def published_scheduler(self) -> dict[str, Any]:
        return dict(
            use_dynamic_shifting=True,
            shift=3.0,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        )

    @property
    def heads(self) -> int:
        return self.transformer.num_attention_heads

    @property
    def guided(self) -> bool:
        return self.transformer.guidance_embeds or self.cfg

    # Text

    def text_inputs(self, tokenizers: Mapping[str, Tokenizer], max_sequence_length: int) -> tuple[TextInput, ...]:
        return (text.ChatInput(self.reads, tokenizers["tokenizer"], max_sequence_length, "prompt", self.chat.size),)

    def encode(self, encoders: Mapping[str, Any], inputs: Sequence[tuple[jax.Array, ...]], dtype: Any) -> PromptEmbeds:
        return PromptEmbeds(encoders["text_encoder"](*inputs[0], dtype))

    def conditioning_shapes(self, inputs: Sequence[TextInput]) -> PromptEmbeds:
        return PromptEmbeds((inputs[0].length, self.transformer.joint_attention_dim))

    # Latents

    @property
    def size_multiple(self) -> int:
        return self.vae.scale

    def latent_shape(self, height: int, width: int) -> tuple[int, int]:
        rows, cols = self._grid(height, width)
        return rows * cols, self.transformer.in_channels

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        return height // self.vae.scale, width // self.vae.scale

    def noise(self, seed: int, height: int, width: int, mode: Mode = PLAIN) -> np.ndarray:
        return latents.noise(
            functools.partial(torch_normal, seed), self.transformer.in_channels, *self._grid(height, width)
        )

    def positions(self, conditioning: PromptEmbeds, height: int, width: int, mode: Mode = PLAIN) -> Positions:
        (rows, cols), *references = (self._grid(*size) for size in ((height, width), *mode.references))
        return rope_table(self.transformer, conditioning.states.shape[-2], rows, cols, references)

    def unpack(self, latents_: jax.Array, height: int, width: int) -> jax.Array:
        return latents.grid(latents_, *self._grid(height, width))

    @property
    def decoder_width(self) -> int:
        return self.vae.decoder_block_out_channels[0]

    # Pictures

    def resolve(self, row: Row) -> Row:
        """Every image is a reference. A base is led away from the negative prompt, the empty one by default."""
        for key in ("mask_image", "control_image"):
            if getattr(row, key):
                raise ValueError(f"{key}: expected none: {self.title} reads reference pictures, as image")
        count = len(row.image)
        for picture in row.image:
            if fault := self.fault((picture.width, picture.height), count):
                raise ValueError(f"image: {picture.path}: {fault}")
        negative = self.cfg and self.led(row)
        if row.negative_prompt and not self.cfg:
            raise ValueError("negative_prompt: expected none: this model has no guidance that leads away from a prompt")
        sizes = tuple(self.reference_size((p.width, p.height), count)[::-1] for p in row.image)
        mode = Mode(negative=negative, references=sizes)
        if mode == PLAIN:  # as most rows of a million: no second object for each
            return row
        return dataclasses.replace(
            row,
            negative_prompt=(row.negative_prompt or "") if negative else None,
            negative_prompt_2=None,
            true_cfg_scale=1.0,
            strength=1.0,
            mode=mode,
        )

    def fault(self, size: tuple[int, int], count: int) -> str | None:
        """Why a picture of this width and height cannot be one of ``count`` references; None if it can."""
        return references.fault(size)

    def reference_size(self, size: tuple[int, int], count: int) -> tuple[int, int]:
        """Width and height of what the VAE sees of a picture, one of ``count``."""
        return references.reference_size(size, self.size_multiple)

    def led(self, row: Row) -> bool:
        """Whether a row's guidance leads away from its negative prompt, in a model that has such."""
        return row.guidance_scale > 1

    def default_size(self, row: Row) -> tuple[int, int]:
        """Of the first reference, as the VAE sees it."""
        width, height = self.reference_size((row.image[0].width, row.image[0].height), len(row.image))
        return height, width

    def cfg_scale(self, row: Row) -> float:
        return row.guidance_scale

    def prepare(self, row: Row, pictures: Mapping[str, Sequence[Image.Image]]) -> dict[str, np.ndarray]:
        return {str(i): references.prepare(image, self.size_multiple) for i, image in enumerate(pictures["image"])}

    def picture_shapes(self, height: int, width: int, mode: Mode) -> dict[str, tuple[int, ...]]:
        return {str(i): (*size, 3) for i, size in enumerate(mode.references)}

    def encode_pictures(self, vae: Decoder, arrays: Mapping[str, jax.Array], dtype: Any) -> Pictures:
        patches = [cast(Encoder, vae.encoder)(arrays[str(i)].astype(dtype)) for i in range(len(arrays))]
        tokens = [each.reshape(len(each), -1, each.shape[-1]).astype(jnp.float32) for each in patches]
        return Pictures(references=jnp.concatenate(tokens, axis=1))

    # Costs

    def encode_flops(self, inputs: Sequence[TextInput]) -> int:
        return sum(cost.encode(self.text, self.layers, each.length) for each in inputs)

    def step_flops(self, height: int, width: int, inputs: Sequence[TextInput], mode: Mode = PLAIN) -> int:
        image = self.tokens(height, width)
        return cost.step(self.transformer, image, inputs[0].length, self.tokens(height, width, mode) - image)

    def decode_flops(self, height: int, width: int) -> int:
        return autoencoder_cost.decode_flops(self.vae.decoder, height, width)

    def encode_bytes(self, at: Footprint, inputs: Sequence[TextInput]) -> int:
        return cost.encode_bytes(self.text, self.layers, at, inputs[0].length)

    def denoise_bytes(self, at: Footprint, inputs: Sequence[TextInput]) -> int:
        return cost.denoise_bytes(self.transformer, at, self.tokens(at.height, at.width, at.mode), inputs[0].length)

    def decode_bytes(self, at: Footprint) -> int:
        return autoencoder_cost.decode_bytes(self.vae.decoder, at)


class Dev(Flux2Family):
    """FLUX.2 dev: Mistral Small 3 reads the prompt; guidance is embedded."""

    name = "flux2-dev"
    pipelines = ("Flux2Pipeline",)
    reads, layers, chat = "Mistral", mistral.LAYERS, text.DEV
    components = {
        "transformer": DEV_TRANSFORMER,
        "text_encoder": Component(
            mistral.MistralConfig, mistral.MistralEncoder,
            namings=tuple(
                Naming(f"{prefix}embed_tokens.weight", keys.MISTRAL)
                for prefix in ("model.language_model.", "language_model.model.", "model.", "")
            ),
            stems=("model",),
            classes=("Mistral3ForConditionalGeneration", "MistralForCausalLM", "Mistral3Model"),
            saved={"architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3"},
            sizes=keys.decoder_sizes,
            constants=keys.mistral_constants,
            files=("mistral_3_small_flux2_bf16.safetensors",),
            folders=("text_encoders", "clip"),
        ),
        "vae": VAE,
    }  # fmt: skip
    tokenizers = {
        "tokenizer": TokenizerFiles("text_encoder", 131072, None, functools.partial(text.ChatTokenizer, chat=text.DEV))
    }

    @classmethod
    def claims(cls, config: Mapping[str, Any]) -> bool:
        return super().claims(config) and bool(config.get("guidance_embeds", True))


class Klein(Flux2Family):
    """FLUX.2 klein: Qwen3 reads the prompt. A base is guided away from the empty prompt; a distilled one has no
    guidance."""

    name = "flux2-klein"
    pipelines = ("Flux2KleinPipeline",)
    reads, layers, chat = "Qwen3", qwen3.LAYERS, text.KLEIN
    components = {
        "transformer": TRANSFORMER,
        "text_encoder": Component(
            qwen3.Qwen3Config, qwen3.Qwen3Encoder,
            namings=tuple(Naming(f"{p}embed_tokens.weight", keys.QWEN3) for p in ("", "model.")),
            stems=("model",),
            classes=("Qwen3ForCausalLM", "Qwen3Model"),
            saved={"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
            sizes=keys.decoder_sizes,
            constants=keys.qwen3_constants,
            files=("qwen_3_4b.safetensors", "qwen_3_8b.safetensors"),
            folders=("text_encoders", "clip"),
        ),
        "vae": VAE,
    }  # fmt: skip
    tokenizers = {
        "tokenizer": TokenizerFiles(
            "text_encoder", 151936, "Qwen/Qwen3-4B", functools.partial(text.ChatTokenizer, chat=text.KLEIN)
        )
    }

    def __init__(self, configs: Mapping[str, Any], index: Mapping[str, Any] | None = None):
        super().__init__(configs, index)
        self.distilled = bool((index or {}).get("is_distilled", False))  # as diffusers has it
        self.cfg = not self.distilled

    @classmethod
    def index_of(cls, file: str) -> Mapping[str, Any]:
        """Files do not say it but by their names: ``flux-2-klein-base-4b.safetensors``."""
        return {"is_distilled": "base" not in file.lower()}

    def index(self) -> dict[str, Any]:
        return {"is_distilled": self.distilled}

    def warnings(self, flux_name: str) -> tuple[str, ...]:
        """A base under a distilled model's settings, or the other way round."""
        if "klein" not in flux_name or ("base" in flux_name.split("-")) == self.cfg:
            return ()
        said = "is distilled" if self.distilled else "is a base, which is not distilled"
        return (f"model.flux_name={flux_name}, but the checkpoint {said}: are the sampler's settings meant for it?",)


FAMILIES = (Dev, Klein)
