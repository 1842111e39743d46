"""Live comparison of Chroma with diffusers' pipelines, on random weights and through the command line."""

from __future__ import annotations

import importlib.util
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, images, psnr
from flax import nnx
from flux2_pipeline import opened
from test_chroma import original_names
from test_flux2 import sizes, tensors
from test_pictures_parity import louder, mask, picture

from fluxbatch.models import autoencoder, autoencoder_keys
from fluxbatch.models.chroma import keys, transformer
from fluxbatch.models.flux1 import t5
from fluxbatch.models.flux1.keys import T5
from fluxbatch.models.flux1.single_files import transformer_constants
from fluxbatch.models.flux1.transformer import rope_table
from fluxbatch.types import UserError
from fluxbatch.weights import load
from fluxbatch.weights.published import published
from fluxbatch.weights.source import Source

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

spec = importlib.util.spec_from_file_location("generate_chroma", GOLDEN / "generate_chroma.py")


@pytest.fixture(scope="module")
def generate():
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(cli, tmp_path):
    def run(folder, rows):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        code, err = cli(
            f"pretrained_model_name_or_path={folder}", f"manifest={tmp_path / 'rows.jsonl'}",
            f"output_dir={tmp_path}", "run_name=run", "max_sequence_length=48", "hardware=cpu",
        )  # fmt: skip
        assert code == 0, err
        return images(tmp_path / "run")

    return run


def rows_of(generate, wide):
    """Prompts of one word, to such as leave one token of padding, none, and are cut; guidance of several strengths and
    negative prompts of other lengths; sizes that are no squares."""
    each = [
        dict(prompt="x", height=64, width=64),
        dict(prompt=generate.prompt_of(47), height=32, width=48, guidance_scale=5.0),
        dict(prompt=generate.prompt_of(30), height=48, width=80, guidance_scale=1.5, negative_prompt="hens"),
        dict(prompt=generate.prompt_of(100), height=32, width=32, negative_prompt="is not read"),
    ] if wide else [
        dict(prompt=generate.prompt_of(48), height=24, width=8, guidance_scale=3.0,
             negative_prompt=generate.prompt_of(47)),
        dict(prompt=generate.prompt_of(12), height=40, width=72),
    ]  # fmt: skip
    steps = (1, 2, 4, 9)
    return [
        dict(id=f"p{i}", seed=7 + i, guidance_scale=1.0, num_inference_steps=steps[-1 - i]) | row
        for i, row in enumerate(each)
    ]


WIDE = dict(seed=13, heads=2, head_dim=16, axes=(4, 6, 6), layers=2, single=2, channels=4)
ODD = dict(seed=11, heads=3, head_dim=8, axes=(2, 2, 4), layers=1, single=3, channels=2, width=16, sizes=(8, 16), dynamic=True,
           shift=3.0, approximator=(32, 20, 3))  # fmt: skip


@pytest.mark.parametrize("sizes", [WIDE, ODD])
def test_pipeline(generate, run, tmp_path, sizes):
    """≥ 50 dB in float32, for each row."""
    pipe = generate.pipeline(**sizes)
    pipe.save_pretrained(tmp_path / "model")
    rows = rows_of(generate, sizes is WIDE)
    drawn, expected = run(tmp_path / "model", rows), {row["id"]: generate.render(pipe, row) for row in rows}
    figures = [psnr(drawn[name], picture) for name, picture in expected.items()]
    print(f"{min(figures):.1f} dB at least")
    assert min(figures) >= 50
    # The test is blind unless the prompt moves the picture.
    others = [generate.render(pipe, row | {"prompt": "quite another prompt"}) for row in rows]
    assert all(psnr(other, expected[row["id"]]) < 30 for other, row in zip(others, rows, strict=True))


def test_masked_padding(generate, run, tmp_path, monkeypatch):
    """With padding left out, images are as with text that is cut behind its first token of padding."""
    pipe = generate.pipeline(**WIDE)
    pipe.save_pretrained(tmp_path / "model")
    index = json.loads((tmp_path / "model/model_index.json").read_text())
    (tmp_path / "model/model_index.json").write_text(json.dumps(index | {"_masked_padding": True}))
    rows = rows_of(generate, True)[:3]
    drawn, padded = run(tmp_path / "model", rows), [generate.render(pipe, row) for row in rows]
    encode = pipe._get_t5_prompt_embeds

    def cut(*args, **given):
        states, mask = encode(*args, **given)
        return states[:, : int(mask.sum())], mask[:, : int(mask.sum())]

    monkeypatch.setattr(pipe, "_get_t5_prompt_embeds", cut)
    for row, other in zip(rows, padded, strict=True):
        expected = generate.render(pipe, row)
        assert psnr(drawn[row["id"]], expected) >= 50 and psnr(other, expected) < 40, row["id"]


def test_pictures(generate, run, tmp_path):
    """Rows that start from a picture, and that draw a part of it anew, with guidance and without."""
    pipe = generate.pipeline(**WIDE)
    louder(pipe)
    pipe.save_pretrained(tmp_path / "model")
    pipe.transformer.register_to_config(guidance_embeds=False)  # which diffusers' inpainting asks for
    picture(1, 48, 32).save(tmp_path / "a.png")
    mask(2, 48, 32).save(tmp_path / "m.png")
    start = dict(prompt="a fox", seed=3, height=48, width=32, num_inference_steps=5, image="a.png", strength=0.6)
    rows = [
        start | dict(id="start", guidance_scale=4.0, negative_prompt="hens"),
        start | dict(id="plain", guidance_scale=1.0),
        start | dict(id="part", guidance_scale=3.0, mask_image="m.png", strength=0.8),
    ]
    drawn = run(tmp_path / "model", rows)
    kinds = diffusers.ChromaImg2ImgPipeline, diffusers.ChromaInpaintPipeline
    for row in rows:
        masks = {"mask_image": mask(2, 48, 32)} if "mask_image" in row else {}
        theirs = kinds[len(masks)](**{key: value for key, value in pipe.components.items() if value is not None})
        theirs.set_progress_bar_config(disable=True)
        given = {"image": picture(1, 48, 32), "strength": row["strength"]} | masks
        expected = generate.render(theirs, row, **given)
        assert psnr(drawn[row["id"]], expected) >= 50, row["id"]
        other = generate.render(theirs, row, **given | {"image": picture(9, 48, 32)})
        assert psnr(other, expected) < 30, row["id"]


def test_parts(generate, tmp_path):
    """States of the text encoder with a mask, and the velocity of the transformer, each by itself."""
    pipe = generate.pipeline(**ODD)
    pipe.save_pretrained(tmp_path)
    with torch.no_grad():
        states, _, attended, *_ = pipe.encode_prompt("a red fox", max_sequence_length=48)
        latents = torch.randn(1, 15, 8, generator=torch.Generator().manual_seed(0))
        whole = torch.cat([attended, torch.ones(1, 15)], 1)
        y, x = np.divmod(np.arange(15), 5)
        ids = torch.tensor(np.stack([0 * y, y, x], 1), dtype=torch.float32)
        (velocity,) = pipe.transformer(
            latents, states, torch.tensor([0.7]), ids, torch.zeros(48, 3), whole, return_dict=False
        )
    words = pipe.tokenizer(["a red fox"], padding="max_length", max_length=48, return_tensors="np")
    encoder = opened(tmp_path / "text_encoder", t5.T5Encoder, t5.T5Config, T5, "model")
    found = np.asarray(encoder(words["input_ids"], jnp.float32, words["attention_mask"]))
    assert np.abs(found - states.numpy()).max() < 1e-4 * np.abs(states.numpy()).max()

    model = opened(
        tmp_path / "transformer", transformer.Chroma, transformer.ChromaConfig, keys.TRANSFORMER_DIFFUSERS,
        "diffusion_pytorch_model",
    )  # fmt: skip
    text = transformer.PromptEmbeds(jnp.asarray(found), jnp.asarray(attended.numpy()))
    mod = jax.tree.map(lambda x: x[:, 0], model.step_inputs(text, jnp.float32([[0.7, 0.0]]), jnp.ones(1), jnp.float32))
    positions = rope_table(48, 3, 5, model.cfg.axes_dims_rope)
    ours = model.velocity(jnp.asarray(latents.numpy()), model.embed(text, positions, jnp.float32), mod, positions)
    assert np.abs(np.asarray(ours) - velocity.numpy()).max() < 1e-3 * np.abs(velocity.numpy()).max()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_norms_of_the_approximator(dtype):
    """torch's of no eps; values so small that eps tells."""
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)).mul_(3e-4).to(getattr(torch, dtype))
    theirs = torch.nn.RMSNorm(16, dtype=x.dtype)(x).detach().float().numpy()
    norm = transformer.Layer(16, rngs=nnx.Rngs(0)).norm
    ours = np.asarray(norm(jnp.asarray(x.float().numpy(), dtype)), np.float32)
    assert np.abs(ours - theirs).max() < 0.01 * np.abs(theirs).max()
    assert np.abs(theirs[0]).mean() < 0.7  # without an eps it would be about 0.8


def test_numbers_are_rounded_as_diffusers_rounds_them():
    """Of all vectors of the published size."""
    cfg = transformer.ChromaConfig.from_json(published()["lodestones/chroma1-hd"]["components"]["transformer"])
    from diffusers.models.transformers.transformer_chroma import ChromaCombinedTimestepTextProjEmbeddings

    theirs = ChromaCombinedTimestepTextProjEmbeddings(16, cfg.vectors).mod_proj.numpy()
    assert np.abs(transformer.numbers(cfg) - theirs).max() < 1e-6


def meta(part, config):
    """diffusers' or transformers' own, of the published size."""
    from transformers import T5Config, T5EncoderModel

    with torch.device("meta"):
        if part == "transformer":
            return diffusers.ChromaTransformer2DModel(**config)
        if part == "text_encoder":
            return T5EncoderModel(T5Config(**config))
        blocks = {f"{way}_block_types": [f"{way.title()}{kind}Block2D"] * 4
                  for way, kind in (("down", "Encoder"), ("up", "Decoder"))}  # fmt: skip
        return diffusers.AutoencoderKL(**config, **blocks)


@pytest.mark.parametrize("part", ["transformer", "original", "text_encoder", "decoder", "encoder"])
def test_full_size_names_and_shapes(part):
    """Tables cover exactly what diffusers and transformers instantiate at Chroma1-HD's real sizes."""
    known = published()["lodestones/chroma1-hd"]["components"]
    name = {"original": "transformer", "decoder": "vae", "encoder": "vae"}.get(part, part)
    model = meta(name, known[name])
    own = model.state_dict()
    if part == "original":
        own = original_names(own, torch.cat)
    found = tensors({name: tuple(value.shape) for name, value in own.items()})
    module, config, table = {
        "transformer": (transformer.Chroma, transformer.ChromaConfig, keys.TRANSFORMER_DIFFUSERS),
        "original": (transformer.Chroma, transformer.ChromaConfig, keys.TRANSFORMER_ORIGINAL),
        "text_encoder": (t5.T5Encoder, t5.T5Config, T5),
        "decoder": (autoencoder.Decoder, autoencoder.VaeConfig, autoencoder_keys.VAE_DECODER),
        "encoder": (autoencoder.Encoder, autoencoder.VaeConfig, autoencoder_keys.VAE_ENCODER),
    }[part]
    cfg = config.from_json(known[name])
    plan = load.plan(lambda rngs: module(cfg, rngs=rngs), found, table, Source("/"))
    if name == "transformer":
        count = sum(p.numel() for p in model.parameters())
        assert count == 8_899_983_424 == sum(x.size for x in jax.tree.leaves(plan.state))
    if part == "original":
        given = sizes(found, table, keys.transformer_sizes)
        assert config.from_json(given | transformer_constants(given)) == cfg
    odd = next(name for name in found if "norm" in name)
    wrongs = [{("new_" + name if name == odd else name): tensor for name, tensor in found.items()}]
    if part == "original":  # what FLUX.1 has and Chroma has not
        wrongs.append(found | tensors({"time_in.in_layer.weight": (3072, 256)}))
    for wrong, said in zip(wrongs, (odd, "time_in.in_layer.weight"), strict=False):
        with pytest.raises(UserError, match=re.escape(said)):
            load.plan(lambda rngs: module(cfg, rngs=rngs), wrong, table, Source("/"))


def test_original_names_are_those_that_diffusers_converts(generate):
    from diffusers.loaders.single_file_utils import convert_chroma_transformer_checkpoint_to_diffusers

    own = generate.pipeline(**ODD).transformer.state_dict()
    for name, value in own.items():  # it cuts what single blocks have in one at the published widths
        if cut := re.match(r"single_.+(?:(attn\.to_[qkv])|proj_mlp)\.", name):
            own[name] = torch.randn(3072 if cut[1] else 4 * 3072, *value.shape[1:])
    named = original_names(own, torch.cat)
    assert named.keys() != own.keys()
    back = convert_chroma_transformer_checkpoint_to_diffusers(dict(named))
    assert back.keys() == own.keys() and all(torch.equal(value, own[name]) for name, value in back.items())
