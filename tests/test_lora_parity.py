"""Adapters through diffusers' ``load_lora_weights`` and ``set_adapters``, PEFT and LyCORIS, and through ours:
the same pictures, merged and row by row."""

from __future__ import annotations

import atexit
import importlib.util
import inspect
import json
import shutil
import tempfile

import lora_files as files
import numpy as np
import pytest
import test_lora
from conftest import GOLDEN, psnr

from fluxbatch.config import application
from fluxbatch.distributed import backend
from fluxbatch.generation import prompts
from fluxbatch.generation.model_spec import open_model_spec
from fluxbatch.lora import adapter as lora
from fluxbatch.lora import apply
from fluxbatch.lora.formats import read_key
from fluxbatch.manifest.rows import read_rows
from fluxbatch.models.flux1.lora import LORA

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("diffusers")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

spec = importlib.util.spec_from_file_location("generate", GOLDEN / "generate.py")
generate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(generate)

CACHE = tempfile.mkdtemp(prefix="fluxbatch-test-xla-")
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)

SIZE = files.DEV
ROW = {
    "prompt": "a red apple on a blue background",
    "height": 32,
    "width": 32,
    "num_inference_steps": 2,
    "guidance_scale": 2.0,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    generate.pipeline(**generate.VARIANTS["dev"], seed=5).save_pretrained(folder)
    return folder


def tell_converters(monkeypatch):
    """diffusers' converters, which know only FLUX.1's own size, are told this one's."""
    from diffusers.loaders import lora_conversion_utils as converters
    from diffusers.loaders import lora_pipeline

    d = SIZE.width
    for name in (
        "_convert_kohya_flux_lora_to_diffusers",
        "_convert_bfl_flux_control_lora_to_diffusers",
        "_convert_fal_kontext_lora_to_diffusers",
    ):
        source = inspect.getsource(getattr(converters, name))
        for old, new in (
            ("[3072, 3072, 3072, 12288]", f"{[d, d, d, 4 * d]}"),
            ("inner_dim = 3072", f"inner_dim = {d}"),
            ("range(19)", f"range({SIZE.double})"),
            ("range(38)", f"range({SIZE.single})"),
            ("num_layers = 19", f"num_layers = {SIZE.double}"),
            ("num_single_layers = 38", f"num_single_layers = {SIZE.single}"),
        ):
            source = source.replace(old, new)
        scope = dict(vars(converters))
        exec(source, scope)
        monkeypatch.setattr(lora_pipeline, name, scope[name])


@pytest.fixture
def pipe(model, monkeypatch):
    """diffusers' pipeline."""
    from diffusers import FluxPipeline

    tell_converters(monkeypatch)
    pipe = FluxPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def theirs(pipe, lora_weights, seed=0) -> np.ndarray:
    if lora_weights:
        pipe.set_adapters(list(lora_weights), list(lora_weights.values()))
    else:
        pipe.disable_lora()
    image = generate.render(pipe, ROW | {"seed": seed}, 24)
    if not lora_weights:
        pipe.enable_lora()
    return image


def ours(model, tmp_path, monkeypatch, adapters, all_lora_weights, **options) -> list[np.ndarray]:
    """Pictures of rows that differ in their mixes."""
    manifest = tmp_path / "rows.jsonl"
    manifest.write_text(
        "".join(json.dumps(ROW | {"seed": 0, "lora": lora_weights}) + "\n" for lora_weights in all_lora_weights)
    )
    names = list(adapters)
    arrays = {
        "lora_model_name_or_path": [str(adapters[name]) for name in names],
        "weight_name": ["null"] * len(names),
        "adapter_name": names,
        "scale": [1.0] * len(names),
        "from_pt": ["true"] * len(names),
    }
    flags = {"pretrained_model_name_or_path": model, "manifest": manifest, "max_sequence_length": 24, "hardware": "cpu",
             "weights_dtype": "float32", "activations_dtype": "float32", "output_dir": tmp_path} | options  # fmt: skip
    args = [f"{key}={value}" for key, value in flags.items()] + [
        f"lora_config.{key}=[{','.join(map(str, value))}]" for key, value in arrays.items()
    ]
    jobs = []
    monkeypatch.setattr("sys.argv", ["fluxbatch.run", *args])
    with pytest.raises(SystemExit):
        application.main(lambda job: jobs.append(job) or 0)
    jobs[0].sweep = {"lora": all_lora_weights}  # so that weights stay and only what adapters touch is loaded anew
    engine = open_model_spec(jobs[0], backend.start("cpu", CACHE))
    rows = engine.resolve(read_rows(jobs[0], size_multiple=engine.size_multiple)[0])
    pipeline = engine.pipeline(rows)
    states = prompts.encode(rows, engine.inputs, pipeline, len(rows))
    pixels, _ = pipeline.decode(pipeline.denoise(rows, states.batch(rows)), 32, 32)
    return list(np.asarray(pixels))


def alike(maker):
    """The last layer's modulation with an A of equal halves: diffusers swaps them, though they are not shift and
    scale."""
    half, module = maker.normal(1, SIZE.width), "final_layer.adaLN_modulation.1"
    return {
        f"{module}.lora_A.weight": np.concatenate([half, half]),
        f"{module}.lora_B.weight": maker.normal(2 * SIZE.width, 2),
    }


# What diffusers loads, all of it (of kohya's files it drops the layers outside the blocks).
DIFFUSERS = (
    "diffusers",
    "diffusers with alphas",
    "AI-toolkit",
    "mixed",
    "kohya",
    "ComfyUI, down and up",
    "OneTrainer",
    "XLabs",
    "BFL control",
    "fal",
)


@pytest.mark.parametrize("name", DIFFUSERS)
def test_as_diffusers_does(pipe, model, tmp_path, monkeypatch, name):
    """Two adapters of mixed ranks and alphas, the second partial: each alone, both, none."""
    whole = name in ("BFL control", "fal")  # diffusers wants every key of these
    base = generate.render(pipe, ROW | {"seed": 0}, 24)
    adapters = {}
    for seed, adapter in enumerate("a" if name == "BFL control" else "ab"):  # and has one set of norms only
        maker = files.Maker(seed, size=0.3 if name == "XLabs" else 0.15, keep=1.0 if whole or not seed else 0.5)
        tensors = files.FORMATS[name](SIZE, maker)
        if name == "OneTrainer":  # diffusers knows the attention layers of its blocks
            tensors = {k: v for k, v in tensors.items() if "_blocks_" not in k or "_attn_" in k}
        if name == "BFL control":
            tensors |= alike(maker)
        if name in ("diffusers with alphas", "OneTrainer"):  # and wants an alpha for every layer
            for key in [key for key in tensors if key.endswith(("lora_A.weight", "lora_down.weight"))]:
                tensors.setdefault(
                    key.removesuffix(".lora_A.weight").removesuffix(".lora_down.weight") + ".alpha", maker.alpha()
                )
        adapters[adapter] = files.save(tmp_path / f"{adapter}.safetensors", tensors)
        pipe.load_lora_weights(str(adapters[adapter]), adapter_name=adapter)
    all_lora_weights = [{"a": 1.0}] if name == "BFL control" else [{"a": 1.0}, {"b": 0.7}, {"a": 0.4, "b": -0.6}, {}]
    expected = [theirs(pipe, lora_weights) for lora_weights in all_lora_weights]
    assert all(
        psnr(picture, base) < 30
        for lora_weights, picture in zip(all_lora_weights, expected, strict=True)
        if lora_weights
    )  # the adapters do something
    merged = [ours(model, tmp_path, monkeypatch, adapters, [lora_weights])[0] for lora_weights in all_lora_weights]
    for lora_weights, picture, wanted in zip(all_lora_weights, merged, expected, strict=True):
        assert psnr(picture, wanted) >= 50, ("merged", lora_weights)
    if name != "BFL control":
        for lora_weights, picture, wanted in zip(
            all_lora_weights, ours(model, tmp_path, monkeypatch, adapters, all_lora_weights), expected, strict=True
        ):
            assert psnr(picture, wanted) >= 50, ("row by row", lora_weights)


def rows_of(weight: np.ndarray, rows) -> np.ndarray:
    n = len(weight)
    return np.concatenate([weight[n * a // of : n * b // of] for a, b, of in rows])


def agree(file, base: dict[str, np.ndarray], wanted: dict[str, np.ndarray], scale: float = 1.0) -> None:
    """Our merge of ``file`` into ``base`` (by diffusers' module names) gives ``wanted``, row by row too."""
    adapter = lora.read_adapter(
        lora.Spec("x", str(file), None, scale, True, "lora.x.path"), test_lora.plans(SIZE), LORA, True
    )
    edits = apply.Loras((adapter,)).edits("transformer", (("x", scale),))
    changed = 0
    for name, old in base.items():
        (target,) = read_key(f"transformer.{name}.lora_A.weight", LORA).targets
        location = f"{target.path}.kernel", target.layer
        old, new = (rows_of(weight, target.rows) for weight in (old, wanted[name]))
        if location not in edits:
            assert np.array_equal(old, new), name
            continue
        changed += 1
        assert np.abs(new - old).max() > 0.01
        assert np.abs(edits[location](old) - new).max() < 2e-5 * max(1, np.abs(new).max()), name
        delta = adapter.changes["transformer"][location]
        if not delta.merged_only:
            a, b = delta.factors()
            assert np.abs(old + scale * (b @ a) - new).max() < 2e-5 * max(1, np.abs(new).max()), name
    assert changed == len(edits) > 10


def linears(transformer) -> dict[str, np.ndarray]:
    return {
        n: m.weight.detach().numpy().copy() for n, m in transformer.named_modules() if isinstance(m, torch.nn.Linear)
    }


@pytest.mark.parametrize("kind,options", [
    ("LoraConfig", dict(r=4, lora_alpha=6, use_rslora=True)),
    ("LoraConfig", dict(r=4, lora_alpha=6, rank_pattern={"attn.to_q": 2, "proj_mlp": 8}, alpha_pattern={"attn.to_k": 3, "proj_mlp": 1})),
    ("LoraConfig", dict(r=4, lora_alpha=6, use_dora=True)),
    ("LoHaConfig", dict(r=4, alpha=6, alpha_pattern={"attn.to_k": 3})),
    ("LoKrConfig", dict(r=2, alpha=6)),
    ("LoKrConfig", dict(r=2, alpha=6, decompose_both=True, decompose_factor=8)),
])  # fmt: skip
def test_as_peft_merges(pipe, tmp_path, kind, options):
    """``save_pretrained``'s two files, settings included; DoRA also at another scale."""
    import peft

    base = linears(pipe.transformer)
    targets = ["to_q", "to_k", "to_v", "proj_mlp", "proj_out", "net.2", "norm1.linear", "linear_2"]
    model = peft.get_peft_model(pipe.transformer, getattr(peft, kind)(target_modules=targets, **options))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_magnitude" in name:
                p.mul_(1 + 0.3 * torch.rand(p.shape, generator=generator))
            elif p.requires_grad:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    model.save_pretrained(tmp_path)
    for scale in (1.0, 0.6) if kind == "LoraConfig" else (1.0,):
        for module in model.modules():
            if kind == "LoraConfig" and isinstance(module, peft.tuners.lora.LoraLayer):
                module.set_scale("default", scale)
        model.merge_adapter()
        merged = {
            n.removesuffix(".base_layer"): w for n, w in linears(model.base_model.model).items() if ".lora_" not in n
        }
        agree(tmp_path / "adapter_model.safetensors", base, {name: merged[name] for name in base}, scale)
        model.unmerge_adapter()


@pytest.mark.parametrize("algorithm,options", [
    ("LohaModule", dict(lora_dim=3, alpha=2)), ("LokrModule", dict(lora_dim=2, alpha=3, factor=4)), ("LokrModule", dict(lora_dim=2, alpha=3, decompose_both=True, factor=8)),
    ("LokrModule", dict(lora_dim=9, alpha=3, factor=4, full_matrix=True)), ("LoConModule", dict(lora_dim=3, alpha=2, weight_decompose=True)),
    ("LoConModule", dict(lora_dim=3, alpha=2, rs_lora=True)), ("LokrModule", dict(lora_dim=2, alpha=3, factor=4, weight_decompose=True)),
    ("LohaModule", dict(lora_dim=3, alpha=2, weight_decompose=True, wd_on_out=False)),
])  # fmt: skip
@pytest.mark.parametrize("prefix", ["lycoris_", "lora_unet_"])
def test_as_lycoris_computes(pipe, tmp_path, algorithm, options, prefix):
    """Each module's own output on the unit vectors is the merged weight."""
    modules = pytest.importorskip("lycoris.modules")
    torch.manual_seed(0)
    base, wanted, tensors = linears(pipe.transformer), {}, {}
    for name, module in pipe.transformer.named_modules():
        if not isinstance(module, torch.nn.Linear) or "blocks" not in name:
            continue
        key = prefix + name.replace(".", "_")
        adapted = getattr(modules, algorithm)(key, module, **options)
        with torch.no_grad():
            for n, p in adapted.named_parameters():
                p.mul_(1 + 0.3 * torch.rand_like(p)) if n == "dora_scale" else p.copy_(0.3 * torch.randn_like(p))
            output = adapted(torch.eye(module.in_features)) - (module.bias if module.bias is not None else 0)
        wanted[name] = output.T.numpy().copy()
        tensors |= {f"{key}.{n}": v.detach().numpy().copy() for n, v in adapted.state_dict().items()}
    agree(files.save(tmp_path / "lycoris.safetensors", tensors), {name: base[name] for name in wanted}, wanted)
