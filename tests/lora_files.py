"""Adapter files as the trainers write them, for a FLUX of any size: names, shapes, random numbers."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from fluxbatch.weights.source import DTYPES

Shapes = dict[str, tuple[int, int]]  # module → out, in
Tensors = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Size:
    width: int = 3072
    double: int = 19
    single: int = 38
    channels: int = 64
    context: int = 4096
    pooled: int = 768
    guidance: bool = True
    head: int = 128
    factor: int = 16  # of LoKr
    clip: tuple[int, int, int] = (768, 3072, 12)  # width, hidden, layers
    t5: tuple[int, int, int, int] = (4096, 4096, 10240, 24)  # width, all heads, hidden, layers


FULL = Size()
# tests/golden/dev: two blocks of each kind, guidance
DEV = Size(
    width=32,
    double=2,
    single=2,
    channels=16,
    context=32,
    pooled=32,
    head=16,
    factor=4,
    clip=(32, 64, 2),
    t5=(32, 32, 64, 2),
)


def bfl(s: Size) -> Shapes:
    """Linear layers by Black Forest Labs' names."""
    d = s.width
    found = {"img_in": (d, s.channels), "txt_in": (d, s.context)}
    for name, width in (("time_in", 256), ("vector_in", s.pooled), *([("guidance_in", 256)] if s.guidance else [])):
        found |= {f"{name}.in_layer": (d, width), f"{name}.out_layer": (d, d)}
    for i in range(s.double):
        for half in ("img", "txt"):
            at = f"double_blocks.{i}.{half}_"
            found |= {
                at + "mod.lin": (6 * d, d),
                at + "attn.qkv": (3 * d, d),
                at + "attn.proj": (d, d),
                at + "mlp.0": (4 * d, d),
                at + "mlp.2": (d, 4 * d),
            }
    for i in range(s.single):
        at = f"single_blocks.{i}."
        found |= {at + "linear1": (7 * d, d), at + "linear2": (d, 5 * d), at + "modulation.lin": (3 * d, d)}
    return found | {"final_layer.linear": (s.channels, d), "final_layer.adaLN_modulation.1": (2 * d, d)}


def diffusers(s: Size) -> Shapes:
    """The same by diffusers' names, where fused layers are apart."""
    d, t = s.width, "time_text_embed."
    found = {"x_embedder": (d, s.channels), "context_embedder": (d, s.context)}
    embedders = {"timestep": 256, "text": s.pooled} | ({"guidance": 256} if s.guidance else {})
    for name, width in embedders.items():
        found |= {f"{t}{name}_embedder.linear_1": (d, width), f"{t}{name}_embedder.linear_2": (d, d)}
    for i in range(s.double):
        at = f"transformer_blocks.{i}."
        found |= {at + "norm1.linear": (6 * d, d), at + "norm1_context.linear": (6 * d, d)}
        names = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
        found |= {f"{at}attn.{n}": (d, d) for n in names}
        for ff in ("ff", "ff_context"):
            found |= {f"{at}{ff}.net.0.proj": (4 * d, d), f"{at}{ff}.net.2": (d, 4 * d)}
    for i in range(s.single):
        at = f"single_transformer_blocks.{i}."
        found |= {f"{at}attn.{n}": (d, d) for n in ("to_q", "to_k", "to_v")}
        found |= {at + "norm.linear": (3 * d, d), at + "proj_mlp": (4 * d, d), at + "proj_out": (d, 5 * d)}
    return found | {"norm_out.linear": (2 * d, d), "proj_out": (s.channels, d)}


def clip(s: Size) -> Shapes:
    d, hidden, layers = s.clip
    shapes = {f"self_attn.{n}": (d, d) for n in ("q_proj", "k_proj", "v_proj", "out_proj")} | {
        "mlp.fc1": (hidden, d),
        "mlp.fc2": (d, hidden),
    }
    return {f"text_model.encoder.layers.{i}.{name}": shape for i in range(layers) for name, shape in shapes.items()}


def t5(s: Size) -> Shapes:
    d, inner, hidden, layers = s.t5
    shapes = {f"0.SelfAttention.{n}": (inner, d) for n in "qkv"} | {"0.SelfAttention.o": (d, inner)}
    shapes |= {f"1.DenseReluDense.{n}": (hidden, d) for n in ("wi_0", "wi_1")} | {"1.DenseReluDense.wo": (d, hidden)}
    return {f"encoder.block.{i}.layer.{name}": shape for i in range(layers) for name, shape in shapes.items()}


def xlabs(s: Size) -> Shapes:
    d = s.width
    found = {}
    for i in range(s.double):
        for n in "12":
            found |= {
                f"double_blocks.{i}.processor.qkv_lora{n}": (3 * d, d),
                f"double_blocks.{i}.processor.proj_lora{n}": (d, d),
            }
    for i in range(s.single):
        found |= {
            f"single_blocks.{i}.processor.qkv_lora": (3 * d, d),
            f"single_blocks.{i}.processor.proj_lora": (d, 5 * d),
        }
    return found


def apart(s: Size) -> Shapes:
    """OneTrainer's newer names: BFL's, with the fused layers apart."""
    d, found = s.width, {}
    for name, (out, width) in bfl(s).items():
        if name.endswith("attn.qkv"):
            found |= {f"{name}.{i}": (d, width) for i in range(3)}
        elif name.endswith("linear1"):
            found |= {f"{name}.{i}": (d if i < 3 else 4 * d, width) for i in range(4)}
        else:
            found[name] = (out, width)
    return found


def diffsynth(s: Size) -> Shapes:
    """DiffSynth-Studio's names of the same layers as Black Forest Labs'."""
    names = {"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "final_proj_out",
             "final_layer.adaLN_modulation.1": "final_norm_out.linear"}  # fmt: skip
    for old, new in (("time_in", "time_embedder.timestep_embedder"), ("vector_in", "pooled_text_embedder"),
                     ("guidance_in", "guidance_embedder.timestep_embedder")):  # fmt: skip
        names |= {f"{old}.in_layer": f"{new}.0", f"{old}.out_layer": f"{new}.2"}
    ends = {"linear1": "to_qkv_mlp", "linear2": "proj_out", "modulation.lin": "norm.linear"}
    for old, new in (("img", "a"), ("txt", "b")):
        ends |= {f"{old}_mod.lin": f"norm1_{new}.linear", f"{old}_attn.qkv": f"attn.{new}_to_qkv",
                 f"{old}_attn.proj": f"attn.{new}_to_out", f"{old}_mlp.0": f"ff_{new}.0",
                 f"{old}_mlp.2": f"ff_{new}.2"}  # fmt: skip
    found = {}
    for name, shape in bfl(s).items():
        stack, _, rest = name.partition(".")
        layer, _, end = rest.partition(".")
        found[f"{stack.removeprefix('double_')}.{layer}.{ends[end]}" if "blocks" in stack else names[name]] = shape
    return found


def dots(prefix: str, shapes: Shapes) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


def underscores(prefix: str, shapes: Shapes) -> Shapes:
    return {prefix + name.replace(".", "_"): shape for name, shape in shapes.items()}


def blocks(shapes: Shapes) -> Shapes:
    return {name: shape for name, shape in shapes.items() if "blocks" in name}


class Maker:
    """Random tensors for modules; ``keep`` of them, ranks and alphas as drawn."""

    def __init__(
        self,
        seed: int,
        ranks=(1, 2, 4, 8),
        alphas=(0.5, 1.0, 4.0, 16.0),
        size: float = 0.3,
        keep: float = 1.0,
        dtype=np.float32,
    ):
        self.rng = np.random.default_rng(seed)
        self.ranks, self.alphas, self.size, self.keep, self.dtype = ranks, alphas, size, keep, dtype

    def normal(self, *shape: int) -> np.ndarray:
        return (self.rng.standard_normal(shape) * self.size).astype(self.dtype)

    def chosen(self, shapes: Shapes) -> Iterator[tuple[str, int, int, int]]:
        for name, (out, width) in shapes.items():
            if self.rng.random() < self.keep:
                yield name, out, width, int(self.rng.choice(self.ranks))

    def alpha(self) -> np.ndarray:
        return np.asarray(self.rng.choice(self.alphas), self.dtype)

    def lora(
        self, shapes: Shapes, down="lora_down.weight", up="lora_up.weight", alpha: bool = True, bias: bool = False
    ) -> Tensors:
        found = {}
        for name, out, width, rank in self.chosen(shapes):
            found |= {f"{name}.{down}": self.normal(rank, width), f"{name}.{up}": self.normal(out, rank)}
            if alpha and self.rng.random() < 0.8:
                found[f"{name}.alpha"] = self.alpha()
            if bias:
                found[f"{name}.lora_B.bias"] = self.normal(out)
        return found

    def peft(self, shapes: Shapes, alpha: bool = False, bias: bool = False) -> Tensors:
        return self.lora(shapes, "lora_A.weight", "lora_B.weight", alpha, bias)

    def loha(self, shapes: Shapes) -> Tensors:
        found = {}
        for name, out, width, rank in self.chosen(shapes):
            for w in "12":
                found |= {
                    f"{name}.hada_w{w}_a": self.normal(out, rank),
                    f"{name}.hada_w{w}_b": self.normal(rank, width),
                }
            found[f"{name}.alpha"] = self.alpha()
        return found

    def lokr(self, shapes: Shapes, factor: int = 4) -> Tensors:
        """One or both of the Kronecker factors whole, or products."""
        found = {}
        for name, out, width, rank in self.chosen(shapes):
            for w, (a, b) in (("w1", (factor, factor)), ("w2", (out // factor, width // factor))):
                if self.rng.random() < 0.5:
                    found[f"{name}.lokr_{w}"] = self.normal(a, b)
                else:
                    found |= {f"{name}.lokr_{w}_a": self.normal(a, rank), f"{name}.lokr_{w}_b": self.normal(rank, b)}
            found[f"{name}.alpha"] = self.alpha()
        return found

    def dora(self, shapes: Shapes, name: str = "dora_scale", **options) -> Tensors:
        found = self.lora(shapes, **options)
        for module, (out, _) in shapes.items():
            if any(key.startswith(f"{module}.") for key in found):
                length = np.abs(self.normal(out, 1)) + np.asarray(0.5, self.dtype)
                found[f"{module}.{name}"] = length if name == "dora_scale" else length[:, 0]
        return found


def save(
    path: pathlib.Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> pathlib.Path:
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, value in tensors.items():
        header[name] = {
            "dtype": names[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [at, at + value.nbytes],
        }
        at += value.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        len(text).to_bytes(8, "little") + text + b"".join(np.ascontiguousarray(v).tobytes() for v in tensors.values())
    )
    return path


# Every format: what a full file of it holds.
FORMATS: dict[str, Callable[[Size, Maker], Tensors]] = {
    "diffusers": lambda s, m: m.peft(dots("transformer.", diffusers(s)) | dots("text_encoder.", clip(s))),
    "diffusers with alphas": lambda s, m: m.peft(dots("transformer.", diffusers(s)), alpha=True),
    "AI-toolkit": lambda s, m: m.peft(dots("transformer.", blocks(diffusers(s)))),
    "mixed": lambda s, m: m.lora(dots("transformer.", blocks(diffusers(s))), alpha=False),
    "kohya": lambda s, m: m.lora(underscores("lora_unet_", blocks(bfl(s))) | underscores("lora_te1_", clip(s))),
    "kohya, all layers": lambda s, m: m.lora(underscores("lora_unet_", bfl(s))),
    "kohya with T5": lambda s, m: m.lora(
        underscores("lora_unet_", blocks(bfl(s))) | underscores("lora_te1_", clip(s)) | underscores("lora_te3_", t5(s))
    ),
    "ComfyUI": lambda s, m: m.peft(dots("diffusion_model.", bfl(s))),
    "ComfyUI, down and up": lambda s, m: m.lora(
        dots("diffusion_model.", blocks(bfl(s))) | dots("text_encoders.clip_l.transformer.", clip(s))
    ),
    "OneTrainer": lambda s, m: m.lora(
        underscores("lora_transformer_", diffusers(s)) | underscores("lora_te1_", clip(s))
    ),
    "OneTrainer, newer": lambda s, m: m.lora(
        dots("transformer.", apart(s)) | dots("clip_l.", clip(s)) | dots("t5.", t5(s))
    ),
    "XLabs": lambda s, m: m.lora(xlabs(s), "down.weight", "up.weight", alpha=False),
    "DiffSynth": lambda s, m: m.lora(diffsynth(s), "lora_A.default.weight", "lora_B.default.weight", alpha=False),
    "diffusers, underscores": lambda s, m: m.lora(
        underscores("transformer_", diffusers(s)) | underscores("text_encoder_", clip(s))
    ),
    "BFL control": lambda s, m: m.peft(bfl(s), bias=True) | norms(s, m),
    "fal": lambda s, m: m.peft(
        dots("base_model.model.", blocks(bfl(s)) | {"final_layer.linear": (s.channels, s.width)})
    ),
    "PEFT": lambda s, m: m.peft(dots("base_model.model.", diffusers(s))),
    "PEFT DoRA": lambda s, m: m.dora(
        dots("base_model.model.", diffusers(s)),
        "lora_magnitude_vector",
        down="lora_A.weight",
        up="lora_B.weight",
        alpha=False,
    ),
    "kohya DoRA": lambda s, m: m.dora(underscores("lora_unet_", blocks(bfl(s)))),
    "kohya LoHa": lambda s, m: m.loha(underscores("lora_unet_", blocks(bfl(s)))),
    "SimpleTuner LoKr": lambda s, m: m.lokr(underscores("lycoris_", blocks(diffusers(s))), s.factor),
    "AI-toolkit LoKr": lambda s, m: m.lokr(dots("diffusion_model.", blocks(bfl(s))), s.factor),
}


def norms(s: Size, m: Maker) -> Tensors:
    names = [
        f"double_blocks.{i}.{half}_attn.norm.{n}_norm.scale"
        for i in range(s.double)
        for half in ("img", "txt")
        for n in ("query", "key")
    ]
    names += [f"single_blocks.{i}.norm.{n}_norm.scale" for i in range(s.single) for n in ("query", "key")]
    return {name: np.asarray(1, m.dtype) + m.normal(s.head) for name in names}


def control(s: Size, m: Maker, norm: bool = True) -> Tensors:
    """A control LoRA as Black Forest Labs writes it: the first layer reads a control image beside the latents."""
    wide = m.peft({"img_in": (s.width, 2 * s.channels)}, bias=True)
    wide["img_in.lora_A.weight"][:, s.channels :] *= 4  # so that another image moves what is made
    return m.peft(bfl(s), bias=True) | wide | (norms(s, m) if norm else {})


def arrays(adapters: Mapping[str, object], scale: float = 1.0) -> list[str]:
    """Words of a command line for adapters by their names: a path each."""
    values = {
        "lora_model_name_or_path": adapters.values(),
        "weight_name": ["null"] * len(adapters),
        "adapter_name": adapters,
        "scale": [scale] * len(adapters),
        "from_pt": ["true"] * len(adapters),
    }
    return [f"lora_config.{key}=[{','.join(map(str, value))}]" for key, value in values.items()]
