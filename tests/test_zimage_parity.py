"""Live comparison of Z-Image with diffusers' pipeline, on random weights and through the command line."""

from __future__ import annotations

import importlib.util
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, images, psnr
from flux2_pipeline import opened
from test_flux2 import sizes, tensors
from test_zimage import original_names

from fluxbatch.models import autoencoder, autoencoder_keys
from fluxbatch.models.zimage import keys, qwen3, transformer
from fluxbatch.types import UserError
from fluxbatch.weights import load
from fluxbatch.weights.published import published
from fluxbatch.weights.source import Source

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

spec = importlib.util.spec_from_file_location("generate_zimage", GOLDEN / "generate_zimage.py")


@pytest.fixture(scope="module")
def generate():
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_of(generate, wide):
    """Prompts of one token, to sixteen windows, and one that is cut; guidance of several strengths and negative prompts of
    other lengths; images with padding and without."""
    each = [
        dict(prompt="x", height=64, width=64),
        dict(prompt=generate.prompt_of(96), height=32, width=48, guidance_scale=5.0),
        dict(prompt=generate.prompt_of(65), height=48, width=80, guidance_scale=0.5, negative_prompt="hens"),
        dict(prompt=generate.prompt_of(600), height=32, width=32, negative_prompt="is not read"),
    ] if wide else [
        dict(prompt=generate.prompt_of(64), height=24, width=8, guidance_scale=1.0, negative_prompt=generate.prompt_of(90)),
        dict(prompt=generate.prompt_of(97), height=40, width=72),
    ]  # fmt: skip
    steps = (1, 2, 4, 9)
    return [
        dict(id=f"p{i}", seed=7 + i, guidance_scale=0.0, num_inference_steps=steps[-1 - i]) | row
        for i, row in enumerate(each)
    ]


WIDE = dict(heads=2, axes=(4, 4, 4), layers=2, refiners=1, channels=2)
ODD = dict(heads=3, axes=(2, 6, 4), layers=1, refiners=2, channels=4, width=8, text_layers=2, norm_eps=1e-3,
           rope_theta=100.0, dynamic=True)  # fmt: skip


@pytest.mark.parametrize("sizes", [WIDE, ODD])
def test_pipeline(generate, cli, tmp_path, sizes):
    """≥ 50 dB in float32, for each row."""
    pipe = generate.pipeline(**sizes, seed=10)
    pipe.save_pretrained(tmp_path / "model")
    rows = rows_of(generate, sizes is WIDE)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, err = cli(
        f"pretrained_model_name_or_path={tmp_path / 'model'}", f"manifest={tmp_path / 'rows.jsonl'}",
        f"output_dir={tmp_path}", "run_name=run", "max_sequence_length=512", "hardware=cpu",
    )  # fmt: skip
    assert code == 0, err
    drawn, expected = images(tmp_path / "run"), {row["id"]: generate.render(pipe, row) for row in rows}
    figures = [psnr(drawn[name], picture) for name, picture in expected.items()]
    print(f"{min(figures):.1f} dB at least")
    assert min(figures) >= 50
    # The test is blind unless the prompt moves the picture.
    others = [generate.render(pipe, row | {"prompt": "quite another prompt"}) for row in rows]
    assert all(psnr(other, expected[row["id"]]) < 30 for other, row in zip(others, rows, strict=True))


def test_parts(generate, tmp_path):
    """Hidden states of the text encoder, and the velocity of the transformer, each by itself."""
    pipe = generate.pipeline(**ODD, seed=3)
    pipe.save_pretrained(tmp_path)
    prompt = generate.prompt_of(60)
    words = pipe.tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        (states,) = pipe.encode_prompt(prompt, do_classifier_free_guidance=False)[0]
        latents = torch.randn(1, 4, 1, 6, 10, generator=torch.Generator().manual_seed(0))
        (velocity,) = pipe.transformer(list(latents), torch.tensor([0.3]), [states], return_dict=False)[0]
    assert len(words["input_ids"][0]) + generate.AROUND == len(states) == 60
    encoder = opened(tmp_path / "text_encoder", qwen3.Qwen3Encoder, qwen3.Qwen3Config, keys.qwen3_of, "model")
    tokenize = qwen3_tokens(tmp_path / "tokenizer")
    ids, mask = tokenize([prompt], 64)
    found = np.asarray(encoder(jnp.asarray(ids), jnp.asarray(mask)))
    assert np.abs(found[0, :60] - states.numpy()).max() < 1e-4 * np.abs(states.numpy()).max()

    model = opened(
        tmp_path / "transformer", transformer.ZImage, transformer.ZImageConfig, keys.TRANSFORMER_DIFFUSERS,
        "diffusion_pytorch_model",
    )  # fmt: skip
    positions = transformer.rope_tables(model.cfg, 64, 3, 5)
    tokens = latents[0, :, 0].reshape(4, 3, 2, 5, 2).permute(1, 3, 2, 4, 0).reshape(1, 15, 16).numpy()
    given = transformer.PromptEmbeds(jnp.asarray(found), jnp.float32(mask))
    vec = model.step_inputs(given, jnp.float32([[0.7, 0.0]]), jnp.ones(1), jnp.float32)[:, 0]
    ours = model.velocity(jnp.asarray(tokens), model.embed(given, positions, jnp.float32), vec, positions)
    theirs = -velocity[:, 0].reshape(4, 3, 2, 5, 2).permute(1, 3, 2, 4, 0).reshape(1, 15, 16).numpy()
    assert np.abs(np.asarray(ours) - theirs).max() < 1e-3 * np.abs(theirs).max()


def qwen3_tokens(folder):
    from fluxbatch.models.flux2.text import ChatTokenizer

    return ChatTokenizer(str(folder), qwen3.CHAT)


def meta(part, config):
    """diffusers' or transformers' own, of the published size."""
    from diffusers import AutoencoderKL, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with torch.device("meta"):
        if part == "transformer":
            return ZImageTransformer2DModel(**config)
        if part == "vae":
            blocks = {f"{way}_block_types": [f"{way.title()}{kind}Block2D"] * 4
                      for way, kind in (("down", "Encoder"), ("up", "Decoder"))}  # fmt: skip
            return AutoencoderKL(**config, **blocks)
        return Qwen3ForCausalLM(Qwen3Config(**config, tie_word_embeddings=True))


@pytest.mark.parametrize("part", ["transformer", "original", "text_encoder", "decoder", "encoder"])
def test_full_size_names_and_shapes(part):
    """Tables cover exactly what diffusers and transformers instantiate at Z-Image-Turbo's real sizes."""
    known = published()["tongyi-mai/z-image-turbo"]["components"]
    name = {"original": "transformer", "decoder": "vae", "encoder": "vae"}.get(part, part)
    model = meta(name, known[name])
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if part == "original":
        shapes = original_names(shapes, lambda thirds: (3 * thirds[0][0], thirds[0][1])) | {
            "norm_final.weight": (3840,)
        }
    found = tensors(shapes)
    module, config, table = {
        "transformer": (transformer.ZImage, transformer.ZImageConfig, keys.TRANSFORMER_DIFFUSERS),
        "original": (transformer.ZImage, transformer.ZImageConfig, keys.TRANSFORMER_ORIGINAL),
        "text_encoder": (qwen3.Qwen3Encoder, qwen3.Qwen3Config, keys.qwen3_of(found)),
        "decoder": (autoencoder.Decoder, autoencoder.VaeConfig, autoencoder_keys.VAE_DECODER),
        "encoder": (autoencoder.Encoder, autoencoder.VaeConfig, autoencoder_keys.VAE_ENCODER),
    }[part]
    cfg = config.from_json(known[name])
    plan = load.plan(lambda rngs: module(cfg, rngs=rngs), found, table, Source("/"))
    if name == "transformer":
        count = sum(p.numel() for p in model.parameters())
        assert count == 6_154_908_736 == sum(x.size for x in jax.tree.leaves(plan.state))
    if part == "original":
        given = sizes(found, table, keys.transformer_sizes)
        assert config.from_json(given | keys.transformer_constants(given)) == cfg
    odd = next(name for name in found if "norm" in name)
    wrong = {("new_" + name if name == odd else name): tensor for name, tensor in found.items()}
    with pytest.raises(UserError, match=re.escape(odd)):
        load.plan(lambda rngs: module(cfg, rngs=rngs), wrong, table, Source("/"))


def test_original_names_are_those_that_diffusers_converts(generate):
    from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers

    own = generate.pipeline(**ODD).transformer.state_dict()
    named = original_names(own, torch.cat)
    assert named.keys() != own.keys()
    back = convert_z_image_transformer_checkpoint_to_diffusers({name: value.clone() for name, value in named.items()})
    assert back.keys() == own.keys() and all(torch.equal(value, own[name]) for name, value in back.items())
