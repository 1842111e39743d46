"""FLUX.3 through the command line, without torch: the golden as a flow map and as a base with guidance."""

from __future__ import annotations

import dataclasses
import functools
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
from test_flux2_run import WEIGHTS, change, check_adapter, check_bytes, check_mixed_rows, drawn, modules
from test_published import cache, planned  # noqa: F401

from fluxbatch.models.flux3 import references, transformer
from fluxbatch.models.flux3.schedule import Flux3Schedule
from fluxbatch.types import UserError

WORDS = "max_sequence_length=8192", "hardware=cpu"
BASE, KLEIN = GOLDEN / "flux3-base", GOLDEN / "flux3-klein"


@pytest.fixture
def model(tmp_path):
    """The golden checkpoint, a flow map or not: they share all but the transformer."""

    def make(flow_map, name="model"):
        folder = tmp_path / name
        folder.mkdir()
        for part in ("text_encoder", "vae"):
            os.symlink(BASE / part, folder / part)
        os.symlink(BASE / "tokenizer", folder / ("processor" if flow_map else "tokenizer"))
        for part in ("transformer", "modular_model_index.json"):
            os.symlink((KLEIN if flow_map else BASE) / part, folder / part)
        return folder

    return make


@pytest.fixture
def draw(cli, tmp_path):
    shutil.copy(GOLDEN / "flux3.png", tmp_path)
    return lambda folder, rows, run, *words: drawn(cli, tmp_path, folder, rows, run, *WORDS, *words)


def golden_rows(flow_map):
    rows = [json.loads(line) for line in (GOLDEN / "flux3.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "negative_prompt" or not flow_map} for row in rows]


@pytest.mark.parametrize("name", ["klein", pytest.param("base", marks=pytest.mark.slow)])
def test_golden(model, draw, tmp_path, name):
    """Pictures that diffusers drew, of prompts of one, two and three windows and of a reference on its canvas."""
    expected = np.load(GOLDEN / f"flux3-{name}.npz")
    rows = golden_rows(name == "klein")
    rows = [row for row in rows if name == "base" or row["id"] != "g2"]
    other = rows[0] | {"id": "other", "prompt": "quite another prompt"}
    drawn = draw(model(name == "klein"), [*rows, other], name, "per_device_batch_size=2")
    assert all(psnr(drawn[row["id"]], expected[row["id"]]) >= 50 for row in rows)
    assert psnr(drawn["other"], drawn["g0"]) < 30  # what holds above is not blind to prompts
    cropped = next(record for record in metadata(tmp_path / name) if record["id"] == "g3")
    assert json.loads(cropped["crop"]) == [12, 20, 52, 43] and (cropped["height"], cropped["width"]) == (23, 40)


def test_goldens_differ():
    """Nor to the flow map and guidance."""
    klein, base = (np.load(GOLDEN / f"flux3-{name}.npz") for name in ("klein", "base"))
    assert all(psnr(klein[name], base[name]) < 30 for name in klein.files)


def test_plan_says_the_windows(cli, model, tmp_path):
    rows = golden_rows(False)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copy(GOLDEN / "flux3.png", tmp_path)
    words = f"pretrained_model_name_or_path={model(False)}", f"manifest={tmp_path / 'rows.jsonl'}", *WORDS
    code, said = cli(*words, f"output_dir={tmp_path}", entry="plan")
    assert code == 0, said
    for text in (
        "32×32, with a negative prompt, 80 text tokens, 3 steps",
        "32×48, with a negative prompt, 160 text tokens, 4 steps",
        "32×32, with a negative prompt, 240 and 80 text tokens, 9 steps",
        "64×64, with a negative prompt, 1 reference, 80 text tokens, 2 steps",
        "3 × text, 3 × modulation",
    ):
        assert text in said


def test_a_plan_without_the_checkpoint(planned, cache):  # noqa: F811
    text = planned("model=flux3-klein-base", "target=h100", "negative_prompt=" + "hens " * 60)
    assert "transformer 5.54 G, text_encoder 3.62 G, vae 49.6 M" in text
    assert "80 and 160 text tokens, 50 steps" in text and "how long prompts are is guessed" in text
    assert cache.asked == ["Qwen/Qwen3-VL-4B-Instruct"]  # for the tokenizer, which is small


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (dict(mask_image="flux3.png", image="flux3.png"), "mask_image: expected none: FLUX.3 reads reference pictures"),
        (dict(negative_prompt="hens"), "negative_prompt: expected none"),
    ],
)
def test_a_row_with_what_it_does_not_read(cli, model, tmp_path, field, message):
    shutil.copy(GOLDEN / "flux3.png", tmp_path)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "x"} | field))
    words = f"pretrained_model_name_or_path={model(True)}", f"manifest={tmp_path / 'rows.jsonl'}", "resolution=32"
    code, said = cli(*words, f"output_dir={tmp_path}", entry="plan")
    assert code == 2 and f"rows.jsonl:1: {message}" in said


def test_schedule():
    """Steps of 3 as diffusers prints them; settings that would be for nothing are refused."""
    schedule = Flux3Schedule.of({"shift": 6.93})
    assert np.allclose(schedule.sigmas(3, 4), [1, 0.9327, 0.7760, 0], atol=5e-5)
    assert np.array_equal(schedule.sigmas(3, 4), schedule.sigmas(3, 4096))
    with pytest.raises(UserError, match="sampler.max_shift=1.15: expected null"):
        Flux3Schedule.of({}, max_shift=1.15)
    with pytest.raises(UserError, match="use_dynamic_shifting is true"):
        Flux3Schedule.of({"use_dynamic_shifting": True})


@pytest.mark.parametrize(
    ("size", "kept", "canvas"),
    [
        ((40, 23), (40, 23), (64, 64)),
        ((70, 100), (70, 100), (80, 112)),
        ((2048, 2048), (2048, 2048), (2048, 2048)),
        ((2049, 2048), (2048, 2048), (2048, 2048)),
        ((9000, 30), (4096, 14), (4096, 64)),
    ],
)
def test_canvas(size, kept, canvas):
    assert references.whole(size, 16) == (kept, canvas)
    left, top, right, bottom = references.box(size, 16)
    assert (right - left, bottom - top) == kept and 0 <= left <= right <= canvas[0] and 0 <= top <= bottom <= canvas[1]


TINY = transformer.Flux3Config(
    in_channels=8, cond_in_channels=8, num_layers=2, num_single_layers=2, num_attention_heads=2, attention_head_dim=8,
    joint_attention_dim=24, timestep_channels=32, mlp_ratio=3.0, axes_dims_rope=(2, 2, 2, 2), rope_theta=10_000,
    flow_map=False,
)  # fmt: skip


@pytest.mark.parametrize("flow_map", [True, False])
def test_what_rests_is_computed_once(flow_map):
    """Text and references of a base pass their early blocks once for all steps, with the same result; also those that
    come one at a time."""
    graph, state = nnx.split(transformer.Flux3(dataclasses.replace(TINY, flow_map=flow_map), rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    txt, img, refs = (jnp.float32(rng.normal(size=(2, n, c))) for n, c in ((5, 24), (6, 8), (4, 8)))
    positions, text = transformer.rope_tables(TINY, 5, 2, 3, [(2, 2)]), transformer.PromptEmbeds(txt)
    given = text, jnp.float32([[1, 0.6, 0.2]] * 2), jnp.ones(2), jnp.float32

    @functools.partial(jax.jit, static_argnums=1)
    def at_once(state, i):
        steps = nnx.merge(graph, state).step_inputs(*given)
        assert (steps.text is None) == (steps.references is None) == (not flow_map)
        flux = nnx.merge(graph, state)
        flux.drop_step_layers()
        embedded = flux.embed(text, positions, jnp.float32), flux.embed_references(refs, positions)
        at = jax.tree.map(lambda x: x[:, i], steps)
        return flux.velocity(img, embedded[0], at, positions, embedded[1])

    @functools.partial(jax.jit, static_argnums=1)
    def in_parts(state, i):
        flux = nnx.merge(graph, state)
        inputs, parts = flux.step_vector(*given)[1], flux.stream()
        assert bool(parts.still) == (not flow_map)
        x = flux.embed_tokens(jnp.concatenate([img, refs], 1), text, positions, jnp.float32)
        for name, count in parts.blocks:
            shared = jax.tree.map(lambda x, at=0 if name in parts.still else i: x[:, at], inputs)
            blocks, own = nnx.split(getattr(flux, name))
            for k in range(count):
                layer = nnx.merge(blocks, jax.tree.map(lambda leaf, k=k: leaf[k], own))
                x = flux.block(layer, x, (), shared, positions)
        return flux.finish(x, shared)

    for i in range(2):
        found = at_once(state, i)
        assert np.allclose(found, in_parts(state, i), atol=1e-5) and np.abs(found).max() > 0.1


@pytest.mark.slow
def test_converted_streamed_resumed_and_replayed(cli, model, draw, tmp_path):
    folder, rows = model(False), golden_rows(False)[1::2]
    texts = f"text_cache_dir={tmp_path / 'texts'}"
    draw(folder, rows[:1], "run", texts)
    expected = draw(folder, rows, "run", texts)  # the first is there
    again = draw(folder, rows, "again", texts)
    status = json.loads((tmp_path / "again/status.json").read_text())
    weights = [file for part in ("transformer", "vae") for file in (folder / part).resolve().glob("*.safetensors")]
    assert status["load"]["bytes"] < sum(file.stat().st_size for file in weights) + 1  # no text encoder
    code, err = cli(f"pretrained_model_name_or_path={folder}", f"to={tmp_path / 'copy'}", entry="convert")
    assert code == 0, err
    copied, streamed = draw(tmp_path / "copy", rows, "copied"), draw(folder, rows, "streamed", "stream_blocks=true")
    times = {"txt_mode": 2, "mode_blocks.image_cond.": 1, "mode_blocks.image.": 6, "single_transformer": 6}
    check_bytes(tmp_path, folder, times)
    for row in rows:
        assert np.array_equal(copied[row["id"]], expected[row["id"]])
        assert np.array_equal(again[row["id"]], expected[row["id"]])
        assert np.abs(streamed[row["id"]].astype(int) - expected[row["id"]]).max() <= 1
    for key in ("g1", "g3"):
        code, err = cli(f"id={key}", f"output_dir={tmp_path}", "run_name=run", entry="replay")
        assert code == 0, err
    code, err = cli(f"output_dir={tmp_path}", "run_name=run", entry="verify")
    assert code == 0, err
    assert len({record["model_digest"] for run in ("run", "copied") for record in metadata(tmp_path / run)}) == 1


# ---- Black Forest Labs' names, and adapters

TO_BFL = [
    (r"^timestep_embedder\.linear_1", "time_in.in_layer"), (r"^timestep_embedder\.linear_2", "time_in.out_layer"),
    (r"^target_timestep_embedder\.linear_1", "ref_time_in.in_layer"),
    (r"^target_timestep_embedder\.linear_2", "ref_time_in.out_layer"),
    (r"^x_embedders\.", "emb_in."), (r"^context_embedder\.", "txt_in."), (r"^mode_blocks\.", "content_mode_blocks."),
    (r"^single_transformer_blocks\.", "single_blocks."), (r"^proj_out", "final_layer.image.linear"),
    (r"^norm_out\.linear", "final_layer.image.adaLN_modulation.1"),
    (r"(stream_modulations\.\w+)\.linear", r"\1.lin"), (r"attn\.to_([qkv])\.", r"\1_proj."),
    (r"attn\.to_out\.0", "attn_out"), (r"attn\.norm_q\.weight", "norm.query_norm.scale"),
    (r"attn\.norm_k\.weight", "norm.key_norm.scale"), (r"ff\.linear_in", "mlp_in"), (r"ff\.linear_out", "mlp_out"),
]  # fmt: skip


def bfl_names(found):
    """Tensors by the names of Black Forest Labs' files, of diffusers'."""

    def renamed(name):
        for pattern, new in TO_BFL:
            name = re.sub(pattern, new, name)
        return name

    return {renamed(name): value for name, value in found.items()}


def swapped(found, name):
    """With shift before scale in the final modulation, or the other way round."""
    return found | {name: np.concatenate(np.split(found[name], 2)[::-1])}


@pytest.mark.slow
def test_single_file(model, draw):
    """Black Forest Labs' file, the rest in folders beside it."""
    folder, row = model(True), golden_rows(True)[:1]
    found = swapped(bfl_names(load_file(KLEIN / WEIGHTS)), "final_layer.image.adaLN_modulation.1.weight")
    found["repa_projectors.0.weight"] = np.zeros((2, 2), np.float32)
    file = folder / "flux-3-image-klein.safetensors"
    files.save(file, {f"model.diffusion_model.{name}": x for name, x in found.items()})
    assert np.array_equal(draw(file, row, "file")["g0"], draw(folder, row, "folder")["g0"])


@pytest.mark.slow
@pytest.mark.parametrize("naming", ["diffusers", "BFL"])
def test_adapters(model, draw, tmp_path, naming):
    """All linear layers changed: merged, and beside the weights, as a checkpoint that was changed by the formula."""
    own, row, final = load_file(KLEIN / WEIGHTS), golden_rows(True)[0], "final_layer.image.adaLN_modulation.1"
    named = own if naming == "diffusers" else swapped(bfl_names(own), f"{final}.weight")
    prefix = "transformer." if naming == "diffusers" else "diffusion_model."
    shapes = {prefix + module: shape for module, shape in modules(named).items()}
    adapter = files.Maker(3, size=0.2, ranks=(2, 4), alphas=(1.0, 2.0)).peft(shapes)
    files.save(tmp_path / "a.safetensors", adapter)
    changed = {
        name: x + 0.7 * change(adapter, prefix + name.removesuffix(".weight")).astype(np.float32) if x.ndim == 2 else x
        for name, x in named.items()
    }
    folder, other = model(True), model(True, "changed")
    if naming == "diffusers":
        os.unlink(other / "transformer")
        (other / "transformer").mkdir()
        shutil.copy(KLEIN / "transformer/config.json", other / "transformer")
        files.save(other / WEIGHTS, changed)
    else:
        files.save(other := other / "flux-3.safetensors", changed)
    plain, expected = draw(folder, [row], "plain")["g0"], draw(other, [row], "changed")["g0"]
    check_adapter(draw, folder, row, tmp_path / "a.safetensors", 0.7, plain, expected)


# ---- mixed rows


def mixed():
    """23 rows: two sizes, steps of 1 to 4, several strengths of guidance, prompts of one and of two windows."""
    long = "with many words about all that is to be seen in it, near and far"
    return [
        dict(
            id=f"r{i}",
            prompt=f"picture {i % 17}" + (long if i % 3 == 0 else ""),
            seed=i,
            height=(32, 32, 16)[i % 3],
            width=(32, 32, 48)[i % 3],
            num_inference_steps=1 + i % 4,
            guidance_scale=(0.5, 2.5, 4.0)[i % 3],
        )
        for i in range(23)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("flow_map", "meshes"), [(False, ["ddp 8", "tensor 2"]), (True, ["fsdp 2"])])
def test_mixed_rows(model, draw, flow_map, meshes):
    check_mixed_rows(draw, model(flow_map), meshes, rows=mixed())
