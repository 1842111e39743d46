"""A random toy checkpoint on disk, and its pictures drawn straight: NumPy in float64, one row, step after step."""

from __future__ import annotations

import itertools
import json
import pathlib

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

WIDTH, LAYERS, HEADS, CHANNELS, SCALE, TEXT, LINES, PAINT, POWER = 32, 3, 2, 6, 4, 24, 2, 16, 1.5
LENGTH = 20  # tokens of a prompt
CONFIGS = {
    "reader": {"_class_name": "ToyReader", "vocab_size": 258, "width": TEXT, "layers": LINES},
    "canvas": {
        "_class_name": "ToyCanvas",
        "channels": CHANNELS,
        "width": WIDTH,
        "layers": LAYERS,
        "heads": HEADS,
        "text_width": TEXT,
    },
    "painter": {"_class_name": "ToyPainter", "channels": CHANNELS, "width": PAINT, "scale": SCALE},
}
STEMS = {"reader": "letters", "canvas": "strokes", "painter": "strokes"}

Weights = dict[str, dict[str, np.ndarray]]  # component → name in its file → tensor


def weights(seed: int = 0) -> Weights:
    rng = np.random.default_rng(seed)

    def normal(*shape: int, size: float | None = None) -> np.ndarray:
        return (rng.normal(size=shape) * (size or shape[-1] ** -0.5)).astype(np.float32)

    def linear(name: str, d_out: int, d_in: int) -> dict[str, np.ndarray]:
        return {f"{name}.weight": normal(d_out, d_in), f"{name}.bias": normal(d_out, size=0.2)}

    reader = {"letters": normal(258, TEXT, size=1.0), "translation": normal(3, 3)}
    for i in range(LINES):
        reader |= {f"line_{i}/norm": 1 + normal(TEXT, size=0.2)}
        reader |= linear(f"line_{i}/inner", 2 * TEXT, TEXT) | linear(f"line_{i}/outer", TEXT, 2 * TEXT)
    canvas = (
        linear("brush/latents_in", WIDTH, CHANNELS)
        | linear("brush/text_in", WIDTH, TEXT)
        | linear("brush/time_in", WIDTH, 4)
    )
    canvas |= {"brush/place_in.weight": normal(WIDTH, 2)} | linear("brush/latents_out", CHANNELS, WIDTH)
    for i in range(LAYERS):
        sizes = {"time": (2, 1), "query": (1, 1), "key_value": (2, 1), "out": (1, 1), "up": (2, 1), "down": (1, 2)}
        for name, (d_out, d_in) in sizes.items():
            canvas |= linear(f"layer_{i}/{name}", d_out * WIDTH, d_in * WIDTH)
    painter = {"smear.weight": normal(PAINT, CHANNELS, 3, 3, size=0.15), "smear.bias": normal(PAINT, size=0.2)}
    painter |= linear("colours", 3 * SCALE**2, PAINT)
    return {"reader": reader, "canvas": canvas, "painter": painter}


def save(folder: pathlib.Path, tensors: Weights) -> pathlib.Path:
    """The checkpoint as a directory."""
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "ToyboxPipeline"}))
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps({"power": POWER}))
    for name, config in CONFIGS.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
        save_file(tensors[name], folder / name / f"{STEMS[name]}.safetensors")
    save_tokenizer(folder / "alphabet")
    return folder


def save_file_of_all(folder: pathlib.Path, tensors: Weights) -> pathlib.Path:
    """The same as one file without configs."""
    folder.mkdir(parents=True)
    save_tokenizer(folder / "alphabet")
    save_file(
        {f"{name}>{key}": value for name, own in tensors.items() for key, value in own.items()},
        folder / "toybox.safetensors",
    )
    return folder


def save_tokenizer(folder: pathlib.Path) -> None:
    """A token a byte, 2 + its number; 1 at the end; 0 behind it."""
    plain = [
        *range(33, 127),
        *range(161, 173),
        *range(174, 256),
    ]  # these bytes stand for themselves in byte-level tokenizers
    letters = {byte: chr(byte) for byte in plain}
    letters |= {byte: chr(256 + n) for n, byte in enumerate(sorted({*range(256)} - {*plain}))}
    vocabulary = {"<pad>": 0, "<end>": 1} | {letters[byte]: 2 + byte for byte in range(256)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 1)])
    made.add_special_tokens([AddedToken("<pad>", special=True), AddedToken("<end>", special=True)])
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    config = {"backend": "tokenizers", "pad_token": "<pad>", "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def adapter(seed: int, rank: int, alpha: float, *sites: tuple[str, str, int, int]) -> dict[str, np.ndarray]:
    """An adapter file: of each (component, module, outputs, inputs) its two factors."""
    rng = np.random.default_rng(seed)
    prefixes = {"canvas": "toybox:", "reader": "toybox-reader:"}
    found = {}
    for component, module, d_out, d_in in sites:
        key = prefixes[component] + module
        found[f"{key}.lora_A.weight"] = rng.normal(0, 0.5, (rank, d_in)).astype(np.float32)
        found[f"{key}.lora_B.weight"] = rng.normal(0, 0.5, (d_out, rank)).astype(np.float32)
        found[f"{key}.alpha"] = np.float32(alpha)
    return found


def merged(tensors: Weights, adapter: dict[str, np.ndarray], scale: float) -> Weights:
    tensors = {name: dict(own) for name, own in tensors.items()}
    for key, a in adapter.items():
        if key.endswith(".lora_A.weight"):
            module = key.removesuffix(".lora_A.weight")
            component = "reader" if module.startswith("toybox-reader:") else "canvas"
            name = module.partition(":")[2] + ".weight"
            factor = scale * float(adapter[f"{module}.alpha"]) / len(a)
            tensors[component][name] = tensors[component][name] + factor * (adapter[f"{module}.lora_B.weight"] @ a)
    return tensors


def draw(tensors: Weights, prompt: str, seed: int, height: int, width: int, steps: int | list[float]) -> np.ndarray:
    """The picture of one row, uint8 ``[height, width, 3]``. ``steps``: how many, or their noise levels."""
    reader, canvas, painter = (
        {key: value.astype(np.float64) for key, value in tensors[name].items()} for name in CONFIGS
    )

    def apply(own: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
        return x @ own[f"{name}.weight"].T + own[f"{name}.bias"]

    ids = [*(2 + byte for byte in prompt.encode()[: LENGTH - 1]), 1]
    text = reader["letters"][ids]
    for i in range(LINES):
        y = text / np.sqrt(np.mean(text**2, -1, keepdims=True) + 1e-5) * reader[f"line_{i}/norm"]
        text = text + apply(reader, f"line_{i}/outer", silu(apply(reader, f"line_{i}/inner", y + y.mean(0))))
    # a place without a token is a zero that is attended to
    read = np.concatenate([apply(canvas, "brush/text_in", text), np.zeros((LENGTH - len(ids), WIDTH))])

    rows, columns = height // SCALE, width // SCALE
    x = (
        np.random.Generator(np.random.Philox(seed))
        .standard_normal((rows * columns, CHANNELS), np.float32)
        .astype(np.float64)
    )
    places = np.array([(row / 8, column / 8) for row in range(rows) for column in range(columns)])
    given = [np.cos(step / steps * np.pi / 2) for step in range(steps)] if isinstance(steps, int) else steps
    levels = [*(level**POWER for level in given), 0.0]
    for now, then in itertools.pairwise(levels):
        time = silu(apply(canvas, "brush/time_in", np.array([now, now**2, np.cos(3 * now), np.sin(3 * now)])))
        h = apply(canvas, "brush/latents_in", x) + places @ canvas["brush/place_in.weight"].T
        for i in range(LAYERS):
            scale, gate = np.split(apply(canvas, f"layer_{i}/time", time), 2)
            y = normed(h) * (1 + scale)
            q = apply(canvas, f"layer_{i}/query", y)
            k, v = np.split(apply(canvas, f"layer_{i}/key_value", np.concatenate([read, y])), 2, -1)
            heads = [slice(n * WIDTH // HEADS, (n + 1) * WIDTH // HEADS) for n in range(HEADS)]
            attended = np.concatenate(
                [softmax(q[:, n] @ k[:, n].T / np.sqrt(WIDTH // HEADS)) @ v[:, n] for n in heads], -1
            )
            h = h + apply(canvas, f"layer_{i}/out", attended)
            h = h + gate * apply(canvas, f"layer_{i}/down", silu(apply(canvas, f"layer_{i}/up", normed(h))))
        clean = apply(canvas, "brush/latents_out", normed(h) * (1 + time))
        x = clean + then / now * (x - clean)

    grid = np.pad(x.reshape(rows, columns, CHANNELS), ((1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(grid, (3, 3), (0, 1))  # [h, w, C, 3, 3]
    smeared = silu(np.einsum("hwcij,ocij->hwo", windows, painter["smear.weight"]) + painter["smear.bias"])
    patches = np.tanh(apply(painter, "colours", smeared)).reshape(rows, columns, SCALE, SCALE, 3)
    return np.round((patches.transpose(0, 2, 1, 3, 4).reshape(height, width, 3) + 1) / 2 * 255).astype(np.uint8)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def normed(x: np.ndarray) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-5)


def softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)
