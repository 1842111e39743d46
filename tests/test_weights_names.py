"""Names that checkpoints have besides the usual: old ones, variants, wrappers, links; the names of what is missing."""

from __future__ import annotations

import json
import os
import shutil

import huggingface_hub
import numpy as np
import pytest
from conftest import GOLDEN
from huggingface_hub import errors
from safetensors.numpy import load_file, save_file
from test_hub import COMMIT, hub, weights  # noqa: F401
from test_lora import read
from test_weights import FLUX, model, plans
from test_weights_layouts import VAE, assert_equal, bfl_flux, black_forest_labs, parameters

from fluxbatch.types import UserError
from fluxbatch.weights.checkpoint import open_checkpoint
from fluxbatch.weights.matching import lacked

CLIP, T5 = "text_encoder/model.safetensors", "text_encoder_2/model.safetensors"
FILES = {"transformer": FLUX, "vae": VAE, "text_encoder": CLIP, "text_encoder_2": T5}


@pytest.fixture
def copy(golden, tmp_path):
    return shutil.copytree(golden / "dev", tmp_path / "model")


@pytest.fixture(scope="module")
def expected():
    return parameters(GOLDEN / "dev")


def complaint(path, **other):
    with pytest.raises(UserError) as error:
        plans(path, **other)
    assert len(error.value.lines) == 1 and "\n" not in str(error.value), error.value.lines
    return str(error.value)


def rename(file, change):
    save_file({change(name): value for name, value in load_file(file).items()}, file)


# ---- other names of the same thing ----


def test_the_vae_of_old_diffusers(copy, expected):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def change(name):
        for new, word in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{word}.")
        return name

    names = set(load_file(copy / VAE))
    rename(copy / VAE, change)
    assert len(names - set(load_file(copy / VAE))) in (8, 16)
    assert_equal({"vae": expected["vae"]}, parameters(copy, only="vae"))
    tensors = load_file(copy / VAE)
    save_file(
        tensors
        | {"decoder.mid_block.attentions.0.to_q.weight": tensors["decoder.mid_block.attentions.0.query.weight"]},
        copy / VAE,
    )
    assert "filled already" in complaint(copy)


def test_clip_with_its_projection(copy, expected):
    """FLUX does not read it."""
    config = copy / "text_encoder/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": ["CLIPTextModelWithProjection"]}))
    tensors = load_file(copy / CLIP)
    width = next(value.shape[1] for name, value in tensors.items() if name.endswith("token_embedding.weight"))
    save_file(tensors | {"text_projection.weight": np.ones((width, width), np.float32)}, copy / CLIP)
    assert_equal({"text_encoder": expected["text_encoder"]}, parameters(copy, only="text_encoder"))


@pytest.mark.parametrize(
    "change",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"_fsdp_wrapped_module.{name}",
        lambda name: name.replace("blocks.0.", "blocks.0._orig_mod."),
        lambda name: name.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module."),
        lambda name: f"model.diffusion_model.{name}",
        lambda name: f"model._orig_mod.{name}",
    ],
)
def test_wrapped_weights(copy, tmp_path, expected, change):
    """torch.compile's, FSDP's and DDP's names, in a directory and in a single file with fp8 scales."""
    name = change("transformer_blocks.0.attn.to_q.weight"), change("transformer_blocks.1.attn.to_q.weight")
    assert name != ("transformer_blocks.0.attn.to_q.weight", "transformer_blocks.1.attn.to_q.weight")
    rename(copy / FLUX, change)
    assert_equal({"transformer": expected["transformer"]}, parameters(copy, only="transformer"))
    file = black_forest_labs(GOLDEN / "dev", tmp_path / "single")["path"]
    tensors = load_file(file)
    tensors |= {"img_in.weight": tensors["img_in.weight"] / 2, "img_in.scale_weight": np.full(1, 2, np.float32)}
    save_file({change(key): value for key, value in tensors.items()}, file)
    assert_equal({"transformer": expected["transformer"]}, parameters(file, only="transformer"))


def test_two_names_of_one_tensor(copy):
    tensors = load_file(copy / FLUX)
    save_file(tensors | {"_orig_mod.x_embedder.weight": tensors["x_embedder.weight"] + 1}, copy / FLUX)
    assert "_orig_mod.x_embedder.weight" in (output := complaint(copy)) and "are one tensor of the model" in output


# ---- variants ----


def to_variant(copy, variant="fp16"):
    for name in FILES.values():
        (copy / name).rename(copy / name.replace(".safetensors", f".{variant}.safetensors"))


def test_weights_that_are_all_of_a_variant(copy, expected):
    to_variant(copy)
    assert_equal(expected, parameters(copy))
    assert open_checkpoint(model(copy)).digest()
    shutil.copy(
        copy / FLUX.replace(".safetensors", ".fp16.safetensors"),
        copy / FLUX.replace(".safetensors", ".bf16.safetensors"),
    )
    output = complaint(copy)
    assert f"{copy}/transformer: has 2 variants of the weights (bf16, fp16)" in output
    for at, component in {"clip": "text_encoder", "t5": "text_encoder_2", "vae": "vae"}.items():
        assert_equal(
            {component: expected[component]}, parameters(GOLDEN / "dev", only=component, **{at: str(copy / component)})
        )


def test_the_usual_file_goes_before_a_variant(copy, expected):
    tensors = load_file(copy / FLUX)
    save_file(
        {name: value + 1 for name, value in tensors.items()}, copy / FLUX.replace(".safetensors", ".fp16.safetensors")
    )
    assert_equal({"transformer": expected["transformer"]}, parameters(copy, only="transformer"))


@pytest.mark.parametrize(
    "part", ["diffusion_pytorch_model.fp16-{}.safetensors", "diffusion_pytorch_model-{}.fp16.safetensors"]
)
def test_a_variant_in_parts(copy, expected, part):
    """As diffusers names them, now and formerly."""
    tensors = load_file(copy / FLUX)
    (copy / FLUX).unlink()
    names, locations = sorted(tensors), {}
    for i in range(2):
        file = part.format(f"0000{i + 1}-of-00002")
        save_file({name: tensors[name] for name in names[i::2]}, copy / "transformer" / file)
        locations |= dict.fromkeys(names[i::2], file)
    (copy / "transformer/diffusion_pytorch_model.safetensors.index.fp16.json").write_text(
        json.dumps({"weight_map": locations})
    )
    assert_equal({"transformer": expected["transformer"]}, parameters(copy, only="transformer"))


def test_a_variant_of_a_repository(hub, golden, expected):  # noqa: F811
    """It is fetched where there is nothing else, a component's too."""
    repo = shutil.copytree(golden / "dev", hub.root / "some/flux")
    to_variant(repo)
    assert_equal({"vae": expected["vae"]}, parameters("some/flux", only="vae"))
    for given, wanted in ((dict(clip="some/flux"), "text_encoder"), (dict(vae="some/flux"), "vae")):
        assert_equal({wanted: expected[wanted]}, parameters(golden / "dev", only=wanted, **given))
        assert weights(hub.fetched) == {FILES[wanted].replace(".safetensors", ".fp16.safetensors")}


# ---- links and revisions ----


def test_a_link_to_nothing_is_named(hub, golden, tmp_path):  # noqa: F811
    """Of the cache of Hugging Face, what was to be downloaded anew; of a directory, the link."""
    shutil.copytree(golden / "dev", hub.root / "some/flux")
    cache = tmp_path / "models--some--flux/snapshots" / COMMIT
    shutil.copytree(golden / "dev", cache)
    for name in FILES.values():
        os.remove(cache / name)
        os.symlink("../../../blobs/0123", cache / name)
        output = complaint(cache)
        assert (
            f"{cache}/{name}: a link to ../../../blobs/0123, which is not there" in output
            and "hf download some/flux --force-download" in output
        )
        os.remove(cache / name)
        os.symlink(hub.root / "some/flux" / name, cache / name)
    plans(cache)
    for name in ("transformer", "text_encoder"):
        shutil.rmtree(cache / name)
        os.symlink("/mnt/gone", cache / name)
        assert f"{cache}/{name}: a link to /mnt/gone, which is not there" in complaint(cache)
        os.remove(cache / name)
        shutil.copytree(golden / "dev" / name, cache / name)
    file = tmp_path / "flux1-dev.safetensors"
    os.symlink("/mnt/gone/flux.safetensors", file)
    assert f"{file}: a link to /mnt/gone/flux.safetensors, which is not there: mend the link" in complaint(file)
    for path in (tmp_path / "flux1-dev.safetensors", tmp_path / "loras"):
        (tmp_path / "loras").mkdir(exist_ok=True)
        if not os.path.lexists(tmp_path / "loras/x.safetensors"):
            os.symlink("/mnt/gone/x.safetensors", tmp_path / "loras/x.safetensors")
        with pytest.raises(UserError, match="a link to /mnt/gone/.*, which is not there"):
            read(path)


def test_a_revision_that_is_not_there_is_named(monkeypatch):
    class Refs:
        branches, tags = [type("Ref", (), {"name": "main"})], [type("Ref", (), {"name": "v1"})]

    def offline(*_, **__):
        raise OSError("offline")

    for kind, words, refs in (
        (
            errors.RevisionNotFoundError,
            "'some/flux' on Hugging Face has no revision 'v9': expected one of its branches, tags or commits (main,",
            lambda repo: Refs,
        ),
        (
            errors.RevisionNotFoundError,
            "'some/flux' on Hugging Face has no revision 'v9': expected one of its branches, tags or commits",
            offline,
        ),
        (
            errors.RepositoryNotFoundError,
            "'some/flux' at revision 'v9' is neither a directory here nor a repository",
            offline,
        ),
        (
            errors.LocalEntryNotFoundError,
            "'some/flux' at revision 'v9' is not a directory here, and Hugging Face cannot be reached",
            offline,
        ),
    ):

        def fail(*_, kind=kind, **__):
            raise kind.__new__(kind)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        monkeypatch.setattr(huggingface_hub, "list_repo_refs", refs)
        with pytest.raises(UserError) as told:
            open_checkpoint(model("https://huggingface.co/some/flux/tree/v9"))
        assert (
            words in str(told.value) and len(told.value.lines) == 1 and ("main" in str(told.value)) == ("main" in words)
        )


# ---- what is missing ----


@pytest.mark.parametrize(
    "component,prefix", [*((component, "") for component in FILES), ("transformer", "model.diffusion_model.")]
)
def test_the_tensor_that_a_file_lacks_is_named(golden, copy, component, prefix):
    """As the file names its others: for the path of every parameter, the name of what fills it."""
    files = {"diffusers": copy}
    if component == "transformer":
        save_file({prefix + name: value for name, value in load_file(copy / FLUX).items()}, copy / FLUX)
        files["BFL"] = black_forest_labs(golden / "dev", copy.parent / "single")["path"]
        save_file({prefix + name: value for name, value in load_file(files["BFL"]).items()}, files["BFL"])
    elif component == "vae":
        files["BFL"] = black_forest_labs(golden / "dev", copy.parent / "single")["path"]
    for path in files.values():
        opened = open_checkpoint(model(path)).components[component]
        plan = opened.plan()
        for parameter, pieces in plan.pieces.items():
            stacked = plan.shapes[parameter][0] is not None
            for layer, piece in enumerate(pieces):
                left = {name: tensor for name, tensor in opened.tensors.items() if tensor is not piece.tensor}
                assert lacked(opened.table, parameter, layer if stacked else None, left) == piece.tensor.name


@pytest.mark.parametrize(
    "component,name",
    [
        ("transformer", "x_embedder.bias"),
        ("transformer", "transformer_blocks.1.attn.to_add_out.weight"),
        ("transformer", "norm_out.linear.weight"),
        ("text_encoder_2", "encoder.block.1.layer.1.DenseReluDense.wi_0.weight"),
        ("vae", "decoder.mid_block.attentions.0.to_k.bias"),
        ("vae", "decoder.up_blocks.1.resnets.0.norm2.weight"),
    ],
)
def test_the_message_names_both(copy, component, name):
    tensors = load_file(copy / FILES[component])
    del tensors[name]
    save_file(tensors, copy / FILES[component])
    output = complaint(copy)
    assert f"{FILES[component]}: parameter that no tensor fills: " in output and output.endswith(
        f": the file lacks {name}"
    )


def test_the_tensor_that_would_give_a_size_is_named(golden, tmp_path):
    file = black_forest_labs(golden / "dev", tmp_path / "it")["path"]
    whole = bfl_flux(load_file(golden / "dev" / FLUX))
    save_file({name: value for name, value in whole.items() if name != "txt_in.weight"}, file)
    assert complaint(file).endswith(
        "no tensor gives the size of 'txt_in.kernel' of the transformer: the file lacks txt_in.weight"
    )
    save_file({name: value for name, value in whole.items() if name != "img_in.weight"}, file)
    assert complaint(file).endswith(
        "no tensor gives the size of 'img_in.kernel' of the transformer: the file lacks img_in.weight"
    )
    save_file({name: value for name, value in whole.items() if name != "vector_in.in_layer.weight"}, file)
    signs = "vector_in.in_layer.weight or time_text_embed.text_embedder.linear_1.weight"
    assert f"no transformer in it, which has {signs}: its tensors are called" in complaint(file)
