"""The pictures that rows read: where they lie, what is in them, and whether they can be read at all."""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from PIL import Image, ImageOps, UnidentifiedImageError

from fluxbatch.storage.base import NotFound, StorageError
from fluxbatch.storage.registry import read_bytes
from fluxbatch.types import Picture, Reject, Row, UserError

MAX_PIXELS = 1 << 28  # of a picture that is read: more is taken for an attack, or a mistake
_THREADS = 16
_SHOWN = 50  # missing pictures in one message
_ORIENTATION = 0x0112  # EXIF: from 5 on height and width are exchanged
# How Pillow calls what has a plain meaning as RGB
_PLAIN = ("1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "LAB")
_ALPHA = ("LA", "PA", "RGBA", "La", "RGBa")


class Missing(ValueError):
    """There is no such picture."""


def inspect(rows: Sequence[Row], rejects: Sequence[Reject], quarantine: bool) -> tuple[list[Row], list[Reject]]:
    """The rows, with digest and size of each picture that they read; as rejects those that cannot have an image.

    UserError names pictures that are not there, unless they are to be set aside (``quarantine``).
    """
    distinct = {p.url: p for row in rows for pictures in row.pictures.values() for p in pictures}
    if not distinct:
        return list(rows), list(rejects)
    with ThreadPoolExecutor(_THREADS, "picture") as pool:
        found = dict(zip(distinct, pool.map(_inspected, distinct.values()), strict=True))
    good, bad, missing = [], list(rejects), []
    for row in rows:
        fault = next(_faults(row, found), None)
        if fault is None:
            good.append(_seen(row, found))
            continue
        field, error = fault
        bad.append(Reject(row.where, f"{field}: {error}", row.id, row.index, row.prompt))
        missing += [bad[-1]] if isinstance(error, Missing) else []
    if missing and not quarantine:
        more = [f"… and {len(missing) - _SHOWN:,} more rows"] if len(missing) > _SHOWN else []
        raise UserError(*(f"{each.where}: {each.reason}" for each in missing[:_SHOWN]), *more)
    return good, bad


def _faults(row: Row, found: dict[str, Picture | ValueError]) -> Iterator[tuple[str, ValueError]]:
    for field, pictures in row.pictures.items():
        for picture in pictures:
            if isinstance(fault := found[picture.url], ValueError):
                yield field, fault


def _seen(row: Row, found: dict[str, Picture | ValueError]) -> Row:
    """The row with what was found out about its pictures, under the paths that it has for them."""

    def seen(picture: Picture | None) -> Picture | None:
        if picture is None:
            return None
        known = found[picture.url]
        assert isinstance(known, Picture)
        return dataclasses.replace(known, path=picture.path)

    if not row.pictures:
        return row
    images = tuple(each for picture in row.image if (each := seen(picture)))
    return dataclasses.replace(
        row, image=images, mask_image=seen(row.mask_image), control_image=seen(row.control_image)
    )


def _inspected(picture: Picture) -> Picture | ValueError:
    try:
        data = _data(picture)
        with _opened(picture, data) as image:
            turned = image.getexif().get(_ORIENTATION, 1) >= 5
            width, height = image.size[::-1] if turned else image.size
        return dataclasses.replace(picture, sha256=hashlib.sha256(data).hexdigest(), height=height, width=width)
    except ValueError as error:
        return error


def read(picture: Picture) -> Image.Image:
    """The picture, upright, as RGB, or L if it is grey; what is transparent is white. ValueError says why it cannot be
    read, or that it is another one than when the job was opened."""
    data = _data(picture)
    if hashlib.sha256(data).hexdigest() != picture.sha256:
        raise ValueError(f"{picture.path}: changed while the job ran")
    try:
        with _opened(picture, data) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16") or upright.mode == "I":
                upright = upright.point(lambda value: value / 257).convert("L")
            if upright.mode in _ALPHA or "transparency" in upright.info:
                over = Image.new("RGBA", upright.size, "white")
                return Image.alpha_composite(over, upright.convert("RGBA")).convert("RGB")
            return upright if upright.mode in ("L", "RGB") else upright.convert("L" if upright.mode == "1" else "RGB")
    except (OSError, SyntaxError, EOFError) as error:
        raise ValueError(f"{picture.path}: not a whole picture: {error}") from None


def _data(picture: Picture) -> bytes:
    try:
        return read_bytes(picture.url)
    except NotFound:
        raise Missing(f"{picture.path}: not found") from None
    except StorageError as error:
        raise ValueError(f"{picture.path}: {error}") from None


def _opened(picture: Picture, data: bytes) -> Image.Image:
    """The picture by its header. ValueError for what is none, is too large, or has numbers of another kind."""
    if not data:
        raise ValueError(f"{picture.path}: empty")
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise ValueError(f"{picture.path}: its first bytes are not those of a picture") from None
    except Image.DecompressionBombError:
        raise ValueError(f"{picture.path}: more than {MAX_PIXELS:,} pixels") from None
    except (OSError, SyntaxError, EOFError) as error:
        raise ValueError(f"{picture.path}: not a whole picture: {error}") from None
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{picture.path}: {image.width}×{image.height}, expected at most {MAX_PIXELS:,} pixels")
    if image.mode not in (*_PLAIN, *_ALPHA) and not image.mode.startswith("I"):
        raise ValueError(f"{picture.path}: pixels of kind {image.mode}, expected grey, palette, RGB or CMYK")
    return image
