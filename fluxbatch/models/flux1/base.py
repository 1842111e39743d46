"""FLUX.1 as data: its components, tokenizers, latents, scheduler and costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
from PIL import Image

from fluxbatch.models import autoencoder_cost, autoencoder_keys
from fluxbatch.models.autoencoder import Decoder, VaeConfig
from fluxbatch.models.family import (
    Component,
    Conditioning,
    Family,
    Footprint,
    Pictures,
    TextInput,
    Tokenizer,
    TokenizerFiles,
)
from fluxbatch.models.flux1 import cost, keys, pictures, single_files
from fluxbatch.models.flux1.clip import ClipConfig, ClipTextEncoder
from fluxbatch.models.flux1.lora import LORA
from fluxbatch.models.flux1.t5 import T5Config, T5Encoder
from fluxbatch.models.flux1.transformer import Flux, FluxConfig, rope_table
from fluxbatch.models.key_tables import Naming
from fluxbatch.models.latents import pack, unpack
from fluxbatch.models.schedulers import FlowMatchEuler
from fluxbatch.types import PLAIN, Mode, Row, UserError


class PromptEmbeds(NamedTuple):
    """What FLUX.1 reads of a prompt."""

    states: Any  # of T5, [B, T, D]
    pooled: Any  # of CLIP, [B, P]


class Flux1(Family):
    """FLUX.1: CLIP's pooled vector and T5's states, a 16-channel VAE, packed 2×2 latents."""

    name = "flux1"
    pipelines: ClassVar[tuple[str, ...]] = ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline")
    encoders: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    conditioning: Callable[..., Conditioning] = PromptEmbeds
    lora = LORA
    file_patterns: ClassVar[tuple[str, ...]] = ("flux*",)
    leftovers = r"text_encoders\.\w+\.(logit_scale|text_projection(\.weight)?)"  # of ComfyUI's text encoders in a whole
    components = {
        "transformer": Component(
            FluxConfig,
            Flux,
            namings=(
                Naming("vector_in.in_layer.weight", keys.FLUX_BFL),
                Naming("time_text_embed.text_embedder.linear_1.weight", keys.FLUX_DIFFUSERS),
            ),
            stems=("diffusion_pytorch_model", "model"),
            classes=("FluxTransformer2DModel",),
            saved={"_class_name": "FluxTransformer2DModel"},
            sizes=single_files.transformer_sizes,
            constants=single_files.transformer_constants,
            prefixes=("", "model.diffusion_model.", "diffusion_model.", "transformer.", "model."),
        ),
        "text_encoder": Component(
            ClipConfig,
            ClipTextEncoder,
            namings=tuple(Naming(f"{p}embeddings.token_embedding.weight", keys.CLIP) for p in ("text_model.", "")),
            stems=("model",),
            classes=("CLIPTextModel", "CLIPModel", "CLIPTextModelWithProjection"),
            saved={"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"},
            sizes=single_files.clip_sizes,
            constants=single_files.clip_constants,
            home="clip_model_name_or_path",
            files=("clip_l.safetensors",),
            folders=("text_encoders", "clip"),
            prefixes=(
                "",
                "text_encoders.clip_l.transformer.",
                "text_encoders.clip_l.",
                "clip_l.transformer.",
                "clip_l.",
            ),
        ),
        "text_encoder_2": Component(
            T5Config,
            T5Encoder,
            namings=(Naming("encoder.final_layer_norm.weight", keys.T5),),
            stems=("model",),
            classes=("T5EncoderModel", "T5ForConditionalGeneration", "T5Model"),
            saved={"architectures": ["T5EncoderModel"], "model_type": "t5", "feed_forward_proj": "gated-gelu"},
            sizes=single_files.t5_sizes,
            constants=lambda sizes: {"feed_forward_proj": "gated-gelu"},
            home="t5xxl_model_name_or_path",
            files=("t5xxl_fp16.safetensors", "t5xxl_fp8_e4m3fn_scaled.safetensors", "t5xxl_fp8_e4m3fn.safetensors"),
            folders=("text_encoders", "clip"),
            prefixes=("", "text_encoders.t5xxl.transformer.", "text_encoders.t5xxl.", "t5xxl.transformer.", "t5xxl."),
            same=(("shared.weight", "encoder.embed_tokens.weight"),),
        ),
        "vae": Component(
            VaeConfig,
            Decoder,
            namings=autoencoder_keys.NAMINGS,
            encoder_namings=autoencoder_keys.ENCODER_NAMINGS,
            stems=("diffusion_pytorch_model", "model"),
            classes=("AutoencoderKL",),
            saved={"_class_name": "AutoencoderKL"},
            sizes=autoencoder_keys.sizes,
            constants=single_files.vae_constants,
            home="vae_model_name_or_path",
            files=("ae.safetensors", "ae.sft"),
            folders=("vae",),
            prefixes=("", "vae.", "first_stage_model."),
        ),
    }
    tokenizers = {
        "tokenizer": TokenizerFiles("text_encoder", 49408, "openai/clip-vit-large-patch14"),
        "tokenizer_2": TokenizerFiles("text_encoder_2", 32128, "google/t5-v1_1-xxl"),
    }

    @classmethod
    def claims(cls, config: Mapping[str, Any]) -> bool:
        channels = config.get("in_channels", 64)
        return super().claims(config) and channels == (config.get("out_channels") or channels)

    def __init__(self, configs: Mapping[str, Any], index: Mapping[str, Any] | None = None):
        super().__init__(configs, index)
        self.transformer: FluxConfig = configs["transformer"]
        self.clip: ClipConfig = configs["text_encoder"]
        self.t5: T5Config = configs["text_encoder_2"]
        self.vae: VaeConfig = configs["vae"]

    # The checkpoint

    def mismatches(self) -> Iterator[tuple[str, str, Any, Any, str]]:
        cfg = self.transformer
        for key, expected, of in (
            ("in_channels", *self._in_channels()),
            ("joint_attention_dim", self.t5.d_model, "T5's d_model"),
            ("pooled_projection_dim", self.clip.hidden_size, "CLIP's hidden_size"),
        ):
            if (found := getattr(cfg, key)) != expected:
                yield "transformer", key, found, expected, of

    def _in_channels(self) -> tuple[int, str]:
        """Of a token as the transformer reads it, and why."""
        return 4 * self.vae.latent_channels, "4 × the VAE's latent_channels"

    def scheduler(
        self, config: Mapping[str, Any], time_shift: bool | None, base_shift: float | None, max_shift: float | None
    ) -> FlowMatchEuler:  # fmt: skip
        return FlowMatchEuler.of(config, time_shift, base_shift, max_shift)

    def published_scheduler(self) -> dict[str, Any]:
        """Dev shifts by image size, schnell does not."""
        dev = self.guided
        return dict(use_dynamic_shifting=dev, shift=3.0 if dev else 1.0, base_shift=0.5, max_shift=1.15,
                    base_image_seq_len=256, max_image_seq_len=4096)  # fmt: skip

    @property
    def heads(self) -> int:
        return self.transformer.num_attention_heads

    @property
    def guided(self) -> bool:
        return self.transformer.guidance_embeds

    @property
    def step_caches(self) -> tuple[str, ...]:
        cfg = self.transformer
        return ("first_block",) if cfg.num_layers and cfg.num_layers + cfg.num_single_layers > 1 else ()

    def warnings(self, flux_name: str) -> tuple[str, ...]:
        """A dev model under schnell's settings, or the other way round."""
        for kind, expected in (("schnell", False), ("dev", True)):
            if kind in flux_name.split("-") and self.guided != expected:
                has = "a" if self.guided else "no"
                return (
                    f"model.flux_name={flux_name}, but the checkpoint has {has} guidance embedding: are the "
                    "sampler's settings meant for it?",
                )
        return ()

    # Text

    def text_inputs(self, tokenizers: Mapping[str, Tokenizer], max_sequence_length: int) -> tuple[TextInput, ...]:
        clip, t5 = tokenizers["tokenizer"], tokenizers["tokenizer_2"]
        places = self.clip.max_position_embeddings
        length = clip.max_length if clip.here else places
        if (
            type(length) is not int or not 1 < length <= places
        ):  # beyond them JAX would take the last place again and again
            got = f"{length:,}" if type(length) is int else repr(length)
            raise UserError(
                f"{clip.folder}: model_max_length is {got}, expected from 2 (start and end) to CLIP's {places} "
                "positions"
            )
        return TextInput("CLIP", clip, length, "prompt"), TextInput("T5", t5, max_sequence_length, "prompt_2")

    def encode(self, encoders: Mapping[str, Any], inputs: Sequence[tuple[jax.Array, ...]], dtype: Any) -> PromptEmbeds:
        (clip_ids,), (t5_ids,) = inputs
        pooled = encoders["text_encoder"](clip_ids, dtype)
        return PromptEmbeds(encoders["text_encoder_2"](t5_ids, dtype), pooled)

    def conditioning_shapes(self, inputs: Sequence[TextInput]) -> PromptEmbeds:
        return PromptEmbeds(
            (inputs[1].length, self.transformer.joint_attention_dim), (self.transformer.pooled_projection_dim,)
        )

    def in_steps(self, conditioning: PromptEmbeds) -> PromptEmbeds:
        return PromptEmbeds(conditioning.states, None)

    # Latents

    @property
    def size_multiple(self) -> int:
        return 2 * self.vae.scale

    def latent_shape(self, height: int, width: int) -> tuple[int, int]:
        return (height // self.size_multiple) * (width // self.size_multiple), 4 * self.vae.latent_channels

    def noise(self, seed: int, height: int, width: int, mode: Mode = PLAIN) -> np.ndarray:
        return pack(pictures.draws(seed, 2 if mode.start or mode.guided_by else 1, height, width, self.vae)[-1])

    def positions(
        self, conditioning: PromptEmbeds, height: int, width: int, mode: Mode = PLAIN
    ) -> tuple[np.ndarray, np.ndarray]:
        (rows, cols), *references = (
            (h // self.size_multiple, w // self.size_multiple) for h, w in ((height, width), *mode.references)
        )
        length = conditioning.states.shape[-2]
        return rope_table(length, rows, cols, self.transformer.axes_dims_rope, references)

    def unpack(self, latents: jax.Array, height: int, width: int) -> jax.Array:
        return unpack(latents, height // self.vae.scale, width // self.vae.scale)

    @property
    def decoder_width(self) -> int:
        return self.vae.block_out_channels[0]

    # Pictures

    def resolve(self, row: Row) -> Row:
        """True guidance needs a scale above 1 and a negative prompt; an image is what a row starts from."""
        if row.control_image:
            raise ValueError("control_image: expected none: this model reads none, nor has an adapter it read one")
        if len(row.image) > 1:
            raise ValueError(f"image: got {len(row.image)}, expected one: it is what the row starts from")
        if row.mask_image and not row.image:
            raise ValueError("mask_image: expected an image that it is the mask of")
        if row.mask_image and row.padding_mask_crop is not None:
            (h, w), (mask_h, mask_w) = ((p.height, p.width) for p in (row.image[0], row.mask_image))
            if (h, w) != (mask_h, mask_w):
                raise ValueError(f"mask_image: got {mask_w}×{mask_h}, expected the image's {w}×{h} to crop both alike")
        negative = row.true_cfg_scale > 1 and row.negative_prompt is not None
        mode = Mode(negative=negative, start=bool(row.image), mask=row.mask_image is not None)
        if mode == PLAIN:  # as most rows of a million: no second object for each
            return row
        if not negative:
            row = dataclasses.replace(row, negative_prompt=None, negative_prompt_2=None, true_cfg_scale=1.0)
        return dataclasses.replace(row, mode=mode, strength=row.strength if mode.start else 1.0)

    def prepare(self, row: Row, pictures_: Mapping[str, Sequence[Image.Image]]) -> dict[str, np.ndarray]:
        return pictures.prepare(row, pictures_, self.vae)

    def finish(self, row: Row, pixels: np.ndarray, pictures_: Mapping[str, Sequence[Image.Image]]) -> np.ndarray:
        return pictures.pasted(row, pixels, pictures_["image"][0], pictures_["mask_image"][0])

    def picture_shapes(self, height: int, width: int, mode: Mode) -> dict[str, tuple[int, ...]]:
        if not mode.start:
            return {}
        h, w = height // self.vae.scale, width // self.vae.scale
        shapes = {"image": (height, width, 3), "epsilon": (h, w, self.vae.latent_channels)}
        return shapes | ({"mask": self.latent_shape(height, width)} if mode.mask else {})

    def encode_pictures(self, vae: Decoder, arrays: Mapping[str, jax.Array], dtype: Any) -> Pictures:
        assert vae.encoder is not None
        start = pictures.encode(vae.encoder, arrays["image"], arrays["epsilon"], self.vae, dtype)
        return Pictures(start=start, mask=arrays.get("mask"))

    # Costs

    def encode_flops(self, inputs: Sequence[TextInput]) -> int:
        return cost.clip(self.clip, self.clip.max_position_embeddings) + cost.t5(self.t5, inputs[1].length)

    def step_flops(self, height: int, width: int, inputs: Sequence[TextInput], mode: Mode = PLAIN) -> int:
        return cost.flux_step(self.transformer, self.tokens(height, width, mode), inputs[-1].length)

    def decode_flops(self, height: int, width: int) -> int:
        return autoencoder_cost.decode_flops(self.vae, height, width)

    def encode_bytes(self, at: Footprint, inputs: Sequence[TextInput]) -> int:
        return max(cost.t5_bytes(self.t5, at, inputs[1].length), cost.clip_bytes(self.clip, at))

    def denoise_bytes(self, at: Footprint, inputs: Sequence[TextInput]) -> int:
        return cost.denoise_bytes(self.transformer, at, self.tokens(at.height, at.width, at.mode), inputs[-1].length)

    def decode_bytes(self, at: Footprint) -> int:
        return autoencoder_cost.decode_bytes(self.vae, at)
