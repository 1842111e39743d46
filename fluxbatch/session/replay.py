"""One row made again from its record, and its pixels compared.

record ─ the run's configuration, with what is given anew ─ Row ─ pixels ─ the same, the same to rounding, or other
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import yaml
from omegaconf import OmegaConf

from fluxbatch.config.schema import DType, Job, WeightsDType
from fluxbatch.distributed import backend
from fluxbatch.generation import prompts
from fluxbatch.generation.model_spec import ModelSpec, open_model_spec
from fluxbatch.generation.pictures import finish, prepare
from fluxbatch.results.damage import fault_of
from fluxbatch.results.image_files import EXTENSIONS, cropped, decode, pixel_sha256
from fluxbatch.results.inputs import folders_of, inputs_of
from fluxbatch.results.ledger import METADATA, Record, read_records
from fluxbatch.results.location import CONFIG
from fluxbatch.results.packed import open_images
from fluxbatch.results.resume import crop_padding, difference, levels, mix
from fluxbatch.results.writer import PROGRAM, encoded
from fluxbatch.storage import cache
from fluxbatch.storage.base import NotFound, Store, join
from fluxbatch.storage.log import object_of
from fluxbatch.storage.picture import found
from fluxbatch.storage.registry import open_store
from fluxbatch.types import Exit, Row, UserError

OF_A_ROW = ("index", "id", "prompt", "prompt_2", "seed", "height", "width", "num_inference_steps", "guidance_scale")


def replay(job: Job, wanted: str, save: str | None, anew: Sequence[str]) -> int:
    """Makes the image of the record ``wanted`` (a row's id, or the name of its image) under the run's own
    configuration, but for the keys of ``job`` in ``anew``. ``save``: the file that is written, or None."""
    saved = None if save is None else _place_of(save)
    store = open_store(join(job.output_dir, *([job.run_name] if job.run_name else [])))
    records, record = _records(store, wanted)
    recorded, facts = _recorded(store, job, record, anew)
    spec = _spec(recorded, anew)
    for line in difference(facts, spec.facts):
        print(f"changed since: {line}")
    made = _made(spec, recorded, records, record)
    if made is None:
        print(f"{wanted}: not finite this time")
        return Exit.REJECTED_ROWS
    if saved:
        target, name, form = saved
        target.write(name, encoded(record | {"sha256": pixel_sha256(made)}, made, form, recorded.output))
        print(f"{wanted}: saved as {save}")
    said, code = _compared(spec, store, record, made)
    print(f"{wanted}: {said}")
    return code


def _records(store: Store, wanted: str) -> tuple[list[Record], Record]:
    """All records of the run and the one that is ``wanted``."""
    # as of the last merge, which knows ids and places of rows that have moved; a run that was killed made more
    lines = store.read(METADATA).splitlines() if store.exists(METADATA) else []
    needs = {*OF_A_ROW, "lora", "file_name", "sha256"}
    records = [object_of(line, f"{join(store.url, METADATA)}:{number}", needs) for number, line in enumerate(lines, 1)]
    merged = {record["file_name"] for record in records}
    records += (record for record in read_records(store) if record["file_name"] not in merged)
    name = wanted.removeprefix(f"{store.url}/")  # as shells complete it
    found_by = (("id", wanted), ("file_name", name))
    record = next((record for key, value in found_by for record in records if record[key] == value), None)
    if record is None:
        raise UserError(f"id={wanted}: {store.url} has no record of such a row, nor of such an image")
    return records, record


def _recorded(store: Store, job: Job, record: Record, anew: Sequence[str]) -> tuple[Job, dict[str, Any]]:
    """The run's configuration, for the program that made this record, with what this command line says anew; and the
    facts that the run resolved."""
    try:
        found = yaml.safe_load(store.read(CONFIG))
        facts = found.pop("resolved")
    except (yaml.YAMLError, AttributeError, KeyError, TypeError):
        raise UserError(
            f"{join(store.url, CONFIG)}: expected what a run writes there; another start of the same job restores it"
        ) from None
    del found["lora_coverage"]  # said of the adapters, not asked of them
    config, given = OmegaConf.merge(OmegaConf.structured(Job), found), OmegaConf.structured(job)
    for key in anew:
        OmegaConf.update(config, key, OmegaConf.select(given, key))
    if "sharding.per_device_batch_size" not in anew and "per_device_batch_size" in record:
        config.sharding.per_device_batch_size = record["per_device_batch_size"]  # the last start may have had another
    recorded = OmegaConf.to_object(config)
    assert isinstance(recorded, Job)
    for key, kind in (("weights_dtype", WeightsDType), ("activations_dtype", DType)):  # perhaps this machine's choice
        setattr(recorded.hardware, key, kind[facts[key]])
    return recorded, facts


def _spec(recorded: Job, anew: Sequence[str]) -> ModelSpec:
    backend.set_compiler_flags(recorded.hardware.xla_flags, recorded.hardware.libtpu_init_args)
    programs = cache.find("jax_cache_dir", recorded.jax_cache_dir)
    if programs.error and "jax_cache_dir" in anew:
        raise programs.error  # else the directory was another machine's
    return open_model_spec(recorded, backend.start(recorded.hardware.platform.name, programs.path, programs.writable))


def _made(spec: ModelSpec, recorded: Job, records: Sequence[Record], record: Record) -> np.ndarray | None:
    """uint8 ``[H, W, 3]``, made by the programs that the run had; None where it is not finite."""
    # all rows decide how adapters are applied, as they did then
    made_of = {id(each): _row(each) for each in records}
    resolved = spec.resolve(list(made_of.values()))
    spec = spec.reading(resolved)
    pipeline = spec.pipeline(resolved)
    (row,) = spec.resolve([_row(record, folders_of(recorded))])
    # by the same programs: rounding is another in a batch of another size
    rows = [row] * (spec.data_parallel_size * recorded.sharding.per_device_batch_size)
    states = prompts.encode(rows, spec.inputs, pipeline, len(rows))
    pipeline.encoders_out(again=False)
    try:
        prepared = [prepare(row, spec.family)] * len(rows) if row.pictures else None
    except ValueError as error:
        raise UserError(f"{row.id}: {error}; expected the pictures that the row was made of") from None
    latents = pipeline.denoise(rows, states.batch(rows), prepared)
    pixels, finite = pipeline.decode(latents, row.height, row.width)
    return finish(row, cropped(row, np.asarray(pixels)[0]), spec.family) if np.asarray(finite)[0] else None


def _compared(spec: ModelSpec, store: Store, record: Record, made: np.ndarray) -> tuple[str, Exit]:
    """What is to be said of ``made`` beside the record and its image, and the exit code."""
    file, images = record["file_name"], open_images(store)
    if pixel_sha256(made) == record["sha256"]:
        said, wrong = f"the same pixels, sha256 {record['sha256']}", fault_of(images, record)
        if wrong == "":
            return said, Exit.OK
        but = f"{file} is not there" if wrong is None else f"{file} is damaged: {wrong}"
        return f"{said}; but {but}", Exit.REJECTED_ROWS
    try:
        stored = decode(images.read(file))
    except (NotFound, ValueError) as error:
        wrong = f"other pixels than were recorded; nothing to compare them with: {file}: {error}"
        return wrong, Exit.REJECTED_ROWS
    apart = int(np.abs(made.astype(int) - stored.astype(int)).max()) if made.shape == stored.shape else "another size"
    by = ", ".join(difference(record, {key: spec.provenance[key] for key in PROGRAM}, only_new=True))
    why = f"; made by another program, which rounds otherwise: {by}" if by else ""
    if apart == 1 and spec.weights_dtype == spec.activations_dtype == "float32":
        return f"the same to rounding: largest difference {apart} of 255{why}", Exit.OK
    return f"other pixels than {file}; largest difference {apart} of 255{why}", Exit.REJECTED_ROWS


def _place_of(path: str) -> tuple[Store, str, str]:
    """The folder, name and format that a path means; UserError where there is something already."""
    folder, _, name = os.path.expanduser(path).rpartition("/")
    formats = {extension: form for form, extension in EXTENSIONS.items()} | {".jpeg": "jpeg"}
    form = formats.get(os.path.splitext(name)[1].lower())
    if form is None:
        raise UserError(f"save={path}: expected a file's name that ends in {', '.join(formats)}")
    store = open_store(folder or ("/" if path.startswith("/") else "."))
    if store.exists(name):
        raise UserError(f"save={path}: is there already; expected the name of a new file")
    return store, name, form


def _row(record: dict[str, Any], folders: Sequence[str] = ()) -> Row:
    """``folders``: where relative paths of its pictures may begin; if none is given, they are not looked for."""
    pictures = {
        field: tuple(found(picture, folders) if folders else picture for picture in each)
        for field, each in inputs_of(record).items()
    }
    return Row(
        **{key: record[key] for key in OF_A_ROW},
        sized=not json.loads(record.get("crop") or "[]"),  # else it has its picture's size
        lora=tuple(sorted(mix(record).items())),
        sigmas=levels(record),
        negative_prompt=record.get("negative_prompt"),
        negative_prompt_2=record.get("negative_prompt_2"),
        true_cfg_scale=record.get("true_cfg_scale") or 1.0,
        strength=1.0 if record.get("strength") is None else record["strength"],
        padding_mask_crop=crop_padding(record),
        image=pictures.get("image", ()),
        mask_image=next(iter(pictures.get("mask_image", ())), None),
        control_image=next(iter(pictures.get("control_image", ())), None),
    )
