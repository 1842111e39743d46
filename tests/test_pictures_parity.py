"""Rows with pictures and negative prompts through the command line, against diffusers' own pipelines."""

from __future__ import annotations

import importlib.util
import inspect
import json

import numpy as np
import plain
import pytest
from conftest import GOLDEN, images, metadata, pixels, psnr
from PIL import Image

from fluxbatch.models.flux1 import pictures

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

LENGTH = 24


def loaded(name):
    spec = importlib.util.spec_from_file_location(name, GOLDEN / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def louder(pipe, factor=4):
    """What is encoded of a picture, so that another one moves the image."""
    with torch.no_grad():
        pipe.vae.encoder.conv_out.weight *= factor


@pytest.fixture(scope="module")
def dev(tmp_path_factory):
    """FLUX.1 with guidance, whose encoder is as loud as the rest: (folder, pipeline)."""
    pipe = loaded("generate").pipeline(2, 16, (4, 6, 6), 2, 2, 4, True, True, "quick_gelu", seed=3)
    louder(pipe)
    pipe.set_progress_bar_config(disable=True)
    folder = tmp_path_factory.mktemp("dev")
    pipe.save_pretrained(folder)
    return folder, pipe


def picture(seed, height, width):
    """Soft colours, so that shrinking and encoding say something."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def mask(seed, height, width):
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 5), np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def run(cli, tmp_path):
    def run(folder, rows, name, *more):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = f"pretrained_model_name_or_path={folder}", f"manifest={tmp_path}/{name}.jsonl", f"run_name={name}"
        code, err = cli(*given, f"output_dir={tmp_path}", f"max_sequence_length={LENGTH}", "hardware=cpu", *more)
        assert code == 0, err
        return images(tmp_path / name)

    return run


def theirs(pipe, row, **more):
    named = ("prompt", "height", "width", "num_inference_steps", "guidance_scale", "strength")
    given = {key: row[key] for key in named if key in row} | more
    given |= {key: row[key] for key in ("negative_prompt", "negative_prompt_2", "true_cfg_scale") if key in row}
    generator = torch.Generator("cpu").manual_seed(row["seed"])
    return np.asarray(pipe(**given, max_sequence_length=LENGTH, generator=generator).images[0])


def test_negative_prompts(dev, run):
    """Rows with and without one in a job; "" is one, and without a scale above 1 there is none."""
    folder, pipe = dev
    base = dict(height=32, width=48, num_inference_steps=3, guidance_scale=2.5)
    rows = [
        dict(base, id="a", seed=1, prompt="a fox", negative_prompt="a hen", true_cfg_scale=4.0),
        dict(base, id="b", seed=2, prompt="a fox", negative_prompt="", true_cfg_scale=1.5),
        dict(base, id="c", seed=3, prompt="a fox", negative_prompt="a hen", negative_prompt_2="x", true_cfg_scale=2.0),
        dict(base, id="d", seed=4, prompt="a fox", negative_prompt="a hen"),
    ]
    found = run(folder, rows, "cfg", "per_device_batch_size=2")
    for row in rows:
        assert psnr(found[row["id"]], theirs(pipe, row)) >= 50, row["id"]
    assert psnr(found["a"], theirs(pipe, rows[0] | {"negative_prompt": "snow"})) < 30


@pytest.mark.parametrize("strength", [0.3, 0.56, 0.9, 1.0])
def test_image_to_image(dev, run, tmp_path, strength):
    folder, pipe = dev
    pipe = diffusers.FluxImg2ImgPipeline(**pipe.components)
    pipe.set_progress_bar_config(disable=True)
    picture(1, 70, 45).save(tmp_path / "in.png")
    base = dict(prompt="a fox", num_inference_steps=25 if strength == 0.56 else 12, guidance_scale=2.0, seed=5)
    rows = [
        dict(base, id="a", image="in.png", strength=strength, height=64, width=48),
        dict(base, id="b", image="in.png", strength=strength, height=32, width=32, seed=6, negative_prompt="hen"),
    ]
    rows[1]["true_cfg_scale"] = 3.0
    found = run(folder, rows, "img2img", "per_device_batch_size=2")
    for row in rows:
        assert psnr(found[row["id"]], theirs(pipe, row, image=picture(1, 70, 45))) >= 50
    moved = psnr(found["a"], theirs(pipe, rows[0], image=picture(2, 70, 45)))
    assert moved < 30 or strength == 1.0


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpaint(dev, run, tmp_path, strength):
    folder, pipe = dev
    pipe = diffusers.FluxInpaintPipeline(**pipe.components)
    pipe.set_progress_bar_config(disable=True)
    picture(1, 70, 45).save(tmp_path / "in.png")
    mask(3, 40, 60).save(tmp_path / "mask.png")
    row = dict(id="a", prompt="a fox", num_inference_steps=5, guidance_scale=2.0, seed=5, strength=strength)
    row |= dict(image="in.png", mask_image="mask.png", height=64, width=48)
    found = run(folder, [row], "inpaint")["a"]
    expected = theirs(pipe, row, image=picture(1, 70, 45), mask_image=mask(3, 40, 60))
    assert psnr(found, expected) >= 50
    assert psnr(found, theirs(pipe, row, image=picture(1, 70, 45), mask_image=mask(4, 40, 60))) < 30


@pytest.mark.parametrize(
    ("box", "pad", "size"),
    [((40, 30, 70, 52), 8, (64, 48)), ((0, 60, 20, 95), 3, (32, 64)), ((5, 5, 110, 20), 32, (64, 64))],
)
def test_padding_mask_crop(dev, run, tmp_path, box, pad, size):
    """A soft mask in the middle, one at two edges, and one that is too wide for the picture to have its aspect."""
    folder, pipe = dev
    pipe = diffusers.FluxInpaintPipeline(**pipe.components)
    pipe.set_progress_bar_config(disable=True)
    picture(1, 98, 120).save(tmp_path / "in.png")
    hole = Image.new("L", (120, 98))
    hole.paste(mask(3, box[3] - box[1], box[2] - box[0]), box)
    hole.save(tmp_path / "mask.png")
    row = dict(id="a", prompt="a fox", num_inference_steps=4, guidance_scale=2.0, seed=5, strength=0.8)
    row |= dict(image="in.png", mask_image="mask.png", padding_mask_crop=pad, height=size[0], width=size[1])
    found = run(folder, [row], "crop")["a"]
    expected = theirs(pipe, row, image=picture(1, 98, 120), mask_image=hole, padding_mask_crop=pad)
    assert found.shape == (98, 120, 3) and psnr(found, expected) >= 50
    kept = np.asarray(hole) == 0
    np.testing.assert_array_equal(found[kept], np.asarray(picture(1, 98, 120))[kept])
    inside = np.asarray(hole) > 127
    assert psnr(found[inside], expected[inside]) >= 50
    assert psnr(found[inside], np.asarray(picture(1, 98, 120))[inside]) < 25


def test_crops_are_those_of_diffusers():
    rng = np.random.default_rng(0)
    for _ in range(300):
        w, h, width, height = rng.integers(1, 200, 2).tolist() + (16 * rng.integers(1, 12, 2)).tolist()
        (left, right), (top, bottom) = (np.sort(rng.choice(side + 1, 2, replace=False)).tolist() for side in (w, h))
        hole = Image.new("L", (w, h))
        hole.paste(1, (left, top, right, bottom))
        pad = int(rng.integers(0, 40))
        row = plain.row(0, width=width, height=height, padding_mask_crop=pad)
        expected = diffusers.image_processor.VaeImageProcessor.get_crop_region(hole, width, height, pad)
        assert pictures.crop_box(hole, row) == expected


@pytest.mark.parametrize("masked", [False, True])
def test_step_cache(dev, run, tmp_path, masked):
    """The rule of diffusers' first-block cache, which its own pipeline for pictures does not get to use."""
    folder, pipe = dev
    pipe = (diffusers.FluxInpaintPipeline if masked else diffusers.FluxImg2ImgPipeline)(**pipe.components)
    pipe.set_progress_bar_config(disable=True)
    picture(1, 70, 45).save(tmp_path / "in.png")
    mask(3, 40, 60).save(tmp_path / "mask.png")
    row = dict(id="a", prompt="a fox", num_inference_steps=14, guidance_scale=2.0, seed=5, strength=0.9)
    row |= dict(image="in.png", height=64, width=48)
    given = dict(image=picture(1, 70, 45))
    if masked:
        row["mask_image"], given["mask_image"] = "mask.png", mask(3, 40, 60)
    found = run(folder, [row], "cached", "step_cache=first_block", "step_cache_threshold=0.8")["a"]
    (record,) = metadata(tmp_path / "cached")
    ran = []
    hook = pipe.transformer.single_transformer_blocks[-1].proj_out.register_forward_hook(lambda *_: ran.append(1))
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.8))
    try:
        with pipe.transformer.cache_context("cond"):
            expected = theirs(pipe, row, **given)
    finally:
        pipe.transformer.disable_cache()
        hook.remove()
    assert psnr(found, expected) >= 50
    assert len(ran) == record["computed_steps"] < 13
    assert psnr(found, theirs(pipe, row, **given)) < 50


def reader(name, channels, seed=4, factor=4):
    """A random pipeline of another class: its transformer reads so many channels of a token."""
    pipe = loaded("generate").pipeline(
        2, 16, (4, 6, 6), 2, 2, 4, True, True, "quick_gelu", seed=seed, vae=(8, 8, 16, 16)
    )
    louder(pipe, factor)
    parts = dict(pipe.components)
    if channels:
        names = inspect.signature(diffusers.FluxTransformer2DModel.__init__).parameters
        config = {key: value for key, value in parts["transformer"].config.items() if key in names}
        flux = diffusers.FluxTransformer2DModel(**config | {"in_channels": channels, "out_channels": 16})
        parts["transformer"] = loaded("generate").loud(flux, 0.2, torch.Generator().manual_seed(seed))
    kept = getattr(diffusers, name)
    known = inspect.signature(kept.__init__).parameters
    pipe = kept(**{key: part for key, part in parts.items() if key in known})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_kontext(run, tmp_path):
    """A picture of another aspect than the image, one row with a negative prompt, and one without a picture."""
    pipe = reader("FluxKontextPipeline", None, factor=20)
    pipe.save_pretrained(tmp_path / "model")
    picture(1, 90, 70).save(tmp_path / "in.png")
    base = dict(prompt="a fox", num_inference_steps=6, guidance_scale=2.5, height=48, width=32)
    rows = [
        dict(base, id="edit", seed=1, image="in.png"),
        dict(base, id="away", seed=2, image="in.png", negative_prompt="hen", true_cfg_scale=2.0),
        dict(base, id="none", seed=3),
    ]
    found = run(tmp_path / "model", rows, "kontext")
    for row in rows:
        more = {"image": picture(1, 90, 70)} if "image" in row else {}
        expected = theirs(pipe, row, max_area=48 * 32, **more)
        assert psnr(found[row["id"]], expected) >= 50, row["id"]
    assert psnr(found["edit"], theirs(pipe, rows[0], max_area=48 * 32, image=Image.new("RGB", (70, 90)))) < 30


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_fill(run, tmp_path, strength):
    pipe = reader("FluxFillPipeline", 2 * 16 + 4 * 64)
    pipe.save_pretrained(tmp_path / "model")
    picture(1, 90, 70).save(tmp_path / "in.png")
    mask(3, 40, 60).save(tmp_path / "mask.png")
    row = dict(id="a", prompt="a fox", num_inference_steps=4, guidance_scale=30.0, seed=5, strength=strength)
    row |= dict(image="in.png", mask_image="mask.png", height=64, width=48)
    found = run(tmp_path / "model", [row], "fill")["a"]
    given = dict(image=picture(1, 90, 70), mask_image=mask(3, 40, 60))
    assert psnr(found, theirs(pipe, row, **given)) >= 50
    for other in (dict(image=picture(2, 90, 70)), dict(mask_image=mask(4, 40, 60))):
        assert psnr(found, theirs(pipe, row, **given | other)) < 30


def test_control(run, tmp_path):
    pipe = reader("FluxControlPipeline", 2 * 16)
    pipe.save_pretrained(tmp_path / "model")
    picture(1, 90, 70).save(tmp_path / "map.png")
    row = dict(id="a", prompt="a fox", num_inference_steps=3, guidance_scale=10.0, seed=5)
    row |= dict(control_image="map.png", height=64, width=48)
    found = run(tmp_path / "model", [row], "control")["a"]
    assert psnr(found, theirs(pipe, row, control_image=picture(1, 90, 70))) >= 50
    assert psnr(found, theirs(pipe, row, control_image=picture(2, 90, 70))) < 30


@pytest.mark.parametrize("kind", ["distilled", "base", "dev"])
def test_references(run, tmp_path, kind):
    """Of sizes that must be cut, and one that must be made smaller; the first gives the size where the row has none."""
    generate = loaded("generate_flux2")
    pipe = generate.pipeline(
        **generate.VARIANTS[{"distilled": "flux2-klein", "base": "flux2-base", "dev": "flux2-dev"}[kind]], seed=2
    )
    louder(pipe)
    folder = tmp_path / "model"
    pipe.save_pretrained(folder)
    sizes = {"one.png": (70, 101), "two.png": (96, 64), "large.png": (1100, 1000)}
    for i, (name, size) in enumerate(sizes.items()):
        picture(i, *size).save(tmp_path / name)
    base = dict(prompt="a fox", num_inference_steps=2, guidance_scale=3.0)
    rows = [
        dict(base, id="one", seed=1, image="one.png"),
        dict(base, id="two", seed=2, image=["one.png", "two.png"], height=32, width=48),
        dict(base, id="none", seed=3, height=32, width=48),
    ]
    if kind == "distilled":
        rows.append(dict(base, id="large", seed=4, image="large.png", height=32, width=32))
    length = generate.length_of("flux2-dev") if kind == "dev" else generate.LENGTH
    found = run(folder, rows, "references", f"max_sequence_length={length}", "per_device_batch_size=2")

    def expected(row, **more):
        paths = [row["image"]] if isinstance(row.get("image"), str) else row.get("image", [])
        given = {key: row[key] for key in ("prompt", "height", "width", "num_inference_steps") if key in row}
        pictures = [Image.fromarray(pixels(tmp_path / path)) for path in paths] or None
        layers = {} if kind == "dev" else {"guidance_scale": row["guidance_scale"]}
        given |= {"image": pictures, "max_sequence_length": length, "guidance_scale": row["guidance_scale"]} | layers
        return np.asarray(pipe(**given | more, generator=torch.Generator("cpu").manual_seed(row["seed"])).images[0])

    pipe.set_progress_bar_config(disable=True)
    for row in rows:
        assert psnr(found[row["id"]], expected(row)) >= 50, row["id"]
    others = [picture(7, 70, 101), picture(8, 96, 64)]
    assert psnr(found["two"], expected(rows[1], image=others)) < 30
