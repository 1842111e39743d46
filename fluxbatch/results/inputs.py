"""The pictures that images were made of, small, as pages show them beside these."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

from PIL import Image

from fluxbatch.config.schema import Job, manifests
from fluxbatch.storage.picture import found, located, read
from fluxbatch.storage.registry import find_files
from fluxbatch.types import Picture

MAX_CARRIED = 400  # pictures that a page carries; of more it shows the files themselves, where they are local
_SIDE = 256
_THREADS = 4  # each holds a decoded picture


def folders_of(job: Job) -> list[str]:
    """Where relative paths of the job's pictures may begin: beside its manifests, and in the working directory."""
    paths = [path for given in manifests(job) for path in find_files(given)]
    return [*dict.fromkeys([*(path.rpartition("/")[0] for path in paths), ""])]


def inputs_of(record: Mapping[str, Any]) -> dict[str, list[Picture]]:
    """The pictures of a record by field; where they lie is not known."""
    inputs = json.loads(record.get("inputs") or "{}")
    return {
        field: [Picture(each["path"], "", each["sha256"], each["height"], each["width"]) for each in pictures]
        for field, pictures in inputs.items()
    }


def addresses(records: Iterable[Mapping[str, Any]], folders: Sequence[str], page: str) -> dict[str, str]:
    """SHA-256 → an address for a page that lies in the folder ``page``: of a small copy that the address holds, or of
    the file, where there are too many. Pictures that are not there any more have none."""
    pictures = {p.sha256: p for record in records for each in inputs_of(record).values() for p in each}
    with ThreadPoolExecutor(_THREADS) as pool:
        if len(pictures) <= MAX_CARRIED:
            made = pool.map(lambda picture: _copy(found(picture, folders)), pictures.values())
        else:
            made = pool.map(lambda picture: _link(picture, folders, page), pictures.values())
        return {digest: address for digest, address in zip(pictures, made, strict=True) if address}


def first(record: Mapping[str, Any], folders: Sequence[str], side: int) -> Image.Image | None:
    """The first picture of a record, within a square of ``side`` pixels; None where there is none, or it cannot be
    read."""
    pictures = [picture for each in inputs_of(record).values() for picture in each]
    return _small(found(pictures[0], folders), side) if pictures else None


def _small(picture: Picture, side: int) -> Image.Image | None:
    try:
        image = read(picture, 2 * side)
    except ValueError:
        return None
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image.convert("RGB")


def carried(image: Image.Image) -> str:
    """An address that holds the image."""
    out = io.BytesIO()
    image.save(out, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"


def _copy(picture: Picture) -> str | None:
    image = _small(picture, _SIDE)
    return carried(image) if image else None


def _link(picture: Picture, folders: Sequence[str], page: str) -> str | None:
    if "://" in page:
        return None
    places = (located(picture.path, folder) for folder in folders)
    url = next((url for url in places if "://" not in url and os.path.isfile(url)), None)
    return url and quote(os.path.relpath(url, page))
