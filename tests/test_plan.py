"""The plan: figures of the models, of machines, and of a job before it runs."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re

import jax
import numpy as np
import pytest
from flax import nnx

import fluxbatch.config.application
from fluxbatch.distributed import chips
from fluxbatch.distributed.mesh import make_mesh
from fluxbatch.generation import programs
from fluxbatch.generation.model_spec import open_model_spec
from fluxbatch.generation.steps import STEPS
from fluxbatch.models import autoencoder_cost
from fluxbatch.models.autoencoder import Decoder, VaeConfig
from fluxbatch.models.family import Footprint
from fluxbatch.models.flux1 import cost
from fluxbatch.models.flux1.clip import ClipConfig
from fluxbatch.models.flux1.t5 import T5Config
from fluxbatch.models.flux1.transformer import Flux, FluxConfig
from fluxbatch.planning import aot, memory
from fluxbatch.types import PLAIN, Row, UserError
from fluxbatch.weights import load

DEV = FluxConfig(64, 64, 19, 38, 24, 128, 4096, 768, True, (16, 56, 56))
T5XXL = T5Config(32128, 4096, 64, 10240, 24, 64, 32, 128, 1e-6)
CLIP_L = ClipConfig(49408, 768, 3072, 12, 12, 77, "quick_gelu", 1e-5, 2)
VAE = VaeConfig(16, (128, 256, 512, 512), 2, 32, 0.3611, 0.1159, True, False, False)
T = 1e12


@pytest.mark.parametrize(("text", "linear", "attention", "step"), [(512, 59.5, 14.9, 74.4), (256, 56.2, 13.3, 69.5)])
def test_flops_of_flux_at_1024(text, linear, attention, step):
    assert round(cost.flux_linear(DEV, 4096, text) / T, 1) == linear
    assert round(cost.flux_attention(DEV, 4096, text) / T, 1) == attention
    assert round(cost.flux_step(DEV, 4096, text) / T, 1) == step


def test_flops_of_the_rest():
    doubled = (
        9 * 2 * (512**2 * 256**2 + 512**2 * 512**2 + 256**2 * 1024**2) / T
    )  # of 3×3 kernels over doubled pixels: 4/9 of it is needed
    assert autoencoder_cost.decode_flops(VAE, 1024, 1024) / T == pytest.approx(10.4 - 5 / 9 * doubled, abs=0.1)
    assert cost.t5(T5XXL, 512) / T == pytest.approx(4.845, abs=0.001)
    assert cost.clip(CLIP_L, 77) / T == pytest.approx(0.0134, rel=0.05)


@pytest.mark.parametrize(
    ("name", "chip", "count", "hosts", "topology"),
    [("v6e-4", "v6e", 4, 1, "2x2"), ("v4-8", "v4", 4, 1, "2x2x1"), ("v5e-4", "v5e", 4, 1, "2x2"), ("v5p-8", "v5p", 4, 1, "2x2x1"),
     ("v6e-8", "v6e", 8, 1, "2x4"), ("v6e-16", "v6e", 16, 4, "4x4"), ("v5p-32", "v5p", 16, 4, "2x2x4"), ("H100", "h100", 1, 1, None),
     ("2xh100-8", "h100", 16, 2, None), ("a100-40gb-2", "a100-40gb", 2, 1, None), ("4090", "4090", 1, 1, None)],
)  # fmt: skip
def test_targets(name, chip, count, hosts, topology):
    target = chips.target(name)
    assert (target.chip.name, target.chips, target.hosts, target.topology) == (chip, count, hosts, topology)


@pytest.mark.parametrize("name", ["v6e", "v6e-3", "v4-7", "h100-9", "0xh100", "h101", "2xv6e-4", "", "cpu-2"])
def test_targets_that_do_not_exist(name):
    if name == "v6e":
        assert chips.target(name).chips == 1
        return
    with pytest.raises(UserError, match=f"target={name}: expected"):
        chips.target(name)


def test_chips_by_the_name_that_jax_gives_them():
    found = {
        kind: chips.of_kind(kind)
        for kind in (
            "NVIDIA H100 80GB HBM3",
            "NVIDIA A100-SXM4-80GB",
            "NVIDIA A100-SXM4-40GB",
            "TPU v5 lite",
            "TPU v5",
            "TPU v6 lite",
            "TPU v4",
            "NVIDIA L40S",
            "NVIDIA L4",
            "cpu",
        )
    }
    assert [chip and chip.name for chip in found.values()] == [
        "h100",
        "a100",
        "a100-40gb",
        "v5e",
        "v5p",
        "v6e",
        "v4",
        "l40s",
        "l4",
        None,
    ]


def counted(module, *arrays):
    """What the compiler counts; of a scan it counts the body once."""
    graph, state = nnx.split(nnx.eval_shape(module))
    return jax.jit(lambda state, *a: nnx.merge(graph, state)(*a)).lower(state, *arrays).cost_analysis()["flops"]


def test_flops_against_the_compilers_count():
    flux = dataclasses.replace(DEV, num_layers=1, num_single_layers=1, num_attention_heads=4)
    shape = lambda *s: jax.ShapeDtypeStruct(s, np.float32)  # noqa: E731
    inputs = (
        shape(1, 1024, 64),
        shape(1, 128, 4096),
        shape(1, 768),
        shape(1),
        shape(1),
        (shape(1152, 64), shape(1152, 64)),
    )
    assert counted(lambda: Flux(flux, rngs=nnx.Rngs(0)), *inputs) == pytest.approx(
        cost.flux_step(flux, 1024, 128), rel=0.02
    )
    assert counted(lambda: Decoder(VAE, rngs=nnx.Rngs(0)), shape(1, 44, 44, 16)) == pytest.approx(
        autoencoder_cost.decode_flops(VAE, 352, 352), rel=0.02
    )


# ---- the command


@pytest.fixture
def planned(cli, golden, tmp_path):
    """Lines of a plan of these rows for the small dev checkpoint, by their first word."""

    def call(rows, *args, code=0):
        manifest = tmp_path / "rows.jsonl"
        manifest.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
        base = (
            f"pretrained_model_name_or_path={golden / 'dev'}",
            "sampler=dev",
            "resolution=64",
            "max_sequence_length=24",
            f"output_dir={tmp_path}",
        )
        status, text = cli(f"manifest={manifest}", *base, "aot=false", *args, entry="plan")
        assert status == code, text
        return text

    return call


def test_rows_buckets_and_what_fills_them_up(planned):
    rows = [{"prompt": f"fox {i // 2}", "num_inference_steps": 4} for i in range(10)] + [
        {"prompt": "wide", "width": 96, "num_inference_steps": 8}
    ]
    text = planned([*rows, "nonsense\n"], "target=v6e-4", "sharding=ddp", "manifest_errors=quarantine")
    assert "rows      11 of" in text and "6 distinct prompts" in text
    assert "rejects   1 bad lines are set aside: rows.jsonl:12" in text
    assert "64×64, 4 steps: 10 rows in 3 batches of 4, 16.7% padding" in text
    assert "64×96, 8 steps: 1 rows in 1 batches of 4, 75.0% padding" in text
    assert "programs  6 to compile" in text
    assert "machine   v6e-4: 4 × v6e, 918 TFLOP/s and 31.25 GiB each; data 4" in text
    assert "fits (estimate)" in text and "no prompt is cut" in text


def test_rows_that_are_done_are_not_planned_again(planned, cli, golden, tmp_path):
    rows = [{"prompt": f"fox {i}", "num_inference_steps": 1, "id": f"r{i}"} for i in range(3)]
    assert "done " not in planned(rows)
    manifest, here = tmp_path / "rows.jsonl", {path.name for path in tmp_path.iterdir()}
    manifest.write_text(json.dumps(rows[0]) + "\n")
    base = (
        f"pretrained_model_name_or_path={golden / 'dev'}",
        "sampler=dev",
        "resolution=64",
        "max_sequence_length=24",
        f"output_dir={tmp_path}",
    )
    assert here == {"rows.jsonl"} and cli(f"manifest={manifest}", *base, "hardware=cpu")[0] == 0
    text = planned(rows, "target=cpu")
    assert "rows      3 of" in text and "done      1 of them have their image; what follows is of the 2 to make" in text
    assert "64×64, 1 steps: 2 rows in 2 batches of 1" in text
    text = planned(rows[:1], "target=cpu")
    assert "done      1 of them" in text and "of the 0 to make" in text and "64×64" not in text
    assert "done " not in planned(rows, "target=cpu", "max_shift=2.0")  # pictures of another schedule
    assert "done " not in planned(rows, "target=v6e-1")  # and of another dtype


def test_prompts_that_are_cut_are_named(planned):
    text = planned(
        [
            {"prompt": "short"},
            {"prompt": "word " * 100},
            {"prompt": "ü" * 60},
            {"prompt": "short", "prompt_2": "one " * 40},
        ]
    )
    clip, t5 = (next(line for line in text.splitlines() if f"{name} reads" in line) for name in ("CLIP", "T5"))
    assert (
        "CLIP reads 24 tokens: 2 rows are cut: rows.jsonl:2 has 402, rows.jsonl:3 has 122" in clip
    )  # a token a byte, and both ends
    assert "T5 reads 24 tokens: 2 rows are cut: rows.jsonl:2 has 501, rows.jsonl:4 has 161" in t5


def test_fields_that_decide_nothing_are_named(planned):
    rows = [
        {"prompt": "x", "steps": 3},
        {"prompt": "x", "guidence_scale": 3.5, "category": "a"},
        {"prompt": "x", "category": "b"},
    ]
    line = next(
        line for line in planned([*rows, {"prompt": "x", "two\nlines": 1}]).splitlines() if line.startswith("warning")
    )
    assert (
        "steps (1 rows; did you mean num_inference_steps?), guidence_scale (1 rows; did you mean guidance_scale?), "
        "category (2 rows)" in line
    )
    assert line.endswith(r"two\nlines (1 rows)")
    assert "warning" not in planned([{"prompt": "x", "id": "x", "seed": 1, "num_images": 2}])


def test_time_and_cost_follow_from_the_flops(planned):
    text = planned(
        [{"prompt": "x", "num_inference_steps": 4}], "target=h100", "price_per_chip_hour=2", "resolution=2048"
    )
    config = [
        json.loads((pathlib.Path(__file__).parent / "golden/dev" / part / "config.json").read_text())
        for part in ("transformer", "vae")
    ]
    flux, vae = FluxConfig.from_json(config[0]), VaeConfig.from_json(config[1])
    image = 4 * cost.flux_step(flux, (2048 // (2 * vae.scale)) ** 2, 24) + autoencoder_cost.decode_flops(
        vae, 2048, 2048
    )
    assert f"{image / 1e12:.3g} TFLOP of it for the image alone" in text
    assert "at the peak of 989 TFLOP/s" in text and "at 52% of it" in text and "cost " in text and "(estimate)" in text


def test_adapters_are_covered_and_weigh_what_they_weigh(planned):
    rows = [{"prompt": "a", "lora": {"outline": 1.0}}, {"prompt": "b", "lora": {"outline": 0.5}}]
    text = planned(rows, "pretrained_model_name_or_path=flux-mini", "sampler=mini", "lora=outline", "target=v6e-1")
    merged = planned(
        rows[:1], "pretrained_model_name_or_path=flux-mini", "sampler=mini", "lora=outline", "target=v6e-1"
    )
    assert "lora      outline × 1: " in text and " layers  rank " in text
    held = [re.search(r"denoise +([\d.]+) MiB weights", of)[1] for of in (text, merged)]
    assert float(held[0]) > float(held[1])


def test_mistakes(planned, tmp_path):
    row = [{"prompt": "x"}]
    assert "target=v7: expected cpu, a TPU slice" in planned(row, "target=v7", code=2)
    assert "hardware=tpu: expected hardware=gpu or auto for target=h100" in planned(
        row, "target=h100", "hardware=tpu", code=2
    )
    assert "aot=true, target=h100: expected a TPU slice" in planned(row, "target=h100", "aot=true", code=2)
    assert "price_per_chip_hour=-1.0: expected a number from 0" in planned(row, "price_per_chip_hour=-1", code=2)
    assert "ici_data_parallelism=8 × dcn_data_parallelism=-1 needs 8 devices, there are 4" in planned(
        row, "target=v6e-4", "ici_data_parallelism=8", code=2
    )
    assert not (tmp_path / "rows").exists()  # nothing is written


# ---- memory


def opened(checkpoint, *args):
    """Job and engine of a command line, on one CPU device."""
    found = []
    words = [f"pretrained_model_name_or_path={checkpoint}", "hardware=cpu", "prompt=x", *args]
    with pytest.raises(SystemExit):
        fluxbatch.config.application.main(lambda job: found.append(job) or 0, argv=words)
    return found[0], open_model_spec(found[0], "cpu", jax.devices()[:1])


@pytest.mark.parametrize(
    ("side", "images"),
    [
        (128, 2),
        pytest.param(256, 4, marks=pytest.mark.slow),
        pytest.param(128, 1, marks=pytest.mark.slow),
        pytest.param(512, 2, marks=pytest.mark.slow),
    ],
)  # decoded one after the other
def test_memory_against_the_compiler(side, images):
    text = 32
    args = (
        f"resolution={side}",
        f"per_device_batch_size={images}",
        f"max_sequence_length={text}",
        "offload_encoders=free",
    )
    job, engine = opened("flux-mini", *args)
    phases = {
        phase.name: phase
        for phase in memory.Situation.of(job, engine, "cpu", [(side, side, PLAIN)], again=False).phases()
    }
    needs = {need.name: need for need in aot.needs(engine, images, side, side)}
    for name, phase in phases.items():
        assert phase.total == pytest.approx(phase.weights + needs[name].more, rel=0.1), name
    assert phases["encode"].weights == needs["encode"].held
    assert phases["decode"].weights == needs["denoise"].held + needs["decode"].held + modulators(engine)


@pytest.mark.parametrize("part", ["encode", "denoise"])
def test_a_cpu_brings_one_layer_at_a_time_to_float32(part):
    """Not all of a stack of bfloat16."""
    types = "weights_dtype=bfloat16", "activations_dtype=bfloat16"
    (small,), (large,) = (
        aot.needs(
            opened("flux-mini", "resolution=128", "max_sequence_length=32", *words)[1], 1, 128, 128, PLAIN, [part]
        )
        for words in (types, ())
    )
    assert small.held * 2 == large.held and small.temporaries < large.temporaries < large.held


@pytest.mark.parametrize(
    ("platform", "side", "sharded", "figure"),
    [
        ("tpu", 1024, False, 2.27),
        ("tpu", 1024, False, 2.03),
        ("tpu", 512, False, 0.546),
        ("tpu", 1024, True, 2.2),
        ("tpu", 512, True, 0.61),
        ("gpu", 512, False, 0.51),
        ("gpu", 1024, False, 2.02),
        ("gpu", 2048, False, 8.06),
        ("gpu", 1024, True, 2.11),
        ("gpu", 512, True, 0.60),
    ],
)
def test_memory_of_a_decoder_against_its_compiler(platform, side, sharded, figure):
    """``figure``: GiB of temporaries for FLUX.1, once compiled by hand: v6e-1, v6e-4 and v4-8 with ddp, v6e-1; fsdp:
    v5e-4, v6e-4. One H100, and eight with fsdp."""
    _, state = nnx.split(Decoder(VAE, rngs=None))
    weights = 2 * sum(math.prod(leaf.get_value().shape) for _, leaf in nnx.to_flat_state(state))
    assert autoencoder_cost.decode_bytes(VAE, footprint(1, side, platform)) + sharded * weights == pytest.approx(
        figure * 2**30, rel=0.1
    )


def footprint(images, side, platform):
    at_once = programs.together(images, side, side, programs.pixels_at_once(platform))
    return Footprint(images, side, side, platform, 2, 2, {}, False, STEPS, at_once)


@pytest.mark.parametrize("mesh", [(1, 1), (4, 1), (1, 4)])
def test_fsdp_makes_the_decoders_weights_whole(mesh):
    engine = dataclasses.replace(opened("flux-mini")[1], mesh=make_mesh(mesh))
    assert memory.gathered(engine, "vae") == (0 if mesh[1] == 1 else 4 * memory.parameters(engine, "vae"))


def test_floor_of_an_image(monkeypatch):
    """At the peak of the devices that draw it, where that is known."""
    row = Row(0, "0", "", "", 0, 128, 128, 4, 0.0)
    engine = opened("flux-mini")[1]
    assert engine.roofline_seconds(row) is None  # a CPU
    monkeypatch.setattr(chips, "of_kind", lambda kind: chips.CHIPS["h100"])
    assert engine.roofline_seconds(row) is None  # the table has bfloat16's peak, activations are float32
    engine = opened("flux-mini", "activations_dtype=bfloat16")[1]
    assert engine.roofline_seconds(row) == engine.flops(128, 128, 4) / (chips.CHIPS["h100"].peak * 1e12)


def modulators(engine):
    """Bytes that stay on the device although the denoising program does not take them."""
    cfg = engine.checkpoint.components["transformer"].config
    d, rest = (
        cfg.width,
        sum(
            math.prod(leaf.get_value().shape)
            for keys, leaf in nnx.to_flat_state(engine.plans["transformer"].state)
            if "_in." in (path := load.path_of(keys)) and path.startswith(("time_in", "vector_in", "guidance_in"))
        ),
    )
    return 4 * ((12 * cfg.num_layers + 3 * cfg.num_single_layers + 2) * (d * d + d) + rest)


@pytest.mark.slow
def test_compiled_for_a_tpu_that_is_not_here(planned):
    pytest.importorskip("libtpu", reason="needs .[tpu]")
    for sharding in ("ddp", "fsdp"):
        text = planned(
            [{"prompt": "x"}],
            "pretrained_model_name_or_path=flux-mini",
            "sampler=mini",
            "target=v6e-4",
            f"sharding={sharding}",
            "aot=true",
        )
        assert all(
            re.search(rf"{name} +[\d.]+ [KM]iB weights \+ [\d.]+ MiB, of it temporary", text)
            for name in ("compiled  denoise", "decode")
        ), text


def test_what_makes_it_fit(golden):
    job, engine = opened(
        golden / "dev", "resolution=64", "per_device_batch_size=4", "offload_encoders=false", "max_sequence_length=24"
    )
    need = memory.Situation.of(job, engine, "tpu", [(64, 64, PLAIN)], again=False)
    largest = max(phase.total for phase in need.phases())
    assert need.remedy(largest) != () and need.remedy(1000) == ()
    assert need.remedy(largest - 1) in {("offload_encoders=true",), ("per_device_batch_size=1",)}
    one = dataclasses.replace(need, images=1, stay=False)
    assert set(need.remedy(max(phase.total for phase in one.phases()))) >= {
        "per_device_batch_size=1",
        "offload_encoders=true",
    }


def test_eight_bits_are_proposed_where_all_else_is_slow_or_too_large(cli, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "x"}\n')

    def planned(target):
        words = f"manifest={tmp_path / 'rows.jsonl'}", f"output_dir={tmp_path}", "model=flux-dev", "aot=false"
        status, text = cli(*words, f"target={target}", entry="plan")
        assert status == 0, text
        return text

    text = planned("v5e-1")
    assert "fits with stream_blocks=true: the same images, which is slow\n" in text
    assert "fits with weights_dtype=int8: slightly other images" in text
    text = planned("v5e-4")
    assert "fits with sharding=fsdp: the same images\n" in text and "int8" not in text


def test_what_makes_it_fit_on_what_is_there(golden):
    """Chips that stand idle, encoders that ``sharding=fsdp`` keeps unless it is told otherwise, a CPU's host memory,
    and scores that another attention does not write; the slow way only where there is no other."""
    job, engine = opened(golden / "dev", "resolution=64", "max_sequence_length=24", "offload_encoders=true")

    def enough(need, **changes):
        return max(phase.total for phase in dataclasses.replace(need, **changes).phases())

    def remedy_of(need, **changes):
        return need.remedy(enough(need, **changes))

    need = memory.Situation.of(job, engine, "tpu", [(64, 64, PLAIN)], again=False, devices=jax.devices()[:4])
    divided = dataclasses.replace(engine, mesh=make_mesh((1, 4), devices=jax.devices()[:4]))
    assert remedy_of(need, spec=divided, stay=True) == ("sharding=fsdp",)
    assert set(remedy_of(need, spec=divided, stay=False)) == {"sharding=fsdp", "offload_encoders=true"}
    streaming = dataclasses.replace(engine, stream=True)
    assert remedy_of(dataclasses.replace(need, devices=jax.devices()[:1]), spec=streaming) == ("stream_blocks=true",)
    for_both = max(enough(need, spec=streaming), enough(need, spec=divided, stay=False))
    assert set(need.remedy(for_both)) <= {"sharding=fsdp", "offload_encoders=true"} and need.remedy(for_both)
    on_cpu = dataclasses.replace(memory.Situation.of(job, engine, "cpu", [(64, 64, PLAIN)], again=False), stay=True)
    assert remedy_of(on_cpu, stay=False) == ("offload_encoders=free",)
    writing = dataclasses.replace(
        memory.Situation.of(job, engine, "tpu", [(256, 256, PLAIN)], again=False), scores=True
    )
    assert remedy_of(writing, scores=False) == ("attention=auto",)
    scores = 4 * engine.checkpoint.components["transformer"].config.num_attention_heads * (256 // 16) ** 4
    assert (
        writing.phases()[1].activations - dataclasses.replace(writing, scores=False).phases()[1].activations >= scores
    )


def test_a_transformer_that_does_not_fit_beside_the_encoders_makes_room(golden):
    job, engine = opened(golden / "dev", "resolution=64", "max_sequence_length=24", "offload_encoders=true")
    need = memory.Situation.of(job, engine, "tpu", [(64, 64, PLAIN)], again=True)
    together = need.phases()[0].weights
    assert not dataclasses.replace(need, limit=2 * together).takes_turns
    tight = dataclasses.replace(need, limit=together)
    vae = memory.on_a_device(engine, "vae")
    assert tight.takes_turns and tight.phases()[0].weights == memory.encoders(engine) + vae < together
    assert not dataclasses.replace(tight, stay=True).takes_turns  # offload_encoders=false says that all stay


def test_attention_as_the_plan_takes_it(planned, monkeypatch):
    seen = []
    monkeypatch.setattr(memory.Situation, "phases", lambda self: seen.append(self) or [memory.Phase("denoise", 1, 1)])
    for words in (
        ["target=h100"],
        ["target=h100", "activations_dtype=float32"],
        ["target=v6e-1", "attention=dot_product"],
        ["target=cpu"],
    ):
        planned([{"prompt": "x"}], *words)
    assert [need.scores for need in seen] == [False, True, True, False]


def test_machines_of_several_hosts_are_taken_whole(planned):
    """As by a run of so many processes."""
    row = [{"prompt": "x"}]
    assert "the sharding takes 1 devices, the 2 processes have 4: all must be taken" in planned(
        row, "target=2xh100-2", code=2
    )
    assert "data 2 × fsdp 2" in planned(row, "target=2xh100-2", "sharding=fsdp", "dcn_data_parallelism=2")


def test_idle_chips_are_named_and_paid_for(planned):
    rows = [{"prompt": "x", "num_inference_steps": 1000, "seed": i} for i in range(8)]
    one, all_ = (planned(rows, "target=v5e-8", "price_per_chip_hour=1e9", *words) for words in ([], ["sharding=ddp"]))
    assert "one device, 7 idle" in one and " idle" not in all_
    costs = [float(re.search(r"about ([\d,.]+): 8 × ", text)[1].replace(",", "")) for text in (one, all_)]
    assert 7 < costs[0] / costs[1] < 9


def test_pictures_of_as_many_tokens_share_a_program(planned):
    text = planned([{"prompt": "x", "height": h, "width": w} for h, w in ((64, 96), (96, 64), (64, 64))], "target=h100")
    assert "programs  7 to compile: text, modulation, 2 × denoising, 3 × decoding" in text


def test_several_plans_leave_nothing_behind(planned, tmp_path):
    text = planned([{"prompt": "x"}], "-m", "num_inference_steps=1,2", f"output_dir={tmp_path / 'out'}")
    assert text.count("programs ") == 2 and not (tmp_path / "out").exists()


def test_a_place_that_is_not_this_jobs_is_planned_whole(planned, tmp_path):
    (tmp_path / "rows/.fluxbatch").mkdir(parents=True)
    (tmp_path / "rows/metadata.jsonl").write_text(
        '{"file_name": "a.png", "text": "x"}\n'
    )  # somebody's, who has no job there
    assert "rows      1 of" in planned([{"prompt": "x"}], "target=h100", "run_name=rows")
    for text, why in (
        ('{"format": "webp"}', f"{tmp_path}/rows holds a job with another configuration: "),
        ('{"form', "what is done cannot be read: "),
        ("[]", "what is done cannot be read: "),
    ):
        (tmp_path / "rows/.fluxbatch/job.json").write_text(text)
        output = planned([{"prompt": "x"}], "target=h100", "run_name=rows")
        assert f"fluxbatch: every row is planned, as {why}" in output and "rows      1 of" in output
        assert ('format: "webp" → "png"' in output) == ("webp" in text)
