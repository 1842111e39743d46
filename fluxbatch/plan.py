"""``python -m fluxbatch.plan``: what a run with the same command line would do, need and cost; draws nothing.

Reads the manifest, the records of what is done and the checkpoint's headers, no weights, and needs no accelerator:
``target`` names the machine. Nor does it fetch a checkpoint whose sizes come with the package.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from fluxbatch.config import application
from fluxbatch.config.schema import Job
from fluxbatch.types import Exit, Row, UserError

if TYPE_CHECKING:
    from fluxbatch.distributed.chips import Target
    from fluxbatch.generation.model_spec import ModelSpec

STAND_INS = 256  # CPU devices in place of a target's chips: they cost 0.1 s


@dataclasses.dataclass
class PlanJob(Job):
    """The keys of a plan; the job's own stand beside them."""

    target: str | None = None  # v6e-4, v5e-8, v4-8, v5p-8, h100, a100-8, 2xh100-8, cpu; null: this machine
    price_per_chip_hour: float | None = None  # in any currency; null: no cost is shown
    aot: bool | None = None  # compile the largest image's programs ahead of time; null: for TPUs, if libtpu is there


def plan(job: PlanJob) -> int:
    """Prints the plan."""
    from fluxbatch.generation.model_spec import open_model_spec
    from fluxbatch.manifest.pictures import inspect
    from fluxbatch.manifest.rows import read_rows
    from fluxbatch.planning import forecast
    from fluxbatch.reporting import startup_warnings
    from fluxbatch.weights.published import open_or_known

    if job.price_per_chip_hour is not None and not 0 <= job.price_per_chip_hour < float("inf"):
        raise UserError(f"price_per_chip_hour={job.price_per_chip_hour}: expected a number from 0")
    target, devices = _machine(job)
    spec = open_model_spec(job, target.platform, devices, target.hosts, open_or_known)
    given, rejects = read_rows(job, size_multiple=spec.size_multiple)
    given, rejects = inspect(given, rejects, quarantine=job.manifest_errors.name == "quarantine")
    rows = spec.resolve(given)
    spec = spec.reading(rows)
    for line in startup_warnings.mixed(spec, given):
        print(f"fluxbatch: {line}", file=sys.stderr)
    for line in forecast.lines(
        job, spec, target, rows, _todo(job, spec, rows), rejects, job.price_per_chip_hour, _ahead(job, target)
    ):
        print(line, flush=True)
    return Exit.OK


def _todo(job: PlanJob, spec: ModelSpec, rows: Sequence[Row]) -> Sequence[Row]:
    """The rows that the output place has no image of, as far as its records can be read; writes nothing there."""
    from fluxbatch.reporting import startup_warnings
    from fluxbatch.results.ledger import read_records
    from fluxbatch.results.location import FORMAT, container_facts, read_job
    from fluxbatch.results.packed import open_images
    from fluxbatch.results.resume import difference, digest, key_under, match
    from fluxbatch.storage.base import NotFound, join
    from fluxbatch.storage.registry import open_store

    own = facts = json.loads(json.dumps({**spec.facts, **job.output.fingerprint()}))  # as the place has them
    try:
        store = open_store(join(job.output_dir, *([job.run_name] if job.run_name else [])))
        if (there := read_job(store)) is None:  # no start has been there
            return rows
        facts = {"layout": FORMAT} | container_facts(job.output.container) | facts
        if spec.checkpoint.unseen:  # whether it is the one that drew them cannot be told
            facts["model_digest"] = own["model_digest"] = there.get("model_digest")
        if changed := difference(there, facts):
            print(
                f"fluxbatch: every row is planned, as {store.url} holds a job with another configuration: "
                f"{'; '.join(changed)}",
                file=sys.stderr,
            )
            return rows
        lost = open_images(store).missing({record["file_name"] for record in read_records(store)})
        for line in startup_warnings.lost(sorted(lost)):
            print(f"fluxbatch: {line}", file=sys.stderr)
        done = {(r["id"], r["key"]) for r in read_records(store) if r["file_name"] not in lost}
        return match(
            rows, functools.partial(key_under, facts_digest=digest(own)), done, lambda: read_records(store)
        ).todo
    except NotFound:  # no start has been there
        return rows
    except (UserError, ValueError) as error:
        print(f"fluxbatch: every row is planned, as what is done cannot be read: {error}", file=sys.stderr)
        return rows


def _ahead(job: PlanJob, target: Target) -> bool:
    """Whether to compile ahead of time; UserError if that is asked for and cannot be."""
    from fluxbatch.planning import aot

    here, tpu = job.target is None or target.platform == "cpu", target.platform == "tpu"
    if job.aot is None:
        return tpu and not here and aot.available() and not job.hardware.stream_blocks
    if job.aot and not (here or tpu):
        raise UserError(f"aot=true, target={job.target}: expected a TPU slice, or no target for this machine")
    if job.aot and tpu and not here and not aot.available():
        raise UserError(f"aot=true, target={job.target}: libtpu is not installed: pip install 'fluxbatch[tpu]'")
    if job.aot and job.hardware.stream_blocks:
        raise UserError(
            "aot=true, hardware.stream_blocks=true: expected one of them, as streamed blocks are small programs of "
            "their own"
        )
    return job.aot


def _machine(job: PlanJob) -> tuple[Target, Any]:
    """The target and devices of this process in its place, None for all that there are."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU may be at work for others
    from fluxbatch.distributed import backend, chips

    wanted = job.hardware.platform.name
    if job.target is None:
        import jax

        platform, devices = backend.start(wanted, None), jax.devices()
        kind = devices[0].device_kind
        return chips.Target(
            f"this machine, {kind}", platform, chips.of_kind(kind), len(devices), jax.process_count()
        ), None
    target = chips.target(job.target)
    if wanted not in ("auto", target.platform):
        raise UserError(f"hardware={wanted}: expected hardware={target.platform} or auto for target={job.target}")
    return target, _stand_ins(target)


def _stand_ins(target: Target) -> list[Any]:
    import jax

    with contextlib.suppress(RuntimeError):  # a sweep's second plan: they are there
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", max(target.chips, STAND_INS))
    devices = jax.devices("cpu")
    if len(devices) < target.chips:
        raise UserError(f"target={target.name}: {target.chips} chips, expected at most {len(devices)} in this process")
    return devices[: target.chips]


def main() -> NoReturn:
    application.main(
        plan,
        schema=PlanJob,
        about="plan: what a run of the same command line would do, need and cost (target=…, price_per_chip_hour=…).",
    )


if __name__ == "__main__":
    main()
