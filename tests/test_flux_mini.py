"""The recipe of flux-mini: its data, its words, its scorer, and training from end to end (slow)."""

from __future__ import annotations

import pathlib
import shutil
import sys

import lora_files as files
import numpy as np
import pytest
from conftest import metadata, pixels, psnr
from PIL import Image, ImageFilter

ROOM = pathlib.Path(__file__).parents[1] / "jobs" / "flux-mini"


@pytest.fixture(scope="module", autouse=True)
def room():
    """The recipe's modules can be imported, here alone: their names (data, words, …) are plain."""
    sys.path.insert(0, str(ROOM))
    yield
    sys.path.remove(str(ROOM))
    for file in ROOM.glob("*.py"):
        sys.modules.pop(file.stem, None)


@pytest.fixture(scope="module")
def data(room):
    import data

    if not data.FONT.exists():
        pytest.skip(f"{data.FONT}: Debian's fonts-noto-color-emoji is not installed")
    return data


@pytest.fixture(scope="module")
def scenes(data):
    rng = np.random.default_rng(1)
    return [data.sample(rng, data.SHAPES[i % 3]) for i in range(3000)]


def test_a_picture_is_a_function_of_the_seed(data):
    one, two = (data.render(data.sample(np.random.default_rng(5))) for _ in range(2))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, data.render(data.sample(np.random.default_rng(6))))


def test_held_out_pairs_are_never_drawn_but_their_halves_are(data, scenes):
    pairs = [(name, color) for name in data.OBJECTS for color in data.COLORS]
    assert len(data.OBJECTS) >= 48 and len(data.COLORS) >= 8
    assert sum(data.held_out(*pair) for pair in pairs) >= 0.15 * len(pairs)
    drawn = {(item.name, scene.color) for scene in scenes for item in scene.items}
    assert not any(data.held_out(*pair) for pair in drawn)
    assert {name for name, _ in drawn} == set(data.OBJECTS)
    assert {color for _, color in drawn} == set(data.COLORS)
    asked = data.held_out_scenes(200)
    assert len(asked) == 200 and all(data.held_out(s.items[0].name, s.color) for s in asked)
    assert sum(s.place is not None for s in asked) == 100


def test_captions_say_what_is_drawn(data, scenes):
    for scene in scenes:
        assert all(item.name in scene.caption for item in scene.items)
        assert scene.color in scene.caption or scene.color == "white"
        assert "a orange" not in scene.caption and "a owl" not in scene.caption
        assert data.render(scene).shape == (scene.height, scene.width, 3)


def spoilt(kind: str, image: np.ndarray) -> np.ndarray:
    if kind == "noise":
        return np.clip(image + np.random.default_rng(0).normal(0, 10, image.shape), 0, 255).astype(np.uint8)
    picture = Image.fromarray(image)
    changed = {
        "none": picture,
        "blur": picture.filter(ImageFilter.GaussianBlur(1)),
        "half": picture.resize((64, 64), Image.Resampling.BOX),
    }
    return np.asarray(changed[kind])


@pytest.mark.parametrize("kind", ["none", "noise", "blur", "half"])
def test_scorer_knows_the_truth(data, kind):
    import evaluate

    asked = data.held_out_scenes(60)
    wanted = [{"object": s.items[0].name, "color": s.color, "place": s.place} for s in asked]
    seen = [evaluate.score(spoilt(kind, data.render(s))) for s in asked]
    for key, (right, of) in evaluate.tally(wanted, seen).items():
        assert right >= 0.99 * of, (kind, key, right, of)


def test_scorer_is_not_pleased_by_anything_else(data):
    import evaluate

    flat = np.full((128, 128, 3), data.COLORS["blue"], np.uint8)
    assert evaluate.score(flat) == {"object": None, "color": "blue", "place": None}
    asked = data.held_out_scenes(40)
    wanted = [{"object": s.items[0].name, "color": s.color, "place": s.place} for s in asked]
    noise = np.random.default_rng(0).integers(0, 255, (40, 128, 128, 3), dtype=np.uint8)
    for right, of in evaluate.tally(wanted, [evaluate.score(image) for image in noise]).values():
        assert right <= 0.3 * of
    others = [evaluate.score(data.render(s)) for s in asked[1:] + asked[:1]]
    assert evaluate.tally(wanted, others)["object"][0] <= 4


def test_edits_are_of_pairs_that_were_never_trained(data):
    import edits

    rng = np.random.default_rng(2)
    trained, asked = [edits.sample(rng) for _ in range(500)], edits.held_out_edits(200)
    assert {edit.kind for edit in trained} == {edit.kind for edit in asked} == set(edits.KINDS)
    scenes = [scene for edit in trained for scene in (edit.before, edit.after)]
    assert not any(data.held_out(scene.items[0].name, scene.color) for scene in scenes)
    assert all(data.held_out(edit.after.items[0].name, edit.after.color) for edit in asked)
    assert not any(np.array_equal(*edit.pictures()) for edit in asked)


def test_edits_are_scored(data):
    import edits
    import evaluate_edits

    asked = edits.held_out_edits(16)
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 12, (16, 128, 128, 3))
    drawn = [np.clip(edit.pictures()[1] + noise[i], 0, 255).astype(np.uint8) for i, edit in enumerate(asked)]
    assert evaluate_edits.table(asked, drawn)[1] and all(map(evaluate_edits.is_right, asked, drawn))
    table, enough = evaluate_edits.table(asked, [edit.pictures()[0] for edit in asked])
    assert not enough and "| recolor | 0 | 4 | 0.0% |" in table
    others = drawn[4:] + drawn[:4]  # of the same kinds
    assert sum(map(evaluate_edits.is_right, asked, others)) <= 1


def test_tokenizers_know_every_caption_and_survive_any_text(data, scenes, tmp_path):
    import words
    from transformers import CLIPTokenizer, T5TokenizerFast

    captions = [scene.caption for scene in scenes]
    words.train(captions, tmp_path)
    clip = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    t5 = T5TokenizerFast.from_pretrained(tmp_path / "tokenizer_2")
    assert max(len(ids) for ids in clip(captions)["input_ids"]) <= words.CLIP_LENGTH
    assert max(len(ids) for ids in t5(captions)["input_ids"]) <= 32
    assert not any(t5.unk_token_id in ids for ids in t5(captions)["input_ids"])
    assert clip("A CAT")["input_ids"] == clip("a cat")["input_ids"]
    assert (t5.pad_token_id, t5("cat")["input_ids"][-1]) == (0, t5.eos_token_id)
    assert clip("cat")["input_ids"][0] == clip.bos_token_id and clip("cat")["input_ids"][-1] == clip.eos_token_id
    assert clip.decode(clip("zebra Ünïcode 🦓 7")["input_ids"], skip_special_tokens=True) == "zebra ünïcode 🦓 7"
    assert t5.decode(t5("a zebra")["input_ids"], skip_special_tokens=True) == "a zebra"


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """All stages of the recipe, a few steps each, at 64 pixels and with small networks; no average, which would
    still be the beginning."""
    optax = pytest.importorskip("optax")
    import adapters
    import autoencoder
    import flow
    import guidance
    import jax
    import loop
    import train

    small = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flow, "POOL", 64)
        patch.setattr(adapters, "POOL", 16)
        for module in (flow, guidance):
            patch.setattr(module, "FLUX", module.FLUX | small)
            patch.setattr(module, "train", lambda *args, decay, **options: loop.train(*args, **options))
        patch.setattr(adapters, "train", lambda *args, decay, **options: loop.train(*args, **options))
        patch.setattr(autoencoder, "VAE", autoencoder.VAE | {"block_out_channels": [4, 8, 8, 8]})
        for module in (autoencoder, guidance):  # flow has Muon, which takes long to compile
            patch.setattr(module, "matrices_by_muon", lambda peak, adam_peak, steps: optax.adam(1e-3))
        work = loop.Work(tmp_path_factory.mktemp("recipe"), 64)
        autoencoder.train_vae(work, 2, size=2)
        flow.train_flow(work, 3, size=4)
        before = work.load("flow")
        flow.train_flow(work, 5, size=4)
        after = work.load("flow")
        autoencoder.train_decoder(work, 2, size=2)
        guidance.train_guidance(work, 2, size=4)
        adapters.train_adapters(work, 3, size=4)
        train.write(work)
    assert (before["step"], after["step"]) == (3, 5), "a stage goes on where it was stopped"
    changed = [
        not np.array_equal(a, b) for a, b in zip(*(jax.tree.leaves(s["params"]) for s in (before, after)), strict=True)
    ]
    assert np.mean(changed) > 0.9, "gradients reach the whole model"
    return work.folder


def picture(cli, folder: pathlib.Path, name: str, *overrides: str) -> np.ndarray:
    code, err = cli(
        "prompt=a red apple on a blue background",
        "resolution=64",
        f"output_dir={folder}",
        f"run_name={name}",
        "activations_dtype=float32",
        "weights_dtype=float32",
        "seed=3",
        *overrides,
    )
    assert code == 0, err
    return pixels(folder / name / metadata(folder / name)[0]["file_name"])


@pytest.mark.slow
def test_recipe_exports_what_the_runner_runs(trained, tmp_path, cli):
    plain = f"pretrained_model_name_or_path={trained / 'flux-mini'}"
    first = picture(cli, tmp_path, "first", plain)
    assert first.shape == (64, 64, 3)
    for name in ("pixel-art", "outline"):
        path = trained / "flux-mini" / "loras" / f"{name}.safetensors"
        assert not np.array_equal(picture(cli, tmp_path, name, plain, *files.arrays({"mine": path}, 4.0)), first)
        assert np.array_equal(picture(cli, tmp_path, f"{name}-off", plain, *files.arrays({"mine": path}, 0.0)), first)
    dev = f"pretrained_model_name_or_path={trained / 'flux-mini-dev'}"
    weak, strong = (
        picture(cli, tmp_path, f"g{g}", dev, f"guidance_scale={g}", "num_inference_steps=6") for g in (1.0, 5.0)
    )
    assert not np.array_equal(weak, strong), "the strength of guidance is read"


@pytest.mark.slow
def test_an_editor_is_trained_from_the_embedded_checkpoint(data, tmp_path, cli, monkeypatch):
    optax = pytest.importorskip("optax")
    import kontext
    import loop
    import train

    monkeypatch.setattr(kontext, "POOL", 8)
    monkeypatch.setattr(kontext, "PLAIN", 8)
    monkeypatch.setattr(kontext, "PLAIN_EVERY", 2)  # one step of each kind
    monkeypatch.setattr(kontext, "train", lambda *args, decay, **options: loop.train(*args, **options))
    monkeypatch.setattr(kontext, "matrices_by_muon", lambda peak, adam_peak, steps: optax.adam(1e-4))
    work = loop.Work(tmp_path, 128)
    kontext.train_kontext(work, 2, size=4)
    train.write(work)
    Image.fromarray(data.render(data.sample(np.random.default_rng(3)))).save(tmp_path / "one.png")
    model = f"pretrained_model_name_or_path={tmp_path / 'flux-mini-kontext'}"
    asked = "prompt=make the background green", "resolution=128"
    edited = picture(cli, tmp_path, "edited", model, *asked, f"image={tmp_path / 'one.png'}")
    assert metadata(tmp_path / "edited")[0]["inputs"].endswith('"read_as": [128, 128]}]}')
    assert edited.shape == (128, 128, 3)
    assert not np.array_equal(edited, picture(cli, tmp_path, "drawn", model, *asked))


@pytest.mark.slow
def test_both_formats_say_what_training_multiplies(data, tmp_path, cli):
    """One adapter, loud, as PEFT's file, as kohya's, and merged into the kernels by the recipe."""
    import adapters
    import export
    import jax
    from flax import nnx
    from safetensors.numpy import save_file
    from test_weights import model

    from fluxbatch.distributed.mesh import make_mesh
    from fluxbatch.models.flux1 import keys
    from fluxbatch.weights import load
    from fluxbatch.weights.checkpoint import open_checkpoint

    mini = pathlib.Path(__file__).parents[1] / "fluxbatch" / "checkpoints" / "flux-mini"
    plan = open_checkpoint(model(mini)).components["transformer"].plan()
    flux = nnx.state(load.load(plan, make_mesh((1, 1)), "float32"), nnx.Param)
    rng = np.random.default_rng(0)
    adapter = jax.tree.map(lambda m: rng.normal(0, 0.06, m.shape).astype(np.float32), adapters.begin(flux))
    drawn = {"off": picture(cli, tmp_path, "off")}
    for name, tensors in {"peft": adapters.peft(adapter, flux), "kohya": adapters.kohya(adapter)}.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        drawn[name] = picture(cli, tmp_path, name, *files.arrays({"mine": tmp_path / f"{name}.safetensors"}))
    assert psnr(drawn["peft"], drawn["kohya"]) >= 50
    merged = tmp_path / "merged"
    shutil.copytree(mini, merged)
    tensors = export.named(export.arrays_of(adapters.adapted(flux, adapter)), keys.FLUX_DIFFUSERS)
    save_file(tensors, merged / "transformer" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    expected = picture(cli, tmp_path, "expected", f"pretrained_model_name_or_path={merged}")
    # the merged file rounds the sum to bfloat16, the adapter its two factors
    assert psnr(drawn["peft"], expected) >= psnr(drawn["off"], expected) + 12


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("model", "asked"),
    [
        ("flux-mini", {}),
        ("flux-mini-dev", {"num_inference_steps": 6, "guidance_scale": 2.0}),
        ("flux-mini-kontext", {"image": "before.png"}),
    ],
)
def test_embedded_checkpoint_draws_the_same_in_diffusers(tmp_path, cli, model, asked):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")

    folder = pathlib.Path(__file__).parents[1] / "fluxbatch" / "checkpoints" / model
    prompt, size = "a red apple on a blue background", 128
    if edits := "image" in asked:
        prompt = "make the background green"
        before = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)).resize((size, size))
        before.save(tmp_path / asked["image"])
        asked = {"image": tmp_path / asked["image"]}
    arguments = [
        f"model={model}",
        f"resolution={size}",
        "weights_dtype=float32",
        "activations_dtype=float32",
        f"output_dir={tmp_path}",
        "run_name=one",
    ]
    code, err = cli(f"prompt={prompt}", *arguments, "seed=3", *(f"{key}={value}" for key, value in asked.items()))
    assert code == 0, err
    record = metadata(tmp_path / "one")[0]
    kind = diffusers.FluxKontextPipeline if edits else diffusers.FluxPipeline
    pipe = kind.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        **({"image": before, "_auto_resize": False, "max_area": size * size} if edits else {}),
        prompt=prompt,
        height=size,
        width=size,
        num_inference_steps=record["num_inference_steps"],
        guidance_scale=record["guidance_scale"],
        output_type="np",
        max_sequence_length=record["max_sequence_length"],
        generator=torch.Generator().manual_seed(3),
    ).images[0]
    assert psnr(pixels(tmp_path / "one" / record["file_name"]), (expected * 255).round().astype(np.uint8)) >= 45
