"""The shape of a job's configuration: types here, values in ``conf/``.

Each default has one home, a YAML file under ``conf/``; the fields here are ``MISSING``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING


# omegaconf takes enums, not Literals; names equal values so that YAML and messages agree.
DType = Enum("DType", {n: n for n in ("auto", "float32", "bfloat16", "float16")})
Attention = Enum("Attention", {n: n for n in ("auto", "dot_product", "flash", "cudnn_flash_te")})
Platform = Enum("Platform", {n: n for n in ("auto", "cpu", "gpu", "tpu")})
ImageFormat = Enum("ImageFormat", {n: n for n in ("png", "jpeg", "webp")})
ManifestErrors = Enum("ManifestErrors", {n: n for n in ("stop", "quarantine")})
OnError = Enum("OnError", {n: n for n in ("continue", "stop")})


@dataclass
class Model:
    flux_name: str = MISSING
    pretrained_model_name_or_path: str = MISSING
    revision: str | None = MISSING
    clip_model_name_or_path: str | None = MISSING
    t5xxl_model_name_or_path: str | None = MISSING


@dataclass
class Sampler:
    num_inference_steps: int = MISSING
    guidance_scale: float = MISSING
    resolution: int = MISSING
    height: int | None = MISSING  # None: the resolution
    width: int | None = MISSING
    max_sequence_length: int = MISSING
    # None: what the checkpoint's scheduler_config.json says
    time_shift: bool | None = MISSING
    base_shift: float | None = MISSING
    max_shift: float | None = MISSING


@dataclass
class Sharding:
    ici_data_parallelism: int = MISSING
    ici_fsdp_parallelism: int = MISSING
    per_device_batch_size: int = MISSING


@dataclass
class Hardware:
    platform: Platform = MISSING
    weights_dtype: DType = MISSING
    activations_dtype: DType = MISSING
    attention: Attention = MISSING
    split_head_dim: bool = MISSING
    offload_encoders: bool = MISSING
    flash_block_sizes: dict[str, int] | None = MISSING


@dataclass
class Output:
    format: ImageFormat = MISSING
    filename: str = MISSING  # template over {i}, {id}, {seed}; extension added from the format
    quality: int = MISSING  # jpeg, webp
    png_level: int = MISSING
    gallery: bool = MISSING


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
    manifest: str | None = MISSING
    prompt_column: str | None = MISSING  # of a TSV/CSV; None: found
    num_images: int = MISSING  # per row that does not say
    seed: int = MISSING
    output_dir: str = MISSING
    run_name: str | None = MISSING
    overwrite: bool = MISSING
    manifest_errors: ManifestErrors = MISSING
    on_error: OnError = MISSING
    max_failures: int | None = MISSING
    shard_size: int = MISSING  # rows whose text is encoded together and whose records are compacted together
    jax_cache_dir: str | None = MISSING
    debug: bool = MISSING
