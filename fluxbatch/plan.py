"""``python -m fluxbatch.plan``: what a run with the same command line would do, need and cost; draws nothing.

Reads the manifest, the records of what is done and the checkpoint's headers, no weights, and needs no accelerator:
``target`` names the machine. Nor does it fetch a checkpoint whose sizes come with the package.
"""

from __future__ import annotations

import dataclasses
from typing import NoReturn

from fluxbatch.config import application
from fluxbatch.config.schema import Job


@dataclasses.dataclass
class PlanJob(Job):
    """The keys of a plan; the job's own stand beside them."""

    target: str | None = None  # v6e-4, v5e-8, v4-8, v5p-8, h100, a100-8, 2xh100-8, cpu; null: this machine
    price_per_chip_hour: float | None = None  # in any currency; null: no cost is shown
    aot: bool | None = None  # compile the largest image's programs ahead of time; null: for TPUs, if libtpu is there


def plan(job: PlanJob) -> int:
    """Prints the plan."""
    from fluxbatch.planning import plan

    return plan.show(job, job.target, job.price_per_chip_hour, job.aot)


def main() -> NoReturn:
    application.main(
        plan,
        schema=PlanJob,
        about="plan: what a run of the same command line would do, need and cost (target=…, price_per_chip_hour=…).",
    )


if __name__ == "__main__":
    main()
