"""Pictures as files that rows read: found, checked by their header, decoded."""

from __future__ import annotations

import dataclasses
import hashlib
import http.client
import io
import os
import urllib.error
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageOps, UnidentifiedImageError

from fluxbatch.storage import web
from fluxbatch.storage.base import NotFound, StorageError
from fluxbatch.storage.registry import read_bytes
from fluxbatch.types import Picture, public

MAX_PIXELS = 1 << 28  # of a picture that is read: more is taken for an attack, or a mistake
MAX_BYTES = 1 << 29  # of its file, of which several are read at once
_ORIENTATION, _SIDEWAYS = 0x0112, 5  # EXIF: from 5 on height and width are exchanged
# How Pillow calls what has a plain meaning as RGB
_PLAIN = ("1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "LAB")
_ALPHA = ("LA", "PA", "RGBA", "La", "RGBa")


class Missing(ValueError):
    """There is no such picture."""


def located(path: str, folder: str) -> str:
    """Where a picture lies: an absolute path, or an address. ``folder``: what a relative path begins in."""
    if "://" in path or os.path.isabs(path):
        return path
    whole = f"{folder}/{path}" if folder else path
    return whole if "://" in whole else os.path.abspath(whole)


class Seen(NamedTuple):
    """What is found in a picture."""

    sha256: str  # of the file
    height: int  # of what is seen
    width: int
    version: str | None = None  # of the file, where a web server says so as it sends it


def look(picture: Picture) -> Seen:
    """ValueError says why there is nothing to see."""
    data, version = _data(picture)
    with _opened(picture, data) as image:
        width, height = image.size[::-1] if _turned(image) else image.size
    return Seen(hashlib.sha256(data).hexdigest(), height, width, version)


def found(picture: Picture, folders: Sequence[str]) -> Picture:
    """The picture of a record, where it lies: in the first of these folders, in which a relative path may begin, that
    has a file of its digest; if none has, in the last that has a picture of its name, or in the last."""
    places = [dataclasses.replace(picture, url=url) for url in dict.fromkeys(located(picture.path, f) for f in folders)]
    alike = []
    for place in places if len(places) > 1 else ():
        try:
            if look(place).sha256 == picture.sha256:
                return place
            alike.append(place)
        except ValueError:
            continue
    return (alike or places)[-1]


def _turned(image: Image.Image) -> bool:
    if image.format != "PNG":  # which Pillow decodes whole for it
        return image.getexif().get(_ORIENTATION, 1) >= _SIDEWAYS
    exif = Image.Exif()
    exif.load(image.info.get("exif", b""))
    return exif.get(_ORIENTATION, 1) >= _SIDEWAYS


def read(picture: Picture, side: int | None = None) -> Image.Image:
    """The picture, upright, as RGB, or L if it is grey; what is transparent is white. ValueError says why it cannot be
    read, or that it is another one than when the job was opened. ``side``: of a square that it is to fill or more:
    then a JPEG is decoded to no more pixels than need be."""
    data, _ = _data(picture)
    if hashlib.sha256(data).hexdigest() != picture.sha256:
        raise ValueError(f"{picture.path}: changed since the job was opened")
    try:
        with _opened(picture, data) as image:
            if image.format == "PNG":  # the checksums of its pixels, which Pillow passes over as it decodes
                Image.open(io.BytesIO(data)).verify()
            if side:
                image.draft(None, (side, side))
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


def _data(picture: Picture) -> tuple[bytes, str | None]:
    """The file, and its version if a web server says so."""
    data, version = _read(picture, MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"{public(picture.path)}: a file of more than {MAX_BYTES >> 20:,} MiB")
    return data, version


def _read(picture: Picture, most: int) -> tuple[bytes, str | None]:
    try:
        if picture.url.startswith(web.SCHEMES):
            return web.read(picture.url, most)
        if "://" not in picture.url and not _is_plain(picture.url):
            raise ValueError(f"{picture.path}: a pipe or a device, expected a file")
        return read_bytes(picture.url, most), None
    except urllib.error.HTTPError as error:
        kind = Missing if error.code in (404, 410) else ValueError
        raise kind(f"{public(picture.path)}: the server answers {error.code} {error.reason}") from None
    except (urllib.error.URLError, TimeoutError, http.client.HTTPException) as error:
        raise ValueError(f"{public(picture.path)}: {error}") from None
    except NotFound:
        raise Missing(f"{picture.path}: not found") from None
    except (StorageError, OSError) as error:  # also of a disk that fails as it is read
        raise ValueError(f"{picture.path}: {error}") from None


def _is_plain(path: str) -> bool:
    """Whether opening it waits for nobody, as for the writer of a pipe, and reading it ends."""
    return not os.path.exists(path) or os.path.isfile(path) or os.path.isdir(path)


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
