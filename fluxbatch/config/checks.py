"""What a job's values may be: one line for each that cannot."""

from __future__ import annotations

import math
import os
import re
import string
from collections.abc import Iterator
from typing import Any

from fluxbatch.config.schema import (
    FLASH_BLOCKS,
    FLASH_BLOCKS_BACKWARD,
    MAX_STEPS,
    OFFLOAD,
    STANDARD_INPUT,
    Job,
    manifests,
    shown,
)
from fluxbatch.types import UserError

_MOST = {"max_sequence_length": 8192, "per_device_batch_size": 4096, "replica_count": 100_000}
_PLAIN = "a relative path without '..', hidden parts, backslashes and control characters"
COLONS = os.name != "nt"  # whether a directory's name may have them, as a time of day does


def check(job: Job, rows: bool = True) -> None:
    """Raise one `UserError` with a line for everything in ``job`` that cannot be.

    ``rows``: whether the command makes images, and so needs a manifest or a prompt.
    """
    problems = [f"{key}={shown(value)}: expected {wanted}" for key, value, wanted in _offenders(job, rows)]
    if problems:
        raise UserError(*problems)


def _offenders(job: Job, rows: bool) -> Iterator[tuple[str, Any, str]]:  # noqa: C901  # a flat list of checks
    """(key, value, what was expected) for each value that is wrong by itself or beside another."""
    if rows and job.manifest is None and job.prompt is None:
        yield "prompt", None, "a prompt, or manifest=FILE with many"
    if job.manifest is not None and job.prompt is not None:
        yield "prompt", job.prompt, f"either a prompt or a manifest, got manifest={shown(job.manifest)} as well"
    if job.prompt is not None and not job.prompt.strip():
        yield "prompt", job.prompt, "some text"

    for group, names in {
        "sampler": "num_inference_steps resolution height width max_sequence_length",
        "sharding": "per_device_batch_size",
        "": "num_images shard_size replica_count",
    }.items():
        for name in names.split():
            value = getattr(getattr(job, group) if group else job, name)
            if value is not None and not 1 <= value <= _MOST.get(name, value):
                most = f" to {_MOST[name]:,}" if name in _MOST else ""
                yield f"{group}.{name}".lstrip("."), value, f"a whole number from 1{most}"
    for key, value in {"seed": job.seed, "max_failures": job.max_failures, "replica_index": job.replica_index}.items():
        if value is not None and value < 0:
            yield key, value, "a whole number from 0"

    if not 0 < job.replica_expiry < math.inf:
        yield "replica_expiry", job.replica_expiry, "a number of seconds above 0"
    if job.text_cache_dir is not None and (
        not job.text_cache_dir.strip() or "://" in job.text_cache_dir or "\0" in job.text_cache_dir
    ):
        yield "text_cache_dir", job.text_cache_dir, "a local directory, or null"
    for key in ("text_cache_dir", "jax_cache_dir"):
        if (value := getattr(job, key)) not in (None, "auto") and os.path.exists(value) and not os.path.isdir(value):
            yield key, value, "a directory, found a file"
    if not 0 < job.text_cache_gigabytes <= 1e6:
        yield "text_cache_gigabytes", job.text_cache_gigabytes, "a number above 0; text_cache_dir=null keeps nothing"

    sampler = job.sampler
    if not (math.isfinite(sampler.guidance_scale) and sampler.guidance_scale >= 0):
        yield "sampler.guidance_scale", sampler.guidance_scale, "a number from 0 (dev: 3 to 5)"
    if sampler.sigmas is not None and (wanted := sigmas_wanted(sampler.sigmas)):
        yield "sampler.sigmas", sampler.sigmas, wanted
    weights, matmul = job.hardware.weights_dtype.name, job.hardware.matmul_dtype
    if matmul is not None and weights not in ("auto", matmul.name):
        yield "hardware.matmul_dtype", matmul.name, f"weights_dtype={matmul.name} or auto beside it, got {weights}"
    if not 0 <= sampler.step_cache_threshold <= 10:
        yield (
            "sampler.step_cache_threshold",
            sampler.step_cache_threshold,
            "a number from 0 to 10 (0.05 to 0.15 are usual)",
        )
    for key in ("base_shift", "max_shift"):
        value = getattr(sampler, key)
        if value is not None and not abs(value) <= 20:
            yield f"sampler.{key}", value, "a number from -20 to 20"
    for key in ("clip_model_name_or_path", "t5xxl_model_name_or_path", "vae_model_name_or_path"):
        if (value := getattr(job.model, key)) is not None and not value.strip():
            yield f"model.{key}", value, "a path or name, or null for the model's own"

    for kind, what in (("ici", "devices"), ("dcn", "slices")):
        axes = {f"sharding.{k}": v for k, v in vars(job.sharding).items() if k.startswith(f"{kind}_")}
        for key, value in axes.items():
            if value < 1 and value != -1:
                yield key, value, f"a number of {what} from 1, or -1 for all that are left"
        automatic = [key for key, value in axes.items() if value == -1]
        if len(automatic) > 1:
            yield automatic[1], -1, f"a number of {what}, as {automatic[0]} is already -1"

    if job.hardware.offload_encoders not in OFFLOAD:
        yield "hardware.offload_encoders", job.hardware.offload_encoders, "true, false, host or free"

    for key, flags in {"xla_flags": job.hardware.xla_flags, "libtpu_init_args": job.hardware.libtpu_init_args}.items():
        for flag in flags:
            if not re.fullmatch(r"--\w+(=\S*)?", flag):
                yield f"hardware.{key}", flag, "flags of the form --name=value"

    blocks = job.hardware.flash_block_sizes or {}
    for name, size in blocks.items():
        key = f"hardware.flash_block_sizes.{name}"
        if name not in FLASH_BLOCKS + FLASH_BLOCKS_BACKWARD:
            yield key, size, f"one of {', '.join(FLASH_BLOCKS)} as the name"
        elif name in FLASH_BLOCKS and (size < 1 or size % 128):
            yield key, size, "a multiple of 128"
    if (whole := blocks.get("block_kv")) and (part := blocks.get("block_kv_compute")) and whole % part:
        yield "hardware.flash_block_sizes.block_kv", whole, f"a multiple of block_kv_compute={part}"

    output = job.output
    if wanted := _template_fault(output.filename):
        yield "output.filename", output.filename, wanted
    if not 1 <= output.quality <= 100:
        yield "output.quality", output.quality, "1 to 100"
    if not 0 <= output.png_level <= 9:
        yield "output.png_level", output.png_level, "0 to 9"
    if output.rows_per_shard is not None and output.rows_per_shard < 1:
        yield "output.rows_per_shard", output.rows_per_shard, "a whole number from 1, or null for about 1 GB"
    if output.container.name != "files" and not re.fullmatch(r"[\w-]*\{i:0\d+\}[\w-]*", output.filename):
        wanted = f"{{i:09}}, as container={output.container.name} has keys of one width"
        yield "output.filename", output.filename, wanted
    if not job.output_dir.strip() or "\0" in job.output_dir:
        yield "output_dir", job.output_dir, "a path"
    yield from _manifest_offenders(job)
    for key, value in _paths(job):
        if lost_slash(value):
            yield key, value, value.replace(":/", "://", 1)
    if job.run_name is not None and not stays_inside(job.run_name, COLONS):
        yield "run_name", job.run_name, f"a name, or {_PLAIN}{'' if COLONS else ', and without colons'}"

    yield from _lora_offenders(job)


def _manifest_offenders(job: Job) -> Iterator[tuple[str, Any, str]]:
    if job.manifest is not None:
        is_one = isinstance(job.manifest, str)
        paths = [job.manifest] if is_one else job.manifest
        if not isinstance(paths, list) or not paths or not all(isinstance(p, str) for p in paths):
            yield "manifest", job.manifest, "a path, a pattern like prompts/*.jsonl, or a list of those"
        elif any(not path.strip() or "\0" in path for path in paths):
            yield "manifest", job.manifest, "a path"
        elif STANDARD_INPUT in paths:
            if not is_one:
                yield "manifest", job.manifest, f"{STANDARD_INPUT} alone, or files"
            if job.run_name is None:
                yield "run_name", None, "a name, as standard input has none"
            if job.sweep:
                yield "manifest", STANDARD_INPUT, "a file: standard input can be read once, and a sweep has many jobs"
    if job.prompt_template is not None:
        if not any(name for _, name in template_parts(job.prompt_template)):
            wanted = "names of fields in braces, as in 'a photo of {object}'; a brace that is text is doubled"
            yield "prompt_template", job.prompt_template, wanted
        if job.prompt_column is not None:
            yield "prompt_column", job.prompt_column, "null beside prompt_template, which makes the prompts"


def template_parts(template: str) -> list[tuple[str, str]]:
    """A prompt's template as (text, name of the field after it); none where it is not well-formed."""
    parts, text, position = [], "", 0
    while position < len(template):
        token = re.compile(r"\{\{|\}\}|\{([^{}!:]+)\}|[^{}]+").match(template, position)
        if token is None:
            return []
        position = token.end()
        if token[1] is None:
            text += token[0][0] if token[0] in ("{{", "}}") else token[0]
        else:
            parts.append((text, token[1].strip()))
            text = ""
    return [*parts, (text, "")]


def sigmas_wanted(given: Any) -> str | None:
    """What noise levels ought to be, if ``given`` is not that."""
    if not isinstance(given, list) or any(type(level) not in (int, float) for level in given):
        return "a list of numbers like [1.0, 0.75, 0.5]"
    if not 1 <= len(given) <= MAX_STEPS:
        return f"1 to {MAX_STEPS:,} numbers, got {len(given):,}"
    for i, level in enumerate(given):
        if not 0 < level <= 1:  # nor NaN
            return f"numbers above 0, at most 1: number {i + 1} is {level}"
        if i and level >= given[i - 1]:
            return f"each number below the one before it: number {i + 1} is {level} after {given[i - 1]}"
    return None


def _paths(job: Job) -> Iterator[tuple[str, str]]:
    """Every key that may hold an address, and its value."""
    for key in ("output_dir", "jax_cache_dir", "text_cache_dir", "to"):  # to: convert's
        yield key, getattr(job, key, None) or ""
    yield from (("manifest", path) for path in manifests(job) if isinstance(path, str))
    for key, value in vars(job.model).items():
        if key.endswith("_name_or_path"):
            yield f"model.{key}", value or ""
    yield from adapter_paths(job)


def adapter_paths(job: Job) -> Iterator[tuple[str, str]]:
    """The key and the path of every adapter."""
    for name, adapter in job.lora.items():
        yield f"lora.{name}.path", adapter.path
    for i, path in enumerate(job.lora_config.lora_model_name_or_path):
        yield f"lora_config.lora_model_name_or_path[{i}]", path


def lost_slash(path: str) -> bool:
    """Whether pathlib, say, has made gs:/bucket of gs://bucket."""
    return re.match(r"[A-Za-z][\w+.-]+:/(?!/)", path) is not None


def _lora_offenders(job: Job) -> Iterator[tuple[str, Any, str]]:
    arrays = {k: v for k, v in vars(job.lora_config).items() if isinstance(v, list)}
    if len({len(values) for values in arrays.values()}) > 1:
        lengths = ", ".join(f"{key} {len(values)}" for key, values in arrays.items())
        wanted = f"arrays of equal length, one entry per adapter; got {lengths}"
        yield "lora_config.lora_model_name_or_path", arrays["lora_model_name_or_path"], wanted
    names = job.lora_config.adapter_name
    scales = [(f"lora.{name}.scale", adapter.scale) for name, adapter in job.lora.items()]
    scales += [(f"lora_config.scale[{i}]", scale) for i, scale in enumerate(job.lora_config.scale)]
    for i, name in enumerate(names):
        if not name.strip() or name in names[:i] or name in job.lora:
            yield f"lora_config.adapter_name[{i}]", name, "a name that no other adapter has"
    for i, name in enumerate(job.lora_config.weight_name):
        if not isinstance(name, str | None):
            yield f"lora_config.weight_name[{i}]", name, "a file's name, or null"
    for key, scale in scales:
        if not abs(scale) <= 1e4:  # as of a row: beyond it bfloat16 only makes NaN
            yield key, scale, "a number, usually 0.0 to 1.0"


def _template_fault(template: str) -> str | None:
    """What a file name template ought to be, if this one is not."""
    wanted = "{i}, {thousand}, {id} and {seed} only, with format specs as in {i:06}"
    try:
        parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
        fields = {name for _, name, _, _ in parts}
        unknown = fields - {"i", "thousand", "id", "seed"}
        if unknown or any(conv or (name == "id" and spec) for _, name, spec, conv in parts):
            return wanted
        example = template.format(i=0, thousand=0, id="x", seed=0)
    except (ValueError, KeyError, IndexError):
        return wanted
    if not {"i", "id"} & fields:
        return "{i} or {id} in it, so that names differ"
    return None if stays_inside(example) else f"{_PLAIN}, and without colons"


def stays_inside(path: str, colons: bool = False) -> bool:
    """Whether every part of a relative path is a plain name on any file system or bucket (but for ``colons``)."""
    path = path.replace(":", "-") if colons else path
    return all(re.fullmatch(r"[^\s./\\\x00-\x1f:][^/\\\x00-\x1f:]*", part) for part in path.split("/"))
