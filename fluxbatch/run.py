"""``python -m fluxbatch.run``: a manifest of prompts in, images and a metadata manifest out.

manifest line → Row → shard → batch → prompt embeddings → latents → pixels → image file + record → merged metadata
"""

from __future__ import annotations

import functools
from typing import NoReturn

from fluxbatch.config import application
from fluxbatch.config.schema import Job
from fluxbatch.generation.kept import KeptPipeline


def run(job: Job, kept: KeptPipeline | None = None) -> int:
    """Generate the images that the job still lacks; return the exit code. ``kept``: the weights of the sweep's last
    job."""
    from fluxbatch.session.session import open_session  # not above: --help and --cfg must not wait for JAX

    with open_session(job, kept) as session:  # 1. whatever can be wrong, before a weight is read
        with session.generator() as generator, session.writer() as writer:
            for shard in session.shards():  # 2. this replica's work; ends early when the run is asked to stop
                embeds = generator.encode(shard)  # 3. each distinct prompt once
                for batch in session.batches(unreadable=writer.reject):
                    latents = generator.denoise(batch, embeds)  # 4. from each row's own noise
                    writer.submit(batch, generator.decode(batch, latents))  # 5. files and records, behind the devices
                writer.commit(shard)  # 6. its records become one object
    return session.exit_code  # 7. metadata merged, gallery and status written


def main() -> NoReturn:
    application.main(functools.partial(run, kept=KeptPipeline()))


if __name__ == "__main__":
    main()
