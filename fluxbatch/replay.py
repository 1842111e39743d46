"""``python -m fluxbatch.replay id=… output_dir=… run_name=…``: makes one row again from its record and
compares the pixels. Exit code 0 when they are equal, 3 when they are not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

from omegaconf import MISSING, OmegaConf

from fluxbatch import cli
from fluxbatch.config import Job
from fluxbatch.types import Exit, Row, UserError


@dataclass
class ReplayJob(Job):
    id: str = MISSING


def replay(job: ReplayJob) -> int:
    """Makes the image of record ``job.id`` under the run's own configuration."""
    import json

    import numpy as np
    import yaml

    from fluxbatch import text
    from fluxbatch.dist import hosts
    from fluxbatch.engine import open_engine
    from fluxbatch.finish import CONFIG
    from fluxbatch.io.images import decode, pixel_sha256
    from fluxbatch.io.ledger import METADATA, read_records
    from fluxbatch.io.match import difference
    from fluxbatch.io.storage import join, open_store

    store = open_store(join(job.output_dir, *([job.run_name] if job.run_name else [])))
    found = yaml.safe_load(store.read(CONFIG))
    facts = found.pop("resolved")
    del found["lora_coverage"]  # said of the adapters, not asked of them
    recorded = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Job), found))
    assert isinstance(recorded, Job)
    # as of the last merge, which knows ids and places of rows that have moved; a run that was killed made more
    records = [json.loads(line) for line in store.read(METADATA).splitlines()] if store.exists(METADATA) else []
    merged = {record["file_name"] for record in records}
    records += (record for record in read_records(store) if record["file_name"] not in merged)
    record = next((record for record in records if record["id"] == job.id), None)
    if record is None:
        raise UserError(f"id={job.id}: {store.url} has no record of such a row")

    hosts.tell_compiler(recorded.hardware.xla_flags, recorded.hardware.libtpu_init_args)
    engine = open_engine(recorded, hosts.start(recorded.hardware.platform.name, recorded.jax_cache_dir))
    for line in difference(facts, engine.facts):
        print(f"changed since: {line}")
    # all rows decide how adapters are applied, as they did then
    pipeline = engine.pipeline(engine.resolve([_row(record) for record in records]))
    # by the same programs: half precision rounds otherwise in a batch of another size
    rows = [_row(record)] * (engine.ways * recorded.sharding.per_device_batch_size)
    states = text.encode(rows, engine.tokenizers, pipeline, len(rows))
    pixels, finite = pipeline.decode(pipeline.denoise(rows, *states.batch(rows)), record["height"], record["width"])
    made = np.asarray(pixels)[0]
    if not np.asarray(finite)[0]:
        print(f"{job.id}: not finite this time")
        return Exit.REJECTED_ROWS
    if pixel_sha256(made) == record["sha256"]:
        print(f"{job.id}: the same pixels, sha256 {record['sha256']}")
        return Exit.OK
    stored = decode(store.read(record["file_name"]))
    apart = np.abs(made.astype(int) - stored.astype(int)).max() if made.shape == stored.shape else "another size"
    print(f"{job.id}: other pixels than {record['file_name']}; largest difference {apart} of 255")
    return Exit.REJECTED_ROWS


def _row(record: dict[str, Any]) -> Row:
    keys = ("index", "id", "prompt", "prompt_2", "seed", "height", "width", "num_inference_steps", "guidance_scale")
    lora = record.get("lora")
    return Row(**{key: record[key] for key in keys}, lora=None if lora is None else tuple(sorted(lora.items())))


def main() -> NoReturn:
    cli.main(replay, schema=ReplayJob, rows=False, about="replay: make one row again from its record and compare the pixels.")


if __name__ == "__main__":
    main()
