"""Where the model that a user names lies: a directory, a single file, a URL, or a Hugging Face repo."""

from __future__ import annotations

import importlib.resources
import os
import re
from pathlib import Path
from urllib.parse import unquote

from fluxbatch.types import UserError
from fluxbatch.weights.source import broken_link

EMBEDDED = Path(str(importlib.resources.files("fluxbatch"))) / "checkpoints"
SUFFIX = ".safetensors"
SUFFIXES = (SUFFIX, ".sft")
CONVERTED = "fluxbatch.json"  # lists a converted copy, whose weights have no suffix
PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
NO_PICKLES = "pickled files are not read, they can run code"
# Redirected elsewhere, and often to be seen with a token only: fetched as what it is
PAGE = re.compile(
    r"https://huggingface\.co/(?P<repo>[^/?#]+/[^/?#]+)(/(resolve|blob|tree)/(?P<revision>[^/?#]+)(?P<file>/[^?#]+?)?)?/?([?]download=true)?"
)
GGUF = ".gguf"
INSTEAD = (
    "expected bfloat16, float16, float32 or fp8 weights (ComfyUI's, with scales or without) in a .safetensors file: "
    "use the one that it was made from, or its fp8 copy; stream_blocks=true where memory is short"
)
SMALL = ("*.json", "*merges.txt", "*spiece.model", "*.jinja")  # configs and tokenizers


def find(
    name: str, key: str, revision: str | None = None, patterns: tuple[str, ...] = (), beside: tuple[str, ...] = ()
) -> tuple[str, str | None]:
    """A directory, ``.safetensors`` file or URL of either for an embedded name, a path, a URL, a Hugging
    Face repo id, ``owner/repo/file.safetensors`` or its page there; and the snapshot's commit if there is one.

    ``patterns``: the files to fetch of a repository, ``beside``: those to fetch with a named file of it (``*`` matches
    ``/`` too). UserError says what was looked for.
    """
    name = name.removeprefix("file://")
    path = os.path.expanduser(name)
    if page := PAGE.fullmatch(name):
        name, path = unquote(page["repo"] + (page["file"] or "")), ""
        revision = unquote(page["revision"]) if page["revision"] else revision
    if name.lower().endswith(PICKLED) and not os.path.isdir(path):
        raise UserError(f"{key}: {name!r}: expected a {SUFFIX} file: {NO_PICKLES}")
    if name.lower().endswith(GGUF) and not os.path.isdir(path):
        raise UserError(f"{key}: {name!r}: a GGUF file, a quantization that is not read: {INSTEAD}")
    if "://" in name:
        if not re.fullmatch(r"(gs|s3|https?)://[^/]+(/.*)?", name):
            raise UserError(f"{key}: {name!r}: expected gs://bucket/prefix, s3://bucket/prefix or http(s)://host/path")
        if name.startswith("http") and re.search("[?#]", name):
            wanted = "an address without '?' and '#', of a public file or directory: http(s)://host/path"
            raise UserError(f"{key}: {name!r}: expected {wanted}")
        return name.rstrip("/"), None
    if os.path.isdir(path):
        return path, None
    if os.path.isfile(path):
        if not path.endswith(SUFFIXES):
            raise UserError(f"{key}: {name!r}: expected a {SUFFIX} file or a directory")
        return path, None
    # pathlib's own raises where a name is too long
    if "/" not in name and os.path.isfile(EMBEDDED / name / "model_index.json"):
        return str(EMBEDDED / name), None
    owner, _, rest = name.partition("/")
    repo, _, file = rest.partition("/")
    is_path = name.startswith((".", "/", "~")) or name.endswith("/")
    if not repo or is_path or (file and not file.endswith(SUFFIXES)) or repo.endswith(SUFFIXES):
        if path and (reason := broken_link(path)):
            raise UserError(f"{key}: {reason}")
        raise UserError(f"{key}: {name!r} is not there: expected a directory, a {SUFFIX} file, "
                        "gs:// or s3://bucket/prefix, http(s)://… or a Hugging Face repo id")  # fmt: skip
    folder = snapshot(f"{owner}/{repo}", key, revision, (file, *beside) if file else patterns)
    if file:
        return os.path.join(folder, file), os.path.basename(folder)
    if not _has_any(folder):  # but perhaps diffusers' and transformers' variants, as model.fp16.safetensors
        variants = [pattern.replace(SUFFIX, f".*{SUFFIX}") for pattern in patterns if pattern.endswith(SUFFIX)]
        folder = snapshot(f"{owner}/{repo}", key, revision, (*patterns, *variants))
    if not _has_any(folder):
        listed = _listed(f"{owner}/{repo}", revision)
        if gguf := [held for held in listed if held.lower().endswith(GGUF)]:
            held = ", ".join(gguf[:3])
            raise UserError(f"{key}: {name!r}: has {held}: GGUF is a quantization that is not read: {INSTEAD}")
        named = [f"{owner}/{repo}/{held}" for held in listed if held.endswith(SUFFIXES)]
        wanted = ", ".join(pattern for pattern in patterns if pattern not in SMALL)
        raise UserError(f"{key}: {name!r}: {folder} has none of the repository's weights: expected {wanted}"
                        + (f", or one of its files by name: {', '.join(named[:10])}" if named else ""))  # fmt: skip
    return folder, os.path.basename(folder)


def _has_any(folder: str) -> bool:
    return any(held.endswith(SUFFIXES) or held == CONVERTED for *_, files in os.walk(folder) for held in files)


def _listed(repo: str, revision: str | None) -> list[str]:
    """The files of a repository on Hugging Face, as far as it will say."""
    import huggingface_hub

    try:
        return huggingface_hub.list_repo_files(repo, revision=revision)
    except Exception:  # it is asked for the sake of a message
        return []


def split(path: str) -> tuple[str, str | None]:
    """Directory and file name of a ``.safetensors`` file; the directory itself and None."""
    if not path.endswith(SUFFIXES) or os.path.isdir(path):
        return path, None
    folder, _, file = path.rpartition("/")
    return folder or ("/" if path.startswith("/") else "."), file


def snapshot(repo: str, key: str, revision: str | None, patterns: tuple[str, ...]) -> str:
    """The cached snapshot of a Hugging Face repository (token and cache from the usual environment)."""
    import huggingface_hub
    from huggingface_hub import errors

    at = f" at revision {revision!r}" if revision else ""
    try:
        return huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=list(patterns))
    except errors.GatedRepoError as error:
        raise UserError(
            f"{key}: {repo} is gated: accept its licence at https://huggingface.co/{repo}, "
            "then `hf auth login` or set HF_TOKEN") from error  # fmt: skip
    except errors.RevisionNotFoundError as error:
        known = f"one of its branches, tags or commits{_revisions(repo)}"
        raise UserError(f"{key}: {repo!r} on Hugging Face has no revision {revision!r}: expected {known}") from error
    except errors.RepositoryNotFoundError as error:
        where = "a directory here nor a repository on Hugging Face that this token may read"
        raise UserError(f"{key}: {repo!r}{at} is neither {where}") from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        what = f"{repo!r}{at} is not a directory here, and Hugging Face cannot be reached"
        raise UserError(f"{key}: {what}: {reason}") from error


def _revisions(repo: str) -> str:
    """A repository's branches and tags as the end of a message, as far as Hugging Face will say."""
    import huggingface_hub

    try:
        refs = huggingface_hub.list_repo_refs(repo)
    except Exception:  # it is asked for the sake of a message
        return ""
    return f" ({', '.join([ref.name for ref in (*refs.branches, *refs.tags)][:10])})"
