"""Adapters for FLUX.2 as diffusers' own loader merges them, layer by layer, where it reads them right; and where it
does not, what is right."""

from __future__ import annotations

import importlib.util

import lora_files as files
import numpy as np
import pytest
import test_flux2_run as names
from conftest import GOLDEN
from flax import nnx

from fluxbatch.lora import adapter, apply
from fluxbatch.lora.formats import read_key
from fluxbatch.models.flux2 import transformer
from fluxbatch.models.flux2.lora import LORA
from fluxbatch.weights.load import Plan
from fluxbatch.weights.source import Source

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("diffusers")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

SIZES = dict(
    in_channels=16,
    num_layers=2,
    num_single_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=24,
    guidance_embeds=True,
    axes_dims_rope=(4, 4, 4, 4),
)


@pytest.fixture
def flux():
    """diffusers' transformer, random."""
    from diffusers import Flux2Transformer2DModel

    spec = importlib.util.spec_from_file_location("generate_flux2", GOLDEN / "generate_flux2.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    return generate.loud(Flux2Transformer2DModel(**SIZES), 0.2, torch.Generator().manual_seed(0))


def own(flux) -> dict[str, np.ndarray]:
    return {name: value.numpy().copy() for name, value in flux.state_dict().items()}


def plans() -> dict[str, Plan]:
    cfg = transformer.Flux2Config.from_json(SIZES)
    graph, state = nnx.split(nnx.eval_shape(lambda: transformer.Flux2(cfg, rngs=nnx.Rngs(0))), nnx.Param, ...)[:2]
    return {"transformer": Plan(Source("/"), graph, state, {})}


def blocks(shapes):
    return {name: shape for name, shape in shapes.items() if "blocks" in name}


def but(shapes, *ends):
    return {name: shape for name, shape in shapes.items() if not any(end in name for end in ends)}


def lokr(shapes, maker):
    """As trainers write it: the first factor whole, the second whole or a product. PEFT mixes them no otherwise."""
    found = {}
    for i, (name, (out, width)) in enumerate(shapes.items()):
        found |= {f"{name}.lokr_w1": maker.normal(4, 4), f"{name}.alpha": maker.alpha()}
        if i % 3:
            found |= {f"{name}.lokr_w2_a": maker.normal(out // 4, 1), f"{name}.lokr_w2_b": maker.normal(1, width // 4)}
        else:
            found[f"{name}.lokr_w2"] = maker.normal(out // 4, width // 4)
    return found


# What diffusers loads and gets right: all layers by its own names; by Black Forest Labs' all but the last modulation,
# whose halves it leaves as they are, and no alphas; of kohya's files no modulation and no guidance.
FINAL, MODULATED = "adaLN", ("adaLN", "modulation", "guidance_in")
FORMATS = {
    "diffusers": lambda d, b, m: m.peft(files.dots("transformer.", d)),
    "PEFT": lambda d, b, m: m.peft(files.dots("base_model.model.", but(b, FINAL))),
    "PEFT, diffusers' blocks": lambda d, b, m: m.peft(files.dots("base_model.model.", blocks(d))),
    "AI-toolkit": lambda d, b, m: m.peft(files.dots("diffusion_model.", but(b, FINAL))),
    "ComfyUI, diffusers' blocks": lambda d, b, m: m.peft(files.dots("diffusion_model.", blocks(d))),
    "ComfyUI, clipped": lambda d, b, m: m.peft(
        {f"diffusion_model.{n.removeprefix('tran')}": s for n, s in blocks(d).items() if n.startswith("tran")}
    ),
    "kohya": lambda d, b, m: m.lora(files.underscores("lora_unet_", but(b, *MODULATED))),
    "LoKr, AI-toolkit": lambda d, b, m: lokr(files.dots("diffusion_model.", but(b, FINAL)), m),
    "LoKr, LyCORIS": lambda d, b, m: lokr(files.underscores("lycoris_", blocks(d)), m),
    "LoKr, SimpleTuner": lambda d, b, m: lokr(d, m),
}


def merged(flux, file, scale: float) -> dict[str, np.ndarray]:
    """diffusers' weights with an adapter at a scale, by its own names of a transformer that is not fused."""
    from diffusers import Flux2KleinPipeline

    pipe = Flux2KleinPipeline(None, None, None, None, flux)
    pipe.load_lora_weights(str(file), adapter_name="x")
    pipe.set_adapters(["x"], [scale])
    pipe.fuse_lora(components=["transformer"])
    pipe.unload_lora_weights()
    found = own(flux)
    for name in [name for name in found if "attn.to_qkv." in name or "attn.to_added_qkv." in name]:
        parts = ("add_q_proj", "add_k_proj", "add_v_proj") if "added" in name else ("to_q", "to_k", "to_v")
        stem = name.rpartition(".attn.")[0]
        for part, third in zip(parts, np.split(found.pop(name), 3), strict=True):
            found[f"{stem}.attn.{part}.weight"] = third
    return found


def agree(file, base: dict[str, np.ndarray], wanted: dict[str, np.ndarray], scale: float) -> None:
    """Our merge of a file into ``base`` gives ``wanted``, and so do the factors that stand beside the weights."""
    found = adapter.read_adapter(adapter.Spec("x", str(file), None, scale, True, "lora.x.path"), plans(), LORA, True)
    edits, places = apply.Loras((found,)).edits("transformer", (("x", scale),)), set()
    for name, value in base.items():
        if value.ndim < 2:
            continue
        for target in read_key(f"transformer.{name.removesuffix('.weight')}.lora_A.weight", LORA).targets:
            old, new = (
                np.concatenate([w[len(w) * a // of : len(w) * b // of] for a, b, of in target.rows])
                for w in (value, wanted[name])
            )
            if (place := (f"{target.path}.kernel", target.layer)) not in edits:
                assert np.array_equal(old, new), name
                continue
            places.add(place)
            assert np.abs(new - old).max() > 0.005, name
            near = 2e-5 * max(1, np.abs(new).max())
            assert np.abs(edits[place](old) - new).max() < near, name
            a, b = found.changes["transformer"][place].factors()
            assert np.abs(old + scale * (b @ a) - new).max() < near, name
    assert places == set(edits) and len(places) > 10


@pytest.mark.parametrize("name", FORMATS)
def test_as_diffusers_merges(flux, tmp_path, name):
    base = own(flux)
    shapes = names.modules(base), names.modules(names.bfl(base))
    file = files.save(tmp_path / "a.safetensors", FORMATS[name](*shapes, files.Maker(1, size=0.2, ranks=(2, 4))))
    agree(file, base, merged(flux, file, 0.7), 0.7)


@pytest.mark.parametrize("write", [lambda shapes, m: m.peft(shapes), lokr], ids=["LoRA", "LoKr"])
def test_the_last_modulation(flux, tmp_path, write):
    """By Black Forest Labs' names it has shift before scale, as in their checkpoint. diffusers swaps the halves of the
    checkpoint, but not of an adapter."""
    base, module = own(flux), "final_layer.adaLN_modulation.1"
    tensors = write(files.dots("diffusion_model.", {module: (64, 32)}), files.Maker(1, size=0.3, ranks=(2,)))
    file = files.save(tmp_path / "a.safetensors", tensors)
    delta = 0.7 * names.change(tensors, f"diffusion_model.{module}")
    weight = names.bfl(base)[f"{module}.weight"]
    found = adapter.read_adapter(adapter.Spec("x", str(file), None, 0.7, True, "lora.x.path"), plans(), LORA, True)
    edits = apply.Loras((found,)).edits("transformer", (("x", 0.7),))
    assert np.abs(edits["final_mod.kernel", 0](weight) - (weight + delta)).max() < 1e-5
    theirs = merged(flux, file, 0.7)["norm_out.linear.weight"] - base["norm_out.linear.weight"]
    assert np.abs(theirs - delta).max() < 1e-5 < np.abs(theirs - np.roll(delta, 32, 0)).max()
