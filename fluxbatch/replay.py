"""``python -m fluxbatch.replay id=… output_dir=… run_name=… [save=…]``: makes one row again from its record and
compares the pixels; ``id`` is the row's, or the name of its image. Exit code 0 when they are equal, or equal to
rounding in float32; 3 when they are not.

What decides the picture is as it was recorded; ``pretrained_model_name_or_path=…`` and the other keys that
say where things are, ``hardware`` and ``sharding`` may be given anew.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from typing import Any, NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import MISSING, OmegaConf

from fluxbatch.config import application
from fluxbatch.config.schema import DType, Job, WeightsDType, manifests, shown
from fluxbatch.results.resume import levels, mix
from fluxbatch.storage.base import Store
from fluxbatch.storage.picture import located
from fluxbatch.storage.registry import open_store
from fluxbatch.types import Exit, Picture, Row, UserError

# Where things are, and how they are computed here: may be another than when the row was made
ANEW = re.compile(
    r"id|save|output_dir|run_name|debug|jax_cache_dir|(hardware|sharding)(\.(?!\w+_dtype)\w+)?"
    r"|model\.(\w+_name_or_path|revision|verify)"
    r"|lora(\.[^.]+\.(path|weight_name))?|lora_config\.(lora_model_name_or_path|weight_name)"
)

OF_A_ROW = ("index", "id", "prompt", "prompt_2", "seed", "height", "width", "num_inference_steps", "guidance_scale")


@dataclass
class ReplayJob(Job):
    id: str = MISSING  # which row, as metadata.jsonl calls it, or the name of its image
    save: str | None = None  # where the picture that was made goes, as again.png; null: nowhere


def replay(job: ReplayJob) -> int:
    """Makes the image of record ``job.id`` under the run's own configuration."""

    import numpy as np
    import yaml

    from fluxbatch.distributed import backend
    from fluxbatch.generation import prompts
    from fluxbatch.generation.model_spec import open_model_spec
    from fluxbatch.generation.pictures import prepare
    from fluxbatch.results.damage import fault_of
    from fluxbatch.results.image_files import decode, pixel_sha256
    from fluxbatch.results.ledger import METADATA, read_records
    from fluxbatch.results.location import CONFIG
    from fluxbatch.results.packed import open_images
    from fluxbatch.results.resume import difference
    from fluxbatch.results.writer import PROGRAM, encoded
    from fluxbatch.storage import cache
    from fluxbatch.storage.base import NotFound, join
    from fluxbatch.storage.log import object_of

    anew = _anew()
    saved = None if job.save is None else _place_of(job.save)
    store = open_store(join(job.output_dir, *([job.run_name] if job.run_name else [])))
    try:
        found = yaml.safe_load(store.read(CONFIG))
        facts = found.pop("resolved")
    except (yaml.YAMLError, AttributeError, KeyError, TypeError):
        raise UserError(
            f"{join(store.url, CONFIG)}: expected what a run writes there; another start of the same job restores it"
        ) from None
    # as of the last merge, which knows ids and places of rows that have moved; a run that was killed made more
    lines = store.read(METADATA).splitlines() if store.exists(METADATA) else []
    needs = {*OF_A_ROW, "lora", "file_name", "sha256"}
    records = [object_of(line, f"{join(store.url, METADATA)}:{number}", needs) for number, line in enumerate(lines, 1)]
    merged = {record["file_name"] for record in records}
    records += (record for record in read_records(store) if record["file_name"] not in merged)
    name = job.id.removeprefix(f"{store.url}/")  # as shells complete it
    found_by = (("id", job.id), ("file_name", name))
    record = next((record for key, value in found_by for record in records if record[key] == value), None)
    if record is None:
        raise UserError(f"id={job.id}: {store.url} has no record of such a row, nor of such an image")
    recorded = _recorded(job, found, facts, record, anew)

    backend.set_compiler_flags(recorded.hardware.xla_flags, recorded.hardware.libtpu_init_args)
    programs = cache.find("jax_cache_dir", recorded.jax_cache_dir)
    if programs.error and "jax_cache_dir" in anew:
        raise programs.error  # else the directory was another machine's
    spec = open_model_spec(recorded, backend.start(recorded.hardware.platform.name, programs.path, programs.writable))
    for line in difference(facts, spec.facts):
        print(f"changed since: {line}")
    # all rows decide how adapters are applied, as they did then
    folder = next(iter(manifests(recorded)), "").rpartition("/")[0]
    made_of = {id(each): _row(each, folder) for each in records}
    resolved = spec.resolve(list(made_of.values()))
    spec = spec.reading(resolved)
    pipeline = spec.pipeline(resolved)
    (row,) = spec.resolve([made_of[id(record)]])
    # by the same programs: rounding is another in a batch of another size
    rows = [row] * (spec.data_parallel_size * recorded.sharding.per_device_batch_size)
    states = prompts.encode(rows, spec.inputs, pipeline, len(rows))
    pipeline.encoders_out(again=False)
    try:
        prepared = [prepare(row, spec.family)] * len(rows) if row.pictures else None
    except ValueError as error:
        raise UserError(f"{job.id}: {error}; expected the pictures that the row was made of") from None
    latents = pipeline.denoise(rows, states.batch(rows), prepared)
    pixels, finite = pipeline.decode(latents, record["height"], record["width"])
    made = np.asarray(pixels)[0]
    if not np.asarray(finite)[0]:
        print(f"{job.id}: not finite this time")
        return Exit.REJECTED_ROWS

    if saved:
        target, name, form = saved
        target.write(name, encoded(record | {"sha256": pixel_sha256(made)}, made, form, recorded.output))
        print(f"{job.id}: saved as {job.save}")
    file, images = record["file_name"], open_images(store)
    if pixel_sha256(made) == record["sha256"]:
        wrong = fault_of(images, record)
        but = (
            ""
            if wrong == ""
            else f"; but {file} is not there"
            if wrong is None
            else f"; but {file} is damaged: {wrong}"
        )
        print(f"{job.id}: the same pixels, sha256 {record['sha256']}{but}")
        return Exit.REJECTED_ROWS if but else Exit.OK
    try:
        stored = decode(images.read(file))
    except (NotFound, ValueError) as error:
        print(f"{job.id}: other pixels than were recorded; nothing to compare them with: {file}: {error}")
        return Exit.REJECTED_ROWS
    apart = int(np.abs(made.astype(int) - stored.astype(int)).max()) if made.shape == stored.shape else "another size"
    by = ", ".join(difference(record, {key: spec.provenance[key] for key in PROGRAM}, only_new=True))
    why = f"; made by another program, which rounds otherwise: {by}" if by else ""
    if apart == 1 and spec.weights_dtype == spec.activations_dtype == "float32":
        print(f"{job.id}: the same to rounding: largest difference {apart} of 255{why}")
        return Exit.OK
    print(f"{job.id}: other pixels than {file}; largest difference {apart} of 255{why}")
    return Exit.REJECTED_ROWS


def _place_of(path: str) -> tuple[Store, str, str]:
    """The folder, name and format that a path means; UserError where there is something already."""
    from fluxbatch.results.image_files import EXTENSIONS

    folder, _, name = os.path.expanduser(path).rpartition("/")
    formats = {extension: form for form, extension in EXTENSIONS.items()} | {".jpeg": "jpeg"}
    form = formats.get(os.path.splitext(name)[1].lower())
    if form is None:
        raise UserError(f"save={path}: expected a file's name that ends in {', '.join(formats)}")
    store = open_store(folder or ("/" if path.startswith("/") else "."))
    if store.exists(name):
        raise UserError(f"save={path}: is there already; expected the name of a new file")
    return store, name, form


def _anew() -> list[str]:
    """The keys given on this command line; UserError for those that would change the picture."""
    words = HydraConfig.get().overrides.task
    keys = [override.key_or_group for override in OverridesParser.create().parse_overrides(list(words))]
    if wrong := [word for word, key in zip(words, keys, strict=True) if not ANEW.fullmatch(key)]:
        raise UserError(
            *(
                f"{shown(word)}: decides the picture, which is replayed as it was recorded; expected where things are "
                "(pretrained_model_name_or_path=…, jax_cache_dir=…), hardware=… or sharding=…"
                for word in wrong
            )
        )
    return keys


def _recorded(
    job: ReplayJob, found: dict[str, Any], facts: dict[str, Any], record: dict[str, Any], anew: list[str]
) -> Job:
    """The run's configuration, for the program that made this record, with what this command line says anew."""
    del found["lora_coverage"]  # said of the adapters, not asked of them
    config, given = OmegaConf.merge(OmegaConf.structured(Job), found), OmegaConf.structured(job)
    for key in anew:
        if key not in ("id", "save"):
            OmegaConf.update(config, key, OmegaConf.select(given, key))
    if (
        "sharding.per_device_batch_size" not in anew and "per_device_batch_size" in record
    ):  # the run's last start may have had another
        config.sharding.per_device_batch_size = record["per_device_batch_size"]
    recorded = OmegaConf.to_object(config)
    assert isinstance(recorded, Job)
    for key, kind in (("weights_dtype", WeightsDType), ("activations_dtype", DType)):  # perhaps this machine's choice
        setattr(recorded.hardware, key, kind[facts[key]])
    return recorded


def _row(record: dict[str, Any], folder: str) -> Row:
    """``folder``: where the manifest lies, in which relative paths of pictures begin."""
    pictures = {
        field: tuple(Picture(**each, url=located(each["path"], folder)) for each in found)
        for field, found in json.loads(record.get("inputs") or "{}").items()
    }
    return Row(
        **{key: record[key] for key in OF_A_ROW},
        lora=tuple(sorted(mix(record).items())),
        sigmas=levels(record),
        negative_prompt=record.get("negative_prompt"),
        negative_prompt_2=record.get("negative_prompt_2"),
        true_cfg_scale=record.get("true_cfg_scale") or 1.0,
        strength=1.0 if record.get("strength") is None else record["strength"],
        image=pictures.get("image", ()),
        mask_image=next(iter(pictures.get("mask_image", ())), None),
        control_image=next(iter(pictures.get("control_image", ())), None),
    )


def main() -> NoReturn:
    about = "replay: make one row again from its record and compare pixels (output_dir=…, run_name=…, id=…, save=…)."
    application.main(replay, schema=ReplayJob, rows=False, about=about)


if __name__ == "__main__":
    main()
