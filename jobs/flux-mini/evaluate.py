"""Does flux-mini draw what it is told? Held-out captions through ``fluxbatch.run``, scored without the model.

    python jobs/flux-mini/evaluate.py [--model flux-mini] [--count 200] [--steps 4] [--output_dir outputs]
    python jobs/flux-mini/evaluate.py --spoil all     # the same with one thing broken at a time: a table

The background is the palette colour nearest to the border's median; the object is the nearest drawing
of the font on that background, over small shifts and sizes; the place is where the foreground's centre
lies. Exit status 1 when a share is under what is required.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import subprocess
import sys
from collections import Counter
from typing import Any

import data
import numpy as np
from PIL import Image, ImageFilter

SIDE = 32  # pixels of the square that objects are compared at
FOREGROUND = 36  # a pixel this far (of 255, in one channel) from the background is the object's
OFF_CENTER = 0.12  # of the picture's side: farther out, the object lies at a side
REQUIRED = {"object": 0.95, "color": 0.98, "place": 0.90}


def background(image: np.ndarray) -> np.ndarray:
    """Median ``[3]`` of the border of an image ``[h, w, 3]`` uint8."""
    n = max(2, min(image.shape[:2]) // 32)
    edges = (image[:n], image[-n:], image[:, :n], image[:, -n:])
    return np.median(np.concatenate([e.reshape(-1, 3) for e in edges]), axis=0)


def color_of(image: np.ndarray) -> str:
    """The palette's name of the background."""
    middle = background(image)
    return min(data.COLORS, key=lambda name: float(np.sum((np.array(data.COLORS[name]) - middle) ** 2)))


def foreground(image: np.ndarray) -> np.ndarray:
    """``[h, w]`` bool; a median filter keeps single noisy pixels out."""
    smooth = np.asarray(Image.fromarray(image).filter(ImageFilter.MedianFilter(3)), np.float32)
    return np.abs(smooth - background(image)).max(axis=-1) > FOREGROUND


def crops(image: np.ndarray, shifts=(-0.05, 0.0, 0.05), sizes=(0.92, 1.0, 1.08)) -> np.ndarray | None:
    """``[N, SIDE, SIDE, 3]`` float32: squares around the foreground, the background as it is in the palette."""
    mask = foreground(image)
    if not mask.any():
        return None
    (y0, y1), (x0, x1) = (np.flatnonzero(mask.any(axis))[[0, -1]] for axis in (1, 0))
    side = max(y1 - y0, x1 - x0) + 1
    canvas = np.pad(image, ((side, side), (side, side), (0, 0)), mode="edge")
    picture = Image.fromarray(canvas)
    y, x = side + (y0 + y1 + 1) / 2, side + (x0 + x1 + 1) / 2
    out = []
    for size in sizes:
        half = side * size / 2
        for dy in shifts:
            for dx in shifts:
                box = (x + dx * side - half, y + dy * side - half, x + dx * side + half, y + dy * side + half)
                out.append(np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BOX, box=box), np.float32))
    return np.stack(out)


@functools.cache
def templates(color: str) -> np.ndarray:
    """``[objects, SIDE, SIDE, 3]``: every object on this background."""
    scenes = [data.Scene("", color, (data.Item(name, 64, 64, data.CENTERED),)) for name in data.OBJECTS]
    return np.stack([crops(data.render(scene), (0.0,), (1.0,))[0] for scene in scenes])


def object_of(image: np.ndarray, color: str) -> str | None:
    """The nearest drawing; None where nothing stands out of the background."""
    found = crops(image)
    if found is None:
        return None
    known = templates(color).reshape(len(data.OBJECTS), -1)
    seen = found.reshape(len(found), -1)
    distance = (seen**2).sum(1)[:, None] - 2 * seen @ known.T + (known**2).sum(1)
    return list(data.OBJECTS)[int(distance.min(axis=0).argmin())]


def place_of(image: np.ndarray) -> str | None:
    """The side that the foreground lies at; None: the centre."""
    ys, xs = np.nonzero(foreground(image))
    if not len(ys):
        return None
    y, x = (float(v.mean()) + 0.5 for v in (ys, xs))
    y, x = y / image.shape[0] - 0.5, x / image.shape[1] - 0.5
    if max(abs(x), abs(y)) < OFF_CENTER:
        return None
    return ("left" if x < 0 else "right") if abs(x) > abs(y) else ("top" if y < 0 else "bottom")


def score(image: np.ndarray) -> dict[str, str | None]:
    """What a picture ``[h, w, 3]`` uint8 of one object shows."""
    color = color_of(image)
    return {"object": object_of(image, color), "color": color, "place": place_of(image)}


def tally(wanted: list[dict[str, str | None]], seen: list[dict[str, str | None]]) -> dict[str, tuple[int, int]]:
    """(right, asked) of object, color and place; places count where the caption names one."""
    asked = {key: [i for i, w in enumerate(wanted) if w[key] is not None] for key in REQUIRED}
    return {key: (sum(seen[i][key] == wanted[i][key] for i in rows), len(rows)) for key, rows in asked.items()}


def table(result: dict[str, tuple[int, int]]) -> str:
    lines = ["| | right | of | share | required |", "|---|---|---|---|---|"]
    lines += [f"| {k} | {right} | {of} | {right / of:.1%} | {REQUIRED[k]:.0%} |" for k, (right, of) in result.items()]
    return "\n".join(lines)


def draw(
    rows: list[dict[str, Any]], folder: pathlib.Path, program: list[str], overrides: list[str]
) -> list[dict[str, Any]]:
    """The records of a run over these rows."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    manifest = folder.parent / "eval.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    subprocess.run(
        [
            sys.executable,
            *program,
            f"manifest={manifest}",
            f"run_name={folder.name}",
            f"output_dir={folder.parent}",
            "overwrite=true",
            *overrides,
        ],
        check=True,
    )
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def psnr(image: np.ndarray, other: np.ndarray) -> float:
    """In dB, of arrays in 0..255; infinite where they are equal."""
    squared = np.mean((image.astype(np.float32) - other) ** 2)
    return float(10 * np.log10(255**2 / squared)) if squared else np.inf


def decibels(records: list[dict[str, Any]], folder: pathlib.Path, other: pathlib.Path) -> float:
    """PSNR between the pictures of two runs over the same rows; infinite where none differs."""
    pairs = [
        [np.asarray(Image.open(run / r["file_name"]).convert("RGB"), np.float32) for run in (folder, other)]
        for r in records
    ]
    return psnr(*map(np.stack, zip(*pairs, strict=True)))


def judged(records: list[dict[str, Any]], folder: pathlib.Path) -> list[dict[str, str | None]]:
    """What the pictures of a run show. A picture that was rejected shows nothing, and has no record."""
    return [score(np.asarray(Image.open(folder / record["file_name"]).convert("RGB"))) for record in records]


def spoilt_table(rows: dict[str, tuple[dict[str, tuple[int, int]], float]]) -> str:
    lines = ["| broken | object | color | place | PSNR to the unbroken |", "|---|---|---|---|---|"]
    for name, (result, psnr) in rows.items():
        shares = " | ".join(f"{right / of:.0%}" if of else "none drawn" for right, of in result.values())
        lines.append(f"| {name} | {shares} | {psnr:.1f} dB |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="flux-mini", help="embedded name or directory of the checkpoint")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--output_dir", type=pathlib.Path, default=pathlib.Path("outputs"))
    parser.add_argument(
        "--spoil", choices=["all"], help="also with RoPE, modulation, text and timestep broken, one at a time"
    )
    parser.add_argument("overrides", nargs="*", help="more for fluxbatch.run, such as guidance_scale=2")
    args = parser.parse_args()

    scenes = [
        {"prompt": s.caption, "object": s.items[0].name, "color": s.color, "place": s.place}
        for s in data.held_out_scenes(args.count)
    ]
    overrides = [f"pretrained_model_name_or_path={args.model}", f"num_inference_steps={args.steps}", *args.overrides]
    folder = args.output_dir / "eval"
    records = draw(scenes, folder, ["-m", "fluxbatch.run"], overrides)
    seen = judged(records, folder)
    result = tally(records, seen)
    wrong = Counter(
        (w["object"], s["object"]) for w, s in zip(records, seen, strict=True) if w["object"] != s["object"]
    )
    lines = [f"{args.model}, {args.steps} steps, {len(records)} held-out captions", "", table(result)]
    lines += (
        ["", "Taken for another: " + ", ".join(f"{a} for {b} ({n})" for (a, b), n in wrong.most_common(10))]
        if wrong
        else []
    )
    if args.spoil:
        rows = {"nothing": (result, np.inf)}
        for name in ("rope", "modulation", "text", "timestep"):
            spoilt = args.output_dir / f"eval-{name}"
            records = draw(scenes, spoilt, [str(pathlib.Path(__file__).with_name("spoil.py")), name], overrides)
            rows[name] = tally(records, judged(records, spoilt)), decibels(records, spoilt, folder)
        lines += ["", spoilt_table(rows)]
    (folder / "eval.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return int(any(right < REQUIRED[key] * of for key, (right, of) in result.items()))


if __name__ == "__main__":
    sys.exit(main())
