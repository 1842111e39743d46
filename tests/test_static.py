"""What jobs/bench/static.py reads out of a compiled program."""

import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPT = ROOT / "jobs" / "bench" / "static.py"

TPU = """HloModule jit__denoise
FileNames
1 "a = b.py"

%gather (p: bf16[1,8]) -> bf16[1,32] {
  %p = bf16[1,8]{1,0} parameter(0)
  ROOT %all-gather.9 = bf16[1,32]{1,0} all-gather(%p), dimensions={1}
}

%layers (arg: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %arg = (s32[], bf16[4,8]{1,0}) parameter(0)
  %all-gather.1 = bf16[1,32]{1,0} all-gather(%x), dimensions={1}
  %async-collective-start.1 = (bf16[1,8]{1,0}, bf16[1,64]{1,0}) fusion(%x), kind=kCustom, calls=%gather
  %fusion.1 = bf16[4,8]{1,0} fusion(%x), kind=kLoop, backend_config={"estimated_cycles":"100"}
  %call-start.1 = ((), (), (s32[1])) call-start(), async_execution_thread="sparsecore", to_apply=%sparse
  %fusion.2 = bf16[4,8]{1,0} fusion(%x), kind=kLoop, backend_config={"estimated_cycles":"20"}
  %call-update.1 = ((bf16[1,8]{1,0}), bf16[1,16]{1,0}) call-update(%call-start.1, %x)
  %call-done.1 = bf16[1,16]{1,0} call-done(%call-update.1)
  %call-start.2 = ((bf16[1,8]{1,0}), bf16[1,16]{1,0}) call-start(%x), async_execution_thread="sparsecore", to_apply=%sparse
  %fusion.3 = bf16[4,8]{1,0} fusion(%x), kind=kLoop, backend_config={"estimated_cycles":"30"}
  %call-done.2 = bf16[1,16]{1,0} call-done(%call-start.2)
  ROOT %async-collective-done.1 = bf16[1,64]{1,0} fusion(%x), kind=kCustom, backend_config={"estimated_cycles":"11"}
}

%sparse (p: bf16[1,8]) -> bf16[1,16] {
  %p.1 = bf16[1,8]{1,0} parameter(0)
  ROOT %all-gather.8 = bf16[1,16]{1,0} all-gather(%p.1), dimensions={1}
}

%few (arg: (s32[], bf16[4,8])) -> pred[] {
  %constant.1 = s32[] constant(19)
  ROOT %less = pred[] compare(%i, %constant.1), direction=LT
}

%steps (arg: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %while.1 = (s32[], bf16[4,8]{1,0}) while(%init), condition=%few, body=%layers
  %reduce = f32[4]{0} reduce(%y), backend_config={"estimated_cycles":"7"}
}

%until (arg: (s32[], bf16[4,8])) -> pred[] {
  ROOT %less.1 = pred[] compare(%i, %turns), direction=LT
}

ENTRY %main (a: bf16[4,8]) -> bf16[4,8] {
  %while.2 = (s32[], bf16[4,8]{1,0}) while(%init), condition=%until, body=%steps
}
"""

GPU = """HloModule jit__denoise

%product (p0: bf16[19,16,8], p1: s32[], p2: bf16[4,8]) -> (bf16[4,16], s8[64]) {
  %slice.1 = bf16[1,16,8]{2,1,0} dynamic-slice(%p0, %p1), dynamic_slice_sizes={1,16,8}
  ROOT %gemm = (bf16[4,16]{1,0}, s8[64]{0}) custom-call(%slice.1, %p2), custom_call_target="__cublas$lt$matmul"
}

%cut (p0.1: bf16[19,16,8], p1.1: s32[]) -> bf16[1,16,8] {
  %p0.1 = bf16[19,16,8]{2,1,0} parameter(0)
  %p1.1 = s32[] parameter(1)
  ROOT %slice.2 = bf16[1,16,8]{2,1,0} dynamic-slice(%p0.1, %p1.1), dynamic_slice_sizes={1,16,8}
}

%cut_by_jax_0_10 (p0.3: bf16[19,16,8], p1.3: s32[]) -> bf16[1,16,8] {
  %p0.3 = bf16[19,16,8]{2,1,0} parameter(0)
  %p1.3 = s32[] parameter(1)
  %slice.3 = bf16[1,16,8]{2,1,0} dynamic-slice(%p0.3, %p1.3), dynamic_slice_sizes={1,16,8}
  ROOT %copy.3 = bf16[1,16,8]{2,1,0} copy(%slice.3)
}

%sum (p0.2: bf16[4,16], p1.2: bf16[16]) -> bf16[4,16] {
  ROOT %add = bf16[4,16]{1,0} add(%p0.2, %p1.2)
}

%layers (arg: (s32[], bf16[19,16,8])) -> (s32[], bf16[19,16,8]) {
  %x = bf16[4,8]{1,0} get-tuple-element(%arg), index=1
  %w = bf16[19,16,8]{2,1,0} get-tuple-element(%arg), index=2
  %i = s32[] get-tuple-element(%arg), index=0
  %fusion.1 = (bf16[4,16]{1,0}, s8[64]{0}) fusion(%w, %i, %x), kind=kCustom, calls=%product
  %fusion-start.1 = ((bf16[19,16,8]{2,1,0}, s32[]), bf16[1,16,8]{2,1,0}, u32[]) fusion-start(%w, %i), kind=kLoop, calls=%cut
  %fusion-done.1 = bf16[1,16,8]{2,1,0} fusion-done(%fusion-start.1)
  %fusion.3 = bf16[1,16,8]{2,1,0} fusion(%w, %i), kind=kCustom, calls=%cut_by_jax_0_10
  %y = bf16[4,16]{1,0} get-tuple-element(%fusion.1), index=0
  %b = bf16[16]{0} get-tuple-element(%arg), index=3
  %fusion.2 = bf16[4,16]{1,0} fusion(%y, %b), kind=kLoop, calls=%sum
  %attend = (bf16[1,4,16]{2,1,0}, u8[0]{0}) custom-call(%fusion.2), custom_call_target="__cudnn$fmhaSoftmax"
}

%steps (arg: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %while.1 = (s32[], bf16[19,16,8]{2,1,0}) while(%init), condition=%few, body=%layers, backend_config={"known_trip_count":{"n":"19"}}
}

ENTRY %main (a: bf16[4,8]) -> bf16[4,8] {
  %while.2 = (s32[], bf16[4,8]{1,0}) while(%init), condition=%until, body=%steps
  %copy = bf16[4,8]{1,0} copy(%a)
}
"""


@pytest.fixture(scope="module")
def static():
    spec = importlib.util.spec_from_file_location("static", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.environ", {})
        spec.loader.exec_module(module)
    return module


def test_cycles_and_collectives_of_a_step(static):
    cycles, moved = static.one_step(TPU)
    assert cycles == 19 * 161 + 7
    assert moved == {"all-gather, synchronous": 19 * (64 + 32), "all-gather, asynchronous": 19 * (128 + 32)}


def test_bytes_that_a_step_moves(static):
    moved = static.traffic(GPU)
    assert moved["weights copied"] == 19 * 2 * (
        2 * 16 * 8 + 4 + 2 * 16 * 8
    )  # twice read and written, with the event beside the first
    assert moved["others"] == 19 * (2 * 64 + 2 * 64 + 2 * 16)
    assert moved["attention"] == 19 * 2 * 2 * 64 and moved["products"] > 0


@pytest.mark.parametrize("target,words", [("l4", "expected a TPU slice or h100"), ("h300", "target=h300")])
def test_what_it_does_not_know_is_one_line(target, words):
    done = subprocess.run([sys.executable, SCRIPT, target], capture_output=True, text=True)
    assert done.returncode and words in done.stderr and "Traceback" not in done.stderr


def on_a_tpu(*words):
    """What static.py prints of a slice: all of it, ms a step, GiB of arguments, GiB of temporaries."""
    pytest.importorskip("libtpu", reason="needs .[tpu]")
    done = subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.search(r": (\d+) ms a step .*?, ([\d.]+) GiB of arguments, ([\d.]+) GiB temp", done.stdout)
    return done.stdout, *map(float, found.groups())


@pytest.mark.slow
def test_a_tpu_that_is_not_here():
    """FLUX.1 divided over four chips of 31 GiB: its weights are never waited for with nothing to compute, and little
    besides is held."""
    said, milliseconds, arguments, temporary = on_a_tpu("v6e-4", "--sharding", "fsdp")
    assert "all-gather, asynchronous: 16.0" in said and "all-gather, synchronous" not in said
    assert milliseconds < 230 and arguments < 4.1 and temporary < 0.6


@pytest.mark.slow
def test_a_model_that_one_small_tpu_holds():
    """FLUX.2-klein-4B on one chip of 15.75 GiB, where a step reaches two thirds of the peak."""
    _, milliseconds, arguments, temporary = on_a_tpu("v5e-1", "--model", "flux2-klein-4b")
    assert milliseconds < 265 and arguments < 7 and temporary < 0.3


@pytest.mark.slow
def test_an_h100_that_is_not_here():
    pytest.importorskip("jax_plugins.xla_cuda12", reason="needs jax[cuda12]")
    done = subprocess.run([sys.executable, SCRIPT, "h100", "--side", "256"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "weights copied: 0.0 GB" in done.stdout
