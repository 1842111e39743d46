"""Published checkpoints that are not here: a plan goes by the sizes that come with the package, and says so."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import shutil

import huggingface_hub
import lora_files as files
import numpy as np
import pytest
import yaml
from flax import nnx
from test_plan import CLIP_L, DEV, T5XXL, VAE
from test_weights import model

from fluxbatch.distributed.mesh import make_mesh
from fluxbatch.generation.tokenizers import Absent, Tokenizer
from fluxbatch.models.flux1.definition import Flux1
from fluxbatch.weights import load, published
from fluxbatch.weights.checkpoint import open_checkpoint
from fluxbatch.weights.find import EMBEDDED

ROOT = pathlib.Path(__file__).parent.parent
UNSEEN = (": not here, or not all of it, so this goes by the sizes that come with fluxbatch; "
          "the checkpoint itself was not looked at")  # fmt: skip
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of downloads, and a Hub that gives nothing but says what it was asked for."""
    asked = []

    def refuse(repo, **_):
        asked.append(repo)
        raise huggingface_hub.errors.LocalEntryNotFoundError(f"no {repo}")

    for name in ("snapshot_download", "list_repo_files", "hf_hub_download"):
        monkeypatch.setattr(huggingface_hub, name, refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    refuse.asked, refuse.folder = asked, tmp_path / "cache"
    return refuse


@pytest.fixture
def planned(cli, tmp_path):
    def call(*words, code=0):
        status, text = cli(f"output_dir={tmp_path / 'out'}", "prompt=a fox", *words, entry="plan")
        assert status == code, text
        return text

    return call


def test_every_model_of_the_configuration_can_be_planned():
    read = [yaml.safe_load(path.read_text()) for path in (ROOT / "conf/model").glob("*.yaml")]
    named = {model["pretrained_model_name_or_path"] for model in read}
    assert {"black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell", "flux-mini"} <= named
    assert len(named) == 22
    known = {of["repository"] for of in published.published().values()}
    assert {name for name in named if not (EMBEDDED / name).is_dir()} <= known


@pytest.mark.parametrize(
    ("name", "flux", "blocks", "guided"),
    [
        ("black-forest-labs/FLUX.1-dev", 11_901_408_320, 19, True),
        ("black-forest-labs/FLUX.1-schnell", 11_891_178_560, 19, False),
        ("black-forest-labs/FLUX.1-Krea-dev", 11_901_408_320, 19, True),
        ("shuttleai/shuttle-3-diffusion", 11_891_178_560, 19, False),  # 9.96 + 9.95 + 3.87 GB on Hugging Face
        ("ostris/Flex.1-alpha", 8_163_264_064, 8, True),  # 9.91 + 6.42 GB
        ("Freepik/flux.1-lite-8B", 8_163_264_064, 8, True),  # 16.3 GB
    ],
)
def test_published_sizes(name, flux, blocks, guided, cache):
    found = published.open_or_known(model(name))
    assert found.unseen == f"{name}{UNSEEN}" and set(found.tokenizers.values()) == {""}
    configs = [found.components[part].config for part in ("transformer", "text_encoder_2", "text_encoder", "vae")]
    assert configs == [dataclasses.replace(DEV, guidance_embeds=guided, num_layers=blocks), T5XXL, CLIP_L, VAE]
    sizes = {"transformer": flux, "text_encoder_2": 4_762_310_656, "text_encoder": 123_060_480, "vae": 49_545_475}
    for part, size in sizes.items():
        plan = found.components[part].plan()
        assert sum(math.prod(leaf.get_value().shape) for _, leaf in nnx.to_flat_state(plan.state)) == size
        assert plan.nbytes == 2 * size  # bfloat16
    if name != "ostris/Flex.1-alpha":  # which has guidance, and the schedule of what it was made from
        assert found.scheduler == found.family.published_scheduler() | {"num_train_timesteps": 1000}
    assert set(cache.asked) == {"openai/clip-vit-large-patch14", "google/t5-v1_1-xxl"}  # tokenizers, which are small


@pytest.mark.parametrize("words", [
    ["model=flux-dev", "target=v6e-4"], ["model=flux-schnell", "target=h100-8", "sharding=fsdp"],
    ["model=flux-dev", "target=2xh100-4", "sharding=fsdp"],
    ["model=flux-dev", "target=h100", "revision=v1", "verify=digest"],
    ["model=flux-krea-dev", "target=h100"], ["model=shuttle-3-diffusion", "target=v6e-4", "aot=false"],
    ["pretrained_model_name_or_path=black-forest-labs/FLUX.1-dev", "target=cpu"],
    ["pretrained_model_name_or_path=black-forest-labs/FLUX.1-dev/flux1-dev.safetensors", "target=h100"],
    ["pretrained_model_name_or_path=https://huggingface.co/black-forest-labs/FLUX.1-dev", "target=h100"],
])  # fmt: skip
def test_a_plan_without_checkpoint_token_or_network(planned, words):
    text = planned(*words)
    assert (
        text.count(UNSEEN) == 1 and "transformer 11.9 G, text_encoder 123 M, text_encoder_2 4.76 G, vae 49.5 M" in text
    )
    assert all(name in text for name in ("encode  ", "denoise ", "decode  ", "reads     ", "time      "))


@pytest.mark.parametrize("name", ["flex-1-alpha", "flux-lite-8b"])
def test_a_plan_of_a_model_with_fewer_blocks(planned, name):
    text = planned(f"model={name}", "target=h100", "per_device_batch_size=4")
    assert text.count(UNSEEN) == 1
    assert "transformer 8.16 G, text_encoder 123 M, text_encoder_2 4.76 G, vae 49.5 M" in text


def test_the_weights_of_a_known_model_are_never_fetched_for_a_plan(planned, cache, monkeypatch):
    """Not even where they could be."""
    fetch = lambda repo, **_: pytest.fail(repo) if "FLUX" in repo else cache(repo)  # noqa: E731
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert UNSEEN in planned("model=flux-schnell", "target=h100")


def test_a_run_still_needs_the_checkpoint(cli, tmp_path):
    code, text = cli("model=flux-dev", "prompt=x", f"output_dir={tmp_path / 'out'}")
    assert code == 2 and "Hugging Face cannot be reached" in text and not (tmp_path / "out").exists()


def test_what_is_not_known_stays_an_error(planned, golden):
    arrays = ["lora_config.weight_name=[null]", "lora_config.adapter_name=[a]", "lora_config.scale=[1]",
              "lora_config.from_pt=[true]"]  # fmt: skip
    for word, said in (
        ("pretrained_model_name_or_path=/models/FLUX.1-dev", "'/models/FLUX.1-dev' is not there"),
        ("pretrained_model_name_or_path=./black-forest-labs/FLUX.1-dev", "is not there"),
        ("pretrained_model_name_or_path=black-forest-labs/FLUX.1-dev/", "is not there"),
        ("pretrained_model_name_or_path=black-forest-labs/FLUX.1-deb", "Hugging Face cannot be reached"),
        ("pretrained_model_name_or_path=black-forest-labs/FLUX.1-dev/ae.safetensors", "cannot be reached"),
        ("t5xxl_model_name_or_path=/models/t5.safetensors", "model.t5xxl_model_name_or_path: '/models/t5.safetensors'"),
        ("vae_model_name_or_path=someone/vae", "model.vae_model_name_or_path: 'someone/vae'"),
        (f"t5xxl_model_name_or_path={golden / 'dev'}", "joint_attention_dim is 4096, expected 32 (T5's d_model)"),
        ("lora_config.lora_model_name_or_path=[/a.safetensors]", "is not there"),
    ):
        assert said in planned("model=flux-dev", "target=h100", word, *arrays[: 4 * word.startswith("lora")], code=2)


# ---- a small checkpoint as if it were published


@pytest.fixture
def small(golden, monkeypatch):
    """The golden dev checkpoint is published as ``bfl/small``, and known by its configurations."""
    read = {part: json.loads((golden / "dev" / part / "config.json").read_text()) for part in Flux1.components}
    scheduler = json.loads((golden / "dev/scheduler/scheduler_config.json").read_text())
    known = {
        "repository": "bfl/small",
        "file": "small.safetensors",
        "pipeline": "FluxPipeline",
        "dtype": "float32",
        "components": read,
    }
    known["scheduler"] = scheduler
    monkeypatch.setattr(published, "published", lambda: {"bfl/small": known})
    return "sampler=dev", "resolution=64", "max_sequence_length=24", "aot=false"


def download(cache, golden, without=()):
    """As ``huggingface_hub`` keeps it."""
    home = cache.folder / "models--bfl--small"
    shutil.copytree(golden / "dev", home / "snapshots" / COMMIT, ignore=shutil.ignore_patterns(*without))
    (home / "refs").mkdir()
    (home / "refs/main").write_text(COMMIT)


def test_a_component_of_another_known_repository(planned, golden, cache, small):
    words = "pretrained_model_name_or_path=bfl/small", "t5xxl_model_name_or_path=bfl/small", *small, "target=h100"
    assert UNSEEN in planned(*words)
    download(cache, golden, without=("vae",))
    found = published.open_or_known(model("bfl/small", t5="bfl/small", clip=str(golden / "dev")))
    assert found.unseen == f"bfl/small{UNSEEN}" and found.tokenizers["tokenizer"] == str(golden / "dev/tokenizer")
    assert [isinstance(part.source, published.Named) for part in found.components.values()] == [
        True,
        False,
        False,
        True,
    ]


@pytest.mark.parametrize("mesh", [(1, 1), (1, 4), (4, 1)])
def test_sizes_are_those_of_the_headers(small, golden, mesh):
    real, known = open_checkpoint(model(golden / "dev")), published.open_or_known(model("bfl/small"))
    for part in Flux1.components:
        plans = real.components[part].plan(), known.components[part].plan()
        assert plans[0].shapes == plans[1].shapes and plans[0].nbytes == plans[1].nbytes
        read = {load.to_read(plan, make_mesh(mesh), {}) for plan in plans}
        held = {load.held(plan, make_mesh(mesh), np.float32) for plan in plans}
        assert len(read) == len(held) == 1, part


@pytest.mark.parametrize("words", [["target=v6e-4", "sharding=fsdp"], ["target=2xh100-2", "sharding=ddp"],
                                   ["target=h100", "stream_blocks=true"]])  # fmt: skip
def test_a_plan_by_sizes_says_what_the_checkpoints_own_says(planned, small, golden, words):
    def lines(name):
        text = planned(f"pretrained_model_name_or_path={name}", *small, *words).replace(str(name), "…")
        return [line for line in text.splitlines() if UNSEEN not in line and " tokens: " not in line]

    assert lines("bfl/small") == lines(golden / "dev")


def test_a_download_is_looked_at_once_it_is_whole(planned, small, golden, cache):
    words = ["pretrained_model_name_or_path=bfl/small", *small, "target=h100", f"prompt={'word ' * 30}"]
    download(cache, golden, without=("vae",))
    half = planned(*words)
    assert UNSEEN in half and "24 tokens: 1 rows are cut: prompt= has 122" in half  # its tokenizers are there
    shutil.rmtree(cache.folder)
    download(cache, golden)
    assert UNSEEN not in planned(*words)


def test_programs_are_compiled_ahead_of_time_without_the_checkpoint(planned, small):
    text = planned("pretrained_model_name_or_path=bfl/small", *small[:3], "resolution=16", "target=cpu", "aot=true")
    assert UNSEEN in text and "compiled  denoise" in text


def test_what_is_done_is_found_without_the_checkpoint(cli, planned, small, golden, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "num_inference_steps": 1}\n')
    words = [f"manifest={rows}", "prompt=null", *small[:3]]
    assert cli(*words, f"output_dir={tmp_path / 'out'}", f"pretrained_model_name_or_path={golden / 'dev'}")[0] == 0
    rows.write_text(rows.read_text() * 2)
    text = planned("pretrained_model_name_or_path=bfl/small", *words, "target=cpu")
    assert "done      1 of them have their image" in text and "another configuration" not in text
    assert "done  " not in planned("pretrained_model_name_or_path=bfl/small", *words, "target=v6e-1")  # another dtype


# ---- what else a plan reads


def test_adapters_on_this_machine_are_read(planned, tmp_path):
    path, maker = tmp_path / "a.safetensors", files.Maker(0, ranks=(4,), dtype=np.float16)
    files.save(path, maker.lora({"lora_unet_double_blocks_0_img_attn_proj": (3072, 3072)}))
    text = planned("model=flux-dev", "target=h100", *files.arrays({"a": path}))
    assert UNSEEN in text and "lora      a × 1: LoRA as kohya names it, 24,576 parameters" in text


def test_prompts_that_may_be_cut_are_counted_without_tokenizers(planned, tmp_path):
    rows = tmp_path / "rows.jsonl"
    texts = ["short", "word " * 100, "a long word of letters " * 4, "ü", "word " * 600]
    rows.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    text = planned("model=flux-dev", "target=h100", f"manifest={rows}", "prompt=null")
    clip, t5 = (next(line for line in text.splitlines() if f"{name} reads" in line) for name in ("CLIP", "T5"))
    assert "CLIP reads 77 tokens: 2 rows are cut: rows.jsonl:2 has 100 words, rows.jsonl:5 has 600 words; " in clip
    assert clip.endswith("whether 2 more rows are cut cannot be told, as its tokenizer is not here")
    assert "T5 reads 512 tokens: 1 rows are cut: rows.jsonl:5 has 600 words; whether 1 more" in t5


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2"])
def test_what_words_alone_tell_is_so(part):
    """Held against tokenizers that are here."""
    tokenizer, absent = Tokenizer(str(EMBEDDED / "flux-mini" / part)), Absent()
    texts = ["a " * n + tail for n in range(0, 20) for tail in ("", "fox", "überfuchs", "x" * 12, "\n.\t,")]
    for limit in (4, 9, 16):
        longer, doubtful = absent.longer(texts, limit), absent.doubtful(texts, limit)
        truly = tokenizer.longer(texts, limit)
        assert longer <= truly <= longer | doubtful and longer and set(texts) - longer - doubtful
