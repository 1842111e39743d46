"""Whether a checkpoint's files are those that were published: SHA-256 of every byte."""

from __future__ import annotations

import hashlib
import os
import re
from concurrent.futures import ThreadPoolExecutor

from fluxbatch.types import UserError
from fluxbatch.weights.source import Source

BLOCK = 16 << 20


def verify(files: list[tuple[Source, str, int]]) -> None:
    """Reads each (source, file, size) whole; UserError for every file that differs from its known
    digest, or has none."""
    with ThreadPoolExecutor(4) as pool:
        problems = [problem for problem in pool.map(lambda file: _problem(*file), files) if problem]
    if problems:
        raise UserError(*problems)


def _problem(source: Source, file: str, size: int) -> str | None:
    expected = known(source, file)
    if expected is None:
        wanted = f"a file of the Hugging Face cache, or {file}.sha256 beside it"
        return f"{source.path(file)}: no digest to verify it with: expected {wanted}"
    digest = hashlib.sha256()
    for start in range(0, size, BLOCK):
        digest.update(source.read(file, start, min(start + BLOCK, size)))
    if digest.hexdigest() != expected:
        return f"{source.path(file)}: SHA-256 is {digest.hexdigest()}, expected {expected}: the file is damaged"
    return None


def known(source: Source, file: str) -> str | None:
    """The SHA-256 a file must have: what ``sha256sum`` wrote beside it, or the name of its blob in the
    Hugging Face cache (large files are stored under their digest)."""
    if source.exists(f"{file}.sha256"):
        word = source.read(f"{file}.sha256").decode("ascii", "replace").split()[:1]
    else:
        word = [os.path.basename(os.path.realpath(source.path(file)))] if source.local else []
    return word[0].lower() if word and re.fullmatch(r"[0-9a-fA-F]{64}", word[0]) else None
