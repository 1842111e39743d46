"""``python -m fluxbatch.run``: a manifest of prompts in, pictures and a metadata manifest out.

    manifest row → shard → batch → encode → denoise → decode → write → manifest
"""

from __future__ import annotations

from typing import NoReturn

from fluxbatch import cli
from fluxbatch.config import Job
from fluxbatch.types import Exit


def run(job: Job) -> int:
    """Makes the images that the job still lacks; returns the exit code."""
    # Here and not above: --help and --cfg must not wait for JAX.
    import contextlib
    from itertools import chain

    from fluxbatch import batching, dealing, finish, remarks, text
    from fluxbatch.dist import hosts
    from fluxbatch.engine import open_engine
    from fluxbatch.io import cache
    from fluxbatch.io.images import EXTENSIONS
    from fluxbatch.io.ledger import Ledger
    from fluxbatch.io.manifest import read_rows
    from fluxbatch.io.place import LOCK, open_place
    from fluxbatch.io.storage import StorageError
    from fluxbatch.report import Report
    from fluxbatch.tracing import Trace
    from fluxbatch.writer import TooManyFailures, Writer

    replica = dealing.replica(job)
    hosts.tell_compiler(job.hardware.xla_flags, job.hardware.libtpu_init_args)
    programs = cache.find("jax_cache_dir", job.jax_cache_dir)
    platform = hosts.start(job.hardware.platform.name, programs.path, programs.writable)
    report = Report(quiet=not hosts.is_first())
    with hosts.drain_on_signals() as drain, contextlib.ExitStack() as until_end:
        with report.stage("open"), hosts.together():  # whatever can be wrong, before a weight is read
            if programs.error:
                raise programs.error
            engine = open_engine(job, platform)
            given, bad_lines = read_rows(job, multiple=engine.multiple)
            rows = engine.resolve(given)  # each row with its mix of LoRA adapters
            store = open_place(job)
            facts = engine.facts | job.output.facts()
            start = hosts.start_id()
            with hosts.first_goes_first():
                if hosts.is_first():
                    until_end.enter_context(store.hold(LOCK, shared=replica.count > 1))
                ledger = Ledger(store, facts, writer_id=f"{start}-{hosts.index()}", overwrite=job.overwrite)
                todo = ledger.remaining(rows, bad_lines, look=hosts.is_first())
            cached = job.text_cache_dir is not None and job.text_cache_gigabytes
            alike = chain([replica, job.run_name, facts, cached], ((row.id, ledger.key(row)) for row in rows))
            hosts.agree("manifest or configuration", alike)
            todo = hosts.as_first_sees(todo, rows)
            names = ledger.names(todo, job.output.filename, EXTENSIONS[job.output.format.name])
            hosts.agree("ledger", names.items())
            texts = engine.text_cache(job.text_cache_dir, job.text_cache_gigabytes, todo)
            batch_size = job.sharding.per_device_batch_size * engine.ways
            work = dealing.open_work(job, replica, store, ledger, start, rows, todo, batch_size)

            counted = {"rows": len(rows), "before": len(rows) - len(todo)}
            outcome = finish.Outcome(job, engine, store, ledger, report, work, **counted)
            outcome.started()
            if hosts.is_first():
                strangers, lost = remarks.strangers(ledger.strangers, job.overwrite), remarks.lost(ledger.lost)
                for line in chain(lost, remarks.lines(job, engine, given, rows, todo), strangers):
                    report.say(line)

        drain.draws()
        until_end.enter_context(outcome.unforeseen())
        try:
            shards = work.shards(drain)
            if not drain.asked() and (first := next(shards, None)):
                pipeline, report.peak, progress = engine.pipeline(rows, report), engine.peak, work.progress
                with (
                    pipeline.compiling(todo, batch_size, engine.tokenizers.lengths),
                    report.stage("generate"),
                    report.bar(progress.rows, "images", "img") as bar,
                    Trace(store if job.profile and hosts.is_first() else None, report.say) as trace,
                    Writer(store, ledger, job, facts=engine.record, floor=engine.floor, on_image=lambda *row: bar.update(progress.through(*row))) as writer,
                ):
                    for shard in chain([first], shards):
                        states = text.encode(shard.rows, engine.tokenizers, pipeline, batch_size, texts)
                        report.encoded(states)
                        pipeline.encoders_out(again=engine.keep or not work.ends_with(shard))
                        for batch in shard.batches:
                            if drain.asked():
                                break
                            padded = batching.padded(batch.rows, batch.size)
                            latents = pipeline.denoise(padded, *states.batch(padded))
                            pixels, finite = pipeline.decode(latents, *batch.shape)
                            took = report.drawing(len(batch.rows), sum(engine.flops(*batch.shape, row.num_inference_steps) for row in batch.rows))
                            trace.batch(pixels)
                            own, (pixels, finite) = hosts.own(batch.rows, pixels, finite)
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
    cli.main(run)


if __name__ == "__main__":
    main()
