"""Live comparison of FLUX.3 with diffusers' modular pipelines, on random weights and through the command line."""

from __future__ import annotations

import importlib.util
import json
import re

import jax
import numpy as np
import pytest
from conftest import GOLDEN, images, psnr
from test_flux2 import VAE, tensors
from test_flux3 import bfl_names

from fluxbatch.models.flux2 import autoencoder
from fluxbatch.models.flux2 import keys as flux2_keys
from fluxbatch.models.flux3 import keys, qwen3vl, references, transformer
from fluxbatch.types import UserError
from fluxbatch.weights import load
from fluxbatch.weights.published import published
from fluxbatch.weights.source import Source

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

spec = importlib.util.spec_from_file_location("generate_flux3", GOLDEN / "generate_flux3.py")


@pytest.fixture(scope="module")
def generate():
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_of(generate, wide):
    """Prompts of 1 token to three windows, step counts beside each other, negative prompts of other lengths, guidance
    below 1, references of odd sizes, one and several, with a size and without."""
    two, three = generate.prompt_of(81), generate.prompt_of(200)
    each = [
        dict(prompt="x", height=32, width=32),
        dict(prompt=generate.prompt_of(79), height=32, width=32),
        dict(prompt=three, height=32, width=48, negative_prompt=two),
        dict(prompt="a fox", image=["a.png"]),
        dict(prompt="a fox", image=["b.png", "a.png"], height=64, width=48),
    ] if wide else [
        dict(prompt=two, height=32, width=32, negative_prompt="hens", guidance_scale=0.5),
        dict(prompt="a fox", image=["c.png"], negative_prompt=two),
        dict(prompt="a fox", image=["d.png"]),
        dict(prompt="a fox", image=["a.png", "b.png"]),
    ]  # fmt: skip
    scales, steps = (4.0, 1.0, 2.5), (1, 2, 4, 9)
    return [
        dict(id=f"p{i}", seed=7 + i, guidance_scale=scales[i % 3], num_inference_steps=steps[i % 4]) | row
        for i, row in enumerate(each)
    ]


SIZES = {"a": (70, 100), "b": (101, 64), "c": (40, 23), "d": (9, 12)}  # the last two are less than a token, or a canvas
WIDE = dict(heads=2, axes=(4, 4, 4, 4), layers=2, joint=3, channels=2)
ODD = dict(heads=3, axes=(2, 4, 6, 4), layers=1, joint=2, channels=2, width=8, mlp_ratio=2.0, rope_theta=500)


@pytest.mark.parametrize(("flow_map", "sizes"), [(True, WIDE), (False, WIDE), (True, ODD), (False, ODD)])
def test_pipeline(generate, cli, tmp_path, flow_map, sizes):
    """≥ 50 dB in float32, for each row."""
    pipe = generate.pipeline(flow_map, **sizes, seed=10)
    generate.save(pipe, tmp_path / "model")
    pictures = {name: generate.picture(*size, i) for i, (name, size) in enumerate(SIZES.items())}
    for name, picture in pictures.items():
        picture.save(tmp_path / f"{name}.png")
    rows = rows_of(generate, sizes is WIDE)
    rows = [{k: v for k, v in row.items() if k != "negative_prompt" or not flow_map} for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, err = cli(
        f"pretrained_model_name_or_path={tmp_path / 'model'}",
        f"manifest={tmp_path / 'rows.jsonl'}",
        f"output_dir={tmp_path}",
        "run_name=run",
        "max_sequence_length=8192",
        "hardware=cpu",
    )
    assert code == 0, err
    drawn = images(tmp_path / "run")

    def theirs(row):
        return generate.render(pipe, row, [pictures[name[0]] for name in row.get("image", ())])

    expected = {row["id"]: theirs(row) for row in rows}
    assert all(drawn[name].shape == picture.shape for name, picture in expected.items())
    figures = [psnr(drawn[name], picture) for name, picture in expected.items()]
    print(f"flow map {flow_map}: {min(figures):.1f} dB at least")
    assert min(figures) >= 50
    # The test is blind unless the prompt moves the picture.
    others = [psnr(theirs(row | {"prompt": "quite another prompt"}), expected[row["id"]]) for row in rows]
    assert min(others) < 30


def test_a_prompt_that_is_cut(generate, cli, tmp_path):
    """The window ends at ``max_sequence_length``, which need not be a multiple."""
    pipe = generate.pipeline(True, **ODD, seed=10)
    generate.save(pipe, tmp_path / "model")
    row = dict(prompt=generate.prompt_of(200), seed=1, height=32, width=32, num_inference_steps=2)
    words = [f"{key}={value}" for key, value in row.items()]
    code, err = cli(
        f"pretrained_model_name_or_path={tmp_path / 'model'}", f"output_dir={tmp_path}", "run_name=run", *words,
        "max_sequence_length=130", "hardware=cpu",
    )  # fmt: skip
    assert code == 0 and "1 rows are cut" in err, err
    (drawn,) = images(tmp_path / "run").values()
    assert psnr(drawn, generate.render(pipe, row | {"max_sequence_length": 130})) >= 50


@pytest.mark.parametrize("size", [(70, 100), (20, 20), (16, 300), (9, 12), (2600, 2000), (2049, 2047), (5000, 40)])
def test_reference_pixels(generate, size):
    from diffusers.modular_pipelines.flux3.image_processor import Flux3ImageProcessor

    image = generate.picture(*size, 1)
    expected, more = Flux3ImageProcessor().preprocess(image, resize_mode="fill")
    assert np.array_equal(references.prepare(image, 1, 16), expected[0].permute(1, 2, 0).numpy())
    assert references.box(size, 16) == more["reference_crop"]
    if min(references.reference_size(size, 2, 16)) >= 16:
        expected, _ = Flux3ImageProcessor().preprocess(image, resize_mode="crop")
        assert np.array_equal(references.prepare(image, 2, 16), expected[0].permute(1, 2, 0).numpy())
    else:
        assert references.fault(size, 2, 16)


FULL = {True: "flux-3-image-klein", False: "flux-3-image-klein-base"}


def meta(part, config):
    """diffusers' or transformers' own, of the published size."""
    from diffusers import AutoencoderKLFlux2, Flux3Transformer2DModel
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    with torch.device("meta"):
        if part == "transformer":
            return Flux3Transformer2DModel(**config)
        if part == "vae":
            return AutoencoderKLFlux2(**VAE)
        return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=config["text_config"]))


@pytest.mark.parametrize("part", ["transformer", "BFL", "text_encoder", "decoder", "encoder"])
@pytest.mark.parametrize("flow_map", [True, False])
def test_full_size_names_and_shapes(part, flow_map):
    """Tables cover exactly what diffusers and transformers instantiate at FLUX.3's real sizes."""
    if not flow_map and part not in ("transformer", "BFL"):
        pytest.skip("the same in both")
    known = published()[f"black-forest-labs/{FULL[flow_map]}"]["components"]
    name = {"BFL": "transformer", "decoder": "vae", "encoder": "vae"}.get(part, part)
    model = meta(name, known[name])
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = tensors(bfl_names(shapes) | {"repa_projectors.0.weight": (1, 1)} if part == "BFL" else shapes)
    module, config, table = {
        "transformer": (transformer.Flux3, transformer.Flux3Config, keys.TRANSFORMER_DIFFUSERS),
        "BFL": (transformer.Flux3, transformer.Flux3Config, keys.TRANSFORMER_BFL),
        "text_encoder": (qwen3vl.Qwen3VLEncoder, qwen3vl.Qwen3VLConfig, keys.QWEN3_VL),
        "decoder": (autoencoder.Decoder, autoencoder.Flux2VaeConfig, flux2_keys.VAE_DECODER_DIFFUSERS),
        "encoder": (autoencoder.Encoder, autoencoder.Flux2VaeConfig, flux2_keys.VAE_ENCODER_DIFFUSERS),
    }[part]
    cfg = config.from_json(known[name] if name != "vae" else VAE)
    plan = load.plan(lambda rngs: module(cfg, rngs=rngs), found, table, Source("/"))
    if name == "transformer":
        count = sum(p.numel() for p in model.parameters())
        assert count == {True: 5_548_681_984, False: 5_538_458_368}[flow_map]
        assert count == sum(x.size for x in jax.tree.leaves(plan.state))
    odd = next(name for name in found if "norm" in name or "bn." in name)
    wrong = {("new_" + name if name == odd else name): tensor for name, tensor in found.items()}
    with pytest.raises(UserError, match=re.escape(odd)):
        load.plan(lambda rngs: module(cfg, rngs=rngs), wrong, table, Source("/"))


def test_names_of_bfl_are_those_that_diffusers_converts(generate):
    from diffusers.loaders.single_file_utils import convert_flux3_transformer_checkpoint_to_diffusers

    own = generate.pipeline(True, **ODD).transformer.state_dict()
    named = bfl_names(own)
    back = convert_flux3_transformer_checkpoint_to_diffusers({name: value.clone() for name, value in named.items()})
    assert back.keys() == own.keys()
    assert all(torch.equal(value, own[name]) for name, value in back.items() if name != "norm_out.linear.weight")
    swapped = torch.cat(own["norm_out.linear.weight"].chunk(2)[::-1])
    assert torch.equal(back["norm_out.linear.weight"], swapped)
