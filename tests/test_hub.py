"""Repositories on Hugging Face: of each only what is needed is fetched. The Hub here is a directory, filtered and
linked as ``huggingface_hub`` does it."""

from __future__ import annotations

import json
import os
import shutil

import huggingface_hub
import lora_files as files
import numpy as np
import pytest
from huggingface_hub.utils import filter_repo_objects
from test_lora import read
from test_weights import model
from test_weights_layouts import black_forest_labs

from fluxbatch.distributed.mesh import make_mesh
from fluxbatch.types import UserError
from fluxbatch.weights import convert, load
from fluxbatch.weights.checkpoint import open_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The Hub as a directory; ``fetched`` and ``revision`` say what was fetched last."""

    class Hub:
        root = tmp_path / "hub"
        fetched: tuple[str, ...] = ()
        revision: str | None = None

        def snapshot_download(self, repo, revision=None, allow_patterns=None):
            there = self.root / repo
            if not there.is_dir():
                raise huggingface_hub.errors.LocalEntryNotFoundError(f"no {repo}")
            names = list(filter_repo_objects(self.list_repo_files(repo), allow_patterns=allow_patterns))
            self.fetched, self.revision = tuple(names), revision
            folder = tmp_path / "cache" / repo / COMMIT
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            for name in names:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.symlink(there / name, folder / name)
            return str(folder)

        def list_repo_files(self, repo, revision=None):
            return sorted(
                str(path.relative_to(self.root / repo)) for path in (self.root / repo).rglob("*") if path.is_file()
            )

    made = Hub()
    for name in ("snapshot_download", "list_repo_files"):
        monkeypatch.setattr(huggingface_hub, name, getattr(made, name))
    return made


def weights(names):
    return {name for name in names if name.endswith(".safetensors")}


@pytest.fixture
def published(golden, hub):
    """A repository as Black Forest Labs publish FLUX.1: diffusers' folders, and the single files beside them."""
    repo = hub.root / "bfl/flux"
    black_forest_labs(golden / "dev", repo)
    shutil.copytree(golden / "dev", repo, dirs_exist_ok=True)
    for name in ("README.md", "dev_grid.jpg", "text_encoder/pytorch_model.bin", "text_encoder/model.fp16.safetensors"):
        (repo / name).write_text("x")
    return "bfl/flux"


def test_a_checkpoint_of_a_repository(hub, published, golden):
    folders = {"transformer/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
               "text_encoder/model.safetensors", "text_encoder_2/model.safetensors"}  # fmt: skip
    checkpoint = open_checkpoint(model(published))
    assert checkpoint.revision == COMMIT and checkpoint.digest() == open_checkpoint(model(golden / "dev")).digest()
    assert folders <= weights(hub.fetched) <= folders | {"text_encoder/model.fp16.safetensors"}
    assert not {"README.md", "dev_grid.jpg"} & set(hub.fetched)

    single = open_checkpoint(model(f"{published}/flux1-dev.safetensors"))
    assert single.components["transformer"].where.endswith("flux1-dev.safetensors") and single.revision == COMMIT
    assert "flux1-dev.safetensors" in hub.fetched
    assert "transformer/diffusion_pytorch_model.safetensors" not in hub.fetched

    apart = {short: str(golden / "dev") for short in ("clip", "t5")} | {"vae": str(golden / "dev/vae")}
    for name, file in (
        (published, "transformer/diffusion_pytorch_model.safetensors"),
        (f"{published}/flux1-dev.safetensors", "flux1-dev.safetensors"),
    ):
        open_checkpoint(model(name, **apart))
        assert weights(hub.fetched) == {file}

    open_checkpoint(model(published, t5=str(golden / "dev")))  # what other families call text_encoder is not CLIP
    assert weights(hub.fetched) >= folders - {"text_encoder_2/model.safetensors"}
    assert "text_encoder_2/model.safetensors" not in hub.fetched


def test_a_component_of_a_repository(hub, published, golden):
    """By the repository's name, its folder there or what lies at its top; by a file's, nothing else that is large."""
    shutil.copytree(golden / "dev/text_encoder", hub.root / "openai/clip")
    shutil.copytree(golden / "dev/tokenizer", hub.root / "openai/clip", dirs_exist_ok=True)
    (hub.root / "openai/clip/flax_model.msgpack").write_text("x")
    for given, wanted in (
        ({"clip": published}, "text_encoder/model.safetensors"),
        ({"t5": published}, "text_encoder_2/model.safetensors"),
        ({"vae": published}, "vae/diffusion_pytorch_model.safetensors"),
        ({"vae": f"{published}/ae.safetensors"}, "ae.safetensors"),
        ({"clip": "openai/clip"}, "model.safetensors"),
        ({"clip": "openai/clip/model.safetensors"}, "model.safetensors"),
    ):
        checkpoint = open_checkpoint(model(golden / "dev", **given))
        assert weights(hub.fetched) == {wanted} and not {"README.md", "flax_model.msgpack"} & set(hub.fetched), given
        assert ("cache" in checkpoint.tokenizers["tokenizer"]) == ("clip" in given)
        assert ("cache" in checkpoint.tokenizers["tokenizer_2"]) == ("t5" in given)


def test_an_adapter_of_a_repository(hub):
    """The one that is named, and what PEFT keeps beside it, in a folder too."""
    maker = files.Maker(0, ranks=(4,), dtype=np.float16)
    repo = hub.root / "o/loras"
    for name in ("one", "two"):
        files.save(repo / f"{name}.safetensors", maker.lora({"lora_unet_double_blocks_0_img_attn_proj": (3072, 3072)}))
    files.save(
        repo / "deep/adapter_model.safetensors",
        maker.peft({"base_model.model.transformer_blocks.0.attn.to_q": (3072, 3072)}),
    )
    (repo / "deep/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 16}))
    for given in (dict(path="o/loras/one.safetensors"), dict(path="o/loras", weight_name="one.safetensors")):
        assert read(**given).file.endswith("one.safetensors")
        assert hub.fetched == ("deep/adapter_config.json", "one.safetensors")
    for given in (
        dict(path="o/loras/deep/adapter_model.safetensors"),
        dict(path="o/loras", weight_name="deep/adapter_model.safetensors"),
    ):
        (delta,) = read(**given).changes["transformer"].values()
        assert delta.scale == 16 / 4
        assert hub.fetched == ("deep/adapter_config.json", "deep/adapter_model.safetensors")
    for name in ("one", "two"):
        (repo / f"{name}.safetensors").unlink()
    (delta,) = read("o/loras").changes["transformer"].values()
    assert delta.scale == 16 / 4


def test_a_page_of_the_hub_is_its_file(hub, published, golden):
    """Downloads are redirected, and gated ones need the token: they are fetched as from the repository."""
    page = f"https://huggingface.co/{published}"
    for address, revision in (
        (f"{page}/resolve/main/ae.safetensors", "main"),
        (f"{page}/blob/refs%2Fpr%2F1/ae.safetensors?download=true", "refs/pr/1"),
    ):
        vae = open_checkpoint(model(golden / "dev", vae=address)).components["vae"]
        assert vae.where.endswith(f"{COMMIT}/ae.safetensors") and hub.revision == revision
    for address, revision in ((page, None), (f"{page}/tree/v1", "v1"), (f"{page}/", None)):
        assert open_checkpoint(model(address)).revision == COMMIT and hub.revision == revision
    with pytest.raises(UserError, match="expected a .safetensors file: pickled"):
        open_checkpoint(model(f"{page}/resolve/main/flux.ckpt"))


def test_a_repository_of_single_files_says_which(hub, published):
    """Which of them is meant cannot be known, and none is fetched."""
    for name in ("flux1-dev-fp8.safetensors", "flux1-dev-bf16.safetensors", "README.md"):
        path = hub.root / "kijai/flux" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    for given in (dict(path="kijai/flux"), dict(path=published, clip="kijai/flux")):
        with pytest.raises(UserError) as error:
            open_checkpoint(model(**given))
        assert len(error.value.lines) == 1 and not weights(hub.fetched)
        assert "by name: kijai/flux/flux1-dev-bf16.safetensors, kijai/flux/flux1-dev-fp8.safetensors" in str(
            error.value
        )


def test_a_converted_copy_of_a_repository(hub, golden):
    checkpoint = open_checkpoint(model(golden / "dev"))
    convert.convert(checkpoint, str(hub.root / "me/copy"), None)
    copy = open_checkpoint(model("me/copy"))
    assert copy.digest() == checkpoint.digest()
    module = load.load(copy.components["vae"].plan(), make_mesh((1, 1)), np.float32)
    expected = load.load(checkpoint.components["vae"].plan(), make_mesh((1, 1)), np.float32)
    assert np.array_equal(module.conv_in.kernel[...], expected.conv_in.kernel[...])
