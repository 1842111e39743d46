"""``python -m fluxbatch.convert model=… to=DIR``: a checkpoint as checksummed arrays that load in exact ranges."""

from __future__ import annotations

import dataclasses
from typing import NoReturn

from omegaconf import MISSING

from fluxbatch import cli
from fluxbatch.config import Job
from fluxbatch.types import Exit


@dataclasses.dataclass
class Convert(Job):
    to: str = MISSING  # local directory or gs://bucket/prefix


def convert(job: Convert) -> int:
    """Writes the copy; ``pretrained_model_name_or_path=<to>`` reads it."""
    from fluxbatch.report import Report
    from fluxbatch.weights import convert as weights
    from fluxbatch.weights.checkpoint import open_checkpoint
    from fluxbatch.weights.native import dtype_of

    checkpoint = open_checkpoint(job.model)
    total = sum(component.plan().nbytes for component in checkpoint.components.values())
    with Report().bar(total, "converting", "B", unit_scale=True) as bar:
        new = weights.convert(checkpoint, job.to, dtype_of(job.hardware.weights_dtype.name), bar.update)
    print(f"{'written' if new else 'complete already'}: {job.to}")
    return Exit.OK


def main() -> NoReturn:
    cli.main(convert, schema=Convert, rows=False, about="convert: a checkpoint as checksummed arrays. to=DIR or gs://bucket/prefix")


if __name__ == "__main__":
    main()
