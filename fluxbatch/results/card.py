"""The data set's card: README.md of a finished run, as Hugging Face reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import huggingface_hub

from fluxbatch import __version__
from fluxbatch.config.schema import Container, Job
from fluxbatch.results.image_files import EXTENSIONS
from fluxbatch.results.location import CARD, METADATA, SHEET
from fluxbatch.results.shard_files import open_format
from fluxbatch.storage.base import Store

OURS = "<!-- written by fluxbatch at the end of each start; without this line it stays as you edit it -->"


def write_card(store: Store, job: Job, counts: Mapping[str, int], license: str | None) -> None:
    """Write README.md, unless somebody has made it theirs: what the images are, and how ``load_dataset`` finds them.

    ``counts``: ``images`` and ``rejected``. ``license``: of the model, where it is known. Raises StorageError.
    """
    if store.exists(CARD) and OURS not in store.read(CARD).decode("utf-8", "replace"):
        return
    container = job.output.container
    if container is Container.files:
        files = [METADATA, f"**/*{EXTENSIONS[job.output.format.name]}"]
    else:
        files = [f"shard-*{open_format(container).extension}"]
    data = huggingface_hub.DatasetCardData(
        pretty_name=job.run_name,
        task_categories=["text-to-image"],
        tags=["synthetic", "fluxbatch"],
        size_categories=_size(counts["images"]),
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": files}]}],
    )
    lines = [f"---\n{data.to_yaml()}\n---", OURS, "", f"# {_plain(job.run_name)}", ""]
    if store.exists(SHEET):
        lines += [f"![A sample of the images]({SHEET})", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {_plain(value)} |" for name, value in _said(job, counts, license))]
    lines += [
        "",
        "```python",
        "import datasets",
        "",
        'rows = datasets.load_dataset("PATH OR REPOSITORY", split="train")',
        "```",
        "",
        "Every row has its own seed, steps, guidance and model digest: `config.yaml` has the settings of the job.",
        f"Made with fluxbatch {__version__}.",
    ]
    store.write(CARD, "\n".join(lines).encode("utf-8", "replace") + b"\n")


def _said(job: Job, counts: Mapping[str, int], license: str | None) -> list[tuple[str, Any]]:
    sampler, output = job.sampler, job.output
    adapters = {name: adapter.scale for name, adapter in job.lora.items()}
    adapters |= dict(zip(job.lora_config.adapter_name, job.lora_config.scale, strict=True))
    size = f"{sampler.width or sampler.resolution} × {sampler.height or sampler.resolution}"
    said: dict[str, Any] = {
        "images": f"{counts['images']:,}",
        "rows without one": f"{counts['rejected']:,}" if counts["rejected"] else None,
        "model": f"{job.model.flux_name} (`{job.model.pretrained_model_name_or_path}`)",
        "the model's license": license,
        "LoRA": json.dumps(adapters, ensure_ascii=False) if adapters else None,
        "steps": sampler.num_inference_steps,
        "guidance": f"{sampler.guidance_scale:g}",
        "size": f"{size}, unless a row says otherwise",
        "format": output.format.name + ("" if output.format.name == "png" else f", quality {output.quality}"),
    }
    return [(name, value) for name, value in said.items() if value is not None]


def _plain(value: Any) -> str:
    """On one line, and within a cell of a table."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")


def _size(count: int) -> str:
    """The Hub's word for a data set's size."""
    steps = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B")
    return steps[min(max(0, len(str(count)) - 3), len(steps) - 1)]
