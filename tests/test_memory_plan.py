"""What is on the devices when: text encoders first and out again, by way of host memory or of the checkpoint."""

from __future__ import annotations

import json
import os
import time

import jax
import numpy as np
import pytest
from conftest import images
from lora_files import arrays
from test_lora import adapters, opened, states  # noqa: F401
from test_weights import FLUX, copy, plans  # noqa: F401

from fluxbatch.distributed.mesh import make_mesh
from fluxbatch.generation import prompts
from fluxbatch.generation.kept import KeptPipeline
from fluxbatch.types import UserError
from fluxbatch.weights import device_weights, load

ROW = {"prompt": "a fox", "seed": 1, "height": 32, "width": 32, "num_inference_steps": 1}


def leaves(net):
    return jax.tree.leaves(net.parts()[1])


def t5(location, where, mesh=(1, 1)):
    return device_weights.DeviceWeights(plans(location)["text_encoder_2"], make_mesh(mesh), np.float32, {}, where)


@pytest.mark.parametrize("where", ["keep", "host", "free"])
def test_weights_leave_and_return(golden, where):
    net, read = t5(golden / "dev", where, (1, 2)), []
    assert net.missing == net.plan.nbytes
    for _ in range(3):
        net.load(read.append)
        assert net.missing == 0
        held = leaves(net)
        assert (
            sum(part.data.nbytes for x in held for part in x.addressable_shards)
            == load.held(net.plan, net.mesh, np.float32)
            > 0
        )
        before = [np.array(x) for x in held]
        net.leave()
        assert all(x.is_deleted() for x in held) == (where != "keep")
        del held
        net.load(read.append)
        assert all(np.array_equal(a, b) for a, b in zip(before, leaves(net), strict=True))
    loads = 4 if where == "free" else 1
    assert sum(read) == loads * net.plan.nbytes


def test_what_is_never_needed_again_is_not_copied(golden):
    net = t5(golden / "dev", "host")
    net.load(lambda n: None)
    net.leave(again=False)
    assert net.missing == net.plan.nbytes


def test_a_file_replaced_between_two_loads_is_noticed(copy):  # noqa: F811
    net = device_weights.DeviceWeights(plans(copy)["transformer"], make_mesh((1, 1)), np.float32, {}, "free")
    net.load(lambda n: None)
    net.leave()
    time.sleep(0.02)
    os.utime(copy / FLUX)
    with pytest.raises(UserError, match="changed while it was being read"):
        net.load(lambda n: None)


def test_where_weights_go(golden, monkeypatch):
    mesh = make_mesh((1, 1))
    assert [device_weights.offload_policy(offload, mesh, 1) for offload in (False, True, "host", "free")] == [
        "keep",
        "keep",
        "keep",
        "free",
    ]
    monkeypatch.setattr(load, "on_host", lambda mesh: False)
    assert [device_weights.offload_policy(offload, mesh, 1) for offload in (False, True, "host", "free")] == [
        "keep",
        "host",
        "host",
        "free",
    ]
    assert device_weights.offload_policy(True, mesh, device_weights.host_memory()) == "free"  # no room
    assert 0 < device_weights.host_memory() < 1 << 50


@pytest.mark.parametrize(
    ("cgroup", "left"),
    [
        ("0::/system.slice/job_1/step_0", 250),
        ("1:name=systemd:/\n0::/system.slice/job_1", 250),
        ("0::/", 900),
        ("0::/elsewhere", 900),
        ("4:memory:/x", 900),
        (None, 900),
    ],
)
def test_memory_of_the_groups_around_a_process(tmp_path, monkeypatch, cgroup, left):
    """A Slurm job's limit stands on the way down to its step, whose own may be none; file cache can be had back."""
    groups = {
        "": (1000, 200, 100),
        "system.slice": ("max", 150, 0),
        "system.slice/job_1": (300, 150, 100),
        "system.slice/job_1/step_0": ("max", 150, 100),
    }
    for name, (limit, used, cache) in groups.items():
        folder = tmp_path / "groups" / name
        folder.mkdir()
        for file, text in {
            "memory.max": limit,
            "memory.current": used,
            "memory.stat": f"anon 1\nfile {cache}\n",
        }.items():
            (folder / file).write_text(f"{text}\n")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 2 kB\n")
    if cgroup is not None:
        (tmp_path / "proc/self/cgroup").write_text(f"{cgroup}\n")
    monkeypatch.setattr(device_weights, "PROC", tmp_path / "proc")
    monkeypatch.setattr(device_weights, "CGROUPS", tmp_path / "groups")
    assert device_weights.host_memory() == left


@pytest.mark.parametrize("where", ["host", "free"])
def test_adapters_on_encoders_that_come_and_go(opened, adapters, monkeypatch, where):  # noqa: F811
    """A sweep over mixes that change the text encoders, which are out of the way in between."""
    monkeypatch.setattr(device_weights, "offload_policy", lambda *_: where)

    def weights(lora_weights, sweep=True):
        spec, rows = opened([ROW | {"lora": lora_weights}], *arrays(adapters), sweep=sweep)
        pipeline = spec.pipeline(rows, kept=kept)
        values = {name: [np.array(x) for x in jax.tree.leaves(state)] for name, state in states(pipeline).items()}
        pipeline.encoders_out(again=True)
        return pipeline, values

    kept = KeptPipeline()
    one, two = {"kohya": 0.8}, {"kohya": 0.4, "lokr": 1.0}
    swept = [weights(lora_weights) for lora_weights in (one, {}, two, one)]
    assert len({id(pipeline) for pipeline, _ in swept}) == 1
    for (_, values), (_, same) in ((swept[0], swept[3]), (swept[2], weights(two, sweep=False))):
        assert all(np.array_equal(a, b) for name in values for a, b in zip(values[name], same[name], strict=True))
    assert not all(
        np.array_equal(a, b) for a, b in zip(swept[0][1]["text_encoder_2"], swept[1][1]["text_encoder_2"], strict=True)
    )


@pytest.mark.parametrize("where", ["keep", "free"])
def test_encoders_return_once_the_pictures_are_drawn(opened, monkeypatch, where):  # noqa: F811
    """They may need that memory; where they never left, the next texts are encoded behind the pictures."""
    monkeypatch.setattr(device_weights, "offload_policy", lambda *_: where)
    spec, rows = opened([ROW])
    pipeline = spec.pipeline(rows)
    states = prompts.encode(rows, spec.inputs, pipeline, 1)
    waited, wait = [], jax.block_until_ready
    monkeypatch.setattr("fluxbatch.generation.pipeline.jax.block_until_ready", lambda x: waited.append(x) or wait(x))
    pipeline.encoders_out(again=True)
    pictures = pipeline.decode(pipeline.denoise(rows, states.batch(rows)), 32, 32)
    del waited[:]
    prompts.encode(rows, spec.inputs, pipeline, 1)
    assert any(x is pictures for x in waited) == (where == "free")


@pytest.mark.parametrize("where", ["host", "free"])
def test_transformer_and_encoders_take_turns_where_both_do_not_fit(opened, monkeypatch, where):  # noqa: F811
    """The same pictures, and never both on the devices."""
    rows = [ROW | {"prompt": f"prompt {i}", "seed": i} for i in range(2)]

    def drawn():
        spec, resolved = opened(rows, sweep=False)
        pipeline, made, here = spec.pipeline(resolved), [], []
        for row in resolved:
            states = prompts.encode([row], spec.inputs, pipeline, 1)
            here.append([pipeline.networks[name].here for name in ("text_encoder_2", "transformer")])
            pipeline.encoders_out(again=True)
            made.append(np.asarray(pipeline.decode(pipeline.denoise([row], states.batch([row])), 32, 32)[0]))
            here.append([pipeline.networks[name].here for name in ("text_encoder_2", "transformer")])
        return made, here

    monkeypatch.setattr(device_weights, "offload_policy", lambda *_: where)
    beside, here = drawn()
    assert here[2] == [True, True]  # both fit
    monkeypatch.setattr(device_weights, "device_memory", lambda mesh: 1000)
    taken, here = drawn()
    assert here == [[True, False], [False, True]] * 2
    assert all(np.array_equal(a, b) for a, b in zip(beside, taken, strict=True))


def test_freed_encoders_change_no_picture(cli, golden, tmp_path):
    """Three shards, read again for each; rows with mixes of their own; the figures of the load say so."""
    rows = [{"prompt": f"prompt {i}", "seed": i, "height": 32, "width": 32, "num_inference_steps": 1} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made, loaded = {}, {}
    for offload in ("false", "free"):
        args = {
            "pretrained_model_name_or_path": golden / "dev",
            "max_sequence_length": 24,
            "hardware": "cpu",
            "output_dir": tmp_path,
            "run_name": offload,
            "manifest": tmp_path / "rows.jsonl",
            "shard_size": 2,
            "offload_encoders": offload,
        }
        code, err = cli(*(f"{key}={value}" for key, value in args.items()))
        assert code == 0 and err.count("loading: 100%") >= (4 if offload == "free" else 2)
        made[offload] = images(tmp_path / offload)
        figures = json.loads((tmp_path / offload / "status.json").read_text())["load"]
        assert figures.keys() == {"bytes", "seconds", "gigabytes_per_second"} and figures["seconds"] > 0
        loaded[offload] = figures["bytes"]
    assert all(np.array_equal(picture, made["free"][name]) for name, picture in made["false"].items())
    sizes = {name: plan.nbytes for name, plan in plans(golden / "dev").items()}
    assert loaded["false"] == sum(sizes.values())
    assert loaded["free"] - loaded["false"] == 2 * (sizes["text_encoder"] + sizes["text_encoder_2"])


def test_mistakes(cli, tmp_path):
    code, err = cli("prompt=x", "hardware=cpu", "offload_encoders=sometimes", f"output_dir={tmp_path}")
    assert code == 2 and "offload_encoders=sometimes: expected true, false, host or free" in err
