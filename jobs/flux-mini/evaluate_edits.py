"""Does flux-mini-kontext edit as it is told? Held-out edits through ``fluxbatch.run``, scored without the model.

    python jobs/flux-mini/evaluate_edits.py [--model flux-mini-kontext] [--count 200] [--output_dir outputs]

An edit is right when the object, the background and the place are those asked for; an outline, when no other object's
outline is nearer. PSNR to the picture that the recipe would draw tells whether the rest was kept. Exit status 1 when a
share is under what is required.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys

import data
import edits
import evaluate
import numpy as np
from PIL import Image

REQUIRED = 0.90


def is_right(edit: edits.Edit, image: np.ndarray) -> bool:
    """Whether a picture ``[h, w, 3]`` uint8 shows what the edit asks for."""
    (item,) = edit.after.items
    if edit.kind != "outline":
        return evaluate.score(image) == {"object": item.name, "color": edit.after.color, "place": edit.after.place}
    known = {
        name: dataclasses.replace(edit.after, items=(dataclasses.replace(item, name=name),)) for name in data.OBJECTS
    }
    distance = {
        name: np.square(data.outline(data.render(scene)).astype(np.float32) - image).mean()
        for name, scene in known.items()
    }
    return min(distance, key=distance.__getitem__) == item.name


def table(asked: list[edits.Edit], images: list[np.ndarray]) -> tuple[str, bool]:
    """What was right by kind, and whether it is enough."""
    right = np.array([is_right(edit, image) for edit, image in zip(asked, images, strict=True)])
    near = np.array([evaluate.psnr(edit.pictures()[1], image) for edit, image in zip(asked, images, strict=True)])
    lines = ["| edit | right | of | share | PSNR to the drawn |", "|---|---|---|---|---|"]
    kinds = np.array([edit.kind for edit in asked])
    for kind, chosen in [*((kind, kinds == kind) for kind in edits.KINDS), ("all", kinds != "")]:
        share = right[chosen].mean()
        lines.append(
            f"| {kind} | {right[chosen].sum()} | {chosen.sum()} | {share:.1%} | {near[chosen].mean():.1f} dB |"
        )
    return "\n".join(lines), bool(right.mean() >= REQUIRED)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="flux-mini-kontext", help="embedded name or directory of the checkpoint")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--output_dir", type=pathlib.Path, default=pathlib.Path("outputs"))
    parser.add_argument("overrides", nargs="*", help="more for fluxbatch.run, such as num_inference_steps=8")
    args = parser.parse_args()

    asked = edits.held_out_edits(args.count)
    before = args.output_dir / "eval-before"
    before.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, edit in enumerate(asked):
        Image.fromarray(edit.pictures()[0]).save(before / f"{i}.png")
        rows.append({"prompt": edit.instruction, "image": f"{before.name}/{i}.png", "kind": edit.kind})
    folder = args.output_dir / "eval-edits"
    overrides = [f"pretrained_model_name_or_path={args.model}", "model.flux_name=flux-mini-kontext", *args.overrides]
    records = evaluate.draw(rows, folder, ["-m", "fluxbatch.run"], overrides)
    images = [np.asarray(Image.open(folder / record["file_name"]).convert("RGB")) for record in records]
    lines, enough = table(asked, images)
    text = f"{args.model}, {len(records)} held-out edits\n\n{lines}\n"
    (folder / "eval.md").write_text(text)
    print(text, end="")
    return int(not enough)


if __name__ == "__main__":
    sys.exit(main())
