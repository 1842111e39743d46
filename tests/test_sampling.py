"""Noise, schedule, packing and batching against torch's and diffusers' own values."""

import numpy as np
import pytest

from fluxbatch.generation.steps import STEPS, padded_sigmas
from fluxbatch.models.latents import pack, unpack
from fluxbatch.models.noise import torch_normal
from fluxbatch.models.schedulers import FlowMatchEuler
from fluxbatch.shards import batching
from fluxbatch.types import Row, UserError


def row(i=0, height=64, width=64, steps=4):
    return Row(i, str(i), "p", "p", i, height, width, steps, 0.0)


def test_noise_is_one_stream_per_seed():
    a = torch_normal(7, 1000)
    assert np.array_equal(a[:984], torch_normal(7, 1008)[:984])  # whole blocks do not depend on the size
    assert not np.array_equal(a[-16:], torch_normal(7, 1008)[984:1000])  # a partial block is drawn afresh
    assert not np.array_equal(a, torch_normal(8, 1000))
    assert np.array_equal(a, torch_normal(7 + 2**32, 1000))  # torch keeps 32 bits
    assert abs(a.mean()) < 0.1 and abs(a.std() - 1) < 0.1


def test_noise_known_values():
    """The first values of torch.manual_seed(0), as everyone knows them."""
    assert torch_normal(0, 16)[:4] == pytest.approx([-1.1258, -1.1524, -0.2506, -0.4339], abs=1e-4)


def test_noise_needs_a_block():
    with pytest.raises(ValueError, match="at least 16"):
        torch_normal(0, 15)


@pytest.mark.parametrize("channels,height,width", [(4, 4, 6), (16, 8, 8)])
def test_unpack_inverts_pack(channels, height, width):
    latents = np.random.default_rng(0).normal(size=(channels, height, width)).astype(np.float32)
    tokens = pack(latents)
    assert tokens.shape == (height // 2 * width // 2, 4 * channels)
    assert tokens[1, :4].tolist() == latents[0, :2, 2:4].reshape(-1).tolist()  # second patch of the first channel
    assert np.array_equal(np.asarray(unpack(tokens[None], height, width))[0], latents.transpose(1, 2, 0))


def test_schedules():
    dev = FlowMatchEuler.of({"use_dynamic_shifting": True, "shift": 3.0}, None, None, None)
    assert dev.sigmas(4, 4096) == pytest.approx([1, 0.9045, 0.7595, 0.5128, 0], abs=1e-4)  # mu = 1.15
    assert dev.sigmas(4, 256) == pytest.approx([1, 0.8318, 0.6225, 0.3546, 0], abs=1e-4)  # mu = 0.5
    schnell = FlowMatchEuler.of({"shift": 1.0}, None, None, None)
    assert schnell.sigmas(4, 4096) == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    forced = FlowMatchEuler.of({"shift": 1.0}, True, 0.5, 1.15)
    assert np.array_equal(forced.sigmas(4, 1024), dev.sigmas(4, 1024))


@pytest.mark.parametrize("config,text", [
    ({"use_karras_sigmas": True}, "use_karras_sigmas is True, expected False"),
    ({"shift": None}, "shift is None, expected a number"), ({"max_shift": "1.15"}, "max_shift is '1.15', expected a number"),
    ({"shift": 0}, "shift is 0, expected a number above 0"), ({"base_image_seq_len": float("nan")}, "base_image_seq_len is nan, expected a number"),
    ({"use_dynamic_shifting": True, "base_image_seq_len": 4096}, "base_image_seq_len is 4096, expected another number than max_image_seq_len"),
])  # fmt: skip
def test_schedules_that_cannot_be(config, text):
    with pytest.raises(UserError, match=f"scheduler_config.json: {text}"):
        FlowMatchEuler.of(config, None, None, None)


def test_padded_sigmas_keep_their_shape():
    schedule = FlowMatchEuler.of({}, None, None, None)
    levels, counts = padded_sigmas([schedule.sigmas(n, 64) for n in (1, 4, 50)])
    assert levels.shape == (3, 7 * STEPS + 1) and counts.tolist() == [1, 4, 50]
    assert levels[0, 1:].max() == 0


def test_plan_is_total_and_pure():
    rows = [row(i, 64 if i % 3 else 128, 64, 4 + i % 2) for i in range(23)]
    for size in (1, 3, 4, 8):
        shards = batching.plan(rows, size, 8)
        assert sorted(r.index for s in shards for r in s.rows) == list(range(23))
        assert all(len({(r.height, r.width) for r in b.rows}) == 1 for s in shards for b in s.batches)
        short = [b for s in shards for b in s.batches if len(b.rows) < size]
        assert len(short) <= 2  # the last of each bucket
        assert all(len(s.rows) <= max(8, size) for s in shards)
        assert shards == batching.plan(rows, size, 8)
    assert [r.index for r in batching.padded(rows[:2], 4)] == [0, 1, 1, 1]
    assert batching.plan([], 4, 8) == []


def test_levels_that_are_given_are_shifted_as_even_ones_are():
    """Values by hand: e^μ / (e^μ + 1/σ - 1) with μ = 0.5 at 256 tokens; s σ / (1 + (s - 1) σ)."""
    dev = FlowMatchEuler.of({"use_dynamic_shifting": True, "shift": 3.0}, None, None, None)
    assert dev.shifted([0.9, 0.4], 256) == pytest.approx([0.93686, 0.52361, 0], abs=1e-5)
    still = FlowMatchEuler.of({"shift": 3.0}, None, None, None)
    assert still.shifted([1.0, 0.5], 256) == pytest.approx([1, 0.75, 0])
    for schedule in (dev, still):
        assert np.array_equal(schedule.shifted(np.linspace(1, 1 / 5, 5).tolist(), 4096), schedule.sigmas(5, 4096))
        assert schedule.shifted([0.5], 256).dtype == np.float32
