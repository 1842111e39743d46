"""Prompts to token ids."""

from __future__ import annotations

import collections
import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as Backend

from fluxbatch.types import UserError


class Tokenizer:
    """One of them; its ids are those of transformers."""

    here, unit = True, ""

    def __init__(self, folder: str):
        """UserError if ``folder`` has none that can be read."""
        self.folder = folder
        try:
            self._backend, self.max_length, self._padding, self._side = _open(Path(folder))
        except Exception as error:  # transformers and tokenizers raise whatever their parsers raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{folder}: the tokenizer cannot be read: {reason}") from error

    def __call__(self, texts: Sequence[str], length: int) -> np.ndarray:
        """Ids ``[B, length]``, padded and truncated."""
        self._backend.enable_truncation(length, direction=self._side)
        self._backend.enable_padding(length=length, **self._padding)
        found = np.array([found.ids for found in self._backend.encode_batch(list(texts))], np.int32)
        return found.reshape(len(texts), length)

    def count(self, texts: Sequence[str], special: bool = True) -> list[int]:
        """Their tokens; ``special``: with those for start and end."""
        self._backend.no_truncation()
        self._backend.no_padding()
        chunks = (list(texts[i : i + 4096]) for i in range(0, len(texts), 4096))
        return [
            len(found)
            for chunk in chunks
            for found in self._backend.encode_batch_fast(chunk, add_special_tokens=special)
        ]

    def longer(self, texts: Iterable[str], limit: int) -> set[str]:
        """Those of ``texts`` that have more than ``limit`` tokens.

        Both tokenizers go word by word, and words repeat: most texts are told apart by what their words have, in a
        tenth of the time. Others may go another way, which a hundred texts will show.
        """
        # a character of ASCII is a token at most; beside them stand a start, an end and a leading space
        texts = [text for text in dict.fromkeys(texts) if len(text) > limit - 3 or not text.isascii()]
        plain = {text: text.split() for text in texts if text.isascii() and text.isprintable()}
        least, most = self._bounds(plain)
        sample = list(plain)[:: len(plain) // 100 + 1]
        if not all(least[text] <= count <= most[text] for text, count in zip(sample, self.count(sample), strict=True)):
            least, most = {}, {}
        doubtful = [text for text in texts if text not in least or least[text] - 1 <= limit < most[text] + 1]
        found = {text for text, count in zip(doubtful, self.count(doubtful), strict=True) if count > limit}
        return found.union(text for text, count in least.items() if count - 1 > limit)

    def doubtful(self, texts: Iterable[str], limit: int) -> set[str]:
        """None: of all ``longer`` says whether they have more tokens."""
        return set()

    def _bounds(self, texts: Mapping[str, Sequence[str]]) -> tuple[dict[str, int], dict[str, int]]:
        """The least and the most tokens that texts of these words, all of ASCII, can have: the same but for words that
        are there once."""
        seen = collections.Counter(itertools.chain.from_iterable(texts.values()))
        often = [word for word, times in seen.items() if times > 1]
        most = {word: len(word) + 1 for word in seen} | dict(zip(often, self.count(often, special=False), strict=True))
        least = dict.fromkeys(seen, 1) | {word: most[word] for word in often}
        ends = self._backend.num_special_tokens_to_add(is_pair=False)
        low, high = (
            {text: ends + sum(map(of.__getitem__, words)) for text, words in texts.items()} for of in (least, most)
        )
        return low, high


def _open(folder: Path) -> tuple[Backend, int, dict[str, object], str]:
    """A tokenizer, the length it is made for, how it pads, and the side that it truncates."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if config.get("backend") == "tokenizers" and (file := folder / "tokenizer.json").exists():
        # Written by transformers 5, so the file is all there is to it; transformers takes up to three seconds to
        # import.
        backend, pad, length = Backend.from_file(str(file)), config["pad_token"], config["model_max_length"]
        pad, sides = (
            pad if isinstance(pad, str) else pad["content"],
            (config.get("padding_side", "right"), config.get("truncation_side", "right")),
        )
    else:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would say that torch is missing
        from transformers import AutoTokenizer, T5Tokenizer

        # Google's own repositories are older than the names of classes in configs and than tokenizer.json
        nameless = (
            "tokenizer_class" not in config
            and not (folder / "tokenizer.json").exists()
            and (folder / "spiece.model").exists()
        )
        whole = (T5Tokenizer if nameless else AutoTokenizer).from_pretrained(str(folder), local_files_only=True)
        backend, pad, length, sides = (
            whole.backend_tokenizer,
            whole.pad_token,
            whole.model_max_length,
            (whole.padding_side, whole.truncation_side),
        )
    if (number := backend.token_to_id(pad)) is None:
        raise ValueError(f"it has no token {pad!r} to pad with")
    return backend, length, {"pad_id": number, "pad_token": pad, "direction": sides[0]}, sides[1]


class Absent:
    """In the place of a tokenizer that is not here: what words and characters tell without one."""

    folder, here, unit = "", False, " words"
    max_length = None  # nobody knows

    def count(self, texts: Sequence[str]) -> list[int]:
        """Their words, of at least a token each."""
        return [len(text.split()) for text in texts]

    def longer(self, texts: Iterable[str], limit: int) -> set[str]:
        """Those of ``texts`` that certainly have more than ``limit`` tokens: words and an end."""
        return {text for text in texts if text.isascii() and text.isprintable() and len(text.split()) >= limit}

    def doubtful(self, texts: Iterable[str], limit: int) -> set[str]:
        """Those that may have more: of others each character is a token at most, as ``Tokenizer.longer`` has it."""
        texts = {text for text in texts if len(text) > limit - 3 or not text.isascii()}
        return texts - self.longer(texts, limit)
