"""Every key with its default and what it does, as the comments in ``conf/`` and of the commands' own schemas say it."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from pathlib import Path

from omegaconf import MISSING

from fluxbatch.config import overrides
from fluxbatch.config import schema as config
from fluxbatch.config.schema import Job

# A wheel carries conf/ inside the package, a checkout beside it.
CONF = next(d for d in (Path(__file__).parents[1] / "conf", Path(__file__).parents[2] / "conf") if d.is_dir())

COMMANDS = ("plan", "verify", "replay", "convert", "status")  # those with keys of their own
KEY = re.compile(r"( *)([a-z]\w*):(?: +([^#]+?))?(?: +# (.*))?")


def page(words: Sequence[str] = ()) -> Iterator[str]:
    """The lines of the reference: all keys, or those in whose name or text one of the words is."""
    for title, entries in _parts():
        lines = [f"  {key:38} {text}".rstrip() for key, text in entries]
        if found := [line for line in lines if not words or any(word.lower() in line.lower() for word in words)]:
            yield from (title, *found, "")


def markdown() -> Iterator[str]:
    """All of it as lines of a Markdown page."""
    yield from ("# Every key", "")
    yield "Written by `python -m fluxbatch.keys --markdown` from the comments in [conf/](../../conf); do not edit."
    yield ""
    yield "A key goes by its full name or by its last part: `sampler.resolution=512` or `resolution=512`."
    yield "A group's choice sets several keys at once; what the command line says of a key wins."
    yield "`python -m fluxbatch.keys cache` prints those about caches."
    yield "`python -m fluxbatch.run --cfg job …` prints what a command line comes to."
    for title, entries in _parts():
        yield from ("", f"## {title}", "")
        for key, text in entries:
            line = f"- `{key}`" + (": " + text.replace("<", r"\<") if text else "")
            yield from textwrap.wrap(line, 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _parts() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """A title, and under it key=default → what it does."""
    yield "Keys", _keys(CONF / "config.yaml")
    for folder in sorted(path for path in CONF.iterdir() if path.is_dir()):
        files = sorted(folder.glob("*.yaml"))
        choices = [(f"{folder.name}={path.stem}", _about(path)) for path in files]
        yield f"Group {folder.name}: files that set several keys", choices
        if folder.name in Job.__dataclass_fields__ and folder.name != "lora":  # whose keys are the adapters' names
            base = max(files, key=lambda path: len(_keys(path)))  # the others only say what differs
            keys = [(f"{folder.name}.{key}", text) for key, text in _keys(base)]
            yield f"Keys of {folder.name}, as {folder.name}={base.stem} has them", keys
    for command in COMMANDS:
        module = importlib.import_module(f"fluxbatch.{command}")
        [schema] = (
            kind
            for kind in vars(module).values()
            if isinstance(kind, type) and issubclass(kind, Job) and kind.__module__ == module.__name__
        )
        yield f"Keys of fluxbatch.{command}, besides all others", own(schema)


def _keys(path: Path) -> list[tuple[str, str]]:
    """key=default → comment, of the file's keys."""
    found, parent = [], ""
    for line in path.read_text("utf-8").partition("\nhydra:")[0].splitlines():
        if (match := KEY.fullmatch(line)) and match[2] != "defaults":
            indent, key, default, comment = match.groups()
            if default is None and comment is None:
                parent = f"{key}."
                continue
            parent = parent if indent else ""
            found.append((f"{parent}{key}={default or '[…]'}", comment or ""))
    return found


def _about(path: Path) -> str:
    """The comment that a file begins with."""
    text = path.read_text("utf-8").splitlines()
    count = next(i for i, line in enumerate([*text, ""]) if not line.startswith("#"))
    return " ".join(line[1:].strip() for line in text[:count] if not line.startswith("# @"))


def own(schema: type[Job]) -> list[tuple[str, str]]:
    """key=default → comment, of the keys that a command has for itself."""
    found = []
    for field in (field for field in dataclasses.fields(schema) if field.name not in Job.__dataclass_fields__):
        default = field.default.name if isinstance(field.default, Enum) else config.shown(field.default)
        word = "…" if default == MISSING else default.lower() if isinstance(field.default, bool) else default
        comment = re.search(rf"^    {field.name}: .*?  # (.*)$", inspect.getsource(schema), re.MULTILINE)
        about = comment[1] if comment else overrides.expected(*overrides.kind_of(schema, field.name))
        found.append((f"{field.name}={word}", about))
    return found


def header(about: str, task: Callable[..., int], schema: type[Job]) -> str:
    """How --help begins: how the command is called, and the keys that it has for itself."""
    module = sys.modules[getattr(task, "func", task).__module__].__spec__
    command = f"-m {module.name}" if module else sys.argv[0]  # else a script's
    lines = [about, "", f"Usage: python {command} [option] [key=value …] [group=name …]"]
    if keys := own(schema):
        lines += ["", "Keys of its own, besides all of fluxbatch.run's:", ""]
        lines += [f"  {key:25} {text}" for key, text in keys]
    return "\n".join(lines)
