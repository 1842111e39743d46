"""FLUX.2's parts without torch: goldens, divided weights and tokens, names and shapes of published checkpoints."""

from __future__ import annotations

import dataclasses
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import filled
from flax import nnx

from fluxbatch.distributed.mesh import Layout, Placement, make_mesh
from fluxbatch.generation.tokenizers import Absent
from fluxbatch.models.flux2 import autoencoder, cost, keys, mistral, qwen3, text, transformer
from fluxbatch.models.flux2.schedule import Flux2Schedule, empirical_mu
from fluxbatch.models.key_tables import shapes_of
from fluxbatch.types import UserError
from fluxbatch.weights import load, published
from fluxbatch.weights.checkpoint import agreed
from fluxbatch.weights.source import Source, Tensor

# The published configurations.
FULL = {
    "klein-4b": dict(
        num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False
    ),
    "klein-9b": dict(
        num_layers=8, num_single_layers=24, num_attention_heads=32, joint_attention_dim=12288, guidance_embeds=False
    ),
    "dev": dict(
        num_layers=8, num_single_layers=48, num_attention_heads=48, joint_attention_dim=15360, guidance_embeds=True
    ),
}
COMMON = dict(
    in_channels=128, attention_head_dim=128, axes_dims_rope=[32, 32, 32, 32], mlp_ratio=3.0, rope_theta=2000, eps=1e-6
)
ENCODERS = {
    "klein-4b": dict(
        vocab_size=151936,
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        rope_theta=1000000,
        rms_norm_eps=1e-6,
    ),
    "klein-9b": dict(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        rope_theta=1000000,
        rms_norm_eps=1e-6,
    ),
    "dev": dict(
        vocab_size=131072,
        hidden_size=5120,
        intermediate_size=32768,
        num_hidden_layers=40,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        rope_theta=1000000000.0,
        rms_norm_eps=1e-5,
    ),
}
# Parameters of the published transformers: 3.88, 9.08 and 32.2 billion.
COUNTS = {"klein-4b": 3_875_544_576, "klein-9b": 9_078_581_248, "dev": 32_223_281_152}
VAE = dict(
    block_out_channels=[128, 256, 512, 512],
    layers_per_block=2,
    latent_channels=32,
    norm_num_groups=32,
    batch_norm_eps=1e-4,
    down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4,
)
TINY = transformer.Flux2Config.from_json(
    dict(
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        num_attention_heads=4,
        attention_head_dim=16,
        joint_attention_dim=24,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 4, 4),
    )
)


@pytest.fixture(scope="module")
def tiny():
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in ((4, 24, 16), (4, 8, 24), (4, 16, 16))]
    t, guidance = np.float32([1, 0.7, 0.3, 0.1]), np.float32([1, 2, 3, 4])
    flux = filled(transformer.Flux2(TINY, rngs=None))
    return (
        nnx.split(flux),
        (*arrays[:2], t, guidance),
        arrays[2],
        transformer.rope_table(TINY, 8, 4, 6, ((2, 4), (4, 2))),
    )


def velocity(graph, state, inputs, rope, refs):
    return jax.jit(lambda s, *a: nnx.merge(graph, s)(*a))(state, *inputs, rope, refs)


@pytest.mark.parametrize("shape", [(2, 2, 1, 1), (1, 1, 2, 1), (1, 1, 1, 4), (1, 2, 2, 2)])
@pytest.mark.parametrize("with_refs", [False, True])
def test_divided(tiny, shape, with_refs):
    """Weights, tokens and heads over eight devices, as over one."""
    (graph, state), inputs, refs, rope = tiny
    rope = rope if with_refs else tuple(table[:32] for table in rope)
    expected = velocity(graph, state, inputs, rope, refs if with_refs else None)
    mesh = make_mesh(shape)
    layout = Layout(mesh)
    divided, abstract = nnx.split(
        transformer.Flux2(TINY, rngs=None, layout=layout, attention=layout.attention(transformer.attn.dot_product))
    )

    def placed(leaf, like):
        axes = like.get_metadata()["axes"]
        place = Placement.of(mesh, leaf.get_value().shape, axes)
        # ``filled`` gave the values as a device holds them, so only parts of an axis are dealt anew
        value = Placement(place.read, place.final, place.used, place.parts, place.groups).arranged(leaf.get_value())
        return leaf.replace(jax.device_put(value, place.final))

    own = jax.tree.map(placed, state, abstract, is_leaf=lambda x: isinstance(x, nnx.Variable))
    got = velocity(divided, own, inputs, rope, refs if with_refs else None)
    assert np.abs(got - expected).max() < 2e-5 * np.abs(expected).max()
    split = {load.path_of(k): leaf.get_value().sharding.spec for k, leaf in nnx.to_flat_state(own)}
    if shape[3] > 1:
        for path in (
            "single_blocks.mlp_gate.kernel",
            "single_blocks.mlp_up.kernel",
            "single_blocks.qkv.q.kernel",
            "double_blocks.img.mlp_gate.kernel",
        ):
            assert "tensor" in str(split[path][1])
        assert "tensor" in str(split["single_blocks.out.kernel"][2])


def test_references_are_read(tiny):
    (graph, state), inputs, refs, rope = tiny
    first, other = (velocity(graph, state, inputs, rope, x) for x in (refs, refs[:, ::-1]))
    assert np.abs(first - other).max() > 0.01


def test_one_program_of_steps(tiny):
    """The modulation of many steps at once is that of each."""
    (graph, state), (img, txt, _, guidance), _, rope = tiny
    flux, rope = nnx.merge(graph, state), tuple(table[:32] for table in rope)
    times = np.tile(np.float32([1, 0.5, 0.25]), (4, 1))
    steps = flux.step_inputs(transformer.PromptEmbeds(txt), np.pad(times, ((0, 0), (0, 1))), guidance, jnp.float32)
    assert [x.shape for x in steps] == [(4, 3, 384), (4, 3, 384), (4, 3, 192), (4, 3, 128)]
    flux.drop_step_layers()
    words = flux.embed(transformer.PromptEmbeds(txt), rope, jnp.float32)
    for i in range(3):
        at = jax.tree.map(lambda x, i=i: x[:, i], steps)
        expected = velocity(graph, state, (img, txt, times[:, i], guidance), rope, None)
        assert np.abs(flux.velocity(img, words, at, rope) - expected).max() < 1e-4


def tensors(shapes):
    return {
        name: Tensor(name, "f", np.dtype(np.float32), tuple(shape), 0, 4 * int(np.prod(shape)))
        for name, shape in shapes.items()
    }


def bfl_transformer(name):
    """Names and shapes of Black Forest Labs' file."""
    c = FULL[name]
    d, own = 128 * c["num_attention_heads"], {}
    own |= {
        "img_in.weight": (d, 128),
        "txt_in.weight": (d, c["joint_attention_dim"]),
        "final_layer.linear.weight": (128, d),
    }
    own |= {
        f"{n}.{p}_layer.weight": (d, 256 if p == "in" else d)
        for n in ["time_in", *["guidance_in"] * c["guidance_embeds"]]
        for p in ("in", "out")
    }
    own |= {f"double_stream_modulation_{s}.lin.weight": (6 * d, d) for s in ("img", "txt")}
    own |= {"single_stream_modulation.lin.weight": (3 * d, d), "final_layer.adaLN_modulation.1.weight": (2 * d, d)}
    for i in range(c["num_layers"]):
        for s in (f"double_blocks.{i}.img_", f"double_blocks.{i}.txt_"):
            own |= {
                s + "attn.qkv.weight": (3 * d, d),
                s + "attn.proj.weight": (d, d),
                s + "mlp.0.weight": (6 * d, d),
                s + "mlp.2.weight": (d, 3 * d),
            }
            own |= {s + f"attn.norm.{n}_norm.scale": (128,) for n in ("query", "key")}
    for i in range(c["num_single_layers"]):
        s = f"single_blocks.{i}."
        own |= {
            s + "linear1.weight": (9 * d, d),
            s + "linear2.weight": (d, 4 * d),
            s + "norm.query_norm.scale": (128,),
            s + "norm.key_norm.scale": (128,),
        }
    return tensors(own)


def sizes(found, table, function):
    """What shapes give away, as a single file is read."""
    return function(*shapes_of(found, table))


@pytest.mark.parametrize("name", FULL)
def test_transformer_of_bfl(name):
    """All names of the published sizes are used, once, and the sizes are seen in the shapes."""
    found = bfl_transformer(name)
    table = keys.transformer_bfl(keys.sizes_of(found))
    given = sizes(found, table, keys.transformer_sizes)
    expected = FULL[name] | COMMON
    assert {key: expected[key] for key in given if key in expected} == {
        key: value for key, value in given.items() if key in expected
    }
    cfg = transformer.Flux2Config.from_json(given | keys.transformer_constants(given))
    assert cfg == transformer.Flux2Config.from_json(expected)
    plan = load.plan(lambda rngs: transformer.Flux2(cfg, rngs=rngs), found, table, Source("/"))
    assert sum(x.size for x in jax.tree.leaves(plan.state)) == COUNTS[name]


@pytest.mark.parametrize(
    "old,new",
    [
        ("double_blocks.3.txt_mlp.0.weight", "double_blocks.3.txt_mlp.1.weight"),
        ("single_stream_modulation.lin.weight", "single_stream_modulation.linear.weight"),
    ],
)
def test_a_renamed_key_is_named(old, new):
    found = bfl_transformer("klein-4b")
    found[new] = dataclasses.replace(found.pop(old), name=new)
    cfg = transformer.Flux2Config.from_json(FULL["klein-4b"] | COMMON)
    with pytest.raises(UserError, match=re.escape(new)):
        load.plan(lambda rngs: transformer.Flux2(cfg, rngs=rngs), found, keys.transformer_bfl(), Source("/"))


def language_model(config, prefix, norms, depth):
    d, hidden, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, groups = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    own = {f"{prefix}embed_tokens.weight": (config["vocab_size"], d), f"{prefix}norm.weight": (d,)}
    for i in range(depth):
        s = f"{prefix}layers.{i}."
        own |= {s + f"{n}.weight": (d,) for n in ("input_layernorm", "post_attention_layernorm")}
        own |= {s + f"self_attn.{n}.weight": (head,) for n in norms}
        own |= {
            s + f"self_attn.{n}_proj.weight": shape
            for n, shape in zip("qkvo", ((heads, d), (groups, d), (groups, d), (d, heads)), strict=True)
        }
        own |= {s + f"mlp.{n}_proj.weight": (d, hidden) if n == "down" else (hidden, d) for n in ("gate", "up", "down")}
    return tensors(own)


@pytest.mark.parametrize(
    "name,prefix,beside",
    [
        ("klein-4b", "model.", {}),
        ("klein-9b", "", {"lm_head.weight": (151936, 4096)}),
        (
            "dev",
            "language_model.model.",
            {
                "language_model.lm_head.weight": (9, 9),
                "vision_tower.ln_pre.weight": (9,),
                "multi_modal_projector.norm.weight": (9,),
            },
        ),
        ("dev", "model.language_model.", {"lm_head.weight": (9, 9), "model.vision_tower.ln_pre.weight": (9,)}),
        ("dev", "model.", {"tekken_model": (9,)}),
    ],
)
def test_text_encoder_names(name, prefix, beside):
    """Layers behind the last one that is read are neither built nor read."""
    module, config, table, norms = (
        (mistral.MistralEncoder, mistral.MistralConfig, keys.MISTRAL, ())
        if name == "dev"
        else (qwen3.Qwen3Encoder, qwen3.Qwen3Config, keys.QWEN3, ("q_norm", "k_norm"))
    )
    found = language_model(ENCODERS[name], prefix, norms, ENCODERS[name]["num_hidden_layers"]) | tensors(beside)
    cfg = config.from_json(ENCODERS[name])
    given = sizes(found, table, keys.decoder_sizes)
    constants = keys.mistral_constants(given) if name == "dev" else keys.qwen3_constants(given)
    last = mistral.LAYERS[-1] if name == "dev" else qwen3.LAYERS[-1]
    assert config.from_json(constants | given) == dataclasses.replace(
        cfg, num_hidden_layers=last + 1
    )  # more are not counted
    plan = load.plan(lambda rngs: module(cfg, rngs=rngs), found, table, Source("/"))
    read = {piece.tensor.name for pieces in plan.pieces.values() for piece in pieces}
    assert {int(m[1]) for n in read if (m := re.search(r"layers\.(\d+)\.", n))} == set(range(last))
    states = jax.eval_shape(
        lambda s, i, m: nnx.merge(plan.graph, s)(i, m, jnp.bfloat16), plan.state, *[jnp.zeros((2, 512), jnp.int32)] * 2
    )
    assert states.shape == (2, 512, FULL[name]["joint_attention_dim"])


def bfl_vae(half):
    """Names and shapes of one half of ``ae.safetensors``, resolutions counted from the finest."""
    widths, own = VAE["block_out_channels"], {}

    def conv(name, out, into, size):
        own.update({f"{half}.{name}.weight": (out, into, size, size), f"{half}.{name}.bias": (out,)})

    def norm(name, width):
        own.update({f"{half}.{name}.{leaf}": (width,) for leaf in ("weight", "bias")})

    def resnet(name, into, out):
        norm(f"{name}.norm1", into), norm(f"{name}.norm2", out)
        conv(f"{name}.conv1", out, into, 3), conv(f"{name}.conv2", out, out, 3)
        if into != out:
            conv(f"{name}.nin_shortcut", out, into, 1)

    up = half == "decoder"
    before, levels = (512, range(3, -1, -1)) if up else (128, range(4))
    conv("conv_in", before, 32 if up else 3, 3)
    for level in levels:
        for block in range(3 if up else 2):
            resnet(
                f"{'up' if up else 'down'}.{level}.block.{block}",
                before if block == 0 else widths[level],
                widths[level],
            )
        before = widths[level]
        if level != levels[-1]:
            conv(f"up.{level}.upsample.conv" if up else f"down.{level}.downsample.conv", before, before, 3)
    for i in (1, 2):
        resnet(f"mid.block_{i}", 512, 512)
    norm("mid.attn_1.norm", 512), norm("norm_out", before)
    for n in ("q", "k", "v", "proj_out"):
        conv(f"mid.attn_1.{n}", 512, 512, 1)
    conv("conv_out", 3 if up else 64, before, 3)
    conv("post_quant_conv" if up else "quant_conv", *(32, 32) if up else (64, 64), 1)
    return own


def test_autoencoder_of_bfl():
    statistics = {"bn.running_mean": (128,), "bn.running_var": (128,), "bn.num_batches_tracked": ()}
    found = tensors(bfl_vae("encoder") | bfl_vae("decoder") | statistics)
    cfg = autoencoder.Flux2VaeConfig.from_json(VAE)
    for module, table in ((autoencoder.Decoder, keys.vae_decoder_bfl(4)), (autoencoder.Encoder, keys.VAE_ENCODER_BFL)):
        plan = load.plan(lambda rngs, module=module: module(cfg, rngs=rngs), found, table, Source("/"))
        assert len(plan.pieces["bn.mean"]) == 1


@pytest.mark.parametrize("name,kind,distilled", [
    ("klein-4B", "klein-4b", True), ("klein-9B", "klein-9b", True), ("klein-base-4B", "klein-4b", False), ("klein-base-9B", "klein-9b", False),
    ("dev", "dev", None)])  # fmt: skip
def test_what_a_plan_knows(name, kind, distilled):
    """The sizes that come with the package are the published ones, and what is drawn with them is of the right kind."""
    known = published.published()[f"black-forest-labs/flux.2-{name}".lower()]
    family = published.family_of(known)
    parts = {part: published.component(part, of, known, "x") for part, of in family.components.items()}
    assert parts["transformer"].config == transformer.Flux2Config.from_json(FULL[kind] | COMMON)
    assert parts["text_encoder"].config == family.components["text_encoder"].config.from_json(ENCODERS[kind])
    assert parts["vae"].config == autoencoder.Flux2VaeConfig.from_json(VAE)
    whole = agreed(family, parts, known.get("index", {}))
    assert (whole.cfg, whole.guided, whole.index()) == (
        distilled is False,
        distilled is not True,
        {} if distilled is None else {"is_distilled": distilled},
    )
    assert whole.scheduler(known["scheduler"], None, None, None) == Flux2Schedule(True, 3.0)


def test_a_shift_that_flux2_does_not_have():
    with pytest.raises(UserError, match=r"sampler.max_shift=1.15: expected null"):
        Flux2Schedule.of({}, None, None, 1.15)


def test_shift_jumps():
    """μ of FLUX.2's authors, and the levels of four steps at a megapixel."""
    assert empirical_mu(4300, 4) == pytest.approx(2.308, abs=1e-3) and empirical_mu(4301, 4) == pytest.approx(
        1.185, abs=1e-3
    )
    levels = Flux2Schedule.of({"use_dynamic_shifting": True}).sigmas(4, 4096)
    assert levels == pytest.approx([1, 0.9674, 0.9081, 0.7672, 0], abs=1e-4)


def test_cost_is_the_compilers():
    """Products that XLA counts in the compiled programs, within what is linear in tokens."""
    cfg = transformer.Flux2Config.from_json(
        dict(
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            num_attention_heads=2,
            attention_head_dim=64,
            joint_attention_dim=192,
            guidance_embeds=False,
            axes_dims_rope=(16, 16, 16, 16),
        )
    )
    flux = nnx.split(transformer.Flux2(cfg, rngs=None))
    spec = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    rope = transformer.rope_table(cfg, 64, 16, 16, ((8, 8),))
    run = jax.jit(lambda s, *a: nnx.merge(flux[0], s)(*a[:4], rope, a[4]))
    compiled = run.lower(flux[1], spec(1, 256, 64), spec(1, 64, 192), spec(1), spec(1), spec(1, 64, 64)).compile()
    counted = compiled.cost_analysis()["flops"]
    assert cost.step(cfg, 256, 64, 64) == pytest.approx(counted, rel=0.1)
    words = qwen3.Qwen3Config.from_json(
        dict(
            vocab_size=50,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
        )
    )
    encoder = nnx.split(qwen3.Qwen3Encoder(words, rngs=None, layers=(1, 2, 3)))
    ids = jax.ShapeDtypeStruct((1, 128), jnp.int32)
    lowered = jax.jit(lambda s, i: nnx.merge(encoder[0], s)(i, i)).lower(encoder[1], ids)
    assert cost.encode(words, (1,), 128) == pytest.approx(lowered.compile().cost_analysis()["flops"], rel=0.2)


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(axes_dims_rope=[64, 64]), "axes_dims_rope"),
        (dict(patch_size=2), "patch_size 2: expected 1"),
        (dict(eps=1e-5), "eps 1e-05: expected 1e-06"),
    ],
)
def test_config_that_is_refused(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        transformer.Flux2Config.from_json(FULL["klein-4b"] | COMMON | change)


@pytest.mark.parametrize("config,change,message", [
    (qwen3.Qwen3Config, dict(attention_bias=True), "attention_bias"), (qwen3.Qwen3Config, dict(hidden_act="gelu"), "hidden_act"),
    (qwen3.Qwen3Config, dict(layer_types=["sliding_attention"]), "layer_types"), (qwen3.Qwen3Config, dict(num_key_value_heads=5), "divisor"),
    (mistral.MistralConfig, dict(rope_scaling={"type": "yarn"}), "yarn")])  # fmt: skip
def test_encoder_that_is_refused(config, change, message):
    with pytest.raises(ValueError, match=message):
        config.from_json(ENCODERS["klein-4b"] | change)


def test_encoder_that_is_too_short():
    cfg = qwen3.Qwen3Config.from_json(ENCODERS["klein-4b"] | dict(num_hidden_layers=27))
    with pytest.raises(ValueError, match="num_hidden_layers 27: expected more than 27"):
        qwen3.Qwen3Encoder(cfg, rngs=None)


def test_prompts_without_a_tokenizer():
    """A plan counts words, and what the template adds: what it calls cut is, and what may be cut it does not call
    whole."""
    read = text.ChatInput("x", Absent(), 100, "prompt", 40)
    short, long, unknown = "word " * 5, "word " * 100, "w" * 70
    assert read.truncated([short, long, unknown]) == {long} and read.doubtful([short, long, unknown]) == {unknown}


def test_the_tokenizer_says_what_is_cut(golden):
    chat = text.ChatTokenizer(str(golden / "flux2-klein/tokenizer"), text.KLEIN)
    (around,) = chat.count([""])
    assert 0 < around <= 96 and chat.longer(["x" * n for n in (0, 10, 11, 200)], around + 10) == {"x" * 11, "x" * 200}
    ids, mask = chat(["x" * 200, "x"], 96)
    assert ids.shape == (2, 96) and mask.sum(1).tolist() == [96, around + 1] and not chat([], 96)[0].size


def test_a_tokenizer_without_template_is_refused(golden, tmp_path):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(golden / "flux2-klein/tokenizer" / file, tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path}: the tokenizer cannot be read: it has no chat template"):
        text.ChatTokenizer(str(tmp_path), text.KLEIN)
