"""Chroma through the command line, without torch."""

from __future__ import annotations

import json
import os
import re

import jax
import jax.numpy as jnp
import lora_files as files
import numpy as np
import pytest
from conftest import GOLDEN, metadata, psnr
from flax import nnx
from PIL import Image
from safetensors.numpy import load_file
from test_flux2_run import ADAPTERS, WEIGHTS, check_adapters, check_mixed_rows, drawn
from test_published import cache, planned  # noqa: F401
from test_weights_layouts import bfl_flux

from fluxbatch.lora.formats import read_key
from fluxbatch.models.chroma import transformer
from fluxbatch.models.chroma.lora import LORA
from fluxbatch.models.flux1 import cost as flux1_cost
from fluxbatch.models.flux1.transformer import rope_table
from fluxbatch.weights.precision import Precision

WORDS = "max_sequence_length=48", "hardware=cpu"
MODEL = GOLDEN / "chroma"


@pytest.fixture
def draw(cli, tmp_path):
    return lambda folder, rows, run, *words: drawn(cli, tmp_path, folder, rows, run, *WORDS, *words)


def golden_rows():
    return [json.loads(line) for line in (GOLDEN / "chroma.jsonl").read_text().splitlines()]


def test_golden(draw, tmp_path):
    """Pictures that diffusers drew, of prompts with much padding, with one token of it and none, with guidance and
    without."""
    expected = np.load(GOLDEN / "chroma.npz")
    rows = golden_rows()
    other = rows[0] | {"id": "other", "prompt": "quite another prompt"}
    drawn = draw(MODEL, [*rows, other], "run", "per_device_batch_size=2")
    assert all(psnr(drawn[row["id"]], expected[row["id"]]) >= 50 for row in rows)
    assert psnr(drawn["other"], drawn["g0"]) < 30  # what holds above is not blind to prompts
    kept = {record["id"]: record.get("negative_prompt") for record in metadata(tmp_path / "run")}
    assert kept["g1"] == "" and not kept["g3"]  # of no guidance it is not read


def test_golden_is_of_the_mask(draw, monkeypatch):
    """Without it other pictures would come out."""
    monkeypatch.setattr(transformer.Chroma, "_around", lambda self, *_: self)
    row = golden_rows()[0]
    assert psnr(draw(MODEL, [row], "run")["g0"], np.load(GOLDEN / "chroma.npz")["g0"]) < 40


def test_a_plan_without_the_checkpoint(planned, cache):  # noqa: F811
    text = planned("model=chroma", "target=h100")
    assert "transformer 8.9 G, text_encoder 4.76 G, vae 49.5 M" in text
    assert "1024×1024, with a negative prompt, 35 steps" in text and "T5 reads 512 tokens" in text
    assert cache.asked == ["google/t5-v1_1-xxl"]  # for the tokenizer, which is small


def test_a_row_that_cannot_be(cli, tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "map.png")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "x", "control_image": "map.png"}))
    words = f"pretrained_model_name_or_path={MODEL}", f"manifest={tmp_path / 'rows.jsonl'}", "resolution=32", *WORDS
    code, said = cli(*words, f"output_dir={tmp_path}", entry="plan")
    assert code == 2 and "rows.jsonl:1: control_image: expected none" in said


def test_an_index_that_cannot_be(cli, beside, tmp_path):
    folder, index = beside("model"), json.loads((MODEL / "model_index.json").read_text())
    os.symlink(MODEL / "transformer", folder / "transformer")
    os.unlink(folder / "model_index.json")
    (folder / "model_index.json").write_text(json.dumps(index | {"_masked_padding": "false"}))
    words = f"pretrained_model_name_or_path={folder}", "prompt=x", "resolution=32", *WORDS
    code, said = cli(*words, f"output_dir={tmp_path}", entry="plan")
    assert code == 2 and 'model_index.json: _masked_padding is "false", expected true or false' in said


PUBLISHED = dict(in_channels=64, num_layers=19, num_single_layers=38, attention_head_dim=128, num_attention_heads=24,
                 joint_attention_dim=4096)  # fmt: skip


def test_config():
    """Entries of FLUX.1 in it, as published files have them, change nothing."""
    cfg = transformer.ChromaConfig.from_json(PUBLISHED)
    assert cfg.vectors == 344 and (cfg.approximator_hidden_dim, cfg.approximator_layers) == (5120, 5)
    assert transformer.ChromaConfig.from_json(PUBLISHED | dict(guidance_embeds=True, pooled_projection_dim=768)) == cfg
    with pytest.raises(ValueError, match="approximator_num_channels 60: expected a multiple of 8"):
        transformer.ChromaConfig.from_json(PUBLISHED | dict(approximator_num_channels=60))


def test_the_approximator_is_never_in_eight_bits():
    state = nnx.state(transformer.Chroma(TINY, rngs=None), nnx.Param)
    narrow = Precision.named("int8", "bfloat16")
    for path, leaf in nnx.to_flat_state(state):
        shape, axes = leaf.get_value().shape, leaf.get_metadata()["axes"]
        if narrow.quantizes(".".join(map(str, path)), shape, axes):
            assert path[0] in ("double_blocks", "single_blocks")


TINY = transformer.ChromaConfig.from_json(
    dict(in_channels=8, num_layers=2, num_single_layers=3, attention_head_dim=8, num_attention_heads=2,
         joint_attention_dim=12, axes_dims_rope=[4, 2, 2], approximator_num_channels=16, approximator_hidden_dim=16,
         approximator_layers=2)
)  # fmt: skip


def test_parts_are_the_whole():
    """Blocks that come one at a time leave what they leave together."""
    graph, state = nnx.split(transformer.Chroma(TINY, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    txt, img = (jnp.float32(rng.normal(size=(2, n, c))) for n, c in ((16, 12), (12, 8)))
    text = transformer.PromptEmbeds(txt, jnp.float32(np.arange(16) < [[9], [16]]))
    positions = rope_table(16, 3, 4, TINY.axes_dims_rope)
    given = text, jnp.float32([[1, 0.6, 0.2]] * 2), jnp.ones(2), jnp.float32

    @jax.jit
    def at_once(state, i):
        model = nnx.merge(graph, state)
        steps = model.step_inputs(*given)
        model.drop_step_layers()
        step = jax.tree.map(lambda x: jnp.take(x, i, 1), steps)
        return model.velocity(img, model.embed(text, positions, jnp.float32), step, positions)

    @jax.jit
    def in_parts(state, i):
        model = nnx.merge(graph, state)
        shared = jax.tree.map(lambda x: jnp.take(x, i, 1), model.step_vector(*given)[1])
        x = model.embed_tokens(img, text, positions, jnp.float32)
        for name, count in model.stream().blocks:
            blocks, own = nnx.split(getattr(model, name))
            for k in range(count):
                layer = nnx.merge(blocks, jax.tree.map(lambda leaf, k=k: leaf[k], own))
                x = model.block(layer, x, (), shared, positions)
        return model.finish(x, shared)

    found = [at_once(state, i) for i in range(2)]
    assert all(np.allclose(x, in_parts(state, i), atol=1e-5) for i, x in enumerate(found))
    assert np.abs(found[0] - found[1]).max() > 0.01


@pytest.mark.slow
def test_converted_streamed_resumed_and_replayed(cli, draw, tmp_path):
    rows = golden_rows()[1::2]
    texts = f"text_cache_dir={tmp_path / 'texts'}"
    draw(MODEL, rows[:1], "run", texts)
    expected = draw(MODEL, rows, "run", texts)  # the first is there
    again = draw(MODEL, rows, "again", texts)
    status = json.loads((tmp_path / "again/status.json").read_text())
    weights = [file for part in ("transformer", "vae") for file in (MODEL / part).glob("*.safetensors")]
    assert status["load"]["bytes"] <= sum(file.stat().st_size for file in weights)  # no text encoder
    code, err = cli(f"pretrained_model_name_or_path={MODEL}", f"to={tmp_path / 'copy'}", entry="convert")
    assert code == 0, err
    copied, streamed = draw(tmp_path / "copy", rows, "copied"), draw(MODEL, rows, "streamed", "stream_blocks=true")
    for row in rows:
        assert np.array_equal(copied[row["id"]], expected[row["id"]])
        assert np.array_equal(again[row["id"]], expected[row["id"]])
        assert np.abs(streamed[row["id"]].astype(int) - expected[row["id"]]).max() <= 1
    code, err = cli("id=g1", f"output_dir={tmp_path}", "run_name=run", entry="replay")
    assert code == 0, err
    code, err = cli(f"output_dir={tmp_path}", "run_name=run", entry="verify")
    assert code == 0, err
    assert len({record["model_digest"] for run in ("run", "copied") for record in metadata(tmp_path / run)}) == 1


# ---- the authors' names, and adapters


def original_names(own, join=np.concatenate):
    """Tensors by the names of the authors' and ComfyUI's files, of diffusers'."""
    approximator = {
        re.sub(r"norms\.(\d+)\.weight", r"norms.\1.scale", name)
        .replace("linear_1", "in_layer")
        .replace("linear_2", "out_layer"): value
        for name, value in own.items()
        if name.startswith("distilled_guidance_layer.")
    }
    return bfl_flux(own, join) | approximator


@pytest.fixture
def beside(tmp_path):
    """A folder with all but the transformer."""

    def make(name):
        (tmp_path / name).mkdir()
        for part in ("text_encoder", "tokenizer", "vae", "scheduler", "model_index.json"):
            os.symlink(MODEL / part, tmp_path / name / part)
        return tmp_path / name

    return make


def tensors():
    return load_file(MODEL / WEIGHTS)


@pytest.mark.slow
def test_single_file(draw, beside):
    """The authors' file, the rest in folders beside it."""
    folder, row = beside("model"), golden_rows()[3:]
    os.symlink(MODEL / "transformer/config.json", folder / "config.json")
    file = folder / "Chroma1-HD.safetensors"
    files.save(file, original_names(tensors()))
    expected = draw(MODEL, row, "folder")["g3"]
    assert np.array_equal(draw(file, row, "file")["g3"], expected)
    assert np.array_equal(draw(folder, row, "found")["g3"], expected)
    files.save(file, {f"model.diffusion_model.{name}": x for name, x in original_names(tensors()).items()})
    assert np.array_equal(draw(file, row, "prefixed")["g3"], expected)


def places(key):
    """Where the layer of an adapter's key lies, and which of its rows are the key's."""
    site = read_key(key, LORA)
    return None if site is None else {(target.at(), target.layer, target.rows) for target in site.targets}


@pytest.mark.parametrize(
    "key",
    [
        "transformer.{}.lora_A.weight",
        "base_model.model.{}.lora_A.default.weight",
        "diffusion_model.{}.lora_down.weight",
        "diffusion_model.{}.lokr_w1",
        "lora_unet_{}.lora_down.weight",
        "lora_transformer_{}.lora_down.weight",
        "lycoris_{}.lokr_w2_a",
    ],
)
def test_names_of_layers_in_adapters(key):
    """Each of both namings, with dots or underscores, leads to its layer."""
    for named in (tensors(), original_names(tensors())):
        layers = [name.removesuffix(".weight") for name, x in named.items() if name.endswith(".weight") and x.ndim == 2]
        found = [places(key.format(layer if "_{" not in key else layer.replace(".", "_"))) for layer in layers]
        assert all(found) and len(set().union(*found)) == sum(map(len, found))
        assert {path for each in found for path, *_ in each} == {
            path for layer in layers for path, *_ in places(f"transformer.{layer}.lora_A.weight")
        }


def test_adapters_of_the_text_encoder():
    """T5 is the first, or the second, or has a name of its own."""
    block = "encoder.block.1.layer.0.SelfAttention.q"
    for key in (f"text_encoder.{block}.lora_A.weight", f"text_encoders.t5xxl.transformer.{block}.lora_A.weight",
                f"lora_te3_{block.replace('.', '_')}.lora_down.weight"):  # fmt: skip
        site = read_key(key, LORA)
        assert site.component == "text_encoder" and site.targets[0].at() == "blocks.q.kernel"


def test_an_adapter_of_flux1(cli, tmp_path):
    """What Chroma has not is a line for each, or left out."""
    shapes = {"transformer_blocks.0.attn.to_q": (16, 16), "transformer_blocks.0.norm1.linear": (96, 16)}
    tensors = files.Maker(0).peft({f"transformer.{name}": shape for name, shape in shapes.items()})
    tensors |= files.Maker(1).lora({"lora_te1_text_model_encoder_layers_0_mlp_fc1": (32, 16)})
    files.save(tmp_path / "a.safetensors", tensors)
    words = f"pretrained_model_name_or_path={MODEL}", "prompt=x", "resolution=32", *WORDS, f"output_dir={tmp_path}"
    words = *words, *files.arrays({"a": tmp_path / "a.safetensors"})
    code, said = cli(*words, entry="plan")
    assert code == 2 and said.count("leads nowhere in this model") == len(tensors) - 2
    assert "transformer.transformer_blocks.0.norm1.linear" in said and "lora_te1_text_model" in said
    code, said = cli(*words, "lora_config.strict=false", entry="plan")
    assert code == 0, said


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(draw, beside, tmp_path, name):
    named = original_names(tensors()) if name == "kohya" else tensors()
    check_adapters(draw, MODEL, beside("changed"), tmp_path / "a.safetensors", named, golden_rows()[0], name)


# ---- mixed rows


def mixed():
    """23 rows: two sizes, steps of 1 to 4, with guidance and without, short prompts and such as leave no padding."""
    long = " with many words about all that is to be seen there"
    return [
        dict(
            id=f"r{i}",
            prompt=f"picture {i % 17}" + (long if i % 3 == 0 else ""),
            seed=i,
            height=(32, 32, 64)[i % 3],
            width=32,
            num_inference_steps=1 + i % 4,
            guidance_scale=(1.0, 0.0, 2.5 + i)[i % 3],
        )
        for i in range(23)
    ]


@pytest.mark.slow
def test_mixed_rows(draw):
    check_mixed_rows(draw, MODEL, ["all", "context 2"], rows=mixed())


def test_cost_is_the_compilers():
    """Of a step, to 3 %: what is linear in the tokens is not counted."""
    sizes = dict(attention_head_dim=32, num_attention_heads=4, joint_attention_dim=64, in_channels=16, num_layers=1)
    more = dict(num_single_layers=1, axes_dims_rope=[8, 12, 12], approximator_hidden_dim=256, approximator_layers=2)
    cfg = transformer.ChromaConfig.from_json(sizes | more)
    graph, state = nnx.split(transformer.Chroma(cfg, rngs=None))
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 128, 16), (1, 64, 64), (1, 64), (1, 2))]

    def step(state, img, states, mask, sigmas):
        model, text = nnx.merge(graph, state), transformer.PromptEmbeds(states, mask)
        mod = jax.tree.map(lambda x: x[:, 0], model.step_inputs(text, sigmas, jnp.ones(1), jnp.float32))
        positions = rope_table(64, 8, 16, cfg.axes_dims_rope)
        return model.velocity(img, model.embed(text, positions, jnp.float32), mod, positions)

    counted = jax.jit(step).lower(state, *shapes).compile().cost_analysis()["flops"]
    assert counted == pytest.approx(flux1_cost.flux_step(cfg, 128, 64) + cfg.approximator_flops, rel=0.03)
