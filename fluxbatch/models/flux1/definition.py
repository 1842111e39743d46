"""FLUX.1's families: text to image, and the checkpoints that read pictures besides."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from fluxbatch.models.autoencoder import Decoder
from fluxbatch.models.family import Pictures
from fluxbatch.models.flux1 import pictures
from fluxbatch.models.flux1.base import Flux1, PromptEmbeds
from fluxbatch.types import Mode, Row

__all__ = ["FAMILIES", "Control", "Fill", "Flux1", "Kontext", "PromptEmbeds"]


def _refuse(row: Row, *keys: str) -> None:
    """ValueError for the first of these fields that the row has."""
    for key in keys:
        if getattr(row, key):
            raise ValueError(f"{key}: expected none: this model has no use for it")


class Kontext(Flux1):
    """FLUX.1 Kontext: reads a picture as more tokens, and edits it. Without one it makes images as FLUX.1 dev does."""

    name = "flux1-kontext"
    pipelines = ("FluxKontextPipeline",)
    file_words = ("kontext",)

    def __init__(self, configs: Mapping[str, Any], index: Mapping[str, Any] | None = None):
        super().__init__(configs, index)
        # pixels of a square reference; a key of ours, which diffusers does not look at
        self.reference_resolution = (index or {}).get("_reference_resolution", pictures.REFERENCE)
        least = 2 * self.size_multiple
        if type(self.reference_resolution) is not int or self.reference_resolution < least:
            got = json.dumps(self.reference_resolution)
            raise ValueError(f"_reference_resolution is {got}, expected a whole number from {least}")

    @classmethod
    def claims(cls, config: Mapping[str, Any]) -> bool:
        return False  # its config is dev's: only model_index.json tells

    def index(self) -> dict[str, Any]:
        own = self.reference_resolution
        return {} if own == pictures.REFERENCE else {"_reference_resolution": own}

    def resolve(self, row: Row) -> Row:
        _refuse(row, "mask_image", "control_image")
        if len(row.image) > 1:
            raise ValueError(f"image: got {len(row.image)}, expected one: the model was trained on single pictures")
        own = self.size_multiple, self.reference_resolution
        sizes = tuple(pictures.reference_size(p.height, p.width, *own) for p in row.image)
        image, row = row.image, super().resolve(dataclasses.replace(row, image=()))
        return dataclasses.replace(row, image=image, mode=row.mode._replace(references=sizes))

    def default_size(self, row: Row) -> tuple[int, int]:
        """Of the picture's aspect and about the row's area, as diffusers has it for every size."""
        multiple, picture, area = self.size_multiple, row.image[0], row.height * row.width
        height = round(math.sqrt(area * picture.height / picture.width))
        width = round(math.sqrt(area * picture.width / picture.height))
        return height // multiple * multiple, width // multiple * multiple

    def prepare(self, row: Row, pictures_: Mapping[str, Sequence[Image.Image]]) -> dict[str, np.ndarray]:
        return {"reference": pictures.pixels(pictures_["image"][0], *row.mode.references[0])}

    def picture_shapes(self, height: int, width: int, mode: Mode) -> dict[str, tuple[int, ...]]:
        return {"reference": (*mode.references[0], 3)} if mode.references else {}

    def encode_pictures(self, vae: Decoder, arrays: Mapping[str, jax.Array], dtype: Any) -> Pictures:
        assert vae.encoder is not None
        return Pictures(references=pictures.encode(vae.encoder, arrays["reference"], None, self.vae, dtype))


class Fill(Flux1):
    """FLUX.1 Fill: reads the picture around a hole, and the hole, beside the latents."""

    name = "flux1-fill"
    pipelines = ("FluxFillPipeline",)
    file_words = ("fill",)

    @classmethod
    def claims(cls, config: Mapping[str, Any]) -> bool:
        return super(Flux1, cls).claims(config) and config.get("in_channels", 64) > 2 * config.get("out_channels", 64)

    def _in_channels(self) -> tuple[int, str]:
        channels, scale = self.vae.latent_channels, self.vae.scale
        return 8 * channels + 4 * scale**2, "8 × the VAE's latent_channels + 4 × the pixels of a latent"

    def resolve(self, row: Row) -> Row:
        _refuse(row, "control_image", "negative_prompt")
        if len(row.image) != 1 or not row.mask_image:
            raise ValueError("image, mask_image: expected one of each: this model fills what is white in the mask")
        mode = Mode(start=row.strength < 1, guided_by="a hole to fill")
        return dataclasses.replace(row, mode=mode, negative_prompt=None, negative_prompt_2=None, true_cfg_scale=1.0)

    def prepare(self, row: Row, pictures_: Mapping[str, Sequence[Image.Image]]) -> dict[str, np.ndarray]:
        image = pictures.pixels(pictures_["image"][0], row.height, row.width)
        mask = pictures.mask_pixels(pictures_["mask_image"][0], row.height, row.width)
        first, _, third = pictures.draws(row.seed, 3, row.height, row.width, self.vae)
        found = {"around": image * ~mask[..., None], "epsilon_around": third.transpose(1, 2, 0)}
        found["mask"] = pictures.mask_channels(mask, self.vae.scale)
        return found | ({"image": image, "epsilon": first.transpose(1, 2, 0)} if row.mode.start else {})

    def picture_shapes(self, height: int, width: int, mode: Mode) -> dict[str, tuple[int, ...]]:
        h, w = height // self.vae.scale, width // self.vae.scale
        latents, pixels = (h, w, self.vae.latent_channels), (height, width, 3)
        found = {"around": pixels, "epsilon_around": latents, "mask": (h * w // 4, 4 * self.vae.scale**2)}
        return found | ({"image": pixels, "epsilon": latents} if mode.start else {})

    def encode_pictures(self, vae: Decoder, arrays: Mapping[str, jax.Array], dtype: Any) -> Pictures:
        assert vae.encoder is not None
        around = pictures.encode(vae.encoder, arrays["around"], arrays["epsilon_around"], self.vae, dtype)
        start = None
        if "image" in arrays:
            start = pictures.encode(vae.encoder, arrays["image"], arrays["epsilon"], self.vae, dtype)
        return Pictures(start=start, channels=jnp.concatenate([around, arrays["mask"]], -1))


class Control(Flux1):
    """FLUX.1 Depth and Canny: read a map of depth or edges beside the latents."""

    name = "flux1-control"
    pipelines = ("FluxControlPipeline",)
    file_words = ("depth", "canny")

    @classmethod
    def claims(cls, config: Mapping[str, Any]) -> bool:
        return super(Flux1, cls).claims(config) and config.get("in_channels", 64) == 2 * (
            config.get("out_channels") or 64
        )

    def _in_channels(self) -> tuple[int, str]:
        return 8 * self.vae.latent_channels, "8 × the VAE's latent_channels"

    def resolve(self, row: Row) -> Row:
        _refuse(row, "image", "mask_image", "negative_prompt")
        if not row.control_image:
            raise ValueError("control_image: expected one: this model, or an adapter of the job, follows a map")
        mode = Mode(guided_by="a control image")
        row = dataclasses.replace(row, mode=mode, strength=1.0)
        return dataclasses.replace(row, negative_prompt=None, negative_prompt_2=None, true_cfg_scale=1.0)

    def prepare(self, row: Row, pictures_: Mapping[str, Sequence[Image.Image]]) -> dict[str, np.ndarray]:
        epsilon = pictures.draws(row.seed, 1, row.height, row.width, self.vae)[0]
        control = pictures.pixels(pictures_["control_image"][0], row.height, row.width)
        return {"control": control, "epsilon": epsilon.transpose(1, 2, 0)}

    def picture_shapes(self, height: int, width: int, mode: Mode) -> dict[str, tuple[int, ...]]:
        h, w = height // self.vae.scale, width // self.vae.scale
        return {"control": (height, width, 3), "epsilon": (h, w, self.vae.latent_channels)}

    def encode_pictures(self, vae: Decoder, arrays: Mapping[str, jax.Array], dtype: Any) -> Pictures:
        assert vae.encoder is not None
        return Pictures(channels=pictures.encode(vae.encoder, arrays["control"], arrays["epsilon"], self.vae, dtype))


FAMILIES = (Flux1, Kontext, Fill, Control)
