"""Where a checkpoint's tokenizers are: beside its weights, or in a public repository."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

from fluxbatch.types import UserError
from fluxbatch.weights.find import snapshot
from fluxbatch.weights.source import Source

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "merges.txt", "spiece.model",
)  # fmt: skip


def find_tokenizer(homes: list[Source], repo: str | None) -> str:
    """A local directory with the tokenizer's files: the first of ``homes`` that has them, else ``repo``."""
    for home in homes:
        present = [file for file in TOKENIZER_FILES if home.exists(file)]
        if {"tokenizer.json", "vocab.json", "spiece.model"} & set(present):
            return home.url if home.local else _copied(home, present)
    where = homes[-1].url
    if repo is None:
        raise UserError(f"{where}: no tokenizer: expected tokenizer.json, vocab.json with merges.txt, or spiece.model")
    try:
        return snapshot(repo, where, None, TOKENIZER_FILES)
    except UserError as error:
        raise UserError(f"{where}: no tokenizer, and {repo} has it, but: {error}") from error


def _copied(source: Source, files: list[str]) -> str:
    folder = tempfile.mkdtemp(prefix="fluxbatch-tokenizer-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name in files:
        with open(os.path.join(folder, name), "wb") as file:
            file.write(source.read(name))
    return folder
