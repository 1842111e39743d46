"""The plan of a job: its machine, its rows that are still to be made, and what is said of them.

job, target ─ machine or its stand-ins ─ model's headers ─ rows without an image yet ─ lines
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from collections.abc import Sequence

import jax

from fluxbatch.config.schema import Job
from fluxbatch.distributed import backend, chips
from fluxbatch.distributed.chips import Target
from fluxbatch.generation.model_spec import ModelSpec, open_model_spec
from fluxbatch.manifest.pictures import inspect
from fluxbatch.manifest.rows import read_rows
from fluxbatch.planning import aot, forecast
from fluxbatch.reporting import startup_warnings
from fluxbatch.results.ledger import read_records
from fluxbatch.results.location import FORMAT, container_facts, read_job
from fluxbatch.results.packed import open_images
from fluxbatch.results.resume import difference, digest, id_of, key_under, match
from fluxbatch.storage.base import NotFound, join
from fluxbatch.storage.registry import open_store
from fluxbatch.types import Exit, Row, UserError
from fluxbatch.weights.published import open_or_known

STAND_INS = 256  # CPU devices in place of a target's chips: they cost 0.1 s


def show(job: Job, target: str | None, price: float | None, ahead: bool | None) -> int:
    """Prints the plan. ``target``: a machine by name, None for this one. ``price``: of a chip for an hour, None for no
    cost. ``ahead``: whether to compile ahead of time, None where it is cheap."""
    if price is not None and not 0 <= price < float("inf"):
        raise UserError(f"price_per_chip_hour={price}: expected a number from 0")
    machine, devices = _machine(job, target)
    compiles = _compiles(job, target, machine.platform, ahead)
    spec = open_model_spec(job, machine.platform, devices, machine.hosts, open_or_known)
    given, rejects = read_rows(job, size_multiple=spec.size_multiple)
    given, rejects = inspect(given, rejects, quarantine=job.manifest_errors.name == "quarantine")
    rows = spec.resolve(given)
    spec = spec.reading(rows)
    for line in startup_warnings.mixed(spec, given):
        print(f"fluxbatch: {line}", file=sys.stderr)
    for line in forecast.lines(job, spec, machine, rows, _todo(job, spec, rows), rejects, price, compiles):
        print(line, flush=True)
    return Exit.OK


def _todo(job: Job, spec: ModelSpec, rows: Sequence[Row]) -> Sequence[Row]:
    """The rows that the output place has no image of, as far as its records can be read; writes nothing there."""
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
        done = {id_of(r) for r in read_records(store) if r["file_name"] not in lost}
        return match(
            rows, functools.partial(key_under, facts_digest=digest(own)), done, lambda: read_records(store)
        ).todo
    except NotFound:  # no start has been there
        return rows
    except (UserError, ValueError) as error:
        print(f"fluxbatch: every row is planned, as what is done cannot be read: {error}", file=sys.stderr)
        return rows


def _compiles(job: Job, target: str | None, platform: str, ahead: bool | None) -> bool:
    """Whether to compile ahead of time; UserError if that is asked for and cannot be."""
    here, tpu = target is None or platform == "cpu", platform == "tpu"
    if ahead is None:
        return tpu and not here and aot.available() and not job.hardware.stream_blocks
    if ahead and not (here or tpu):
        raise UserError(f"aot=true, target={target}: expected a TPU slice, or no target for this machine")
    if ahead and tpu and not here and not aot.available():
        raise UserError(f"aot=true, target={target}: libtpu is not installed: pip install 'fluxbatch[tpu]'")
    if ahead and job.hardware.stream_blocks:
        raise UserError(
            "aot=true, hardware.stream_blocks=true: expected one of them, as streamed blocks are small programs of "
            "their own"
        )
    return ahead


def _machine(job: Job, target: str | None) -> tuple[Target, list[jax.Device] | None]:
    """The target and devices of this process in its place, None for all that there are."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU may be at work for others
    wanted = job.hardware.platform.name
    if target is None:
        platform, devices = backend.start(wanted, None), jax.devices()
        kind = devices[0].device_kind
        return Target(f"this machine, {kind}", platform, chips.of_kind(kind), len(devices), jax.process_count()), None
    machine = chips.target(target)
    if wanted not in ("auto", machine.platform):
        raise UserError(f"hardware={wanted}: expected hardware={machine.platform} or auto for target={target}")
    return machine, _stand_ins(machine)


def _stand_ins(target: Target) -> list[jax.Device]:
    with contextlib.suppress(RuntimeError):  # a sweep's second plan: they are there
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", max(target.chips, STAND_INS))
    devices = jax.devices("cpu")
    if len(devices) < target.chips:
        raise UserError(f"target={target.name}: {target.chips} chips, expected at most {len(devices)} in this process")
    return devices[: target.chips]
