"""Qwen3-VL as FLUX.3's text encoder: its language model, without what sees pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx

from fluxbatch.distributed.mesh import Layout
from fluxbatch.models.flux2.decoder import Decoder, DecoderConfig
from fluxbatch.models.flux2.text import Chat, klein_messages

LAYERS = (4, 8, 12, 16, 20, 24, 28, 32)  # whose states the transformer reads
MULTIPLE = 80  # of tokens that a prompt is padded to: the transformer attends to padding
PADDING_AT = 1  # its position when the transformer learned from it
CHAT = Chat(klein_messages, {"add_generation_prompt": True}, True, 40, "right")


@dataclasses.dataclass(frozen=True)
class Qwen3VLConfig(DecoderConfig):
    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Qwen3VLConfig:
        """Reads ``text_encoder/config.json``, of which the language model is ``text_config``; ValueError for what this
        model cannot be. Of text alone, its rotary angles of three axes are those of one."""
        config = config.get("text_config", config)
        return cls.read(config, {"rms_norm_eps": 1e-6, "head_dim": 128, "rope_theta": 5_000_000.0})


class Qwen3VLEncoder(Decoder):
    def __init__(
        self, cfg: Qwen3VLConfig, *, rngs: nnx.Rngs | None, layers: tuple[int, ...] = LAYERS, layout: Layout = Layout()
    ):
        super().__init__(cfg, layers, True, rngs=rngs, layout=layout, padding_at=PADDING_AT)
