"""``python -m fluxbatch.status output_dir=… [run_name=…]``: how far a run is, and which of its replicas are lost.

``watch=true`` looks again every few seconds until nothing is at work any more. Without ``run_name`` every run in the
place is shown.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from typing import NoReturn

from fluxbatch.config import application
from fluxbatch.config.schema import Job
from fluxbatch.results.location import runs
from fluxbatch.results.watch import Watch, lines

_EVERY = 5.0  # seconds between looks


@dataclasses.dataclass
class StatusJob(Job):
    watch: bool = False  # true: look again every few seconds, until nothing is at work there


def status(job: StatusJob) -> int:
    """Shows the run, or every run below ``job.output_dir``."""
    watches = [Watch(store) for store in runs(job)]
    shown = 0
    while True:
        views = [watch.look() for watch in watches]
        text = [line for view in views for line in lines(view)]
        if shown and sys.stdout.isatty():
            print(f"\x1b[{shown}F\x1b[J", end="")
        print(*text, sep="\n", flush=True)
        shown = len(text)
        if not job.watch or not any(view.goes_on for view in views):
            return 0
        time.sleep(_EVERY)


def main() -> NoReturn:
    application.main(
        status,
        schema=StatusJob,
        rows=False,
        about="status: how far a run is, and which replicas are lost (output_dir=…, run_name=…, watch=true).",
    )


if __name__ == "__main__":
    main()
