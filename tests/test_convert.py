"""fluxbatch.convert: chunks that hosts read in parallel; what was begun goes on, what is there is not written over."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
import tensorstore as ts
from test_weights import model, plans
from test_weights_layouts import FLUX, assert_equal, converted, expected, parameters  # noqa: F401

from fluxbatch.types import UserError
from fluxbatch.weights import convert, zarr
from fluxbatch.weights.checkpoint import open_checkpoint


def test_conversion_resumes_and_refuses(golden, tmp_path, monkeypatch, expected):  # noqa: F811
    checkpoint, to = open_checkpoint(model(golden / "dev")), tmp_path / "out"
    wrote = []
    block = convert._Writer.block

    def dies(self, target, values, name):
        if len(wrote) == 40:
            self.drain()
            raise KeyboardInterrupt
        wrote.append(name)
        block(self, target, values, name)

    monkeypatch.setattr(convert._Writer, "block", dies)
    with pytest.raises(KeyboardInterrupt):
        convert.convert(checkpoint, str(to), None)
    with pytest.raises(UserError, match="has not finished"):
        plans(to)
    with pytest.raises(UserError, match="another checkpoint"):
        convert.convert(open_checkpoint(model(golden / "schnell")), str(to), None)
    with pytest.raises(UserError, match="weights_dtype"):
        convert.convert(checkpoint, str(to), zarr.BFLOAT16)
    first = list(wrote)
    wrote.clear()
    monkeypatch.setattr(
        convert._Writer,
        "block",
        lambda self, target, values, name: wrote.append(name) or block(self, target, values, name),
    )
    assert convert.convert(checkpoint, str(to), None)
    assert first and wrote and not set(first) & set(wrote)
    assert_equal(expected["dev"], parameters(to))
    assert not convert.convert(checkpoint, str(to), None)
    assert open_checkpoint(model(to)).digest() == checkpoint.digest()
    assert open_checkpoint(model(to, clip=str(golden / "dev"))).digest() != checkpoint.digest()  # CLIP from elsewhere
    with pytest.raises(UserError, match="something else"):
        convert.convert(checkpoint, str(tmp_path), None)


def test_words_added_to_a_tokenizer_go_along(golden, tmp_path):
    copy = shutil.copytree(golden / "dev", tmp_path / "model")
    before = open_checkpoint(model(copy)).digest()
    (copy / "tokenizer/added_tokens.json").write_text('{"<my-cat>": 514}')
    checkpoint = open_checkpoint(model(copy))
    assert checkpoint.digest() != before
    convert.convert(checkpoint, str(tmp_path / "out"), None)
    assert (tmp_path / "out/tokenizer/added_tokens.json").read_text() == '{"<my-cat>": 514}'


def test_conversion_to_another_dtype_is_another_model(golden, tmp_path):
    checkpoint = open_checkpoint(model(golden / "dev"))
    convert.convert(checkpoint, str(tmp_path / "out"), zarr.BFLOAT16)
    assert open_checkpoint(model(tmp_path / "out")).digest() != checkpoint.digest()
    only = dict(dtype="bfloat16", only="transformer")
    assert_equal(parameters(golden / "dev", **only), parameters(tmp_path / "out", **only))


@pytest.mark.parametrize(
    "shape,stacked",
    [
        ((19, 12288, 3072), True),
        ((38, 3072, 15360), True),
        ((32128, 4096), False),
        ((19, 3072), True),
        ((512, 512, 3, 3), False),
        ((3072, 64), False),
        ((7,), False),
        ((2, 321, 4096), True),
    ],
)
def test_chunks_divide_the_shards(shape, stacked):
    file, chunk = zarr.grid(shape, stacked, 2)
    assert all(f % c == 0 for f, c in zip(file, chunk, strict=True))
    rows = 1 if stacked else 0
    size = 2 * np.prod(chunk)
    if 2 * np.prod(shape) > zarr.CHUNK:
        assert shape[rows] % chunk[rows] == 0 and size >= min(zarr.CHUNK, 2 * np.prod(shape[rows:]))
        wide = next(n for n in (8, 4, 2, 1) if shape[rows] % n == 0)
        assert (shape[rows] // wide) % chunk[rows] == 0 or size < 2 * zarr.CHUNK  # 8 devices read only their own
    assert 2 * np.prod(file) <= 2 * zarr.SHARD


def test_a_whole_json_of_shapes(golden, tmp_path):
    """What a converted copy says about itself is what is in it."""
    converted(golden / "dev", tmp_path / "out")
    marker = json.loads((tmp_path / "out" / zarr.MARKER).read_text())
    components = open_checkpoint(model(golden / "dev")).components
    for name, component in components.items():
        assert marker["components"][name].keys() == component.whole_plan().pieces.keys()
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        zarr.MARKER,
        "model_index.json",
        "scheduler",
        "tokenizer",
        "tokenizer_2",
        "transformer",
        "vae",
        "text_encoder",
        "text_encoder_2",
    }


def test_the_command(golden, tmp_path, monkeypatch, capsys):
    from fluxbatch import convert as command

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["fluxbatch.convert", *words])
        with pytest.raises(SystemExit) as stop:
            command.main()
        return stop.value.code, capsys.readouterr()

    base = f"pretrained_model_name_or_path={golden / 'dev'}"
    code, output = call(base, f"to={tmp_path / 'out'}", "weights_dtype=bfloat16")
    assert code == 0 and f"written: {tmp_path / 'out'}" in output.out
    assert set(load_marker(tmp_path / "out")) == {"bfloat16"}
    code, output = call(base)
    assert code == 2 and "to" in output.err
    code, output = call(base, f"to={tmp_path / 'eight'}", "weights_dtype=int8")
    assert code == 2 and "weights_dtype=int8: expected one of auto, float32" in output.err
    code, output = call(base, f"to={tmp_path}")
    assert code == 2 and "something else" in output.err and "Traceback" not in output.err

    # where it cannot go, and what cannot go with it
    monkeypatch.chdir(tmp_path)
    for location in ("''", "' '", "http://host/flux", "https://host/flux", "s3:///flux", "gs:///flux"):
        code, output = call(base, f"to={location}")
        assert (
            code == 2
            and "to=" in output.err
            and "expected a directory, gs://bucket/prefix or s3://bucket/prefix" in output.err
            and len(output.err.splitlines()) == 1
        )
    one = {
        "lora_model_name_or_path": "a.safetensors",
        "weight_name": "null",
        "adapter_name": "a",
        "scale": 1.0,
        "from_pt": "true",
    }
    code, output = call(base, "to=new", *(f"lora_config.{key}=[{value}]" for key, value in one.items()))
    assert code == 2 and "lora_config.lora_model_name_or_path[0]: 'a.safetensors': expected no adapter" in output.err
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    code, output = call(base, "to=~/out")
    assert code == 0 and load_marker(tmp_path / "home/out")


def load_marker(folder):
    components = json.loads((folder / zarr.MARKER).read_text())["components"]
    return [entry["dtype"] for arrays in components.values() for entry in arrays.values()]


@pytest.mark.parametrize(
    "shape,stacked", [((5, 24, 8), True), ((24, 8), False), ((3, 10), True), ((7, 12, 2, 2), True)]
)
@pytest.mark.parametrize("rows", [(0, None), (5, 11)])
def test_rows_of_chunks(monkeypatch, tmp_path, shape, stacked, rows):
    """Files of several layers, the last one not full; ranges that begin and end within chunks."""
    monkeypatch.setattr(zarr, "CHUNK", 128)
    monkeypatch.setattr(zarr, "SHARD", 2 * 24 * 8 * 4)
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    dtype = np.dtype(np.float32)
    ts.open(zarr.spec(str(tmp_path / "a.kernel"), shape, dtype, stacked), create=True).result().write(values).result()
    arrays = zarr.Arrays(str(tmp_path))
    entry = {"a.kernel": {"shape": shape, "dtype": "float32", "stacked": stacked}}
    found = zarr.tensors({"components": {"x": entry}}, "x", arrays)
    for (name, tensor), layer in zip(found.items(), values if stacked else [values], strict=True):
        first, last = rows[0], min(rows[1] or len(layer), len(layer))
        assert np.array_equal(arrays.read_rows(tensor, first, last), layer[first:last]), name
