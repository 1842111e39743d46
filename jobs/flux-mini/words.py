"""Tokenizers of the miniature, trained on its captions: CLIP's kind (byte-level BPE) and T5's (Unigram)."""

from __future__ import annotations

import collections
import json
import math
import pathlib
import re
from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

CLIP_LENGTH = 32
CLIP_VOCABULARY = 1000
START, END = "<|startoftext|>", "<|endoftext|>"


def train(captions: Sequence[str], folder: pathlib.Path) -> None:
    """Writes ``tokenizer/`` and ``tokenizer_2/`` in Hugging Face's format."""
    from transformers import CLIPTokenizer, T5TokenizerFast

    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=CLIP_VOCABULARY - len(alphabet) - 2, end_of_word_suffix="</w>", initial_alphabet=alphabet
        ),
    )
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    pieces = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(m) for m in merges), START, END]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CLIP_LENGTH).save_pretrained(folder / "tokenizer")

    # Unigram by maximum likelihood with whole words as the pieces: few enough here that nothing need
    # be pruned; single letters stand by for words never seen.
    counts = collections.Counter(piece for caption in captions for piece in re.findall(r"\w+|[^\w\s]", caption))
    total = sum(counts.values())
    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    scores += [("▁" + word if word[0].isalnum() else word, math.log(n / total)) for word, n in counts.most_common()]
    known = {piece for piece, _ in scores}
    scores += [(letter, -20.0) for letter in ["▁", *map(chr, range(33, 127))] if letter not in known]
    T5TokenizerFast(vocab=scores, extra_ids=0).save_pretrained(folder / "tokenizer_2")
