"""The same job through diffusers: what `bench.py` compares fluxbatch with. ``peer.py CHECKPOINT MANIFEST OUT BATCH
eager|compiled``"""

from __future__ import annotations

import json
import os
import pathlib
import sys
import time


def main(checkpoint: str, manifest: str, out: str, batch: int, way: str) -> None:
    start = time.perf_counter()
    import torch
    from diffusers import DiffusionPipeline

    gpu = torch.cuda.is_available()
    pipe = DiffusionPipeline.from_pretrained(checkpoint, torch_dtype=torch.bfloat16 if gpu else torch.float32).to(
        "cuda" if gpu else "cpu"
    )
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
        first = chunk[0]
        pictures = pipe(
            prompt=[row["prompt"] for row in chunk], height=first["height"], width=first["width"],
            num_inference_steps=first["num_inference_steps"], guidance_scale=first["guidance_scale"],
            max_sequence_length=first["max_sequence_length"],
            generator=[torch.Generator("cpu").manual_seed(row["seed"]) for row in chunk]).images  # fmt: skip
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


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


if __name__ == "__main__":
    if len(sys.argv) != 6:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5])
