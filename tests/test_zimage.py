"""Z-Image through the command line, without torch."""

from __future__ import annotations

import json
import os
import re
import shutil

import jax
import jax.numpy as jnp
import lora_files as files
import numpy as np
import pytest
from conftest import GOLDEN, metadata, psnr
from flax import nnx
from safetensors.numpy import load_file
from test_flux2_run import ADAPTERS, WEIGHTS, check_adapters, check_bytes, check_mixed_rows, drawn
from test_published import cache, planned  # noqa: F401

from fluxbatch.generation.steps import STEPS
from fluxbatch.lora.formats import read_key
from fluxbatch.models.family import Footprint
from fluxbatch.models.zimage import cost, keys, latents, qwen3, transformer
from fluxbatch.models.zimage.lora import LORA
from fluxbatch.types import Mode
from fluxbatch.weights.published import published

WORDS = "max_sequence_length=512", "hardware=cpu"
MODEL = GOLDEN / "zimage"


@pytest.fixture
def draw(cli, tmp_path):
    return lambda folder, rows, run, *words: drawn(cli, tmp_path, folder, rows, run, *WORDS, *words)


def golden_rows():
    return [json.loads(line) for line in (GOLDEN / "zimage.jsonl").read_text().splitlines()]


def test_golden(draw, tmp_path):
    """Pictures that diffusers drew, of prompts of two and of three windows, with guidance and without, padded or not."""
    expected = np.load(GOLDEN / "zimage.npz")
    rows = [row for row in golden_rows() if row["id"] != "g2"]
    other = rows[0] | {"id": "other", "prompt": "quite another prompt"}
    drawn = draw(MODEL, [*rows, other], "run", "per_device_batch_size=2")
    assert all(psnr(drawn[row["id"]], expected[row["id"]]) >= 50 for row in rows)
    assert psnr(drawn["other"], drawn["g0"]) < 30  # what holds above is not blind to prompts
    kept = {record["id"]: record.get("negative_prompt") for record in metadata(tmp_path / "run")}
    assert kept["g1"] == "" and not kept["g3"]  # of no guidance it is not read


@pytest.mark.slow
def test_golden_of_other_windows(draw):
    """A prompt of five windows and a negative one of three."""
    row = golden_rows()[2]
    plain = row | {"id": "plain", "guidance_scale": 0}
    got = draw(MODEL, [row, plain], "run")
    assert psnr(got["g2"], np.load(GOLDEN / "zimage.npz")["g2"]) >= 50 and psnr(got["g2"], got["plain"]) < 30


def test_plan_says_the_windows(cli, tmp_path):
    shutil.copy(GOLDEN / "zimage.jsonl", tmp_path / "rows.jsonl")
    words = f"pretrained_model_name_or_path={MODEL}", f"manifest={tmp_path / 'rows.jsonl'}", *WORDS
    code, said = cli(*words, f"output_dir={tmp_path}", entry="plan")
    assert code == 0, said
    for text in (
        "64×64, 64 text tokens, 3 steps",
        "32×48, with a negative prompt, 96 and 64 text tokens, 4 steps",
        "32×32, with a negative prompt, 160 and 96 text tokens, 9 steps",
        "64×48, 64 text tokens, 2 steps",
    ):
        assert text in said


def test_a_plan_without_the_checkpoint(planned, cache):  # noqa: F811
    text = planned("model=z-image-turbo", "target=h100", "prompt=" + "hens " * 60)
    assert "transformer 6.15 G, text_encoder 3.92 G, vae 49.5 M" in text
    assert "128 text tokens, 8 steps" in text and "how long prompts are is guessed" in text
    assert cache.asked == ["Qwen/Qwen3-4B"]  # for the tokenizer, which is small


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (dict(image="flux3.png"), "rows.jsonl:1: image: expected none: this model reads no pictures"),
        (dict(height=4104), "rows.jsonl:1: height: got 4104, expected at most 4096"),
        (dict(width=36), "multiple of 8"),
    ],
)
def test_a_row_that_cannot_be(cli, tmp_path, field, message):
    shutil.copy(GOLDEN / "flux3.png", tmp_path)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "x"} | field))
    words = f"pretrained_model_name_or_path={MODEL}", f"manifest={tmp_path / 'rows.jsonl'}", "resolution=32", *WORDS
    code, said = cli(*words, f"output_dir={tmp_path}", entry="plan")
    assert code == 2 and message in said


@pytest.mark.parametrize("length", [100, 1024])
def test_a_length_that_cannot_be(cli, tmp_path, length):
    words = f"pretrained_model_name_or_path={MODEL}", "prompt=x", "resolution=32", f"max_sequence_length={length}"
    code, said = cli(*words, f"output_dir={tmp_path}", entry="plan")
    assert code == 2 and f"sampler.max_sequence_length={length}: expected a multiple of 32 up to 992" in said


PUBLISHED = dict(dim=3840, n_heads=30, axes_dims=[32, 48, 48])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(axes_dims=[32, 48, 32]), "axes_dims [32, 48, 32]: expected three even sizes that add up to dim over"),
        (dict(all_patch_size=[4]), "all_patch_size [4]: expected [2]"),
        (dict(siglip_feat_dim=1152), "siglip_feat_dim 1152: expected None"),
        (dict(qk_norm=False), "qk_norm False: expected True"),
        (dict(t_scale=1.0), "t_scale 1.0: expected 1000.0"),
    ],
)
def test_config_that_is_refused(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        transformer.ZImageConfig.from_json(PUBLISHED | change)


def test_encoder_that_is_refused():
    with pytest.raises(ValueError, match="use_sliding_window true: expected false"):
        qwen3.Qwen3Config.from_json({"use_sliding_window": True})


def test_channels_are_last_in_a_token():
    noise = np.random.default_rng(0).normal(size=(3, 4, 6)).astype(np.float32)
    tokens = latents.pack(noise)
    assert np.array_equal(tokens[4].reshape(2, 2, 3), noise[:, 2:4, 2:4].transpose(1, 2, 0))
    assert np.array_equal(latents.unpack(tokens[None], 4, 6)[0], noise.transpose(1, 2, 0))


TINY = transformer.ZImageConfig.from_json(
    dict(in_channels=2, dim=16, n_layers=2, n_refiner_layers=1, n_heads=2, cap_feat_dim=12, axes_dims=[4, 2, 2])
)


@pytest.mark.parametrize("size", [pytest.param((4, 8), marks=pytest.mark.slow), (3, 5)])
def test_parts_are_the_whole(size):
    """Blocks that come one at a time leave what they leave together, of an image with padding and without."""
    graph, state = nnx.split(transformer.ZImage(TINY, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    txt, img = (jnp.float32(rng.normal(size=(2, n, c))) for n, c in ((32, 12), (size[0] * size[1], 8)))
    text = transformer.PromptEmbeds(txt, jnp.float32(np.arange(32) < [[20], [32]]))
    positions = transformer.rope_tables(TINY, 32, *size)
    given = text, jnp.float32([[1, 0.6, 0.2]] * 2), jnp.ones(2), jnp.float32

    @jax.jit
    def at_once(state, i):
        steps = nnx.merge(graph, state).step_inputs(*given)
        model = nnx.merge(graph, state)
        model.drop_step_layers()
        return model.velocity(img, model.embed(text, positions, jnp.float32), jnp.take(steps, i, 1), positions)

    @jax.jit
    def in_parts(state, i):
        model = nnx.merge(graph, state)
        inputs, parts = model.step_vector(*given)[1], model.stream()
        x = model.embed_tokens(img, text, positions, jnp.float32)
        for name, count in parts.blocks:
            shared = jnp.take(inputs, 0 if name in parts.still else i, 1)
            blocks, own = nnx.split(getattr(model, name))
            for k in range(count):
                layer = nnx.merge(blocks, jax.tree.map(lambda leaf, k=k: leaf[k], own))
                x = model.block(layer, x, (), shared, positions)
        return model.finish(x, shared)[:, : img.shape[1]]

    found = [at_once(state, i) for i in range(2)]
    assert all(np.allclose(x, in_parts(state, i), atol=1e-5) for i, x in enumerate(found))
    assert np.abs(found[0] - found[1]).max() > 0.01


@pytest.mark.slow
def test_converted_streamed_resumed_and_replayed(cli, draw, tmp_path):
    rows = golden_rows()[::3]
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
    check_bytes(tmp_path, MODEL, {"context_refiner": 2, "noise_refiner": 5, "layers": 5})
    for row in rows:
        assert np.array_equal(copied[row["id"]], expected[row["id"]])
        assert np.array_equal(again[row["id"]], expected[row["id"]])
        assert np.abs(streamed[row["id"]].astype(int) - expected[row["id"]]).max() <= 1
    code, err = cli("id=g3", f"output_dir={tmp_path}", "run_name=run", entry="replay")
    assert code == 0, err
    code, err = cli(f"output_dir={tmp_path}", "run_name=run", entry="verify")
    assert code == 0, err
    assert len({record["model_digest"] for run in ("run", "copied") for record in metadata(tmp_path / run)}) == 1


# ---- the authors' names, and adapters


def original_names(own, join=np.concatenate):
    """Tensors by the names of the authors' and ComfyUI's files, of diffusers'."""
    found = {}
    for name, value in own.items():
        if thirds := re.fullmatch(r"(.+attention\.)to_q\.weight", name):
            found[f"{thirds[1]}qkv.weight"] = join([own[f"{thirds[1]}to_{n}.weight"] for n in "qkv"])
        elif not re.search(r"attention\.to_[kv]\.", name):
            name = re.sub(r"^all_(x_embedder|final_layer)\.2-1", r"\1", name)
            found[re.sub(r"norm_([qk])\.", r"\1_norm.", name).replace("to_out.0", "out")] = value
    return found


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
    return {name: x.astype(np.float32) for name, x in load_file(MODEL / WEIGHTS).items()}


@pytest.mark.slow
def test_single_file(draw, beside):
    """ComfyUI's file, the rest in folders beside it."""
    folder, row = beside("model"), golden_rows()[3:]
    os.symlink(MODEL / "transformer/config.json", folder / "config.json")
    found = original_names(tensors()) | {"norm_final.weight": np.ones(3, np.float32)}
    file = folder / "z_image_turbo.safetensors"
    files.save(file, {f"model.diffusion_model.{name}": x for name, x in found.items()})
    assert np.array_equal(draw(file, row, "file")["g3"], draw(MODEL, row, "folder")["g3"])
    assert np.array_equal(draw(folder, row, "found")["g3"], draw(MODEL, row, "folder")["g3"])


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
        "model.diffusion_model.{}.lora_A.weight",
        "lora_unet_{}.lora_down.weight",
        "lora_unet_{}.lora.down.weight",
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
    assert {layer for _, layer, _ in places("diffusion_model.layers.17.attention.qkv.lora_A.weight")} == {17}


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(draw, beside, tmp_path, name):
    named = original_names(tensors()) if name == "kohya" else tensors()
    check_adapters(draw, MODEL, beside("changed"), tmp_path / "a.safetensors", named, golden_rows()[3], name)


# ---- mixed rows


def mixed():
    """23 rows: two sizes, with padding and without, steps of 1 to 4, with guidance and without, prompts of two and of
    four windows."""
    long = "with many words about all that is to be seen"
    return [
        dict(
            id=f"r{i}",
            prompt=f"picture {i % 17}" + (long if i % 3 == 0 else ""),
            seed=i,
            height=(32, 32, 64)[i % 3],
            width=32,
            num_inference_steps=1 + i % 4,
            guidance_scale=(0.0, 0.0, 2.5 + i)[i % 3],
        )
        for i in range(23)
    ]


@pytest.mark.slow
def test_mixed_rows(draw):
    check_mixed_rows(draw, MODEL, ["all", "context 2"], rows=mixed())


def test_cost_is_the_compilers():
    """Of a step, to 3 %: what is linear in the tokens is not counted."""
    cfg = transformer.ZImageConfig.from_json(
        dict(in_channels=4, dim=128, n_layers=1, n_refiner_layers=1, n_heads=4, cap_feat_dim=64, axes_dims=[16, 8, 8])
    )
    graph, state = nnx.split(transformer.ZImage(cfg, rngs=None))
    positions = transformer.rope_tables(cfg, 64, 8, 16)
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 128, 16), (1, 64, 128), (1, 128))]

    def step(state, *given):
        return nnx.merge(graph, state).velocity(*given, positions)

    counted = jax.jit(step).lower(state, *shapes).compile().cost_analysis()["flops"]
    assert counted == pytest.approx(cost.step(cfg, 128, 64), rel=0.03)


TPU, FSDP = {"platform": "tpu"}, {"platform": "tpu", "fsdp": 4}
CPU, SMALL = {"platform": "cpu", "numbers": 4}, {"platform": "cpu"}


@pytest.mark.parametrize(
    ("where", "images", "side", "text", "figure"),
    [
        (TPU, 1, 1024, 96, 0.235),
        (TPU, 4, 1024, 96, 0.998),
        (TPU, 1, 1024, 512, 0.275),  # with a negative prompt
        (FSDP, 1, 1024, 96, 0.452),
        (CPU, 1, 512, 96, 0.742),
        (CPU, 4, 512, 96, 1.013),
        (CPU, 2, 256, 512, 0.773),
        (CPU, 1, 1024, 96, 1.042),
        (CPU, 1, 2048, 96, 2.642),
        (SMALL, 1, 512, 96, 0.718),
        (SMALL, 4, 512, 96, 1.037),
        (SMALL, 1, 1024, 96, 0.916),
        (SMALL, 1, 2048, 96, 2.051),
    ],
)
def test_memory_of_a_step_against_the_compilers(where, images, side, text, figure):
    """``figure``: GiB that Z-Image-Turbo's step takes beside weights, once compiled by hand: v6e-1, v6e-4 with fsdp, and
    a CPU in float32 and bfloat16."""
    known = published()["tongyi-mai/z-image-turbo"]["components"]["transformer"]
    numbers, mesh = where.get("numbers", 2), {"fsdp": where.get("fsdp", 1), "context": 1, "tensor": 1}
    weights, mode = 4 if where["platform"] == "cpu" else 2, Mode(negative=figure == 0.275)
    at = Footprint(images, side, side, where["platform"], numbers, weights, mesh, False, STEPS, 1, mode)
    found = cost.denoise_bytes(transformer.ZImageConfig.from_json(known), at, (side // 16) ** 2, text)
    assert found == pytest.approx(figure * 2**30, rel=0.15)


def test_text_encoder_is_read_but_for_its_last_layer():
    names = {f"model.layers.{i}.mlp.up_proj.weight": None for i in range(36)}
    for given in (names, {name.removeprefix("model."): None for name in names}):
        table = keys.qwen3_of(given)
        used = [name for name in given if any(re.fullmatch(rule.pattern, name) for rule in table.rules)]
        assert len(used) == 35 and not any(".35." in name for name in used)
