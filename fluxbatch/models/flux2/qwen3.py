"""Qwen3 as klein's text encoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx

from fluxbatch.distributed.mesh import Layout
from fluxbatch.models.flux2.decoder import Decoder, DecoderConfig

LAYERS = (9, 18, 27)  # whose states the transformer reads


@dataclasses.dataclass(frozen=True)
class Qwen3Config(DecoderConfig):
    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Qwen3Config:
        """Reads ``text_encoder/config.json``; ValueError for what this model cannot be."""
        windowed = config.get("use_sliding_window") and config.get("max_window_layers", 28) < LAYERS[-1]
        kinds = config.get("layer_types") or ["sliding_attention" if windowed else "full_attention"]
        if odd := [kind for kind in kinds[: LAYERS[-1]] if kind != "full_attention"]:
            raise ValueError(f"layer_types {odd[0]!r}: expected 'full_attention'")
        config = {**config, "sliding_window": None}  # of later layers
        return cls.read(config, {"rms_norm_eps": 1e-6, "head_dim": 128, "rope_theta": 10_000.0})


class Qwen3Encoder(Decoder):
    def __init__(
        self, cfg: Qwen3Config, *, rngs: nnx.Rngs | None, layers: tuple[int, ...] = LAYERS, layout: Layout = Layout()
    ):
        super().__init__(cfg, layers, True, rngs=rngs, layout=layout)
