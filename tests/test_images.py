"""Image files: pixels unharmed, parameters inside, damage noticed."""

from __future__ import annotations

import io
import json
import re
import struct
import zlib

import numpy as np
import plain
import pytest
from PIL import Image

from fluxbatch.config.schema import MAX_SIDE, SIDES, ImageFormat
from fluxbatch.manifest.rows import read_rows
from fluxbatch.results.image_files import decode, encode, infotext, is_flat, pixel_sha256
from fluxbatch.types import UserError

OPTIONS = {"png_level": 6, "quality": 90}
TEXT = {"fluxbatch": json.dumps({"prompt": 'ein <b>Bär</b> 🐻 "x"\n', "seed": 2**64 - 1}, ensure_ascii=False)}


def noise(height=24, width=40):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height=32, width=48):
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 5, y * 7, x + y], -1).astype(np.uint8)


def test_png_is_lossless_and_carries_its_parameters():
    data = encode(noise(), "png", text=TEXT, **OPTIONS)
    np.testing.assert_array_equal(decode(data), noise())
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.size, image.mode) == ("PNG", (40, 24), "RGB")
        assert json.loads(image.text["fluxbatch"]) == json.loads(TEXT["fluxbatch"])
    assert data == encode(noise(), "png", text=TEXT, **OPTIONS)
    assert len(encode(smooth(), "png", text={}, png_level=9, quality=0)) < len(
        encode(smooth(), "png", text={}, png_level=0, quality=0)
    )


@pytest.mark.parametrize(("format", "name"), [("jpeg", "JPEG"), ("webp", "WEBP")])
def test_lossy_formats(format, name):
    data = encode(smooth(), format, text=TEXT, **OPTIONS)
    assert np.abs(decode(data).astype(int) - smooth()).mean() < 10
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.size) == (name, (48, 32))
        assert json.loads(image.getexif()[0x010E]) == TEXT
    assert len(encode(smooth(), format, text={}, png_level=0, quality=30)) < len(data)
    huge = {"parameters": "x" * 200_000}  # more than a JPEG's EXIF holds: the image is written all the same
    assert decode(encode(smooth(), format, text=huge, **OPTIONS)).shape == smooth().shape


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_damage_is_noticed(format):
    data = encode(noise(64, 64), format, text={}, **OPTIONS)
    for damaged in (b"", b"no image", data[: len(data) // 2], data[:30]):
        with pytest.raises(ValueError, match="not a whole image"):
            decode(damaged)


# A1111's own pattern of the last line's parts, and its reader's rule for the lines before (modules/infotext_utils.py)
PART = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def read_infotext(text):
    *lines, last = text.strip().split("\n")
    prompt, negative = [], None
    for line in lines:
        if line.startswith("Negative prompt:"):
            negative = [line[16:].strip()]
        else:
            (prompt if negative is None else negative).append(line)
    settings = {name: json.loads(value) if value[:1] == '"' else value for name, value in PART.findall(last)}
    return "\n".join(prompt), negative and "\n".join(negative), settings


@pytest.mark.parametrize("negative", [None, "blurry,\nugly"])
@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_other_programs_read_the_parameters(format, negative):
    record = {"prompt": "ein Bär 🐻,\nSteps: none", "num_inference_steps": 28, "guidance_scale": 3.5, "seed": 2**64 - 1}
    record |= {"width": 1024, "height": 768, "model": "mine, v2: best"} | (
        {"negative_prompt": negative} if negative else {}
    )
    data = encode(noise(), format, text={"parameters": infotext(record)} | TEXT, **OPTIONS)
    with Image.open(io.BytesIO(data)) as image:
        comment = None if format == "png" else image.getexif().get_ifd(0x8769)[0x9286]
        text = image.text["parameters"] if comment is None else comment.removeprefix(b"UNICODE\0").decode("utf-16-be")
    wanted = {"Steps": "28", "Sampler": "Euler", "CFG scale": "3.5", "Seed": str(2**64 - 1)}
    assert read_infotext(text) == (record["prompt"], negative, wanted | {"Size": "1024x768", "Model": record["model"]})


def test_the_hash_is_of_pixels_and_shape():
    assert len(pixel_sha256(noise())) == 64
    assert pixel_sha256(noise()) == pixel_sha256(np.asfortranarray(noise()))
    assert pixel_sha256(noise()) != pixel_sha256(noise().reshape(40, 24, 3))
    changed = noise()
    changed[3, 4, 1] ^= 1
    assert pixel_sha256(noise()) != pixel_sha256(changed)


def test_flat_images():
    assert is_flat(np.full((8, 8, 3), [1, 2, 3], np.uint8))
    almost = np.zeros((8, 8, 3), np.uint8)
    almost[7, 7, 2] = 1
    assert not is_flat(almost)


@pytest.mark.parametrize(
    "pixels",
    [np.zeros((8, 8, 3)), np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((2, 8, 8, 3), np.uint8)],
)
def test_other_arrays_are_refused(pixels):
    with pytest.raises(ValueError, match="expected uint8"):
        encode(pixels, "png", text={}, **OPTIONS)
    with pytest.raises(ValueError, match="format: got 'gif'"):
        encode(noise(), "gif", text={}, **OPTIONS)


def test_a_side_that_the_format_cannot_hold_is_refused_before_anything_is_drawn(tmp_path):
    def sides(format, **row):
        job = plain.job(manifest=str(tmp_path / "m.jsonl"))
        job.output.format = ImageFormat[format]
        (tmp_path / "m.jsonl").write_text(json.dumps({"prompt": "a", **row}))
        try:
            return [(row.height, row.width) for row in read_rows(job)[0]]
        except UserError as error:
            return str(error).partition("m.jsonl:1: ")[2]

    for format in ("png", "jpeg"):
        assert sides(format, width=16384) == [(64, 16384)]
    for side in ("height", "width"):
        wanted = "expected a multiple of 16 from 16 to 16368, as output=webp holds 16,383 at most"
        assert sides("webp", **{side: 16384}) == f"{side}: got 16384, {wanted}"
    assert sides("webp", height=16368) == [(16368, 64)]
    job = plain.job(prompt="a")
    job.output.format, job.sampler.resolution = ImageFormat.webp, 16384
    with pytest.raises(UserError, match="^sampler.resolution: got 16384, .* as output=webp holds"):
        read_rows(job)


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_what_a_format_holds(format):
    """A picture of the largest side is a file, one that is larger is none."""
    pixels = np.zeros((1, SIDES[format], 3), np.uint8)
    assert decode(encode(pixels, format, text={}, **OPTIONS)).shape == pixels.shape
    with pytest.raises((OSError, ValueError)):
        encode(np.zeros((1, SIDES[format] + 1, 3), np.uint8), format, text={}, **OPTIONS)


@pytest.mark.parametrize("side", [10_000, 14_000, MAX_SIDE])
def test_a_large_picture_is_no_attack(side):
    data = bytearray(encode(smooth(), "png", text={}, **OPTIONS))
    data[16:24] = struct.pack(">II", side, side)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    with Image.open(io.BytesIO(data)) as image:  # where Pillow would refuse it, or warn, which is an error here
        assert image.size == (side, side)
