"""Live comparison with torch: diffusers' and transformers' own models on random weights."""

from __future__ import annotations

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, images, psnr
from flax import nnx

from fluxbatch.distributed.mesh import make_mesh
from fluxbatch.models import autoencoder, autoencoder_keys
from fluxbatch.models.flux1 import clip, keys, t5, transformer
from fluxbatch.models.flux1.definition import Flux1
from fluxbatch.models.noise import torch_normal
from fluxbatch.models.schedulers import FlowMatchEuler
from fluxbatch.weights import load
from fluxbatch.weights.headers import read_headers
from fluxbatch.weights.source import Source, Tensor

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

spec = importlib.util.spec_from_file_location("generate", GOLDEN / "generate.py")


@pytest.fixture(scope="module")
def generate():
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ours(model, folder, module, config, table, stem):
    """The same weights in our model: through files, tables and TensorStore."""
    model.save_pretrained(folder)
    source = Source(str(folder))
    cfg = config.from_json(source.json("config.json"))
    plan = load.plan(lambda rngs: module(cfg, rngs=rngs), read_headers(source, (stem,)), table, source)
    return load.load(plan, make_mesh((1, 1)), np.float32)


def call(module, *args):
    return np.asarray(nnx.jit(lambda m, *a: m(*a))(module, *args))


def close(got, expected, tolerance=2e-5):
    """Largest difference against the largest value."""
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize(
    "heads,head_dim,axes,channels,guidance",
    [
        (2, 16, (4, 6, 6), 4, True),
        (3, 8, (2, 2, 4), 8, False),
        (1, 32, (4, 12, 16), 16, True),
        (4, 12, (4, 4, 4), 2, False),
    ],
)
def test_flux(generate, tmp_path, heads, head_dim, axes, channels, guidance):
    from diffusers import FluxTransformer2DModel

    g = torch.Generator().manual_seed(heads)
    model = FluxTransformer2DModel(
        in_channels=4 * channels,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=head_dim,
        num_attention_heads=heads,
        joint_attention_dim=20,
        pooled_projection_dim=28,
        guidance_embeds=guidance,
        axes_dims_rope=axes,
    )
    generate.loud(model, 0.15, g)
    b, rows, cols, words = 3, 4, 6, 7
    img, txt, pooled = (torch.randn(s, generator=g) for s in ((b, rows * cols, 4 * channels), (b, words, 20), (b, 28)))
    t, scale = torch.tensor([1.0, 0.4, 0.01]), torch.tensor([3.5, 1.0, 0.0])
    ids = torch.zeros(rows, cols, 3)
    ids[..., 1], ids[..., 2] = torch.arange(rows)[:, None], torch.arange(cols)[None]
    with torch.no_grad():
        expected = model(
            hidden_states=img,
            encoder_hidden_states=txt,
            pooled_projections=pooled,
            timestep=t,
            img_ids=ids.reshape(-1, 3),
            txt_ids=torch.zeros(words, 3),
            guidance=scale if guidance else None,
        ).sample
    module = ours(
        model, tmp_path, transformer.Flux, transformer.FluxConfig, keys.FLUX_DIFFUSERS, "diffusion_pytorch_model"
    )
    inputs = [jnp.asarray(x.numpy()) for x in (img, txt, pooled, t, scale)]
    close(call(module, *inputs, transformer.rope_table(words, rows, cols, axes)), expected.numpy())


@pytest.mark.parametrize("length", [5, 300])
def test_t5(tmp_path, length):
    from transformers import T5Config, T5EncoderModel

    model = T5EncoderModel(
        T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=3, feed_forward_proj="gated-gelu")
    ).eval()
    ids = torch.randint(0, 99, (2, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids)[0].numpy()
    module = ours(model, tmp_path, t5.T5Encoder, t5.T5Config, keys.T5, "model")
    close(call(module, jnp.asarray(ids.numpy())), expected)


@pytest.mark.parametrize("act,eos", [("quick_gelu", 2), ("gelu", 98)])
def test_clip(tmp_path, act, eos):
    from transformers import CLIPTextConfig, CLIPTextModel

    model = CLIPTextModel(CLIPTextConfig(
        vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, hidden_act=act,
        eos_token_id=eos, bos_token_id=0, pad_token_id=1)).eval()  # fmt: skip
    ids = torch.randint(3, 97, (2, 77), generator=torch.Generator().manual_seed(0))
    ids[0, 40:], ids[1, 76] = 98, 98
    with torch.no_grad():
        expected = model(ids).pooler_output.numpy()
    module = ours(model, tmp_path, clip.ClipTextEncoder, clip.ClipConfig, keys.CLIP, "model")
    close(call(module, jnp.asarray(ids.numpy())), expected)


@pytest.mark.parametrize(
    "given",
    [{}, dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768, dropout=0.0)],
)
def test_clip_of_which_little_is_said(given):
    """transformers 4 leaves out of a whole CLIP's ``text_config`` what is as by default: vocabulary, layers, …"""
    from transformers import CLIPConfig

    theirs, mine = CLIPConfig(text_config=given).text_config, clip.ClipConfig.from_json({"text_config": given})
    assert dataclasses.asdict(mine) == {name: getattr(theirs, name) for name in dataclasses.asdict(mine)}


@pytest.mark.parametrize(
    "options",
    [
        dict(use_quant_conv=False, use_post_quant_conv=False),
        dict(mid_block_add_attention=False, shift_factor=None),
        dict(layers_per_block=2),
    ],
)
def test_vae(generate, tmp_path, options):
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        **dict(
            down_block_types=["DownEncoderBlock2D"] * 3,
            up_block_types=["UpDecoderBlock2D"] * 3,
            block_out_channels=(8, 16, 32),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            scaling_factor=0.36,
            shift_factor=0.1,
        )
        | options
    )
    generate.loud(model, 0.1, torch.Generator().manual_seed(0))
    latents = torch.randn(2, 4, 6, 10, generator=torch.Generator().manual_seed(1))
    image = torch.randn(2, 3, 24, 40, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        decoded = model.decode(latents / 0.36 + (model.config.shift_factor or 0)).sample.permute(0, 2, 3, 1).numpy()
        encoded = model.encode(image).latent_dist.mean.permute(0, 2, 3, 1).numpy()
    stem = "diffusion_pytorch_model"
    decoder = ours(model, tmp_path, autoencoder.Decoder, autoencoder.VaeConfig, autoencoder_keys.VAE_DECODER, stem)
    close(call(decoder, jnp.asarray(latents.permute(0, 2, 3, 1).numpy())), decoded)
    encoder = ours(model, tmp_path, autoencoder.Encoder, autoencoder.VaeConfig, autoencoder_keys.VAE_ENCODER, stem)
    mean, _ = nnx.jit(lambda m, x: m(x))(encoder, jnp.asarray(image.permute(0, 2, 3, 1).numpy()))
    close(np.asarray(mean), encoded)


def test_noise_and_schedule():
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    for seed in (0, 1, 12345, 2**32 + 5, 2**63 - 1):
        for size in (16, 17, 100, 16384):
            expected = torch.randn(size, generator=torch.Generator("cpu").manual_seed(seed)).numpy()
            assert np.abs(torch_normal(seed, size) - expected).max() < 1e-6
    for dynamic in (False, True):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic)
        schedule = FlowMatchEuler.of(dict(scheduler.config), None, None, None)
        for steps in (1, 4, 28, 50):
            for tokens in (64, 256, 4096, 5000):
                scheduler.set_timesteps(
                    sigmas=np.linspace(1, 1 / steps, steps), mu=calculate_shift(tokens, 256, 4096, 0.5, 1.15)
                )
                assert np.abs(schedule.sigmas(steps, tokens) - scheduler.sigmas.numpy()).max() < 1e-6


# The published configurations of FLUX.1 (dev and schnell differ in the guidance embedding).
FULL = {
    "transformer": dict(
        in_channels=64,
        num_layers=19,
        num_single_layers=38,
        attention_head_dim=128,
        num_attention_heads=24,
        joint_attention_dim=4096,
        pooled_projection_dim=768,
        axes_dims_rope=(16, 56, 56),
    ),
    "text_encoder_2": dict(
        vocab_size=32128,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        relative_attention_num_buckets=32,
        feed_forward_proj="gated-gelu",
    ),
    "text_encoder": dict(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        hidden_act="quick_gelu",
    ),
    "vae": dict(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=16,
        norm_num_groups=32,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ),
}


@pytest.mark.parametrize(
    "name,guidance",
    [("transformer", True), ("transformer", False), ("text_encoder_2", None), ("text_encoder", None), ("vae", None)],
)
def test_full_size_names_and_shapes(name, guidance):
    """Tables cover exactly what diffusers and transformers instantiate at FLUX.1's real size."""
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    config = FULL[name] | ({} if guidance is None else {"guidance_embeds": guidance})
    with torch.device("meta"):
        model = {
            "transformer": lambda: FluxTransformer2DModel(**config),
            "vae": lambda: AutoencoderKL(**config),
            "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**config)),
            "text_encoder_2": lambda: T5EncoderModel(T5Config(**config)),
        }[name]()
    tensors = {
        k: Tensor(k, "f", np.dtype(np.float32), tuple(v.shape), 0, 4 * v.numel()) for k, v in model.named_parameters()
    }
    kind = Flux1.components[name]
    cfg = kind.config.from_json(config)
    plan = load.plan(
        lambda rngs: kind.module(cfg, rngs=rngs), tensors, kind.namings[-1].table_for(tensors), Source("/")
    )
    if name == "transformer":
        size = sum(v.size for v in jax.tree.leaves(plan.state))
        assert size == 11_901_408_320 if guidance else size < 11_901_408_320


@pytest.mark.parametrize("variant,seed", [("dev", 1), ("schnell", 2), ("wide", 3), ("deep", 4)])
def test_pipeline(generate, cli, tmp_path, variant, seed):
    """Whole random pipelines through the command line and through diffusers: ≥ 50 dB in float32, and in
    bfloat16 no more than 2 dB worse than diffusers' own bfloat16."""
    extra = {
        "wide": dict(
            heads=4,
            head_dim=32,
            axes=(8, 12, 12),
            layers=1,
            single=1,
            channels=16,
            guidance=True,
            dynamic=True,
            act="gelu",
        ),
        "deep": dict(
            heads=1,
            head_dim=24,
            axes=(4, 8, 12),
            layers=3,
            single=5,
            channels=2,
            guidance=False,
            dynamic=True,
            act="quick_gelu",
        ),
    }
    pipe = generate.pipeline(**(generate.VARIANTS | extra)[variant], seed=seed)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "model")
    rows = [row | {"seed": 7 * seed + i} for i, row in enumerate(generate.rows(True))]
    manifest = tmp_path / "rows.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = {}
    for dtype in ("float32", "bfloat16"):
        code, _ = cli(
            f"pretrained_model_name_or_path={tmp_path / 'model'}",
            f"manifest={manifest}",
            f"output_dir={tmp_path}",
            f"run_name={dtype}",
            "max_sequence_length=24",
            f"weights_dtype={dtype}",
            f"activations_dtype={dtype}",
            "hardware=cpu",
        )
        assert code == 0
        results[dtype] = images(tmp_path / dtype)
    expected = {row["id"]: generate.render(pipe, row, 24) for row in rows}
    for row in rows:
        assert psnr(results["float32"][row["id"]], expected[row["id"]]) >= 50
    # The test is blind unless the prompt moves the picture.
    other = generate.render(pipe, rows[0] | {"prompt": "quite another prompt"}, 24)
    assert psnr(other, expected[rows[0]["id"]]) < 30

    pipe.to(torch.bfloat16)
    theirs = np.mean([psnr(generate.render(pipe, row, 24), expected[row["id"]]) for row in rows])
    mine = np.mean([psnr(results["bfloat16"][row["id"]], expected[row["id"]]) for row in rows])
    assert mine >= theirs - 2
