"""The mesh and what lies on it: however the devices divide the work, the model says the same."""

from __future__ import annotations

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import images, psnr
from flax import nnx
from jax.sharding import PartitionSpec as P

from fluxbatch.distributed.mesh import Layout, Pairs, Placement, batch_sharding, make_mesh, mesh_shape, put, replicated
from fluxbatch.models import attention
from fluxbatch.models.flux1.definition import PromptEmbeds
from fluxbatch.models.flux1.transformer import Flux, FluxConfig, rope_table

CONFIG = FluxConfig(16, 16, 2, 3, 4, 16, 24, 16, True, (4, 6, 6))


@functools.cache
def arguments(text=8, rows=4, cols=6):
    rng = np.random.default_rng(0)
    img, txt, pooled = (rng.normal(size=s).astype(np.float32) for s in ((4, rows * cols, 16), (4, text, 24), (4, 16)))
    return (img, txt, pooled, np.array([1, 0.7, 0.5, 0.1], np.float32), np.full(4, 3.5, np.float32)), rope_table(
        text, rows, cols, (4, 6, 6)
    )


@functools.cache
def weights():
    """Graph and parameters of the model, by path."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Flux(CONFIG, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(1)
    return graph, [
        (keys, leaf, rng.normal(0, 0.2, leaf.get_value().shape).astype(np.float32))
        for keys, leaf in nnx.to_flat_state(state)
    ]


@functools.cache
def velocity(shape, *args):
    """The compiled programs of modulation and of one step on a mesh of ``shape``, and what the latter says."""
    mesh = make_mesh(shape)
    layout = Layout(mesh)
    make = lambda: Flux(CONFIG, rngs=nnx.Rngs(0), attention=layout.attention(attention.blocked), layout=layout)  # noqa: E731
    graph, _ = nnx.split(nnx.eval_shape(make))
    placed = []
    for keys, leaf, value in weights()[1]:
        placement = Placement.of(mesh, value.shape, leaf.get_metadata()["axes"])
        placed.append((keys, leaf.replace(put(np.asarray(placement.arranged(value)), placement.final))))
    batch, rope = arguments(*args)
    (img, txt, pooled, t, guidance), rope = (
        [put(x, batch_sharding(mesh)) for x in batch],
        tuple(put(x, replicated(mesh)) for x in rope),
    )
    state = nnx.from_flat_state(placed)

    def modulate(state, pooled, t, guidance):
        model = nnx.merge(graph, state)
        return model.step_inputs(PromptEmbeds(None, pooled), jnp.stack([t, t], 1), guidance, jnp.float32)

    def step(state, img, txt, mod, rope):
        model = nnx.merge(graph, state)
        return model.velocity(
            img, model.embed(PromptEmbeds(txt, None), rope, jnp.float32), jax.tree.map(lambda x: x[:, 0], mod), rope
        )

    modulate, step = (jax.jit(program, out_shardings=batch_sharding(mesh)) for program in (modulate, step))
    modulate = modulate.lower(state, pooled, t, guidance).compile()
    mod = modulate(state, pooled, t, guidance)
    step = step.lower(state, img, txt, mod, rope).compile()
    return modulate, step, np.asarray(step(state, img, txt, mod, rope))


@functools.cache
def plain(*args):
    batch, rope = arguments(*args)
    graph, leaves = weights()

    def arranged(leaf, value):
        return Placement.of(make_mesh((1,)), value.shape, leaf.get_metadata()["axes"]).arranged(value)

    state = nnx.from_flat_state(
        [(keys, leaf.replace(jnp.asarray(arranged(leaf, value)))) for keys, leaf, value in leaves]
    )
    return np.asarray(jax.jit(lambda state, batch, rope: nnx.merge(graph, state)(*batch, rope))(state, batch, rope))


@pytest.mark.parametrize(
    "shape,sizes", [((1, 1, 1, 4), (8, 4, 6)), ((1, 2, 2, 2), (8, 4, 6)), ((1, 1, 4), (7, 3, 5))], ids=str
)
def test_the_velocity_is_the_same_on_every_mesh(shape, sizes):
    """Modulation made before, or within. The last one's 7 text and 15 image tokens do not divide."""
    *_, found = velocity(shape, *sizes)
    assert np.allclose(found, plain(*sizes), atol=2e-5 * np.abs(found).max())


def exchanges(compiled, kind):
    """Shapes of what the devices exchange by operations of this kind, each as often as it is written in the program."""
    text = compiled.as_text()
    lines = [line for line in text.splitlines() if re.search(rf" {kind}(-start)?\(", line)]
    shapes = (shape for line in lines for shape in re.findall(r"f32\[([\d,]*)\]", line.split(f" {kind}")[0]))
    return [tuple(map(int, shape.split(","))) for shape in shapes]


def test_tensor_parallelism_sums_once_for_each_half_of_a_block():
    modulate, step, _ = velocity((1, 1, 1, 4), 8, 4, 6)
    assert len(exchanges(modulate, "all-reduce")) == 3  # embeddings of vectors
    assert len(exchanges(step, "all-reduce")) == 5  # double: image's and text's attention and MLP; single: both at once
    assert not any(exchanges(step, kind) for kind in ("all-gather", "all-to-all", "collective-permute"))


def test_context_parallelism_gathers_keys_and_values():
    _, step, _ = velocity((1, 1, 4), 8, 4, 6)
    assert len([shape for shape in exchanges(step, "all-gather") if len(shape) > 3]) == 4  # of two kinds of block
    assert not exchanges(step, "all-reduce") + exchanges(step, "all-to-all")


def test_fsdp_gathers_weights_and_no_images():
    modulate, step, _ = velocity((1, 4), 8, 4, 6)
    for program, count in ((modulate, 3), (step, 2 * 6 + 5)):  # each matrix once, one layer of it
        assert not exchanges(program, "all-reduce") + exchanges(program, "collective-permute")
        gathered = exchanges(program, "all-gather")
        assert len([shape for shape in gathered if len(shape) == 3 and shape[0] == 1]) == count
    assert {shape[0] for shape in gathered if len(shape) > 2} == {1} and not exchanges(step, "all-to-all")


def test_mesh_shapes():
    one = (1, 1)
    assert mesh_shape((1, 1, 1, 1), one, 8, 1) == ((1, 1, 1, 1), one)
    assert mesh_shape((-1, 1, 1, 1), one, 8, 1) == ((8, 1, 1, 1), one)
    assert mesh_shape((2, -1, 1, 2), one, 8, 1) == ((2, 2, 1, 2), one)
    assert mesh_shape((1, 1, -1, 2), (-1, 1), 8, 1) == ((1, 1, 4, 2), one)
    assert mesh_shape((1, -1, 1, 1), (-1, 1), 8, 2) == ((1, 4, 1, 1), (2, 1))
    assert mesh_shape((1, 1, 1, -1), (1, -1), 8, 4) == ((1, 1, 1, 2), (1, 4))
    assert mesh_shape((1, -1, 1, 1), (2, 1), 8, 1) == ((1, 4, 1, 1), (2, 1))
    for ici in ((-1, -1, 1, 1), (16, 1, 1, 1), (3, 1, 1, -1), (2, 2, 2, 2)):
        with pytest.raises(ValueError, match="ici_"):
            mesh_shape(ici, one, 8, 1)
    for dcn, slices in (((2, 1), 4), ((3, 1), 1), ((-1, 3), 4), ((-1, -1), 4)):
        with pytest.raises(ValueError, match="dcn_"):
            mesh_shape((1, 1, 1, 1), dcn, 8, slices)


def test_slow_parts_of_an_axis_lie_over_slices():
    devices = jax.devices()[:8]
    ids = np.vectorize(lambda device: device.id)(make_mesh((1, 2, 1, 2), (1, 2), devices).devices)
    assert ids.shape == (1, 4, 1, 2)
    assert ids[0, :, 0].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    ids = np.vectorize(lambda device: device.id)(make_mesh((2, 1, 1, 2), (1, 2), devices).devices)
    assert ids[:, :, 0, 0].tolist() == [[0, 4], [2, 6]]  # fsdp crosses from one half to the other, data stays within


@pytest.mark.parametrize("shape,axes,mesh,read,final", [
    ((8, 4), ("mlp", "embed"), (1, 1, 1, 4), P("tensor", None), P("tensor", None)),
    ((4, 8), ("embed", "mlp"), (1, 1, 1, 4), P("tensor", None), P(None, "tensor")),
    ((3, 8, 8), ("embed", "mlp"), (1, 2, 1, 2), P(None, ("fsdp", "tensor"), None), P(None, "fsdp", "tensor")),
    ((8, 8), ("heads", "embed"), (1, 2, 1, 2), P(("tensor", "fsdp"), None), P(("tensor", "fsdp"), None)),
    ((3, 8), ("embed", "mlp"), (1, 2, 1, 2), P(None, None), P(None, ("tensor", "fsdp"))),
    ((6, 8), ("embed", "mlp"), (1, 1, 1, 4), P(None, None), P(None, "tensor")),
    ((6, 6), ("mlp", "embed"), (1, 1, 1, 4), P(None, None), P(None, None)),
    ((8,), ("mlp",), (1, 2, 1, 2), P("tensor"), P("tensor")),
    ((3, 8), ("mlp",), (1, 4), P(None, None), P(None, None)),  # vectors of three layers
    ((8, 4), ("mlp", "embed"), (1, 1, 4), P(None, None), P(None, None)),
])  # fmt: skip
def test_where_parameters_lie(shape, axes, mesh, read, final):
    placement = Placement.of(make_mesh(mesh), shape, axes)
    assert (placement.read.spec, placement.final.spec) == (read, final)


def test_axes_that_collide_are_refused():
    with pytest.raises(ValueError, match="two of them lie on tensor"):
        Placement.of(make_mesh((1, 1, 1, 2)), (4, 4), ("heads", "mlp"))


def test_parts_that_stand_side_by_side_are_divided_each_by_itself():
    placement = Placement.of(make_mesh((1, 1, 1, 2)), (1, 6), (None, (("heads", 2), ("mlp", 4))))
    assert placement.arranged(np.array([[10, 11, 20, 21, 22, 23]])).tolist() == [[10, 20, 21, 11, 22, 23]]
    layout = Layout(make_mesh((1, 1, 2)))
    joined = layout.join((np.arange(2), np.arange(10, 14)), 0, "tokens")
    assert joined.tolist() == [0, 10, 11, 1, 12, 13]
    assert [part.tolist() for part in layout.split(joined, (2, 4), 0, "tokens")] == [[0, 1], [10, 11, 12, 13]]
    assert layout.join((np.arange(3), np.arange(2)), 0, "tokens").tolist() == [0, 1, 2, 0, 1]  # 3 do not divide


def test_pairs_become_halves():
    pairs = Pairs("heads", 6)
    assert pairs.halved(np.arange(12)[None], -1).tolist() == [[0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]]
    rows = np.arange(24).reshape(2, 6, 2)
    assert np.array_equal(pairs.paired(pairs.halved(rows, -2), -2), rows)
    placement = Placement.of(make_mesh((1, 1, 1, 2)), (5, 12, 4), (pairs, "embed"))
    assert placement.final.spec == P(None, "tensor", None) and placement.pairs == ((-2, pairs),)


ALL = {"ici_fsdp_parallelism": 2, "ici_context_parallelism": 2, "ici_tensor_parallelism": -1}
SHARDED = {
    "mixed": {"ici_data_parallelism": 2, "ici_fsdp_parallelism": -1},
    "tensor": {"ici_tensor_parallelism": 2},
    "context": {"ici_context_parallelism": 4},
    "tensor, fsdp": {"ici_fsdp_parallelism": 2, "ici_tensor_parallelism": 2},
    "all": ALL,
}


def pictures(cli, golden, folder, name, manifest, sizes):
    code, err = cli(
        f"pretrained_model_name_or_path={golden / 'dev'}",
        "max_sequence_length=24",
        "hardware=cpu",
        f"output_dir={folder}",
        f"run_name={name}",
        f"manifest={manifest}",
        "gallery=false",
        *(f"{key}={size}" for key, size in sizes.items()),
    )
    assert code == 0, err
    return images(folder / name)


def test_pictures_are_those_of_diffusers_on_a_mesh_of_three_axes(cli, golden, tmp_path):
    """On a whole run, text encoders and decoder included."""
    rows = [line for line in (golden / "dev.jsonl").read_text().splitlines() if json.loads(line)["id"] in ("g0", "g3")]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    expected = np.load(golden / "dev.npz")
    made = pictures(cli, golden, tmp_path, "run", tmp_path / "rows.jsonl", ALL)
    assert made.keys() == {"g0", "g3"} and all(psnr(picture, expected[name]) >= 50 for name, picture in made.items())


@pytest.mark.slow
def test_pictures_are_the_same_on_every_mesh(cli, golden, tmp_path):
    """test_run.py has ddp and fsdp."""
    rows = (golden / "dev.jsonl").read_text().splitlines()
    manifest = tmp_path / "rows.jsonl"
    manifest.write_text("\n".join([rows[0], rows[2]]) + "\n")
    reference = pictures(cli, golden, tmp_path, "single", manifest, {})
    for name, sizes in SHARDED.items():
        made = pictures(cli, golden, tmp_path, name.replace(", ", "-"), manifest, sizes)
        assert made.keys() == reference.keys()
        for key, picture in made.items():
            assert np.abs(picture.astype(int) - reference[key].astype(int)).max() <= 1, (name, key)


@pytest.mark.parametrize("sizes,words", [
    (["ici_tensor_parallelism=4"], ["ici_tensor_parallelism=4", "2 attention heads"]),
    (["ici_tensor_parallelism=-1", "ici_context_parallelism=-1"], ["ici_tensor_parallelism=-1"]),
    (["dcn_data_parallelism=2"], ["dcn_data_parallelism=2", "1 processes"]),
    (["ici_context_parallelism=16"], ["ici_context_parallelism=16", "8"]),
])  # fmt: skip
def test_what_cannot_be_divided_is_one_line(cli, golden, tmp_path, sizes, words):
    code, err = cli(
        f"pretrained_model_name_or_path={golden / 'dev'}",
        "prompt=a fox",
        f"output_dir={tmp_path}",
        "hardware=cpu",
        *sizes,
    )
    assert code == 2 and all(word in err for word in words) and len(err.splitlines()) == 1
