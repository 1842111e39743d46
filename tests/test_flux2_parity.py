"""Live comparison of FLUX.2's parts with torch: diffusers' and transformers' own models on random weights."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_flux2
import test_flux2_run
from conftest import GOLDEN, images, psnr
from flax import nnx
from flux2_pipeline import Pipeline, opened, transformer_table

from fluxbatch.models.flux2 import autoencoder, keys, latents, mistral, qwen3, references, schedule, text, transformer
from fluxbatch.models.noise import torch_normal
from fluxbatch.types import UserError
from fluxbatch.weights import load
from fluxbatch.weights.source import Source

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

spec = importlib.util.spec_from_file_location("generate_flux2", GOLDEN / "generate_flux2.py")
STEM = "diffusion_pytorch_model"


@pytest.fixture(scope="module")
def generate():
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ours(model, folder, module, config, table, stem):
    model.save_pretrained(folder)
    return opened(folder, module, config, table, stem)


def call(module, *args):
    return np.asarray(nnx.jit(lambda m, *a: m(*a))(module, *args))


def close(got, expected, tolerance=2e-5):
    """Largest difference against the largest value."""
    assert got.shape == expected.shape
    assert np.isfinite(expected).all() and expected.std() > 0.05
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize(
    "heads,axes,channels,layers,single,guidance,options",
    [
        (2, (4, 4, 4, 4), 4, 2, 3, True, {}),
        (3, (2, 4, 6, 4), 2, 1, 2, False, dict(mlp_ratio=2.0)),
        (1, (8, 8, 8, 8), 16, 3, 0, False, dict(out_channels=32, rope_theta=500)),
        (4, (2, 2, 2, 6), 1, 0, 4, True, dict(timestep_guidance_channels=64)),
    ],
)
def test_transformer(generate, tmp_path, heads, axes, channels, layers, single, guidance, options):
    """Also with reference images, of which the first tokens' output is kept."""
    from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel

    g = torch.Generator().manual_seed(heads)
    model = Flux2Transformer2DModel(
        **dict(
            in_channels=4 * channels,
            num_layers=layers,
            num_single_layers=single,
            attention_head_dim=sum(axes),
            num_attention_heads=heads,
            joint_attention_dim=20,
            guidance_embeds=guidance,
            axes_dims_rope=axes,
        )
        | options
    )
    generate.loud(model, 0.2, g)
    b, rows, cols, words, sizes = 3, 4, 6, 7, ((3, 5), (2, 2))
    img, txt = (torch.randn(s, generator=g) for s in ((b, rows * cols, 4 * channels), (b, words, 20)))
    pictures = [torch.randn((1, 4 * channels, *size), generator=g) for size in sizes]
    refs = torch.cat([p.flatten(2).mT for p in pictures], 1).expand(b, -1, -1)
    t, scale = torch.tensor([1.0, 0.4, 0.01]), torch.tensor([3.5, 1.0, 0.0])
    ids = Flux2KleinPipeline._prepare_latent_ids(torch.zeros(1, 1, rows, cols))
    more = torch.cat([ids, Flux2KleinPipeline._prepare_image_ids(pictures)], 1)
    text_ids = Flux2KleinPipeline._prepare_text_ids(txt[:1])
    module = ours(model, tmp_path, transformer.Flux2, transformer.Flux2Config, transformer_table, STEM)
    inputs = [jnp.asarray(x.numpy()) for x in (img, txt, t, scale)]
    for pixels, img_ids, given, extra in ((img, ids, (), None), (torch.cat([img, refs], 1), more, sizes, refs)):
        with torch.no_grad():
            expected = model(
                hidden_states=pixels, encoder_hidden_states=txt, timestep=t, img_ids=img_ids, txt_ids=text_ids,
                guidance=scale if guidance else None).sample[:, : rows * cols]  # fmt: skip
        rope = transformer.rope_table(module.cfg, words, rows, cols, given)
        close(
            call(module, *inputs, rope, None if extra is None else jnp.asarray(extra.numpy())), expected.numpy(), 5e-5
        )


def mask_of(length, counts, side):
    mask = np.zeros((len(counts), length), np.int32)
    for row, count in zip(mask, counts, strict=True):
        row[:count] = 1
    return mask if side == "right" else mask[:, ::-1].copy()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    "kind,heads,groups,head_dim", [("qwen", 4, 2, 8), ("qwen", 3, 1, 4), ("dev", 4, 4, 8), ("dev", 6, 2, 4)]
)
def test_text_encoder(generate, tmp_path, kind, heads, groups, head_dim, side):
    """The states of three layers, those of padding too; a prompt that fills the window has none."""
    model = generate.loud(
        generate.encoder(kind, 99, 32, 24, heads, groups, head_dim), 0.25, torch.Generator().manual_seed(heads)
    )
    length = 21
    mask = mask_of(length, [5, length, 1], side)
    ids = np.random.default_rng(0).integers(0, 99, (3, length))
    module, config, table = ((mistral.MistralEncoder, mistral.MistralConfig, keys.MISTRAL) if kind == "dev" else
                             (qwen3.Qwen3Encoder, qwen3.Qwen3Config, keys.QWEN3))  # fmt: skip
    with torch.no_grad():
        states = model(
            input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), output_hidden_states=True
        ).hidden_states
    layers = mistral.LAYERS if kind == "dev" else qwen3.LAYERS
    expected = torch.cat([states[k] for k in layers], dim=-1).numpy()
    made = ours(model, tmp_path, module, config, table, "model")
    got = call(made, jnp.asarray(ids), jnp.asarray(mask))
    for k in range(3):  # a later layer is larger
        close(*(x[..., 24 * k : 24 * (k + 1)] for x in (got, expected)), 1e-4)


@pytest.mark.parametrize("options", [
    {}, dict(use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False), dict(layers_per_block=2, batch_norm_eps=0.1),
    dict(decoder_block_out_channels=(4, 8, 24))])  # fmt: skip
def test_autoencoder(generate, tmp_path, options):
    from diffusers import Flux2KleinPipeline

    model = generate.loud(generate.autoencoder(4, (8, 16, 32), **options), 0.12, torch.Generator().manual_seed(0))
    patches = torch.randn(2, 16, 3, 5, generator=torch.Generator().manual_seed(1))
    image = torch.randn(2, 3, 24, 40, generator=torch.Generator().manual_seed(2))
    mean, std = (
        x.view(1, -1, 1, 1)
        for x in (model.bn.running_mean, torch.sqrt(model.bn.running_var + model.config.batch_norm_eps))
    )
    with torch.no_grad():
        decoded = model.decode(Flux2KleinPipeline._unpatchify_latents(patches * std + mean)).sample
        encoded = (Flux2KleinPipeline._patchify_latents(model.encode(image).latent_dist.mode()) - mean) / std
    half = functools.partial(ours, model, tmp_path, config=autoencoder.Flux2VaeConfig, stem=STEM)
    last = lambda x: x.permute(0, 2, 3, 1).numpy()  # noqa: E731
    close(call(half(autoencoder.Decoder, table=keys.VAE_DECODER_DIFFUSERS), jnp.asarray(last(patches))), last(decoded))
    close(call(half(autoencoder.Encoder, table=keys.VAE_ENCODER_DIFFUSERS), jnp.asarray(last(image))), last(encoded))


def test_autoencoder_of_bfl(generate, tmp_path):
    """Black Forest Labs' file as diffusers converts such files, at the published sizes."""
    from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
    from safetensors.torch import save_file

    model = AutoencoderKLFlux2(**test_flux2.VAE)
    generate.loud(model, 0.02, torch.Generator().manual_seed(0))
    shapes, g = test_flux2.bfl_vae("encoder") | test_flux2.bfl_vae("decoder"), torch.Generator().manual_seed(1)
    bfl = {
        name: (1 if "norm" in name and name.endswith("weight") else 0) + 0.02 * torch.randn(shape, generator=g)
        for name, shape in shapes.items()
    }
    statistics = {name: value for name, value in model.state_dict().items() if name.startswith("bn.")}
    save_file(bfl | statistics, tmp_path / "ae.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(dict(model.config)))
    named = {name.replace("encoder.quant", "quant").replace("decoder.post", "post"): x for name, x in bfl.items()}
    model.load_state_dict(convert_ldm_vae_checkpoint(named, dict(model.config)) | statistics)
    patches, image = torch.randn(1, 128, 2, 3, generator=g), torch.randn(1, 3, 32, 48, generator=g)
    mean, std = (
        x.view(1, -1, 1, 1)
        for x in (model.bn.running_mean, torch.sqrt(model.bn.running_var + model.config.batch_norm_eps))
    )
    with torch.no_grad():
        decoded = model.decode(Flux2KleinPipeline._unpatchify_latents(patches * std + mean)).sample
        encoded = (Flux2KleinPipeline._patchify_latents(model.encode(image).latent_dist.mode()) - mean) / std
    last = lambda x: x.permute(0, 2, 3, 1).numpy()  # noqa: E731
    half = functools.partial(opened, tmp_path, config=autoencoder.Flux2VaeConfig, stem="ae")
    close(call(half(autoencoder.Decoder, table=keys.vae_decoder_bfl(4)), jnp.asarray(last(patches))), last(decoded))
    close(call(half(autoencoder.Encoder, table=keys.VAE_ENCODER_BFL), jnp.asarray(last(image))), last(encoded))


def test_noise_and_schedule():
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    drawn = torch.randn(1, 16, 3, 5, generator=torch.Generator("cpu").manual_seed(7))
    got = latents.noise(functools.partial(torch_normal, 7), 16, 3, 5)
    assert np.abs(got - drawn.reshape(16, 15).T.numpy()).max() < 1e-6
    for dynamic in (False, True):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic)
        ours = schedule.Flux2Schedule.of(dict(scheduler.config))
        for steps in (1, 3, 4, 12, 50):
            for tokens in (4, 4096, 4300, 4301, 16384):
                mu = compute_empirical_mu(tokens, steps)
                assert schedule.empirical_mu(tokens, steps) == pytest.approx(mu, abs=1e-12)
                scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
                assert np.abs(ours.sigmas(steps, tokens) - scheduler.sigmas.numpy()).max() < 1e-6


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "LA", "CMYK", "I;16"])
@pytest.mark.parametrize("size", [(70, 100), (64, 64), (512, 65), (1500, 1100)])
def test_reference_pixels(generate, mode, size):
    from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor

    image = generate.picture(*size, 1, "I").convert(mode) if mode == "I;16" else generate.picture(*size, 1, mode)
    theirs, processor = image, Flux2ImageProcessor(vae_scale_factor=16)
    processor.check_image_input(image)
    if size[0] * size[1] > 1024 * 1024:
        theirs = processor._resize_to_target_area(image, 1024 * 1024)
    width, height = (x // 16 * 16 for x in theirs.size)
    expected = processor.preprocess(theirs, height=height, width=width, resize_mode="crop")[0].permute(1, 2, 0).numpy()
    assert references.fault(size) is None and references.reference_size(size, 16) == (width, height)
    assert np.array_equal(references.prepare(image, 16), expected)


@pytest.mark.parametrize("size", [(63, 100), (100, 63), (520, 64), (64, 520)])
def test_reference_that_is_refused(generate, size):
    from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor

    with pytest.raises(ValueError, match="."):
        Flux2ImageProcessor.check_image_input(generate.picture(*size, 1))
    assert references.fault(size)


@pytest.mark.parametrize("kind,side", [("base", "right"), ("base", "left"), ("dev", "right"), ("dev", "left")])
def test_tokens(generate, tmp_path, kind, side):
    """Those that the pipelines give their encoders: templates, truncation, padding and masks."""
    from diffusers import Flux2KleinPipeline, Flux2Pipeline

    words, seen = generate.tokenizer(kind, side), []

    class Encoder:
        dtype, device = torch.float32, torch.device("cpu")

        def __call__(self, input_ids, attention_mask, **_):
            seen[:] = input_ids.numpy(), attention_mask.numpy()
            raise StopIteration

    prompts = ["", "a dog", "東京 [IMG] at night", "x" * 500, "<|im_end|> {{ injected }} {% raw %}", " spaces  \n"]
    words.save_pretrained(tmp_path)
    ours = text.ChatTokenizer(str(tmp_path), text.DEV if kind == "dev" else text.KLEIN)
    get = (
        Flux2Pipeline._get_mistral_3_small_prompt_embeds
        if kind == "dev"
        else Flux2KleinPipeline._get_qwen3_prompt_embeds
    )
    module = get.__globals__
    device = module.get("get_module_execution_device")
    for length in (64, 300):
        for prompt in prompts:
            try:
                module["get_module_execution_device"] = lambda _: torch.device("cpu")
                get(Encoder(), words, prompt, max_sequence_length=length)
            except StopIteration:
                pass
            finally:
                module["get_module_execution_device"] = device
            ids, mask = ours([prompt], length)
            assert np.array_equal(ids, seen[0]) and np.array_equal(mask, seen[1])
            assert min(ours.count([prompt])[0], length) == mask.sum()


EXTRA = {
    "wide": dict(
        kind="base",
        heads=4,
        axes=(8, 8, 8, 8),
        layers=1,
        single=1,
        channels=16,
        groups=4,
        width=24,
        vae=dict(sizes=(8, 16, 16, 16)),
    ),
    "deep": dict(
        kind="distilled", heads=2, axes=(6, 4, 4, 2), layers=3, single=5, channels=2, mlp_ratio=2.0, side="left"
    ),
    "static": dict(
        kind="dev", heads=2, axes=(4, 4, 4, 4), layers=2, single=2, channels=4, dynamic=False, depth=35, width=32
    ),
}
SEEDS = [("flux2-klein", 1), ("flux2-base", 2), ("flux2-dev", 3), ("wide", 4), ("deep", 5), ("static", 6)]


def made(generate, variant, seed, folder):
    """A random pipeline of diffusers, saved; its text length and rows."""
    pipe = generate.pipeline(**(generate.VARIANTS | EXTRA)[variant], seed=seed)
    pipe.save_pretrained(folder)
    length = generate.length_of("flux2-dev") if pipe.__class__.__name__ == "Flux2Pipeline" else generate.LENGTH
    return pipe, length, [row | {"seed": 7 * seed + i} for i, row in enumerate(generate.rows())]


@pytest.mark.parametrize("variant,seed", SEEDS)
def test_pipeline(generate, cli, tmp_path, variant, seed):
    """Whole random pipelines through the command line and through diffusers: ≥ 50 dB in float32, and in bfloat16 no
    more than 2 dB worse than diffusers' own bfloat16."""
    pipe, length, rows = made(generate, variant, seed, tmp_path / "model")
    manifest, results = tmp_path / "rows.jsonl", {}
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for dtype in ("float32", "bfloat16"):
        code, err = cli(
            f"pretrained_model_name_or_path={tmp_path / 'model'}",
            f"manifest={manifest}",
            f"output_dir={tmp_path}",
            f"run_name={dtype}",
            f"max_sequence_length={length}",
            f"weights_dtype={dtype}",
            f"activations_dtype={dtype}",
            "hardware=cpu",
        )
        assert code == 0, err
        results[dtype] = images(tmp_path / dtype)
    expected = {row["id"]: generate.render(pipe, row, length) for row in rows}
    figures = [psnr(results["float32"][name], picture) for name, picture in expected.items()]
    print(f"{variant}: {min(figures):.1f} dB at least")
    assert min(figures) >= 50
    # The test is blind unless the prompt moves the picture.
    other = generate.render(pipe, rows[0] | {"prompt": "quite another prompt"}, length)
    assert psnr(other, expected[rows[0]["id"]]) < 30

    pipe.to(torch.bfloat16)
    theirs = np.mean([psnr(generate.render(pipe, row, length), expected[row["id"]]) for row in rows])
    own = np.mean([psnr(results["bfloat16"][name], picture) for name, picture in expected.items()])
    print(f"{variant}: bfloat16 {own:.1f}, diffusers' {theirs:.1f}")
    assert own >= theirs - 2


def test_many_tokens(generate, cli, tmp_path):
    """4,356, behind the jump of the schedule."""
    pipe, length, rows = made(generate, "flux2-klein", 7, tmp_path / "model")
    row = rows[0] | {"height": 528, "width": 528}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    code, err = cli(
        f"pretrained_model_name_or_path={tmp_path / 'model'}",
        f"manifest={tmp_path / 'rows.jsonl'}",
        f"output_dir={tmp_path}",
        "run_name=x",
        f"max_sequence_length={length}",
        "hardware=cpu",
    )
    assert code == 0, err
    assert psnr(images(tmp_path / "x")[row["id"]], generate.render(pipe, row, length)) >= 50


def test_mixed_rows_of_dev(generate, cli, tmp_path):
    """23 of them at any batch size on any mesh: with diffusers' tests, as the golden has no Mistral."""
    _, length, _ = made(generate, "flux2-dev", 3, tmp_path / "model")
    draw = functools.partial(test_flux2_run.drawn, cli, tmp_path)
    meshes = ["ddp 2", "fsdp 8", "tensor 2"]
    test_flux2_run.check_mixed_rows(draw, tmp_path / "model", meshes, f"max_sequence_length={length}", "hardware=cpu")


@pytest.mark.parametrize("variant,seed", SEEDS[1:3])
def test_references(generate, tmp_path, variant, seed):
    """One and two reference images, which must be cropped: ≥ 50 dB."""
    pipe, length, rows = made(generate, variant, seed, tmp_path)
    mine, pictures = Pipeline.open(tmp_path), [generate.picture(70, 100, 1), generate.picture(101, 64, 2)]
    sized = rows[0] | {"height": 64, "width": 64}
    unsized = {key: value for key, value in rows[0].items() if key not in ("height", "width")}
    for row, given in ((rows[0], pictures[:1]), (sized, pictures), (unsized, pictures)):
        picture = generate.render(pipe, row, length, given)
        assert psnr(mine.draw(row, length, given), picture) >= 50
    without = generate.render(pipe, rows[0] | {"height": picture.shape[0], "width": picture.shape[1]}, length)
    assert psnr(without, picture) < 30  # of the size of the first reference


def meta_model(name, config):
    from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration, Qwen3Config, Qwen3ForCausalLM

    with torch.device("meta"):
        if name == "transformer":
            return Flux2Transformer2DModel(**config)
        if name == "vae":
            return AutoencoderKLFlux2(**config)
        if name == "qwen3":
            return Qwen3ForCausalLM(Qwen3Config(**config))
        return Mistral3ForConditionalGeneration(Mistral3Config(text_config=config | {"model_type": "mistral"}))


FULL_SIZE = [(part, size) for part in ("transformer", "text") for size in test_flux2.FULL] + [
    ("decoder", None),
    ("encoder", None),
]


@pytest.mark.parametrize("part,size", FULL_SIZE)
def test_full_size_names_and_shapes(part, size):
    """Tables cover exactly what diffusers and transformers instantiate at FLUX.2's real sizes."""
    kind = (
        "vae" if size is None else "transformer" if part == "transformer" else "mistral" if size == "dev" else "qwen3"
    )
    config = {"transformer": lambda: test_flux2.FULL[size] | test_flux2.COMMON, "vae": lambda: test_flux2.VAE}.get(
        kind, lambda: test_flux2.ENCODERS[size]
    )()
    model = meta_model(kind, config)
    found = test_flux2.tensors({name: tuple(value.shape) for name, value in model.state_dict().items()})
    module, cfg, table = {
        "transformer": (transformer.Flux2, transformer.Flux2Config, transformer_table(found)),
        "qwen3": (qwen3.Qwen3Encoder, qwen3.Qwen3Config, keys.QWEN3),
        "mistral": (mistral.MistralEncoder, mistral.MistralConfig, keys.MISTRAL),
        "vae": (autoencoder.Decoder, autoencoder.Flux2VaeConfig, keys.VAE_DECODER_DIFFUSERS)
        if part == "decoder"
        else (autoencoder.Encoder, autoencoder.Flux2VaeConfig, keys.VAE_ENCODER_DIFFUSERS),
    }[kind]
    cfg = cfg.from_json(config)
    plan = load.plan(lambda rngs: module(cfg, rngs=rngs), found, table, Source("/"))
    if kind == "transformer":
        count = sum(p.numel() for p in model.parameters())
        assert count == test_flux2.COUNTS[size] == sum(x.size for x in jax.tree.leaves(plan.state))
    renamed = next(name for name in found if "norm" in name or "bn." in name)
    new = {"new_" + renamed: dataclasses.replace(found[renamed], name="new_" + renamed)}
    wrong = new | {name: tensor for name, tensor in found.items() if name != renamed}
    with pytest.raises(UserError, match=re.escape("new_" + renamed)):
        load.plan(lambda rngs: module(cfg, rngs=rngs), wrong, table, Source("/"))


def test_transformer_of_bfl(generate, tmp_path):
    """The same weights under Black Forest Labs' names, as diffusers converts them: the final layer's halves are
    swapped."""
    from diffusers import Flux2Transformer2DModel
    from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers
    from safetensors.torch import save_file

    model = generate.loud(
        Flux2Transformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=20,
            guidance_embeds=True,
            axes_dims_rope=(4, 4, 4, 4),
        ),
        0.2,
        torch.Generator().manual_seed(0),
    )
    theirs = model.state_dict()
    d, g = 32, torch.Generator().manual_seed(1)
    names = {
        "x_embedder": "img_in",
        "context_embedder": "txt_in",
        "proj_out": "final_layer.linear",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
    }
    names |= {
        f"{n}_modulation{s}.linear": f"{n}_modulation{s}.lin"
        for n, s in (("double_stream", "_img"), ("double_stream", "_txt"), ("single_stream", ""))
    }
    for a, b in (("timestep", "time_in"), ("guidance", "guidance_in")):
        names |= {f"time_guidance_embed.{a}_embedder.linear_{i}": f"{b}.{p}_layer" for i, p in ((1, "in"), (2, "out"))}
    bfl = {f"{to}.weight": torch.randn(theirs[f"{name}.weight"].shape, generator=g) * 0.2 for name, to in names.items()}
    for i in range(2):
        for s in ("img", "txt"):
            at = f"double_blocks.{i}.{s}_"
            shapes = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.0": (6 * d, d), "mlp.2": (d, 3 * d)}
            bfl |= {f"{at}{n}.weight": torch.randn(shape, generator=g) * 0.2 for n, shape in shapes.items()}
            bfl |= {f"{at}attn.norm.{n}_norm.scale": 1 + 0.2 * torch.randn(16, generator=g) for n in ("query", "key")}
        at = f"single_blocks.{i}."
        bfl |= {
            at + "linear1.weight": torch.randn(9 * d, d, generator=g) * 0.2,
            at + "linear2.weight": torch.randn(d, 4 * d, generator=g) * 0.2,
        }
        bfl |= {f"{at}norm.{n}_norm.scale": 1 + 0.2 * torch.randn(16, generator=g) for n in ("query", "key")}
    save_file(bfl, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(dict(model.config)))
    model.load_state_dict(convert_flux2_transformer_checkpoint_to_diffusers({k: v.clone() for k, v in bfl.items()}))
    img, txt, t = torch.randn(1, 6, 16, generator=g), torch.randn(1, 3, 20, generator=g), torch.tensor([0.4])
    ids, words = (torch.tensor(transformer.positions(3, 2, 3)[part]) for part in (slice(3, None), slice(3)))
    with torch.no_grad():
        expected = model(
            hidden_states=img, encoder_hidden_states=txt, timestep=t, img_ids=ids, txt_ids=words, guidance=t
        ).sample
    module = opened(
        tmp_path,
        transformer.Flux2,
        transformer.Flux2Config,
        lambda found: keys.transformer_bfl(keys.sizes_of(found)),
        "model",
    )
    close(
        call(module, *(jnp.asarray(x.numpy()) for x in (img, txt, t, t)), transformer.rope_table(module.cfg, 3, 2, 3)),
        expected.numpy(),
        5e-5,
    )


@pytest.mark.parametrize("tokens", [4300, 4352])
def test_a_large_picture(generate, tmp_path, tokens):
    """Below and above the number of tokens at which the shift jumps: a VAE of two levels has tokens of 4 × 4 pixels."""
    pipe = generate.pipeline("distilled", 1, (4, 4, 4, 4), 1, 1, 1, seed=3, vae=dict(sizes=(4, 4)))
    pipe.save_pretrained(tmp_path)
    rows, cols = {4300: (50, 86), 4352: (64, 68)}[tokens]
    row = generate.rows()[0] | {"height": 4 * rows, "width": 4 * cols}
    expected = generate.render(pipe, row, 64)
    assert expected.shape[:2] == (4 * rows, 4 * cols)
    assert psnr(Pipeline.open(tmp_path).draw(row, 64), expected) >= 50
