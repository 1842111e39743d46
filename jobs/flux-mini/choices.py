"""What each choice of dtype and cache costs flux-mini in quality, and gains in speed: one table, one run.

    python jobs/flux-mini/choices.py [--model flux-mini-dev --steps 20] [--count 200]

The captions of ``evaluate.py`` with each choice in turn, scored as there, and against the pictures of the first choice.
Speed is of generation alone, without starting, loading and compiling.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys

import data
import evaluate

EIGHT = ("int8", "float8_e4m3fn")
CHOICES = [
    "weights_dtype=float32",
    "weights_dtype=bfloat16",
    "weights_dtype=bfloat16 activations_dtype=bfloat16",
    *(f"weights_dtype={dtype}" for dtype in EIGHT),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="flux-mini")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--output_dir", type=pathlib.Path, default=pathlib.Path("outputs/choices"))
    parser.add_argument("choices", nargs="*", default=CHOICES, help="each a few keys for fluxbatch.run, in one word")
    args = parser.parse_args()

    scenes = data.held_out_scenes(args.count)
    common = [f"model={args.model}", f"num_inference_steps={args.steps}", "hardware=cpu"]
    first = None
    print("| choice | object | color | place | PSNR to the first | images/s |\n|---|---|---|---|---|---|")
    for index, choice in enumerate(args.choices):
        folder = args.output_dir / str(index)
        records = evaluate.draw(scenes, folder, ["-m", "fluxbatch.run"], [*common, *choice.split()])
        shares = evaluate.tally(records, evaluate.judged(records, folder))
        first = first or folder
        decibels = evaluate.decibels(records, folder, first)
        speed = json.loads((folder / "status.json").read_text())["speed"]["images_per_second"]
        said = " | ".join(f"{right / of:.1%}" for right, of in shares.values())
        print(f"| `{choice}` | {said} | {decibels:.1f} dB | {speed:.2f} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
