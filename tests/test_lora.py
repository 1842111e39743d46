"""Adapters without torch: every trainer's keys at FLUX.1's real size, strictness, sources, the algebra,
merging and unmerging, rows with mixes of their own."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import lora_files as files
import ml_dtypes
import numpy as np
import pytest
import yaml
from conftest import metadata
from flax import nnx

from fluxbatch.config import application
from fluxbatch.distributed import backend
from fluxbatch.generation import prompts
from fluxbatch.generation.kept import KeptPipeline
from fluxbatch.generation.model_spec import open_model_spec
from fluxbatch.lora import adapter
from fluxbatch.lora.deltas import Decomposed, Hadamard, Kronecker, Product, Whole
from fluxbatch.manifest.rows import read_rows
from fluxbatch.models.flux1 import clip, t5, transformer
from fluxbatch.models.flux1.lora import LORA
from fluxbatch.types import Row, UserError
from fluxbatch.weights.load import Plan
from fluxbatch.weights.source import Source


@functools.cache
def plans(size: files.Size = files.FULL) -> dict[str, Plan]:
    """Plans that know every parameter's shape, and where none of their bytes are."""
    w, h, n = size.clip
    d, inner, hidden, m = size.t5
    configs = {
        "transformer": (
            transformer.Flux,
            transformer.FluxConfig(
                in_channels=size.channels,
                out_channels=size.channels,
                num_layers=size.double,
                num_single_layers=size.single,
                num_attention_heads=size.width // size.head,
                attention_head_dim=size.head,
                joint_attention_dim=size.context,
                pooled_projection_dim=size.pooled,
                guidance_embeds=size.guidance,
                axes_dims_rope=(size.head - 8, 4, 4),
            ),
        ),
        "text_encoder": (clip.ClipTextEncoder, clip.ClipConfig(99, w, h, n, 1, 77, "quick_gelu", 1e-5, 2)),
        "text_encoder_2": (t5.T5Encoder, t5.T5Config(99, d, inner, hidden, m, 1, 32, 128, 1e-6)),
    }
    made = {}
    for name, (module, config) in configs.items():
        graph, state = nnx.split(
            nnx.eval_shape(lambda module=module, config=config: module(config, rngs=nnx.Rngs(0))), nnx.Param, ...
        )[:2]
        made[name] = Plan(Source("/"), graph, state, {})
    return made


def read(path, strict=True, **spec):
    given = {"name": "x", "path": str(path), "weight_name": None, "scale": 1.0, "from_pt": True, "key": "lora.x.path"}
    return adapter.read_adapter(adapter.Spec(**given | spec), plans(), LORA, strict)


@pytest.mark.parametrize("name", files.FORMATS)
def test_every_key_of_every_format_at_full_size(tmp_path, name):
    tensors = files.FORMATS[name](files.FULL, files.Maker(0, ranks=(1, 2), dtype=np.float16))
    adapter = read(files.save(tmp_path / "all.safetensors", tensors))
    assert not adapter.skipped
    of = {part.part: (part.layers, part.of) for part in adapter.parts}
    assert of["double_blocks.img"] == of["double_blocks.txt"] == (19, 19)
    assert of["single_blocks"] == (38, 38)
    assert ("text_encoder blocks" in of) == any(
        key.startswith(("lora_te1", "text_encoder", "clip_l")) for key in tensors
    )
    assert sum(part.parameters for part in adapter.parts) == sum(
        v.size for k, v in tensors.items() if not k.endswith(("alpha", "norm.scale"))
    )

    # one renamed key, wherever it stands
    at = list(files.FORMATS).index(name)
    keys = [key for key in tensors if "blocks" in key]
    key = keys[len(keys) * at // len(files.FORMATS)]
    renamed = (key.replace("blocks", "blocs"), key.replace(".", ".x", 1), key + "x")[at % 3]
    assert renamed != key
    with pytest.raises(UserError) as error:
        read(files.save(tmp_path / "renamed.safetensors", {renamed if k == key else k: v for k, v in tensors.items()}))
    assert f"renamed.safetensors: key that leads nowhere in this model: {renamed}" in str(error.value)


# ---- the algebra ----

DELTAS = {
    "LoRA": lambda m: Product(m.normal(3, 12), m.normal(10, 3), 0.5),
    "LoHa": lambda m: Hadamard((m.normal(10, 2), m.normal(2, 12)), (m.normal(10, 2), m.normal(2, 12)), 0.5),
    "LoHa, large": lambda m: Hadamard((m.normal(10, 9), m.normal(9, 12)), (m.normal(10, 9), m.normal(9, 12)), 0.5),
    "LoKr": lambda m: Kronecker((m.normal(2, 3),), (m.normal(5, 1), m.normal(1, 4)), 0.5),
    "LoKr, whole": lambda m: Kronecker((m.normal(5, 3),), (m.normal(2, 4),), 0.5),
    "LoKr, both": lambda m: Kronecker((m.normal(5, 1), m.normal(1, 3)), (m.normal(2, 1), m.normal(1, 4)), 0.5),
    "difference": lambda m: Whole(m.normal(10, 12)),
}


@pytest.mark.parametrize("name", DELTAS)
def test_factors_parts_and_norms(name):
    """The low-rank form is the change itself, never wider than the weight; so are the rows of a part of it."""
    delta = DELTAS[name](files.Maker(0))
    full = delta.full()
    assert full.shape == delta.shape == (10, 12)
    for part, wanted in ((delta, full), (delta.take(((7, 10), (0, 2))), full[[7, 8, 9, 0, 1]])):
        assert np.allclose(part.full(), wanted, atol=1e-6)
        a, b = part.factors()
        assert len(a) == b.shape[1] <= min(part.shape)
        assert np.allclose(b @ a, wanted, atol=1e-5)
        assert part.norm2() == pytest.approx(float(np.sum(wanted**2)), rel=1e-4)
        assert np.allclose(part.change(wanted, -0.25), -0.25 * wanted, atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1])
def test_dora_is_its_papers_formula(axis):
    m = files.Maker(0)
    old, inner = m.normal(10, 12), DELTAS["LoRA"](m)
    lengths = np.abs(m.normal(10, 1) if axis else m.normal(1, 12))
    formula = lambda new: lengths * new / np.linalg.norm(new, axis=axis, keepdims=True)  # noqa: E731
    peft, straight = (Decomposed(inner, lengths, inside) for inside in (True, False))
    for dora in (peft, straight):
        assert np.allclose(old + dora.change(old, 1.0), formula(old + inner.full()), atol=1e-5)
    assert np.allclose(old + peft.change(old, 0.5), formula(old + 0.5 * inner.full()), atol=1e-5)
    assert np.allclose(straight.change(old, 0.5), 0.5 * straight.change(old, 1.0), atol=1e-6)


# ---- files: where they lie, and what is wrong with them ----


@pytest.fixture
def tensors():
    return files.FORMATS["XLabs"](files.FULL, files.Maker(0, ranks=(1,), dtype=np.float16))


def test_where_adapters_lie(tmp_path, tensors):
    one = files.save(tmp_path / "some" / "one.safetensors", tensors)
    first = one.with_name("one.sft")
    one.rename(first)
    assert read(first).digest == read(first.parent).digest == read(tmp_path, weight_name="some/one.sft").digest
    first.rename(one)
    for given in (
        dict(path=one),
        dict(path=one, weight_name="one.safetensors"),
        dict(path=one.parent),
        dict(path=one.parent, weight_name="one.safetensors"),
        dict(path=tmp_path, weight_name="some/one.safetensors"),
    ):
        assert read(**given).digest == read(one).digest
    files.save(one.parent / "pytorch_lora_weights.safetensors", tensors)
    assert read(one.parent).file.endswith("pytorch_lora_weights.safetensors")
    (one.parent / "pytorch_lora_weights.safetensors").rename(one.parent / "two.safetensors")
    (tmp_path / "empty").mkdir()
    for given, words in (
        (dict(path=one.parent), ["weight_name", "one.safetensors, two.safetensors"]),
        (dict(path=tmp_path / "empty"), ["expected one .safetensors file", "none"]),
        (dict(path=one.parent, weight_name="three.safetensors"), ["three.safetensors: not found"]),
        (dict(path=tmp_path / "gone.safetensors"), ["gone.safetensors", "not there"]),
        (dict(path=one, weight_name="two.safetensors"), ["is a file", "null"]),
        (dict(path=one.parent, weight_name="x.bin"), ["pickled", "can run code"]),
        (dict(path=tmp_path / "x.ckpt"), ["pickled", "can run code"]),
    ):
        with pytest.raises(UserError) as error:
            read(**given)
        assert "lora.x.path" in str(error.value) or "not found" in str(error.value)
        assert len(error.value.lines) == 1 and all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("magic", [b"PK\x03\x04", b"\x80\x02}q\x00", b"\x80\x04\x95"])
def test_a_pickle_in_disguise(tmp_path, magic):
    (tmp_path / "x.safetensors").write_bytes(magic + bytes(1000))
    with pytest.raises(UserError, match="is a pickle whatever its name says"):
        read(tmp_path / "x.safetensors")


PROJ = "lora_unet_double_blocks_0_img_attn_proj"


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x0580])
def test_a_header_whose_length_begins_like_a_pickle(tmp_path, length):
    file = files.save(tmp_path / "x.safetensors", files.Maker(0, ranks=(1,)).lora({PROJ: (3072, 3072)}))
    data = file.read_bytes()
    count = int.from_bytes(data[:8], "little")
    file.write_bytes(length.to_bytes(8, "little") + data[8 : 8 + count].ljust(length) + data[8 + count :])
    assert file.read_bytes().startswith(adapter.PICKLES)
    assert read(file).changes


def test_alpha_is_a_number_of_any_kind(tmp_path):
    """kohya's flux_extract_lora.py writes the rank as it is, an int64."""
    tensors = files.Maker(0, ranks=(4,)).lora({PROJ: (3072, 3072)}, alpha=False)
    for value in (np.int64(2).reshape(()), np.asarray([2], np.int32), np.asarray([[2]], np.float16)):
        (delta,) = (
            read(files.save(tmp_path / "x.safetensors", tensors | {f"{PROJ}.alpha": value}))
            .changes["transformer"]
            .values()
        )
        assert delta.scale == 2 / 4
    with pytest.raises(UserError, match=r"alpha of shape \[2\], expected one number"):
        read(files.save(tmp_path / "x.safetensors", tensors | {f"{PROJ}.alpha": np.ones(2, np.float32)}))


def test_peft_names_adapters(tmp_path):
    """As its users do."""
    maker = files.Maker(0, ranks=(2,))
    shapes = files.dots("transformer.", {"transformer_blocks.0.attn.to_q": (3072, 3072)})
    tensors = maker.lora(shapes, "lora_A.my-style v2.weight", "lora_B.my-style v2.weight", alpha=False)
    tensors |= {f"{name}.lora_magnitude_vector.my-style v2.weight": np.ones(3072, np.float32) for name in shapes}
    (delta,) = read(files.save(tmp_path / "x.safetensors", tensors)).changes["transformer"].values()
    assert isinstance(delta, Decomposed)


def test_what_is_left_out_changes_nothing(tmp_path):
    """The second of two, and integers, where strict=false lets them pass."""
    tensors = files.Maker(0, ranks=(4,)).lora({PROJ: (3072, 3072)}, alpha=False)
    twice = {
        key.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): 2 * value for key, value in tensors.items()
    }
    wrong = {key.replace("_0_", "_1_"): value.astype(np.int8) for key, value in tensors.items()}
    plain = read(files.save(tmp_path / "a.safetensors", tensors)).changes["transformer"]
    adapter = read(files.save(tmp_path / "b.safetensors", tensors | twice | wrong), strict=False)
    assert {key for key in twice | wrong if any(line.startswith(f"{key}: ") for line in adapter.skipped)} == {
        *twice,
        *wrong,
    }
    assert adapter.changes["transformer"].keys() == plain.keys()
    assert all(
        np.array_equal(delta.full(), plain[location].full())
        for location, delta in adapter.changes["transformer"].items()
    )


def test_biases_and_norms_alone(tmp_path):
    maker = files.Maker(0)
    for tensors in (
        {f"{PROJ}.diff_b": maker.normal(3072)},
        {"double_blocks.0.img_attn.norm.query_norm.scale": maker.normal(128)},
    ):
        adapter = read(files.save(tmp_path / "x.safetensors", tensors))
        assert (
            "biases and norms alone" in next(adapter.table())
            and adapter.merged_only
            and adapter.coverage()["parts"] == []
        )
    for tensors, words in (
        ({f"{PROJ}.alpha": np.float32(1).reshape(())}, "alpha without what belongs to it"),
        ({f"{PROJ}.diff_b": np.zeros(3072, np.float32)}, "holds no adapter"),
    ):
        with pytest.raises(UserError, match=words):
            read(files.save(tmp_path / "x.safetensors", tensors))


def test_biases_that_stay_as_they_are(tmp_path):
    tensors = files.Maker(0, ranks=(4,)).lora({PROJ: (3072, 3072)})
    assert (
        read(
            files.save(tmp_path / "x.safetensors", tensors | {f"{PROJ}.diff_b": np.zeros(3072, np.float32)})
        ).merged_only
        is None
    )
    assert read(
        files.save(tmp_path / "x.safetensors", tensors | {f"{PROJ}.diff_b": np.ones(3072, np.float32)})
    ).merged_only


FIRST = "double_blocks.0.processor.qkv_lora1"
BROKEN = {
    "half a pair": (
        lambda t: {k: v for k, v in t.items() if k != f"{FIRST}.up.weight"},
        f"{FIRST}: down without what belongs to it",
    ),
    "another rank": (
        lambda t: t | {f"{FIRST}.up.weight": np.zeros((9216, 3), np.float16)},
        f"{FIRST}: rank 1 below and 3 above",
    ),
    "another width": (
        lambda t: t | {f"{FIRST}.down.weight": np.zeros((1, 3000), np.float16)},
        "shape [3072, 3000], the model expects [3072, 3072]",
    ),
    "another model": (
        lambda t: t | {"double_blocks.19.processor.proj_lora1.down.weight": t[f"{FIRST}.down.weight"]},
        "double_blocks.19",
    ),
    "NaN": (lambda t: t | {f"{FIRST}.down.weight": np.full((1, 3072), np.nan, np.float16)}, f"{FIRST}: holds NaN"),
    "NaN of a DoRA": (
        lambda t: t | {f"{FIRST}.dora_scale": np.full((9216, 1), np.nan, np.float16)},
        f"{FIRST}: DoRA lengths hold NaN",
    ),
    "integers": (lambda t: t | {f"{FIRST}.down.weight": np.zeros((1, 3072), np.int8)}, "dtype int8"),
    "twice": (
        lambda t: (
            t
            | {
                "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": t[f"{FIRST}.down.weight"],
                "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": t[f"{FIRST}.up.weight"],
            }
        ),
        "has changed double_blocks.img.qkv.q.kernel[0] already",
    ),
    "nothing": (
        lambda t: {"conv_in.lora_down.weight": np.zeros((1, 4), np.float32)},
        "holds no adapter for this model",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_is_named(tmp_path, tensors, name):
    change, words = BROKEN[name]
    file = files.save(tmp_path / "x.safetensors", change(tensors))
    with pytest.raises(UserError) as error:
        read(file)
    assert str(file) in str(error.value) and words in str(error.value)
    if name == "another model":
        adapter = read(file, strict=False)
        assert (
            adapter.skipped == ("double_blocks.19.processor.proj_lora1.down.weight",) and adapter.coverage()["skipped"]
        )
        assert any("double_blocks.19" in line for line in adapter.table())


def test_orientation_dtypes_and_defaults(tmp_path):
    """from_pt=false: every matrix transposed. bfloat16 and float16 hold the same numbers. No alpha: the rank."""
    shapes = files.underscores(
        "lora_unet_", {k: v for k, v in files.bfl(files.FULL).items() if k.startswith("double_blocks.0.img_attn.proj")}
    )
    tensors = files.Maker(0, ranks=(4,), dtype=ml_dtypes.bfloat16).lora(shapes, alpha=False)
    plain = read(files.save(tmp_path / "a.safetensors", tensors))
    turned = read(files.save(tmp_path / "b.safetensors", {k: v.T for k, v in tensors.items()}), from_pt=False)
    half = read(files.save(tmp_path / "c.safetensors", {k: v.astype(np.float32) for k, v in tensors.items()}))
    doubled = {k.replace("lora_down.weight", "alpha"): np.float32(8).reshape(()) for k in tensors if "down" in k}
    twice = read(files.save(tmp_path / "d.safetensors", tensors | doubled))
    for location, delta in plain.changes["transformer"].items():
        for other in (turned, half):
            assert np.array_equal(delta.full(), other.changes["transformer"][location].full())
        assert np.allclose(2 * delta.full(), twice.changes["transformer"][location].full(), atol=1e-6)
    assert len({adapter.digest for adapter in (plain, turned, half, twice)}) == 4
    with pytest.raises(UserError, match="rank|shape"):
        read(tmp_path / "a.safetensors", from_pt=False)


def test_peft_keeps_alpha_beside_its_file(tmp_path):
    """In a config, or where diffusers saves it in the header; a file that has lost it is no adapter of a known
    strength."""
    tensors = files.Maker(0, ranks=(4,), dtype=np.float16).peft(
        {"base_model.model.transformer_blocks.0.attn.to_q": (3072, 3072)}
    )
    file, config = files.save(tmp_path / "adapter_model.safetensors", tensors), tmp_path / "adapter_config.json"

    def scale():
        (delta,) = read(file).changes["transformer"].values()
        return delta.scale

    def complaint():
        with pytest.raises(UserError) as error:
            read(file)
        assert len(error.value.lines) == 1
        return str(error.value)

    assert f"{config}: not found" in complaint()
    alpha = {"base_model.model.transformer_blocks.0.attn.to_q.alpha": np.float16(2).reshape(())}
    files.save(file, tensors | alpha)
    assert scale() == 2 / 4
    files.save(file, tensors, {"lora_adapter_metadata": '{"transformer.lora_alpha": 8, "transformer.r": 4}'})
    assert scale() == 8 / 4
    for text in (
        "{oops",
        "[1]",
        '{"transformer.lora_alpha": "x"}',
        '{"transformer.lora_alpha": 1, "transformer.alpha_pattern": {"(": 1}}',
    ):
        files.save(file, tensors, {"lora_adapter_metadata": text})
        assert f"{file}: lora_adapter_metadata" in complaint()
    for wrong in (
        {"lora_alpha": [1]},
        {"r": "4"},
        {"alpha_pattern": ["x"]},
        {"alpha_pattern": {"(": 1}},
        {"rank_pattern": {"x": None}},
    ):
        config.write_text(json.dumps({"lora_alpha": 16} | wrong))
        assert f"{config}: {next(iter(wrong))} is" in complaint()
    for start in ("pissa", "pissa_niter_4", "OLoRA"):  # the rest of the weights belongs to it
        config.write_text(json.dumps({"lora_alpha": 16, "init_lora_weights": start}))
        assert f"{config}: init_lora_weights is {start}: made for what this start has left" in complaint()
    config.write_text(
        json.dumps(
            {"r": 4, "lora_alpha": 16, "alpha_pattern": [], "rank_pattern": None, "init_lora_weights": "gaussian"}
        )
    )
    assert scale() == 16 / 4


# ---- a small model with adapters ----


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Four of different kinds; two of them change the text encoders too."""
    folder = tmp_path_factory.mktemp("adapters")
    kinds = {"peft": "diffusers", "kohya": "kohya with T5", "loha": "kohya LoHa", "lokr": "SimpleTuner LoKr"}
    return {
        name: files.save(
            folder / f"{name}.safetensors", files.FORMATS[kind](files.DEV, files.Maker(i, size=0.12, keep=0.7))
        )
        for i, (name, kind) in enumerate(kinds.items())
    }


MIXES = [
    {},
    {"peft": 1.0},
    {"kohya": 0.8},
    {"loha": 1.0},
    {"lokr": -0.7},
    {"peft": 0.5, "kohya": 0.5},
    {"loha": 0.3, "lokr": 0.9, "peft": -0.2},
    {"peft": 0.2, "kohya": 0.4, "loha": 0.6, "lokr": 0.8},
]


@pytest.fixture
def opened(golden, tmp_path, monkeypatch):
    """An engine for a manifest of rows, as run.py opens it; ``sweep`` keeps weights from load to load."""

    def open_(rows, *more, sweep=True):
        manifest = tmp_path / "rows.jsonl"
        manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
        args = [
            f"pretrained_model_name_or_path={golden / 'dev'}",
            "max_sequence_length=24",
            "hardware=cpu",
            f"output_dir={tmp_path}",
            f"manifest={manifest}",
            *more,
        ]
        jobs = []
        monkeypatch.setattr("sys.argv", ["fluxbatch.run", *args])
        with pytest.raises(SystemExit):
            application.main(lambda job: jobs.append(job) or 0)
        job = dataclasses.replace(jobs[0], sweep={"x": 1} if sweep else {})
        engine = open_model_spec(job, backend.start("cpu", None))
        return engine, engine.resolve(read_rows(job, size_multiple=engine.size_multiple)[0])

    return open_


def draw(engine, pipeline, rows):
    states = prompts.encode(rows, engine.inputs, pipeline, len(rows))
    return np.asarray(pipeline.decode(pipeline.denoise(rows, states.batch(rows)), 32, 32)[0]).astype(int)


def states(pipeline):
    """All weights, by network, loaded."""
    return {name: pipeline._ready(name)[0][1] for name in pipeline.networks}


def test_eight_rows_of_eight_mixes(opened, adapters):
    """One batch, one compilation; each row as it comes out of a run of its own, where its mix is merged."""
    rows = [
        {
            "prompt": f"prompt {i % 2}",
            "seed": 1,
            "height": 32,
            "width": 32,
            "num_inference_steps": 2,
            "lora": lora_weights,
        }
        for i, lora_weights in enumerate(MIXES)
    ]
    engine, rows = opened(rows, *files.arrays(adapters))
    pipeline = engine.pipeline(rows)
    together = draw(engine, pipeline, rows)
    assert np.abs(draw(engine, pipeline, rows[::-1])[::-1] - together).max() <= 1
    for compiled in (pipeline._denoise, pipeline._encode):
        assert compiled._cache_size() == 1
    for i, row in enumerate(rows):
        alone = draw(engine, engine.pipeline([row]), [row])
        assert np.abs(alone[0] - together[i]).max() <= 1, MIXES[i]
        assert i < 2 or np.abs(alone[0] - together[i % 2]).mean() > 2  # the mix decides the picture


@pytest.mark.slow
def test_mixes_do_not_depend_on_the_sharding(opened, adapters):
    """Beside the weights, whose rows and columns are divided."""
    rows = [
        {"prompt": "x", "seed": 1, "height": 32, "width": 32, "num_inference_steps": 1, "lora": lora_weights}
        for lora_weights in MIXES[:4]
    ]
    drawn = []
    for sizes in ((), ("ici_fsdp_parallelism=2", "ici_tensor_parallelism=2")):
        engine, resolved = opened(rows, *files.arrays(adapters), *sizes, sweep=False)
        drawn.append(draw(engine, engine.pipeline(resolved), resolved))
    assert np.abs(drawn[0] - drawn[1]).max() <= 1


def test_a_hundred_swaps_leave_no_trace(opened, adapters):
    engine, _ = opened([{"prompt": "x"}], *files.arrays(adapters))
    row = Row(0, "0", "x", "x", 0, 32, 32, 1, 1.0)
    all_lora_weights = [tuple(sorted(lora_weights.items())) for lora_weights in MIXES[1:]]
    kept = KeptPipeline()
    load = lambda lora_weights: engine.pipeline([dataclasses.replace(row, lora=lora_weights)], kept=kept)  # noqa: E731
    weights = lambda: {name: jax.tree.map(np.array, state) for name, state in states(pipeline).items()}  # noqa: E731
    pipeline = load(())
    fresh, arrays_before = weights(), jax.tree.leaves(states(pipeline)["transformer"])
    seen = []
    for i in range(100):
        assert load(all_lora_weights[i % len(all_lora_weights)]) is pipeline
        seen.append(hash(b"".join(leaf.tobytes() for leaf in jax.tree.leaves(weights()["transformer"]))))
    assert len(set(seen)) == len(all_lora_weights)
    assert load(()) is pipeline
    for name, state in weights().items():
        assert all(jax.tree.leaves(jax.tree.map(lambda a, b: a.tobytes() == b.tobytes(), state, fresh[name])))
    # what no adapter touches was never read again
    norms = [
        i for i, (path, _) in enumerate(nnx.to_flat_state(states(pipeline)["transformer"])) if "query_norm" in path
    ]
    now = jax.tree.leaves(states(pipeline)["transformer"])
    assert norms and all(now[i] is arrays_before[i] for i in norms)


def test_merging_does_not_depend_on_the_sharding(opened, adapters):
    rows = [{"prompt": "x", "lora": MIXES[-1]}]
    found = []
    for sharding in ("single", "fsdp"):
        engine, resolved = opened(rows, *files.arrays(adapters), f"sharding={sharding}", sweep=False)
        found.append(states(engine.pipeline(resolved)))
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), *found)))


def test_dora_rows_must_agree(opened, adapters, tmp_path):
    dora = files.save(tmp_path / "dora.safetensors", files.FORMATS["kohya DoRA"](files.DEV, files.Maker(0)))
    rows = [{"prompt": "x", "lora": {"dora": 1.0}}, {"prompt": "x", "lora": {"dora": 0.5}}]
    with pytest.raises(UserError) as error:
        opened(rows, *files.arrays({"dora": dora}))
    assert "DoRA" in str(error.value) and "rows.jsonl:2" in str(error.value)
    opened(rows[:1] * 2, *files.arrays({"dora": dora}))


def test_an_adapter_that_no_row_uses_may_be_of_any_kind(opened, adapters, tmp_path):
    """It takes no place beside those that the rows do use."""
    one = "lora_unet_single_blocks_0_linear2"
    files.save(tmp_path / "biases.safetensors", {f"{one}.diff_b": files.Maker(0).normal(files.DEV.width)})
    rows = [
        {"prompt": "x", "seed": 1, "height": 32, "width": 32, "num_inference_steps": 1, "lora": lora_weights}
        for lora_weights in ({"peft": 1.0}, {"peft": 0.5})
    ]
    drawn = []
    for named in ({"peft": adapters["peft"]}, {"biases": tmp_path / "biases.safetensors", "peft": adapters["peft"]}):
        engine, resolved = opened(rows, *files.arrays(named), sweep=False)
        drawn.append(draw(engine, engine.pipeline(resolved), resolved))
    assert np.array_equal(*drawn)


def test_a_run_says_which_adapters_it_used(cli, golden, tmp_path, adapters):
    manifest = tmp_path / "rows.jsonl"
    manifest.write_text('{"prompt": "x"}\n{"prompt": "x", "lora": {"peft": 0.25}}\n{"prompt": "x", "lora": {}}\n')
    two = {name: adapters[name] for name in ("peft", "loha")}
    common = [
        f"pretrained_model_name_or_path={golden / 'dev'}",
        "max_sequence_length=24",
        "hardware=cpu",
        f"output_dir={tmp_path}",
        f"manifest={manifest}",
        "resolution=32",
        "num_inference_steps=1",
        "seed=3",
    ]
    code, err = cli(*common, "run_name=a", *files.arrays(two, 0.5))
    assert code == 0, err
    records = metadata(tmp_path / "a")
    assert [record["lora"] for record in records] == ['{"loha": 0.5, "peft": 0.5}', '{"peft": 0.25}', "{}"]
    assert len({record["key"] for record in records}) == 3
    config = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    assert config["resolved"]["lora"].keys() == two.keys()

    assert "double_blocks.img" in err and "2 of 2" in err
    warned = (
        'lora: 1 of 3 rows have none (the first is rows.jsonl:1) and get loha 0.5, peft 0.5; "lora": {} in a row is '
        "for none\n"
    )
    assert (
        f"fluxbatch: {warned}" in err and warned in cli(*common, "run_name=a", *files.arrays(two, 0.5), entry="plan")[1]
    )
    for row in "012":
        code, output = cli(f"output_dir={tmp_path}", "run_name=a", f"id={row}", entry="replay")
        assert code == 0, output

    for text in (
        '{"prompt": "x"}\n',
        '{"prompt": "x", "lora": {}}\n{"prompt": "y", "lora": {"peft": 1}}\n',
    ):  # no row differs in that
        manifest.write_text(text)
        assert "rows have none" not in cli(*common, "run_name=plain", "overwrite=true", *files.arrays(two, 0.5))[1]

    manifest.write_text('{"prompt": "x", "lora": {"pift": 1}}\n')
    code, err = cli(*common, "run_name=b", *files.arrays(two))
    assert code == 2 and "rows.jsonl:1" in err and "pift" in err
