"""Token ids are those of transformers, also where it is not asked."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tokenizers

from fluxbatch.generation.tokenizers import Tokenizer
from fluxbatch.types import UserError

TEXTS = [
    "",
    " ",
    "a red apple",
    "A  Cat,\tleft of\na BOAT!",
    "l'été à la plage — 12°C 🙂",
    "日本語の文章",
    "<|endoftext|> and </s> <pad>",
    "e\u0301 \u00e9",
    "word " * 200,
    "x" * 400,
    "word " * 9,
    "don't stop-me.now " * 5,
    "日本語の長い文" * 4,
    "ü" * 30,
    "x" * 21,
    " lead",
]


@pytest.fixture(params=["flux-mini", "flux-mini-dev", "dev"])
def checkpoint(request, golden, pytestconfig):
    return golden / "dev" if request.param == "dev" else pytestconfig.rootpath / "fluxbatch/checkpoints" / request.param


def test_ids_are_those_of_transformers(checkpoint):
    from transformers import AutoTokenizer

    for name, length in (("tokenizer", 32), ("tokenizer_2", 24), ("tokenizer_2", 512)):
        theirs = AutoTokenizer.from_pretrained(checkpoint / name)(
            TEXTS, padding="max_length", truncation=True, max_length=length, return_tensors="np"
        )
        assert np.array_equal(Tokenizer(str(checkpoint / name))(TEXTS, length), theirs["input_ids"])


def test_prompts_that_are_too_long(checkpoint):
    from transformers import AutoTokenizer

    for name in ("tokenizer", "tokenizer_2"):
        lengths = {
            text: len(ids)
            for text, ids in zip(
                TEXTS, AutoTokenizer.from_pretrained(checkpoint / name)(TEXTS)["input_ids"], strict=True
            )
        }
        tokenizer = Tokenizer(str(checkpoint / name))
        tokenizer(TEXTS, 8)  # what it truncates and pads to must not matter
        assert tokenizer.count(TEXTS) == list(lengths.values())
        for limit in (*range(8, 40), 77, 150):
            assert (
                tokenizer.longer(TEXTS, limit) == {text for text, length in lengths.items() if length > limit} != set()
            )


def test_prompts_that_are_too_long_where_words_do_not_tell(pytestconfig):
    """Of a tokenizer that knows pairs of words, words by themselves would say too much."""
    tokenizer = Tokenizer(str(pytestconfig.rootpath / "fluxbatch/checkpoints/flux-mini/tokenizer"))
    tokenizer._backend.normalizer = tokenizers.normalizers.Replace("red apple", "apple")
    texts = ["red apple " * 10, "a red apple and " * 5, "red red " * 12, "apple " * 12]
    counts = tokenizer.count(texts)
    assert counts[0] == 12 and tokenizer.longer(texts, 16) == {
        text for text, count in zip(texts, counts, strict=True) if count > 16
    } == {*texts[1:3]}


def test_what_the_library_reads_alone_does_not_wait_for_transformers(pytestconfig):
    folder = pytestconfig.rootpath / "fluxbatch/checkpoints/flux-mini/tokenizer"
    script = (
        f"import sys; from fluxbatch.generation.tokenizers import Tokenizer; Tokenizer({str(folder)!r})(['a'], 8); "
        f"assert not {{'transformers', 'torch'}} & {{*sys.modules}}"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=pytestconfig.rootpath)


def test_a_folder_of_another_kind_is_left_to_transformers(checkpoint, tmp_path, monkeypatch):
    """Only a file that transformers itself has written so is known to be all there is to a tokenizer."""
    expected = {name: Tokenizer(str(checkpoint / name))(TEXTS, 24) for name in ("tokenizer", "tokenizer_2")}
    monkeypatch.setattr("fluxbatch.generation.tokenizers.Backend", None)  # the short way is not gone
    for name in ("tokenizer", "tokenizer_2"):
        other = shutil.copytree(checkpoint / name, tmp_path / name)
        config = json.loads((other / "tokenizer_config.json").read_text())
        config.pop("backend", None)
        (other / "tokenizer_config.json").write_text(json.dumps(config))
        assert np.array_equal(Tokenizer(str(other))(TEXTS, 24), expected[name])


def test_googles_t5_has_no_tokenizer_json(pytestconfig, tmp_path):
    """``google/t5-v1_1-xxl`` has SentencePiece's file, and a config of 2020 that does not say whose it is."""
    from sentencepiece import sentencepiece_model_pb2 as protos

    folder = pytestconfig.rootpath / "fluxbatch/checkpoints/flux-mini/tokenizer_2"
    model = protos.ModelProto()
    for piece, score in json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]:
        kind = {"<unk>": "UNKNOWN", "<pad>": "CONTROL", "</s>": "CONTROL"}.get(piece, "NORMAL")
        model.pieces.add(piece=piece, score=score, type=getattr(protos.ModelProto.SentencePiece, kind))
    model.trainer_spec.model_type, model.trainer_spec.unk_id = protos.TrainerSpec.UNIGRAM, 2
    (tmp_path / "spiece.model").write_bytes(model.SerializeToString())
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    extra = {"extra_ids": 100, "additional_special_tokens": [f"<extra_id_{i}>" for i in range(100)]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(special | extra))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    assert np.array_equal(Tokenizer(str(tmp_path))(TEXTS, 24), Tokenizer(str(folder))(TEXTS, 24))
    (tmp_path / "spiece.model").write_bytes(b"x")
    with pytest.raises(UserError, match=f"{tmp_path}: the tokenizer cannot be read: .") as error:
        Tokenizer(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["tokenizer.json", "tokenizer_config.json", "pad_token"])
def test_a_damaged_one_is_named(checkpoint, tmp_path, damage):
    folder = shutil.copytree(checkpoint / "tokenizer", tmp_path / "tokenizer")
    if damage == "pad_token":
        config = json.loads((folder / "tokenizer_config.json").read_text()) | {
            "pad_token": "<nothing>",
            "backend": "tokenizers",
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    else:
        for file in folder.iterdir():
            if file.name == damage or file.suffix == ".txt" or file.name == "vocab.json":
                file.write_text("{")
    with pytest.raises(UserError, match=f"{folder}: the tokenizer cannot be read: "):
        Tokenizer(str(folder))


@pytest.mark.parametrize("length", [25, 1000000000000000019884624838656, 1, 24.0, "24"])
def test_clip_has_a_place_for_each_token(golden, tmp_path, cli, length):
    copy = shutil.copytree(golden / "dev", tmp_path / "dev")
    config = copy / "tokenizer/tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_max_length": length}))
    status, text = cli("prompt=x", f"pretrained_model_name_or_path={copy}", f"output_dir={tmp_path}")
    got = f"{length:,}" if isinstance(length, int) else repr(length)
    assert (
        status == 2
        and f"{copy / 'tokenizer'}: model_max_length is {got}, expected from 2 (start and end) to CLIP's 24 positions"
        in text
    )
