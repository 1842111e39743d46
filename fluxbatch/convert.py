"""``python -m fluxbatch.convert model=… to=DIR``: a checkpoint as checksummed arrays that load in exact ranges."""

from __future__ import annotations

import dataclasses
import re
from typing import NoReturn

from omegaconf import MISSING

from fluxbatch.config import application
from fluxbatch.config.checks import adapter_paths
from fluxbatch.config.schema import DType, Job, shown
from fluxbatch.shards import progress
from fluxbatch.types import Exit, UserError, at_home


@dataclasses.dataclass
class Convert(Job):
    to: str = MISSING  # local directory, gs://bucket/prefix or s3://bucket/prefix


def convert(job: Convert) -> int:
    """Writes the copy; ``pretrained_model_name_or_path=<to>`` reads it."""
    from fluxbatch.weights import checkpoint, convert, zarr

    for key, path in adapter_paths(job):
        why = "a copy is of the checkpoint alone, and is used with any adapter"
        raise UserError(f"{key}: {path!r}: expected no adapter: {why}")
    if (name := job.hardware.weights_dtype.name) not in DType.__members__:
        dtypes = ", ".join(DType.__members__)
        raise UserError(
            f"hardware.weights_dtype={name}: expected one of {dtypes}: any copy is quantized as it is loaded"
        )
    to = at_home("to", job.to)
    if not to.strip() or "\0" in to or re.match(r"(?!(?:gs|s3)://[^/]|file://)\w+://", to):
        raise UserError(f"to={shown(job.to)}: expected a directory, gs://bucket/prefix or s3://bucket/prefix")
    opened = checkpoint.open_checkpoint(job.model)
    total = sum(component.whole_plan().nbytes for component in opened.components.values())
    with progress.bar(total, "converting", "B", unit_scale=True) as bar:
        new = convert.convert(opened, to, zarr.dtype_of(name), bar.update)
    print(f"{'written' if new else 'complete already'}: {to}")
    return Exit.OK


def main() -> NoReturn:
    application.main(
        convert,
        schema=Convert,
        rows=False,
        about="convert: a checkpoint as checksummed arrays. to=DIR or gs://bucket/prefix",
    )


if __name__ == "__main__":
    main()
