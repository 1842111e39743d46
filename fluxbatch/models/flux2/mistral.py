"""Mistral Small 3 as dev's text encoder: its language model, without what sees pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx

from fluxbatch.distributed.mesh import Layout
from fluxbatch.models.flux2.decoder import Decoder, DecoderConfig

LAYERS = (10, 20, 30)  # whose states the transformer reads


@dataclasses.dataclass(frozen=True)
class MistralConfig(DecoderConfig):
    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> MistralConfig:
        """Reads ``text_encoder/config.json``, of which the language model is ``text_config``; ValueError for what this
        model cannot be."""
        config = config.get("text_config", config)
        return cls.read(config, {"rms_norm_eps": 1e-6, "rope_theta": 10_000.0})


class MistralEncoder(Decoder):
    def __init__(
        self, cfg: MistralConfig, *, rngs: nnx.Rngs | None, layers: tuple[int, ...] = LAYERS, layout: Layout = Layout()
    ):
        super().__init__(cfg, layers, False, rngs=rngs, layout=layout)
