"""Adapters without torch: every trainer's keys at FLUX.1's real size, strictness, sources, the algebra,
merging and unmerging, rows with mixes of their own."""

from __future__ import annotations

import functools
import json

import lora_files as files
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from fluxbatch.models import clip, flux, t5
from fluxbatch.types import UserError
from fluxbatch.weights import lora
from fluxbatch.weights.load import Plan
from fluxbatch.weights.source import Source


@functools.cache
def plans(size: files.Size = files.FULL) -> dict[str, Plan]:
    """Plans that know every parameter's shape, and where none of their bytes are."""
    w, h, n = size.clip
    d, inner, hidden, m = size.t5
    configs = {
        "transformer": (flux.Flux, flux.FluxConfig(
            in_channels=size.channels, out_channels=size.channels, num_layers=size.double, num_single_layers=size.single,
            num_attention_heads=size.width // size.head, attention_head_dim=size.head, joint_attention_dim=size.context,
            pooled_projection_dim=size.pooled, guidance_embeds=size.guidance, axes_dims_rope=(size.head - 8, 4, 4))),
        "text_encoder": (clip.ClipTextEncoder, clip.ClipConfig(99, w, h, n, 1, 77, "quick_gelu", 1e-5, 2)),
        "text_encoder_2": (t5.T5Encoder, t5.T5Config(99, d, inner, hidden, m, 1, 32, 128, 1e-6)),
    }  # fmt: skip
    made = {}
    for name, (module, config) in configs.items():
        graph, state = nnx.split(nnx.eval_shape(lambda module=module, config=config: module(config, rngs=nnx.Rngs(0))), nnx.Param, ...)[:2]
        made[name] = Plan(Source("/"), graph, state, {})
    return made


def read(path, strict=True, **spec):
    given = {"name": "x", "path": str(path), "weight_name": None, "scale": 1.0, "from_pt": True, "key": "lora.x.path"}
    return lora.read_adapter(lora.Spec(**given | spec), plans(), strict)


@pytest.mark.parametrize("name", files.FORMATS)
def test_every_key_of_every_format_at_full_size(tmp_path, name):
    tensors = files.FORMATS[name](files.FULL, files.Maker(0, ranks=(1, 2), dtype=np.float16))
    adapter = read(files.save(tmp_path / "all.safetensors", tensors))
    assert not adapter.skipped
    of = {part.part: (part.layers, part.of) for part in adapter.parts}
    assert of["double_blocks.img"] == of["double_blocks.txt"] == (19, 19)
    assert of["single_blocks"] == (38, 38)
    assert ("text_encoder blocks" in of) == any(key.startswith(("lora_te1", "text_encoder", "clip_l")) for key in tensors)
    assert sum(part.parameters for part in adapter.parts) == sum(v.size for k, v in tensors.items() if not k.endswith(("alpha", "norm.scale")))

    # one renamed key, wherever it stands
    at = list(files.FORMATS).index(name)
    key = list(tensors)[len(tensors) * at // len(files.FORMATS)]
    renamed = (key.replace("blocks", "blocs").replace("layer", "laier"), key.replace(".", ".x", 1), key + "x")[at % 3]
    assert renamed != key
    with pytest.raises(UserError) as error:
        read(files.save(tmp_path / "renamed.safetensors", {renamed if k == key else k: v for k, v in tensors.items()}))
    assert f"renamed.safetensors: key that leads nowhere in this model: {renamed}" in str(error.value)
