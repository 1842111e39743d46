"""``python -m fluxbatch.run``: a manifest of prompts in, pictures and a metadata manifest out.

    manifest row → shard → batch → encode → denoise → decode → write → manifest
"""

from __future__ import annotations

from typing import NoReturn

from fluxbatch.config import application
from fluxbatch.config.schema import Job
from fluxbatch.types import Exit


def run(job: Job) -> int:
    """Makes the images that the job still lacks; returns the exit code."""
    # Here and not above: --help and --cfg must not wait for JAX.
    import contextlib
    from itertools import chain

    from fluxbatch.distributed import process_group
    from fluxbatch.generation import prompts
    from fluxbatch.generation.model_spec import open_engine
    from fluxbatch.manifest.rows import read_rows
    from fluxbatch.reporting import startup_warnings
    from fluxbatch.reporting.profiler import Trace
    from fluxbatch.reporting.terminal import Report
    from fluxbatch.results.image_files import EXTENSIONS
    from fluxbatch.results.ledger import Ledger
    from fluxbatch.results.location import LOCK, open_place
    from fluxbatch.results.writer import TooManyFailures, Writer
    from fluxbatch.session import finalize
    from fluxbatch.shards import assignment, batching
    from fluxbatch.storage import cache
    from fluxbatch.storage.base import StorageError

    replica = assignment.replica(job)
    process_group.tell_compiler(job.hardware.xla_flags, job.hardware.libtpu_init_args)
    programs = cache.find("jax_cache_dir", job.jax_cache_dir)
    platform = process_group.start(job.hardware.platform.name, programs.path, programs.writable)
    report = Report(quiet=not process_group.is_first())
    with process_group.drain_on_signals() as drain, contextlib.ExitStack() as until_end:
        with report.stage("open"), process_group.together():  # whatever can be wrong, before a weight is read
            if programs.error:
                raise programs.error
            engine = open_engine(job, platform)
            given, bad_lines = read_rows(job, multiple=engine.multiple)
            rows = engine.resolve(given)  # each row with its mix of LoRA adapters
            store = open_place(job)
            facts = engine.facts | job.output.facts()
            start = process_group.start_id()
            with process_group.first_goes_first():
                if process_group.is_first():
                    until_end.enter_context(store.hold(LOCK, shared=replica.count > 1))
                ledger = Ledger(store, facts, writer_id=f"{start}-{process_group.index()}", overwrite=job.overwrite)
                todo = ledger.remaining(rows, bad_lines, look=process_group.is_first())
            cached = job.text_cache_dir is not None and job.text_cache_gigabytes
            alike = chain([replica, job.run_name, facts, cached], ((row.id, ledger.key(row)) for row in rows))
            process_group.agree("manifest or configuration", alike)
            todo = process_group.as_first_sees(todo, rows)
            names = ledger.names(todo, job.output.filename, EXTENSIONS[job.output.format.name])
            process_group.agree("ledger", names.items())
            texts = engine.text_cache(job.text_cache_dir, job.text_cache_gigabytes, todo)
            batch_size = job.sharding.per_device_batch_size * engine.ways
            work = assignment.open_work(job, replica, store, ledger, start, rows, todo, batch_size)

            counted = {"rows": len(rows), "before": len(rows) - len(todo)}
            outcome = finalize.Outcome(job, engine, store, ledger, report, work, **counted)
            outcome.started()
            if process_group.is_first():
                strangers, lost = startup_warnings.strangers(ledger.strangers, job.overwrite), startup_warnings.lost(ledger.lost)
                for line in chain(lost, startup_warnings.lines(job, engine, given, rows, todo), strangers):
                    report.say(line)

        drain.draws()
        until_end.enter_context(outcome.unforeseen())
        try:
            shards = work.shards(drain)
            if not drain.asked() and (first := next(shards, None)):
                pipeline, report.peak, progress = engine.pipeline(rows, report), engine.peak, work.progress
                with (
                    pipeline.compiling(todo, batch_size, engine.inputs),
                    report.stage("generate"),
                    report.bar(progress.rows, "images", "img") as bar,
                    Trace(store if job.profile and process_group.is_first() else None, report.say) as trace,
                    Writer(store, ledger, job, facts=engine.record, floor=engine.floor, on_image=lambda *row: bar.update(progress.through(*row))) as writer,
                ):
                    for shard in chain([first], shards):
                        states = prompts.encode(shard.rows, engine.inputs, pipeline, batch_size, texts)
                        report.encoded(states)
                        pipeline.encoders_out(again=engine.keep or not work.ends_with(shard))
                        for batch in shard.batches:
                            if drain.asked():
                                break
                            padded = batching.padded(batch.rows, batch.size)
                            latents = pipeline.denoise(padded, states.batch(padded))
                            pixels, finite = pipeline.decode(latents, *batch.shape)
                            took = report.drawing(len(batch.rows), sum(engine.flops(*batch.shape, row.num_inference_steps) for row in batch.rows))
                            trace.batch(pixels)
                            own, (pixels, finite) = process_group.own(batch.rows, pixels, finite)
                            if own:
                                progress.beside(own[-1], len(batch.rows) - len(own))
                                writer.put(own, names, pixels, finite, took.result)
                        writer.compact()
                        if drain.stopped:
                            break
            return outcome.finished(Exit.PREEMPTED if drain.stopped else None)
        except (StorageError, TooManyFailures) as error:
            return outcome.stopped(error)


def main() -> NoReturn:
    application.main(run)


if __name__ == "__main__":
    main()
