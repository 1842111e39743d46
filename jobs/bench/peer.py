"""The same job through diffusers: what `bench.py` compares fluxbatch with. ``peer.py CHECKPOINT MANIFEST OUT BATCH
eager|compiled``"""

from __future__ import annotations

import json
import os
import pathlib
import sys
import time
from typing import Any


def main(checkpoint: str, manifest: str, out: str, batch: int, way: str) -> None:
    start = time.perf_counter()
    import torch

    gpu, modular = torch.cuda.is_available(), os.path.exists(f"{checkpoint}/modular_model_index.json")
    opened = (flux3 if modular else classic)(checkpoint, torch.bfloat16 if gpu else torch.float32)
    pipe = opened.to("cuda" if gpu else "cpu")
    pipe.set_progress_bar_config(disable=True)
    loaded = time.perf_counter() - start
    if way == "compiled":
        pipe.transformer.compile()
        pipe.vae.decode = torch.compile(pipe.vae.decode)
    with open(manifest) as file:
        rows = [json.loads(line) for line in file]
    folder = pathlib.Path(out)
    folder.mkdir(parents=True)
    for i in range(0, len(rows), batch):
        chunk = rows[i : i + batch]
        same = {name: chunk[0][name] for name in ("height", "width", "num_inference_steps", "max_sequence_length")}
        generators = [torch.Generator("cpu").manual_seed(row["seed"]) for row in chunk]
        if modular:  # takes one prompt
            pictures = [
                pipe(prompt=row["prompt"], generator=generator, output="images", **same)[0]
                for row, generator in zip(chunk, generators, strict=True)
            ]
        else:
            prompts, guidance = [row["prompt"] for row in chunk], chunk[0]["guidance_scale"]
            pictures = pipe(prompt=prompts, generator=generators, guidance_scale=guidance, **same).images
        for row, picture in zip(chunk, pictures, strict=True):
            picture.save(folder / f"{row['id']}.png")
    peak = torch.cuda.max_memory_allocated() if gpu else None
    print(
        json.dumps(
            {"load": loaded, "peak": peak, "versions": f"torch {torch.__version__}, diffusers {_version('diffusers')}"}
        ),
        flush=True,
    )
    os._exit(0)  # what is compiled in threads of its own may hang at exit


class Processor:
    """What the pipeline needs of Qwen3-VL's, which reads pictures besides and cannot be made without torchvision."""

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.apply_chat_template = tokenizer, tokenizer.apply_chat_template


def classic(checkpoint: str, dtype: Any) -> Any:
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(checkpoint, torch_dtype=dtype)


def flux3(checkpoint: str, dtype: Any) -> Any:
    """FLUX.3 klein, a modular pipeline, without the model that writes longer prompts."""
    from diffusers import AutoencoderKLFlux2, Flux3Transformer2DModel
    from diffusers.modular_pipelines import Flux3DistilledAutoBlocks
    from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

    blocks = Flux3DistilledAutoBlocks()
    blocks.sub_blocks.pop("prompt_upsampler")
    pipe = blocks.init_pipeline()
    pipe.update_components(
        transformer=Flux3Transformer2DModel.from_pretrained(f"{checkpoint}/transformer", torch_dtype=dtype),
        vae=AutoencoderKLFlux2.from_pretrained(f"{checkpoint}/vae", torch_dtype=dtype),
        text_encoder=Qwen3VLForConditionalGeneration.from_pretrained(f"{checkpoint}/text_encoder", dtype=dtype),
        tokenizer=Processor(AutoTokenizer.from_pretrained(f"{checkpoint}/tokenizer")),
    )
    return pipe


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


if __name__ == "__main__":
    if len(sys.argv) != 6:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5])
