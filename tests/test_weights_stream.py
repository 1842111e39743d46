"""Block by block equals all at once, with two blocks in memory."""

from __future__ import annotations

import gc
import itertools
import json
import re

import jax
import numpy as np
import pytest
from conftest import images
from lora_files import arrays
from safetensors.numpy import load_file
from test_lora import adapters  # noqa: F401
from test_weights import plans
from test_weights_memory import ALLOWED, bench, written

from fluxbatch.distributed.mesh import make_mesh
from fluxbatch.weights import device_weights
from fluxbatch.weights.block_streaming import StreamedWeights


def flags(golden, tmp_path, name, **more):
    given = {
        "pretrained_model_name_or_path": golden / "dev",
        "max_sequence_length": 24,
        "hardware": "cpu",
        "output_dir": tmp_path,
        "run_name": name,
        "resolution": 32,
    }
    return [f"{key}={value}" for key, value in (given | more).items()]


@pytest.mark.parametrize("sharding", ["single", "ddp"])
def test_streamed_pictures_are_the_same(cli, golden, tmp_path, adapters, monkeypatch, sharding):  # noqa: F811
    """Rows of other sizes, step counts and guidance, an adapter merged into the blocks as they pass; read anew
    in each step, and held in host memory."""
    rows = [
        {
            "prompt": f"prompt {i}",
            "seed": i,
            "width": 32 + 16 * (i % 2),
            "num_inference_steps": 1 + i,
            "guidance_scale": float(i),
        }
        for i in range(4)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = {
        "manifest": tmp_path / "rows.jsonl",
        "sharding": sharding,
        "per_device_batch_size": 2 if sharding == "single" else 1,
    }
    one = arrays({"kohya": adapters["kohya"]}, 0.5)
    made, read = {}, {}
    for name in ("resident", "streamed", "held"):
        monkeypatch.setattr(device_weights, "pinned", lambda mesh, name=name: name == "held")
        code, err = cli(*flags(golden, tmp_path, name, stream_blocks=name != "resident", **more), *one)
        assert code == 0, err
        made[name] = images(tmp_path / name)
        read[name] = json.loads((tmp_path / name / "status.json").read_text())["load"]["bytes"]
    weights = {
        tensor: array.nbytes
        for file in (golden / "dev/transformer").glob("*.safetensors")
        for tensor, array in load_file(file).items()
    }
    blocks = {tensor: size for tensor, size in weights.items() if "transformer_blocks." in tensor}
    modulators = sum(size for tensor, size in blocks.items() if re.search(r"\.norm\d?(_context)?\.linear\.", tensor))
    assert read["held"] == read["resident"]  # two batches, of 3 and 4 steps: one pass is in it
    assert read["streamed"] == read["resident"] + 6 * (sum(blocks.values()) - modulators) + modulators
    for name in ("streamed", "held"):
        assert all(np.array_equal(picture, made["resident"][key]) for key, picture in made[name].items())
    assert len({picture.tobytes() for picture in made["held"].values()}) == 4


def test_what_cannot_be_streamed(cli, golden, tmp_path, adapters):  # noqa: F811
    code, err = cli(*flags(golden, tmp_path, "a", prompt="x", stream_blocks="true", sharding="fsdp"))
    assert code == 2 and "hardware.stream_blocks=true: got a mesh of fsdp 8" in err and len(err.splitlines()) == 1
    (tmp_path / "rows.jsonl").write_text('{"prompt": "x"}\n{"prompt": "x", "lora": {"peft": 0.25}}\n')
    one = arrays({"peft": adapters["peft"]})
    code, err = cli(*flags(golden, tmp_path, "b", manifest=tmp_path / "rows.jsonl", stream_blocks="true"), *one)
    assert code == 2 and "rows.jsonl:2: lora is {'peft': 0.25}" in err and len(err.splitlines()) == 1


def test_at_most_two_blocks_are_in_memory(tmp_path):
    """A model of 0.8 GB passes through: what JAX holds on the devices, and the process's memory."""
    file = written(tmp_path, 0.8)
    plan = bench.planned(str(file))
    streamed = StreamedWeights(plan, make_mesh((1, 1)), "bfloat16", {})
    streamed.load(lambda count: None)
    before = sum(x.nbytes for x in jax.live_arrays())
    largest = live = 0
    gc.collect()
    gc.freeze()  # what other tests have left need not be gone through after each block
    with bench.Peak() as peak, streamed.blocks(itertools.chain(*streamed.passes(2, False))) as blocks:
        for _, block in blocks:
            largest = max(largest, sum(x.nbytes for x in jax.tree.leaves(block)))
            del block
            gc.collect()
            live = max(live, sum(x.nbytes for x in jax.live_arrays()) - before)
    gc.unfreeze()
    file.unlink()
    assert largest == 2 * 24 * 1024**2 + 2 * 2 * (9 * 1024 + 2 * 128)  # without what makes their modulation
    assert live <= 2 * largest
    assert peak.bytes - peak.start_bytes <= 2 * largest + ALLOWED < plan.nbytes / 2


def test_other_adapters_are_in_the_next_blocks(golden):
    """Blocks held in host memory too are read anew once other adapters are merged."""
    streamed = StreamedWeights(plans(golden / "dev")["transformer"], make_mesh((1, 1)), np.float32, {}, hold=True)

    def weights():
        with streamed.blocks(*streamed.passes(1, False)) as blocks:
            return [b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(block)) for _, block in blocks]

    plain = weights()
    assert weights() == plain
    streamed.merge({("single_blocks.out.kernel", 1): lambda old: old + 1, ("img_in.kernel", 0): lambda old: old * 2})
    assert [a == b for a, b in zip(plain, weights(), strict=True)] == [True, True, True, False]
