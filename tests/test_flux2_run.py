"""FLUX.2 through the command line, without torch: the golden as a distilled model and as a base with guidance."""

from __future__ import annotations

import json
import os
import shutil

import lora_files as files
import numpy as np
import pytest
from conftest import GOLDEN, images, metadata, psnr
from safetensors.numpy import load_file

WORDS = "max_sequence_length=96", "hardware=cpu"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def model(tmp_path):
    """The golden checkpoint, distilled or not."""

    def make(distilled, name="model", tensors=None):
        """``tensors``: of the transformer, other than the golden's."""
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        for part in (GOLDEN / "flux2-klein").iterdir():
            if part.is_dir() and not (tensors and part.name == "transformer"):
                os.symlink(part, folder / part.name)
        if tensors:
            (folder / "transformer").mkdir()
            shutil.copy(GOLDEN / "flux2-klein/transformer/config.json", folder / "transformer")
            files.save(folder / WEIGHTS, tensors)
        index = json.loads((GOLDEN / "flux2-klein/model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps(index | {"is_distilled": distilled}))
        return folder

    return make


def drawn(cli, tmp_path, folder, rows, run, *words):
    """A run of ``rows``: pictures by row id."""
    manifest = tmp_path / "rows.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, err = cli(
        f"pretrained_model_name_or_path={folder}",
        f"manifest={manifest}",
        f"output_dir={tmp_path}",
        f"run_name={run}",
        *words,
    )
    assert code == 0, err
    return images(tmp_path / run)


@pytest.fixture
def draw(cli, tmp_path):
    return lambda folder, rows, run, *words: drawn(cli, tmp_path, folder, rows, run, *WORDS, *words)


def golden_rows():
    return [json.loads(line) for line in (GOLDEN / "flux2.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["klein", "base"])
def test_golden(model, draw, tmp_path, name):
    """Pictures that diffusers drew, of mixed sizes, steps and guidance; a batch holds several."""
    expected = np.load(GOLDEN / f"flux2-{name}.npz")
    rows = golden_rows()
    rows = [rows[0], rows[3], *([rows[2]] if name == "klein" else [])]  # 32 × 32 with 3 and 6 steps; 64 × 32
    other = rows[0] | {"id": "other", "prompt": "quite another prompt"}
    drawn = draw(model(name == "klein"), [*rows, other], name, "per_device_batch_size=2")
    assert all(psnr(drawn[row["id"]], expected[row["id"]]) >= 50 for row in rows)
    assert psnr(drawn["other"], drawn["g0"]) < 30  # what holds above is not blind to prompts
    assert {record["is_distilled"] for record in metadata(tmp_path / name)} == {name == "klein"}


def test_goldens_differ():
    """Nor to guidance."""
    klein, base = (np.load(GOLDEN / f"flux2-{name}.npz") for name in ("klein", "base"))
    assert all(psnr(klein[name], base[name]) < 30 for name in klein.files)


def test_what_decides_nothing_is_said(cli, model, tmp_path):
    words = f"pretrained_model_name_or_path={model(True)}", "prompt=x", "resolution=32", f"output_dir={tmp_path}"
    code, said = cli(*words, "prompt_2=y", "guidance_scale=2", entry="plan")
    assert code == 0 and "prompt_2 decides nothing (1 rows have one)" in said
    assert "guidance_scale decides nothing (1 rows have one)" in said
    code, said = cli(*words, "clip_model_name_or_path=z", entry="plan")
    assert code == 2 and "model.clip_model_name_or_path: 'z': expected null" in said
    code, said = cli(*words, "base_shift=0.5", entry="plan")
    assert code == 2 and "sampler.base_shift=0.5: expected null" in said


def mixed():
    """23 rows: two sizes, steps of 1 to 4, guidance above and below 1, prompts that come twice."""
    return [
        dict(
            id=f"r{i}",
            prompt=f"picture {i % 17}",
            seed=i,
            height=(32, 32, 16)[i % 3],
            width=(32, 32, 48)[i % 3],
            num_inference_steps=1 + i % 4,
            guidance_scale=(0.0, 1.0, 2.5, 5.0)[i % 4],
        )
        for i in range(23)
    ]


MESHES = {
    "ddp 2": ["ici_data_parallelism=2"],
    "ddp 8": ["ici_data_parallelism=8"],
    "fsdp 2": ["sharding=fsdp", "ici_fsdp_parallelism=2"],
    "fsdp 8": ["sharding=fsdp"],
    "tensor 2": ["ici_tensor_parallelism=2"],
    "context 2": ["ici_context_parallelism=2"],
    "all": ["ici_data_parallelism=2", "ici_fsdp_parallelism=2", "ici_tensor_parallelism=2"],
}


def check_bytes(tmp_path, folder, times):
    """In the run "streamed" tensors whose names begin so were read so many ``times``, and all others once, as in
    "copied" all were."""
    runs = ("copied", "streamed")
    read = {run: json.loads((tmp_path / run / "status.json").read_text())["load"]["bytes"] for run in runs}
    more = sum(
        (count - 1) * array.nbytes
        for name, array in load_file(folder / WEIGHTS).items()
        for start, count in times.items()
        if name.startswith(start)
    )
    assert read["streamed"] == read["copied"] + more > read["copied"]


def check_adapter(draw, folder, row, file, scale, plain, expected):
    """The adapter makes of ``row`` what weights that it has changed make: merged, and beside a row without it."""
    assert psnr(plain, expected) < 30
    words, named = files.arrays({"a": file}), row["id"]
    merged = draw(folder, [row | {"lora": {"a": scale}}], "merged", *words)
    rows = [row | {"lora": {"a": scale}}, row | {"id": "none", "lora": {}}]
    beside = draw(folder, rows, "beside", "per_device_batch_size=2", *words)
    assert psnr(merged[named], expected) >= 60 and psnr(beside[named], expected) >= 60
    assert psnr(beside["none"], plain) >= 60


ADAPTERS = {  # what is before a module's name, and how it is written
    "diffusers": ("transformer.", lambda m, shapes: m.peft(shapes)),
    "kohya": ("lora_unet_", lambda m, shapes: m.lora(shapes)),
}


def check_adapters(draw, model, other, file, named, row, name):
    """All linear layers of a transformer with these ``named`` tensors changed: merged, and beside the weights, as a
    checkpoint in ``other`` that was changed by the formula."""
    prefix, write = ADAPTERS[name]

    def path(module):
        return prefix + (module.replace(".", "_") if prefix.endswith("_") else module)

    weights = {key: x for key, x in named.items() if key.endswith(".weight")}
    shapes = {path(module): shape for module, shape in modules(weights).items()}
    adapter = write(files.Maker(3, size=0.2, ranks=(2, 4), alphas=(1.0, 2.0)), shapes)
    files.save(file, adapter)
    changed = {
        key: x + 0.7 * change(adapter, path(key.removesuffix(".weight"))).astype(np.float32)
        if key in weights and x.ndim == 2
        else x
        for key, x in named.items()
    }
    (other / "transformer").mkdir()
    shutil.copy(model / "transformer/config.json", other / "transformer")
    files.save(other / WEIGHTS, changed)
    plain, expected = (draw(folder, [row], folder.name)[row["id"]] for folder in (model, other))
    check_adapter(draw, model, row, file, 0.7, plain, expected)


def check_mixed_rows(draw, folder, meshes, *words, rows=None):
    """The same pictures at any batch size on any mesh, to one of 255 levels."""
    rows = rows or mixed()
    expected = draw(folder, rows, "one", *words)
    assert len(expected) == 23 and psnr(expected["r0"], expected["r1"]) < 30
    plans = [(f"batch {size}", [f"per_device_batch_size={size}"]) for size in (3, 4)]
    plans += [(name, [*MESHES[name], f"per_device_batch_size={(1, 3, 4)[i % 3]}"]) for i, name in enumerate(meshes)]
    for name, more in plans:
        got = draw(folder, rows, name.replace(" ", "-"), *words, *more)
        worst = max(np.abs(got[key].astype(int) - picture).max() for key, picture in expected.items())
        assert got.keys() == expected.keys() and worst <= 1, name


@pytest.mark.slow
def test_mixed_rows(model, draw):
    check_mixed_rows(draw, model(False), MESHES)


@pytest.mark.slow
def test_mixed_rows_of_a_distilled_model(model, draw):
    check_mixed_rows(draw, model(True), ["ddp 2", "fsdp 8", "tensor 2"])


@pytest.mark.slow
@pytest.mark.parametrize("distilled", [True, False])
def test_streamed(model, draw, distilled):
    """Blocks that come one at a time, on one device and two."""
    folder, rows = model(distilled), mixed()[:6]
    expected = draw(folder, rows, "whole", "per_device_batch_size=2")
    for words in (["per_device_batch_size=2"], ["ici_data_parallelism=2"]):
        drawn = draw(folder, rows, f"streamed-{len(words[0])}", "stream_blocks=true", *words)
        assert max(np.abs(drawn[key].astype(int) - picture).max() for key, picture in expected.items()) <= 1


@pytest.mark.slow
def test_converted_cached_resumed_and_replayed(cli, model, draw, tmp_path):
    folder, rows = model(False), mixed()[:4]
    cache = f"text_cache_dir={tmp_path / 'texts'}"
    expected = draw(folder, rows[:2], "run", cache)
    expected = draw(folder, rows, "run", cache)  # the first two are there
    again = draw(folder, rows, "again", cache)
    sizes = {part: (folder / part).resolve() for part in ("transformer", "vae")}
    read = json.loads((tmp_path / "again/status.json").read_text())["load"]["bytes"]
    assert read < sum(
        file.stat().st_size for part in sizes.values() for file in part.glob("*.safetensors")
    )  # no text encoder
    code, err = cli(f"pretrained_model_name_or_path={folder}", f"to={tmp_path / 'copy'}", entry="convert")
    assert code == 0, err
    assert json.loads((tmp_path / "copy/model_index.json").read_text()) == {
        "_class_name": "Flux2KleinPipeline",
        "is_distilled": False,
    }
    assert (tmp_path / "copy/tokenizer/chat_template.jinja").exists()
    copied = draw(tmp_path / "copy", rows, "copied")
    for drawn in (again, copied):
        assert all(np.array_equal(drawn[key], picture) for key, picture in expected.items())
    code, err = cli("id=r2", f"output_dir={tmp_path}", "run_name=run", entry="replay")
    assert code == 0, err
    digests = {metadata(tmp_path / run)[0]["model_digest"] for run in ("run", "copied")}
    assert len(digests) == 1
    other = model(True, "distilled")
    code, err = cli(
        f"pretrained_model_name_or_path={other}",
        f"manifest={tmp_path / 'rows.jsonl'}",
        f"output_dir={tmp_path}",
        "run_name=run",
        *WORDS,
    )
    assert code == 2 and "is_distilled" in err
    shutil.rmtree(tmp_path / "copied")


# ---- Black Forest Labs' names, and adapters


def bfl(own):
    """A transformer's tensors by the names of Black Forest Labs' files, of diffusers'."""
    plain = {
        "x_embedder": "img_in",
        "context_embedder": "txt_in",
        "proj_out": "final_layer.linear",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
        "single_stream_modulation.linear": "single_stream_modulation.lin",
        "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
        "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
        "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    }
    found = {f"{new}.weight": own[f"{old}.weight"] for old, new in plain.items() if f"{old}.weight" in own}
    found["final_layer.adaLN_modulation.1.weight"] = np.concatenate(
        np.split(own["norm_out.linear.weight"], 2)[::-1]
    )  # shift before scale
    for i in range(1 + max(int(name.split(".")[1]) for name in own if name.startswith("transformer_blocks."))):
        at, to = f"transformer_blocks.{i}.", f"double_blocks.{i}."
        for half, qkv, norms, proj, ff in (
            ("img", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), "to_out.0", "ff"),
            (
                "txt",
                ("add_q_proj", "add_k_proj", "add_v_proj"),
                ("norm_added_q", "norm_added_k"),
                "to_add_out",
                "ff_context",
            ),
        ):
            found[f"{to}{half}_attn.qkv.weight"] = np.concatenate([own[f"{at}attn.{n}.weight"] for n in qkv])
            found |= {
                f"{to}{half}_attn.norm.{n}_norm.scale": own[f"{at}attn.{old}.weight"]
                for n, old in zip(("query", "key"), norms, strict=True)
            }
            found[f"{to}{half}_attn.proj.weight"] = own[f"{at}attn.{proj}.weight"]
            found |= {
                f"{to}{half}_mlp.{n}.weight": own[f"{at}{ff}.linear_{old}.weight"]
                for n, old in (("0", "in"), ("2", "out"))
            }
    for i in range(1 + max(int(name.split(".")[1]) for name in own if name.startswith("single_transformer_blocks."))):
        at, to = f"single_transformer_blocks.{i}.attn.", f"single_blocks.{i}."
        found |= {
            f"{to}linear1.weight": own[f"{at}to_qkv_mlp_proj.weight"],
            f"{to}linear2.weight": own[f"{at}to_out.weight"],
        }
        found |= {f"{to}norm.{n}_norm.scale": own[f"{at}norm_{n[0]}.weight"] for n in ("query", "key")}
    assert sum(x.size for x in found.values()) == sum(x.size for x in own.values())
    return found


def diffusers(found):
    """Undoes ``bfl``, by where each of its numbers comes from."""
    own = load_file(GOLDEN / "flux2-klein" / WEIGHTS)
    starts = np.cumsum([0, *(x.size for x in own.values())])
    numbered = bfl(
        {
            name: (start + np.arange(x.size)).reshape(x.shape)
            for (name, x), start in zip(own.items(), starts[:-1], strict=True)
        }
    )
    flat = np.empty(starts[-1], np.float32)
    for name, places in numbered.items():
        flat[places.ravel()] = found[name].ravel()
    return {
        name: flat[start : start + x.size].reshape(x.shape)
        for (name, x), start in zip(own.items(), starts[:-1], strict=True)
    }


@pytest.mark.parametrize(
    "file,prefix",
    [("flux-2-klein-tiny.safetensors", ""), ("flux-2-klein-base-tiny.safetensors", "model.diffusion_model.")],
)
def test_single_file(model, draw, file, prefix):
    """Black Forest Labs' file, the rest in folders beside it; its name says whether it is distilled."""
    folder, row = model("base" not in file), golden_rows()[:1]
    expected = draw(folder, row, "folder")["g0"]
    found = bfl(load_file(GOLDEN / "flux2-klein" / WEIGHTS))
    files.save(folder / file, {prefix + name: x for name, x in found.items()})
    assert np.array_equal(draw(folder / file, row, "file")["g0"], expected)


def modules(own):
    """Shapes of the linear layers of so named tensors."""
    return {name.removesuffix(".weight"): x.shape for name, x in own.items() if x.ndim == 2}


def fused(own):
    """diffusers' names after ``fuse_qkv_projections``."""
    return {
        f"transformer_blocks.0.attn.{n}": (3 * own["x_embedder.weight"].shape[0], own["x_embedder.weight"].shape[0])
        for n in ("to_qkv", "to_added_qkv")
    }


FORMATS = {  # the names that its modules have, what is before them, and how it is written
    "diffusers": ("diffusers", "transformer.", lambda m, shapes: m.peft(shapes)),
    "PEFT": ("diffusers", "base_model.model.", lambda m, shapes: m.peft(shapes)),
    "fal": ("bfl", "base_model.model.", lambda m, shapes: m.peft(shapes)),
    "AI-toolkit": ("bfl", "diffusion_model.", lambda m, shapes: m.peft(shapes, alpha=True)),
    "ComfyUI": ("bfl", "diffusion_model.", lambda m, shapes: m.lora(shapes)),
    "bare": ("bfl", "", lambda m, shapes: m.peft(shapes)),
    "kohya": ("bfl", "lora_unet_", lambda m, shapes: m.lora(shapes)),
    "LoKr, LyCORIS": ("diffusers", "lycoris_", lambda m, shapes: m.lokr(shapes)),
    "LoKr, AI-toolkit": ("bfl", "diffusion_model.", lambda m, shapes: m.lokr(shapes)),
    "LoKr, fused": ("fused", "transformer.", lambda m, shapes: m.lokr(shapes)),
}


def change(tensors, module):
    """What an adapter adds to a module, by its formula: alpha over rank is folded in."""
    own = {name.removeprefix(f"{module}."): x for name, x in tensors.items() if name.startswith(f"{module}.")}
    alpha = own.pop("alpha", None)
    if any(name.startswith("lokr") for name in own):
        parts, rank = [], None
        for w in ("w1", "w2"):
            a, b = own.get(f"lokr_{w}_a"), own.get(f"lokr_{w}_b")
            rank = rank if a is None else a.shape[1]  # the second's, where both are products
            parts.append(own[f"lokr_{w}"] if a is None else a @ b)
        return np.kron(*parts) * (1 if rank is None or alpha is None else alpha / rank)
    down, up = (
        next(x for name, x in own.items() if any(word in name for word in words))
        for words in (("lora_A", "lora_down"), ("lora_B", "lora_up"))
    )
    return up @ down * (1 if alpha is None else alpha / len(down))


@pytest.mark.parametrize(
    "name", [*list(FORMATS)[:1], *(pytest.param(name, marks=pytest.mark.slow) for name in list(FORMATS)[1:])]
)
def test_adapters(model, draw, tmp_path, name):
    """All linear layers changed, the final one's modulation among them: merged, and beside the weights, as a checkpoint
    that was changed by the formula."""
    naming, prefix, write = FORMATS[name]
    own = load_file(GOLDEN / "flux2-klein" / WEIGHTS)
    named = {"diffusers": own, "bfl": bfl(own), "fused": own}[naming]
    shapes = fused(own) if naming == "fused" else modules(named)
    path = (
        (lambda module: prefix + module.replace(".", "_")) if prefix.endswith("_") else (lambda module: prefix + module)
    )
    tensors = write(
        files.Maker(3, size=0.2, ranks=(2, 4), alphas=(1.0, 2.0)),
        {path(module): shape for module, shape in shapes.items()},
    )
    files.save(tmp_path / "a.safetensors", tensors)

    changed, scale = dict(named), 0.7
    for module in shapes:
        delta = scale * change(tensors, path(module)).astype(np.float32)
        parts = ("to_q", "to_k", "to_v") if module.endswith("to_qkv") else ("add_q_proj", "add_k_proj", "add_v_proj")
        stem = module.rpartition(".")[0]
        names = [f"{stem}.{part}.weight" for part in parts] if naming == "fused" else [f"{module}.weight"]
        for key, part in zip(names, np.split(delta, len(names)), strict=True):
            changed[key] = changed[key] + part
    changed = diffusers(changed) if naming == "bfl" else changed

    row = golden_rows()[0]
    plain = draw(model(False), [row], "plain")["g0"]
    expected = draw(model(False, "changed", changed), [row], "changed")["g0"]
    check_adapter(draw, tmp_path / "model", row, tmp_path / "a.safetensors", scale, plain, expected)
