"""The shape of a job's configuration: types here, values in ``conf/``.

Each default has one home, a YAML file under ``conf/``; the fields here are ``MISSING``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from enum import Enum
from pathlib import PurePosixPath
from typing import Any

from omegaconf import MISSING


# omegaconf takes enums, not Literals; names equal values so that YAML and messages agree.
class DType(Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class WeightsDType(Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    int8 = "int8"
    float8_e4m3fn = "float8_e4m3fn"


class EightBits(Enum):
    int8 = "int8"
    float8_e4m3fn = "float8_e4m3fn"


class StepCaching(Enum):
    first_block = "first_block"


class Attention(Enum):
    auto = "auto"
    dot_product = "dot_product"
    flash = "flash"
    cudnn_flash_te = "cudnn_flash_te"


class Platform(Enum):
    auto = "auto"
    cpu = "cpu"
    gpu = "gpu"
    tpu = "tpu"


class ImageFormat(Enum):
    png = "png"
    jpeg = "jpeg"
    webp = "webp"


class Container(Enum):
    files = "files"
    webdataset = "webdataset"
    parquet = "parquet"


class ManifestErrors(Enum):
    stop = "stop"
    quarantine = "quarantine"


class Verify(Enum):
    none = "none"
    digest = "digest"


OnError = Enum("OnError", {"continue": "continue", "stop": "stop"})  # no class can have a member called continue
SIDES = {"png": 2**31 - 1, "jpeg": 65_500, "webp": 16_383}  # the most pixels of a file's width or height
MAX_SIDE = 16_384  # pixels that a row may ask for


@dataclass
class Model:
    flux_name: str = MISSING
    pretrained_model_name_or_path: str = MISSING
    revision: str | None = MISSING
    clip_model_name_or_path: str | None = MISSING
    t5xxl_model_name_or_path: str | None = MISSING
    vae_model_name_or_path: str | None = MISSING
    verify: Verify = MISSING


@dataclass
class Sampler:
    num_inference_steps: int = MISSING
    guidance_scale: float = MISSING
    true_cfg_scale: float = MISSING
    strength: float = MISSING
    resolution: int = MISSING
    height: int | None = MISSING  # None: the resolution
    width: int | None = MISSING
    max_sequence_length: int = MISSING
    sigmas: list[float] | None = MISSING  # None: evenly spaced
    step_cache: StepCaching | None = MISSING
    step_cache_threshold: float = MISSING
    # None: what the checkpoint's scheduler_config.json says
    time_shift: bool | None = MISSING
    base_shift: float | None = MISSING
    max_shift: float | None = MISSING


@dataclass
class Sharding:
    ici_data_parallelism: int = MISSING
    ici_fsdp_parallelism: int = MISSING
    ici_context_parallelism: int = MISSING
    ici_tensor_parallelism: int = MISSING
    dcn_data_parallelism: int = MISSING
    dcn_fsdp_parallelism: int = MISSING
    per_device_batch_size: int = MISSING


@dataclass
class Hardware:
    platform: Platform = MISSING
    weights_dtype: WeightsDType = MISSING
    activations_dtype: DType = MISSING
    matmul_dtype: EightBits | None = MISSING
    attention: Attention = MISSING
    split_head_dim: bool = MISSING
    offload_encoders: bool | str = MISSING
    stream_blocks: bool = MISSING
    flash_block_sizes: dict[str, int] | None = MISSING
    xla_flags: list[str] = MISSING
    libtpu_init_args: list[str] = MISSING


@dataclass
class Output:
    format: ImageFormat = MISSING
    filename: str = MISSING  # template over {i}, {thousand}, {id}, {seed}; extension added from the format
    quality: int = MISSING  # jpeg, webp
    png_level: int = MISSING
    gallery: bool = MISSING
    container: Container = MISSING
    rows_per_shard: int | None = MISSING  # None: about 1 GB of images

    def fingerprint(self) -> dict[str, Any]:
        """What of it decides a file's pixels: PNG loses none at any level."""
        return {"format": self.format.name} | ({} if self.format.name == "png" else {"quality": self.quality})


@dataclass
class LoraAdapter:
    path: str = MISSING
    weight_name: str | None = None
    scale: float = 1.0
    from_pt: bool = True


@dataclass
class LoraConfig:
    """The seed's arrays, one entry per adapter."""

    lora_model_name_or_path: list[str] = MISSING
    weight_name: list[Any] = MISSING
    adapter_name: list[str] = MISSING
    scale: list[float] = MISSING
    from_pt: list[bool] = MISSING
    strict: bool = MISSING


@dataclass
class Job:
    model: Model = field(default_factory=Model)
    sampler: Sampler = field(default_factory=Sampler)
    sharding: Sharding = field(default_factory=Sharding)
    hardware: Hardware = field(default_factory=Hardware)
    output: Output = field(default_factory=Output)
    lora: dict[str, LoraAdapter] = field(default_factory=dict)
    lora_config: LoraConfig = field(default_factory=LoraConfig)
    prompt: str | None = MISSING
    prompt_2: str | None = MISSING
    negative_prompt: str | None = MISSING
    negative_prompt_2: str | None = MISSING
    image: Any = MISSING  # a path or address, or a list of them
    mask_image: str | None = MISSING
    control_image: str | None = MISSING
    padding_mask_crop: int | None = MISSING
    manifest: Any = MISSING  # a path or a pattern, a list of those, - for standard input, or None
    prompt_column: str | None = MISSING  # of a TSV/CSV or JSONL; None: found, or prompt
    prompt_template: str | None = MISSING  # over the fields of a row
    num_images: int = MISSING  # per row that does not say
    seed: int = MISSING
    output_dir: str = MISSING
    run_name: str | None = MISSING
    overwrite: bool = MISSING
    manifest_errors: ManifestErrors = MISSING
    on_error: OnError = MISSING
    max_failures: int | None = MISSING
    shard_size: int = MISSING  # rows whose text is encoded together and whose records are compacted together
    replica_index: int | None = MISSING  # None: as the scheduler's environment says
    replica_count: int | None = MISSING
    replica_expiry: float = MISSING
    jax_cache_dir: str | None = MISSING
    text_cache_dir: str | None = MISSING
    text_cache_gigabytes: float = MISSING
    profile: bool = MISSING
    debug: bool = MISSING
    sweep: dict[str, Any] = field(default_factory=dict)  # what a multirun varies, filled in by the CLI


MAX_STEPS = 1_000
STANDARD_INPUT = "-"  # as a manifest
PACKED = r"(?i)\.(?:gz|zst|bz2|xz)$"  # how the name of a compressed manifest ends
OFFLOAD = (True, False, "host", "free")

# The forward kernel's block sizes; the others, pasted along from training set-ups, change nothing.
FLASH_BLOCKS = ("block_q", "block_kv", "block_kv_compute")
FLASH_BLOCKS_BACKWARD = ("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq", "block_kv_dq")


def default_run_name(job: Job) -> str:
    """The manifest's stem and a digest of its place; a prompt's slug and a digest of all that decides the image:
    so the same command finds its finished work again, and another manifest or seed has another directory.
    """
    if job.manifest is not None:
        paths = manifests(job)
        place = PurePosixPath(re.sub(PACKED, "", paths[0].replace("\\", "/")))
        stem = place.parent.name if "*" in place.name else place.stem
        places = [*map(whereabouts, paths)]
        return f"{slug(stem, 'manifest')}-{digest(places[0] if len(places) == 1 else places)}"
    dtypes: tuple[Enum, ...] = (job.hardware.weights_dtype, job.hardware.activations_dtype)
    dtypes += (job.hardware.matmul_dtype,) if job.hardware.matmul_dtype else ()
    text = (job.prompt, job.prompt_2, job.negative_prompt, job.negative_prompt_2, job.seed, job.num_images)
    crop = [] if job.padding_mask_crop is None else [job.padding_mask_crop]  # names are from before there was one
    pictures = (job.image, job.mask_image, job.control_image, *crop)
    groups: tuple[Any, ...] = (job.model, job.sampler, job.output, job.lora_config, *job.lora.values())
    parts = [*(dataclasses.asdict(group) for group in groups), list(job.lora), text, pictures, dtypes]
    return f"{slug(job.prompt or '', 'prompt')}-{digest(parts)}"


def manifests(job: Job) -> list[str]:
    """What ``job.manifest`` names: paths and patterns, as they were given."""
    given = job.manifest
    return given if isinstance(given, list) else [] if given is None else [given]


def whereabouts(path: str) -> str:
    """The address of a file from any directory; a link that is the file itself may come to lead elsewhere."""
    folder, name = os.path.split(path)
    return path if "://" in path else os.path.join(os.path.realpath(folder or "."), name)


def digest(value: Any) -> str:
    """Six hex digits that tell one JSON-like value (enums allowed) from another."""
    text = json.dumps(value, sort_keys=True, default=lambda member: member.name)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:6]


def slug(text: str, otherwise: str) -> str:
    """At most 40 characters of ``text`` that are safe in a file name."""
    words = re.sub(r"\W+", "-", text.lower()).strip("-_")
    return (words if len(words) <= 40 else words[:41].rpartition("-")[0] or words[:40]) or otherwise


def shown(value: Any) -> str:
    """A value on one line, at most 80 characters of it."""
    text = "null" if value is None else str(value)
    text = text.replace("\n", "\\n")
    return text if len(text) <= 80 else text[:77] + "..."
