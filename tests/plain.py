"""Jobs, rows and pixels for tests of the services: no Hydra, no JAX."""

from __future__ import annotations

import dataclasses

import numpy as np

from fluxbatch.config.schema import Container, ImageFormat, Job, LoraConfig, ManifestErrors, OnError, Output, Sampler
from fluxbatch.types import Row


def job(**changes) -> Job:
    plain = Job(
        sampler=Sampler(
            num_inference_steps=4,
            guidance_scale=0.0,
            true_cfg_scale=1.0,
            strength=0.6,
            resolution=64,
            height=None,
            width=None,
            max_sequence_length=64,
            sigmas=None,
        ),
        output=Output(
            format=ImageFormat.png,
            filename="flux_{i}",
            quality=90,
            png_level=1,
            gallery=False,
            container=Container.files,
            rows_per_shard=None,
        ),
        lora_config=LoraConfig([], [], [], [], [], True),
        prompt=None,
        prompt_2=None,
        negative_prompt=None,
        negative_prompt_2=None,
        image=None,
        mask_image=None,
        control_image=None,
        padding_mask_crop=None,
        manifest=None,
        prompt_column=None,
        prompt_template=None,
        num_images=1,
        seed=42,
        overwrite=False,
        manifest_errors=ManifestErrors["stop"],
        on_error=OnError["continue"],
        max_failures=None,
    )
    return dataclasses.replace(plain, **changes)


def row(index: int, **changes) -> Row:
    """Row ``index`` of a manifest without ids and seeds."""
    prompt = changes.pop("prompt", f"prompt {index}")
    plain = Row(
        index=index,
        id=str(index),
        prompt=prompt,
        prompt_2=prompt,
        seed=42 + index,
        height=64,
        width=64,
        num_inference_steps=4,
        guidance_scale=0.0,
        named="id" in changes,
        where=f"m.jsonl:{index + 1}",
    )
    return dataclasses.replace(plain, **changes)


def pixels(row: Row) -> np.ndarray:
    """A small picture that depends on what decides a row's pixels, uint8 [8, 8, 3]."""
    seed = [row.seed, *row.prompt.encode()]
    return np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
