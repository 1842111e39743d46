"""Qwen3 as Z-Image's text encoder: what its last layer but one leaves behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx

from fluxbatch.distributed.mesh import Layout
from fluxbatch.models.flux2.decoder import Decoder, DecoderConfig
from fluxbatch.models.flux2.text import Chat, klein_messages

CHAT = Chat(klein_messages, {"add_generation_prompt": True, "enable_thinking": True}, True, 40, "right")


@dataclasses.dataclass(frozen=True)
class Qwen3Config(DecoderConfig):
    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Qwen3Config:
        """Reads ``text_encoder/config.json``; ValueError for what this model cannot be."""
        if config.get("use_sliding_window"):
            raise ValueError("use_sliding_window true: expected false")
        config = {**config, "sliding_window": None}  # which is there without being used
        return cls.read(config, {"rms_norm_eps": 1e-6, "head_dim": 128, "rope_theta": 10_000.0})

    @property
    def layers(self) -> tuple[int, ...]:
        """Whose states the transformer reads."""
        return (self.num_hidden_layers - 1,)


class Qwen3Encoder(Decoder):
    def __init__(self, cfg: Qwen3Config, *, rngs: nnx.Rngs | None, layout: Layout = Layout()):
        super().__init__(cfg, cfg.layers, True, rngs=rngs, layout=layout)
