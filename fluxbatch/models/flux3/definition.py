"""FLUX.3 as data: klein, a flow map that is distilled, and its base with classifier-free guidance."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from fluxbatch.models.family import Component, Footprint, TextInput, Tokenizer, TokenizerFiles
from fluxbatch.models.flux2 import cost as flux2_cost
from fluxbatch.models.flux2 import keys as flux2_keys
from fluxbatch.models.flux2 import text
from fluxbatch.models.flux2.definition import VAE, Flux2Family
from fluxbatch.models.flux2.transformer import PromptEmbeds
from fluxbatch.models.flux3 import cost, keys, qwen3vl, references
from fluxbatch.models.flux3.lora import LORA
from fluxbatch.models.flux3.schedule import SHIFT, Flux3Schedule
from fluxbatch.models.flux3.transformer import Flux3, Flux3Config, Positions, rope_tables
from fluxbatch.models.key_tables import Naming
from fluxbatch.types import PLAIN, Mode, Row


class Klein(Flux2Family):
    """FLUX.3 klein: Qwen3-VL reads the prompt. A base is guided away from a negative prompt; a flow map has no
    guidance. VAE and latents are FLUX.2's."""

    name = "flux3-klein"
    pipelines = ("Flux3ModularPipeline", "Flux3DistilledModularPipeline")
    title, reads, layers, chat = "FLUX.3", "Qwen3-VL", qwen3vl.LAYERS, qwen3vl.CHAT
    lora = LORA
    components = {
        "transformer": Component(
            Flux3Config, Flux3,
            namings=(
                Naming("early_stream_modulations.image.lin.weight", keys.TRANSFORMER_BFL),
                Naming("early_stream_modulations.image.linear.weight", keys.TRANSFORMER_DIFFUSERS),
            ),
            stems=("diffusion_pytorch_model", "model"),
            classes=("Flux3Transformer2DModel",),
            saved={"_class_name": "Flux3Transformer2DModel"},
            sizes=keys.transformer_sizes,
            constants=keys.transformer_constants,
            prefixes=("", "model.diffusion_model.", "diffusion_model.", "transformer."),
        ),
        "text_encoder": Component(
            qwen3vl.Qwen3VLConfig, qwen3vl.Qwen3VLEncoder,
            namings=tuple(
                Naming(f"{prefix}embed_tokens.weight", keys.QWEN3_VL)
                for prefix in ("model.", "model.language_model.", "language_model.model.", "")
            ),
            stems=("model",),
            classes=("Qwen3VLForConditionalGeneration", "Qwen3VLModel", "Qwen3VLTextModel"),
            saved={"architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl"},
            sizes=flux2_keys.decoder_sizes,
            constants=keys.qwen3vl_constants,
            files=("qwen_3_vl_4b.safetensors",),
            folders=("text_encoders", "clip"),
        ),
        "vae": VAE,
    }  # fmt: skip
    tokenizers = {
        "tokenizer": TokenizerFiles(
            "text_encoder",
            151936,
            "Qwen/Qwen3-VL-4B-Instruct",
            functools.partial(text.ChatTokenizer, chat=qwen3vl.CHAT),
            folders=("processor",),
        )
    }

    def __init__(self, configs: Mapping[str, Any], index: Mapping[str, Any] | None = None):
        super().__init__(configs, index)
        self.flux3: Flux3Config = configs["transformer"]
        self.cfg = not self.flux3.flow_map

    # The checkpoint

    def mismatches(self) -> Iterator[tuple[str, str, Any, Any, str]]:
        states = len(self.layers) * self.text.hidden_size
        for key, expected, of in (
            ("in_channels", 4 * self.vae.latent_channels, "4 × the VAE's latent_channels"),
            ("cond_in_channels", 4 * self.vae.latent_channels, "4 × the VAE's latent_channels"),
            ("joint_attention_dim", states, f"{len(self.layers)} × {self.reads}'s hidden_size"),
        ):
            if (found := getattr(self.flux3, key)) != expected:
                yield "transformer", key, found, expected, of

    def scheduler(
        self, config: Mapping[str, Any], time_shift: bool | None, base_shift: float | None, max_shift: float | None
    ) -> Flux3Schedule:  # fmt: skip
        return Flux3Schedule.of(config, time_shift=time_shift, base_shift=base_shift, max_shift=max_shift)

    def published_scheduler(self) -> dict[str, Any]:
        return {"shift": SHIFT}

    @property
    def guided(self) -> bool:
        return self.cfg

    def warnings(self, flux_name: str) -> tuple[str, ...]:
        """A base under a distilled model's settings, or the other way round."""
        if "klein" not in flux_name or ("base" in flux_name.split("-")) == self.cfg:
            return ()
        said = "is a base, which is not distilled" if self.cfg else "is distilled"
        return (f"model.flux_name={flux_name}, but the checkpoint {said}: are the sampler's settings meant for it?",)

    # Text

    def text_inputs(self, tokenizers: Mapping[str, Tokenizer], max_sequence_length: int) -> tuple[TextInput, ...]:
        tokenizer, around = tokenizers["tokenizer"], self.chat.size
        given = self.reads, tokenizer, max_sequence_length, "prompt", around
        return (text.ChatInput(*given, multiple=qwen3vl.MULTIPLE),)

    # Latents

    def positions(self, conditioning: PromptEmbeds, height: int, width: int, mode: Mode = PLAIN) -> Positions:
        (rows, cols), *pictures = (self._grid(*size) for size in ((height, width), *mode.references))
        return rope_tables(self.flux3, conditioning.states.shape[-2], rows, cols, pictures)

    # Pictures

    def fault(self, size: tuple[int, int], count: int) -> str | None:
        return references.fault(size, count, self.size_multiple)

    def reference_size(self, size: tuple[int, int], count: int) -> tuple[int, int]:
        return references.reference_size(size, count, self.size_multiple)

    def led(self, row: Row) -> bool:
        return not math.isclose(row.guidance_scale, 1)

    def resolve(self, row: Row) -> Row:
        """An image of the size of its one reference keeps what that has of its canvas."""
        row = super().resolve(row)
        if row.sized or len(row.image) != 1:
            return row
        box = references.box((row.image[0].width, row.image[0].height), self.size_multiple)
        return row if box == (0, 0, row.width, row.height) else dataclasses.replace(row, crop=box)

    def prepare(self, row: Row, pictures: Mapping[str, Sequence[Image.Image]]) -> dict[str, np.ndarray]:
        images = pictures["image"]
        return {str(i): references.prepare(image, len(images), self.size_multiple) for i, image in enumerate(images)}

    # Costs

    def step_flops(self, height: int, width: int, inputs: Sequence[TextInput], mode: Mode = PLAIN) -> int:
        image = self.tokens(height, width)
        return cost.step(self.flux3, image, inputs[0].length, self.tokens(height, width, mode) - image)

    def denoise_bytes(self, at: Footprint, inputs: Sequence[TextInput]) -> int:
        tokens, modulation = self.tokens(at.height, at.width, at.mode), cost.modulation(self.flux3)
        return flux2_cost.denoise_bytes(self.flux3, at, tokens, inputs[0].length, modulation, largest=1)


FAMILIES = (Klein,)
