"""Whether an image is the one that its record speaks of."""

from __future__ import annotations

import json

from fluxbatch.results.image_files import decode, parameters, pixel_sha256
from fluxbatch.results.images import Images, Record
from fluxbatch.results.inputs import inputs_of
from fluxbatch.results.resume import crop_padding
from fluxbatch.storage.base import NotFound


def fault_of(images: Images, record: Record) -> str | None:
    """What is wrong with the record's image: "" nothing, None it is not there."""
    try:
        data = images.read(record["file_name"])
        pixels = decode(data)
        said = {} if record["file_name"].endswith(".png") else parameters(data)
    except NotFound:
        return None
    except ValueError as error:
        return str(error)
    height, width, _ = pixels.shape
    expected = _size(record)
    if (height, width) != expected:
        return f"{width}×{height} pixels, but {expected[1]}×{expected[0]} were recorded"
    if record["file_name"].endswith(".png"):
        return "" if pixel_sha256(pixels) == record["sha256"] else "other pixels than were recorded"
    # a lossy file's own pixels are not what was hashed
    if said and (said.get("key"), said.get("sha256")) != (record["key"], record["sha256"]):
        return f"another image than was recorded: of id {json.dumps(said.get('id'), ensure_ascii=False)}"
    return ""


def _size(record: Record) -> tuple[int, int]:
    """Height and width of the record's image: of the picture that it was pasted into, if it was."""
    if crop_padding(record) is None:
        return record["height"], record["width"]
    picture = inputs_of(record)["image"][0]
    return picture.height, picture.width
