"""The command line: from what people type to a `Job`, by way of Hydra.

A command of the package is `main(task)`, where the task takes a checked `Job` and returns its
exit code. A mistake is one line, and nothing here imports JAX, so that help is quick.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import dataclasses
import functools
import gc
import inspect
import io
import os
import re
import shutil
import sys
import tempfile
import traceback
import typing
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn, TextIO

from hydra import version as hydra_version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from fluxbatch import __version__, config, overrides
from fluxbatch.config import Job
from fluxbatch.types import Exit, UserError

Task = Callable[[Any], int]  # a Job (or the schema given to `main`) → exit code

RANKS = ("JAX_PROCESS_ID", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")  # a process's number in its replica

# A wheel carries conf/ inside the package, a checkout beside it.
CONF = next(d for d in (Path(__file__).parent / "conf", Path(__file__).parents[1] / "conf") if d.is_dir())


def main(
    task: Task,
    *,
    schema: type[Job] = Job,
    rows: bool = True,
    about: str | None = None,
    argv: Sequence[str] | None = None,
) -> NoReturn:
    """Run ``task`` on the job (with --multirun: on each job) that the command line describes; exit.

    ``schema``: a subclass of `Job` whose further fields are further keys. ``rows``: whether a
    manifest or a prompt must be given. ``about``: the first line of --help, if the task is a command of its own name.
    The exit code is the task's, the worst one of a multirun, or 2 after a line for each mistake.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    sys.setswitchinterval(0.001)  # what feeds the device waits this long, and not 5 ms, for a thread that traces or writes
    gc.set_threshold(100_000, 50, 50)  # by default a tenth of the start goes into looking through imported modules for cycles
    with _whoever_reads():
        try:
            code = _start(task, schema, rows, about, argv)
        except KeyboardInterrupt:
            print("fluxbatch: interrupted", file=sys.stderr)
            code = 130
        except Exception as error:  # the task's own were met in _HydraTask: this is about the configuration
            code = _report(error, schema, debug=bool({"debug=true", "debug=True"} & {*argv}))
    sys.exit(code)


def _start(task: Task, schema: type[Job], rows: bool, about: str | None, argv: list[str]) -> int:
    parser = get_args_parser()
    parser.error = _usage  # type: ignore[method-assign]
    next(a for a in parser._actions if isinstance(a, argparse._VersionAction)).version = f"fluxbatch {__version__}"
    args = parser.parse_intermixed_args(argv)
    if args.experimental_rerun or args.config_path:
        raise UserError("--experimental-rerun, --config-path: not supported; --config-dir DIR adds a directory")
    if args.config_dir and not Path(args.config_dir).is_dir():
        raise UserError(f"--config-dir {args.config_dir}: expected a directory")
    roots = [CONF, *([Path(args.config_dir).absolute()] if args.config_dir else [])]
    groups: dict[str, list[str]] = {}
    for path in sorted(path for root in roots for path in root.glob("*/*.yaml")):
        groups.setdefault(path.parent.name, []).append(path.stem)
    fixed: frozenset[str] = frozenset()
    if not args.shell_completion:
        args.overrides, fixed = overrides.read(args.overrides, schema, groups, args.multirun)
    job = _HydraTask(task, schema, rows, fixed)

    hydra_version.setbase("1.3")
    ConfigStore.instance().store("schema", schema)
    search_path = create_config_search_path(f"file://{CONF}")
    for root in roots[1:]:
        search_path.prepend("command-line", f"file://{root}", SearchPathQuery(provider="schema"))
    hydra = Hydra.create_main_hydra2("fluxbatch", search_path)
    name = args.config_name or "config"
    try:
        if args.help:
            if about:
                args.overrides.append(f"hydra.help.header={overrides.quote(_header(about, task, schema))}")
            hydra.app_help(name, parser, args)
        elif args.hydra_help:
            hydra.hydra_help(name, parser, args)
        elif args.shell_completion:
            hydra.shell_completion(name, args.overrides)
        elif args.cfg:
            hydra.show_cfg(name, args.overrides, args.cfg, args.package, args.resolve)
        elif args.info:
            hydra.show_info(args.info, name, args.overrides)
        elif args.multirun:
            # Named by its content, not by the clock: the same sweep finds its finished work again.
            label = config.digest([o for o in args.overrides if not o.startswith(("debug=", "overwrite="))])
            words = [f"hydra.job.name=sweep-{label}", *args.overrides, "hydra.mode=MULTIRUN"]
            if about:  # the siblings of run leave nothing behind
                words.append(f"hydra.sweep.dir={overrides.quote(_scratch())}")
            batches = hydra.multirun(name, job, words)
            return max((result.return_value for batch in batches for result in batch), key=_severity)
        else:
            return hydra.run(name, job, [*args.overrides, "hydra.mode=RUN"]).return_value
        return 0
    except UnicodeDecodeError as error:  # which does not say of which file
        found = filter(None, map(_not_utf8, sorted(path for root in roots for path in root.rglob("*.yaml"))))
        raise UserError(*([*found] or [f"a file of the configuration is not UTF-8: {error}"])) from error
    finally:
        GlobalHydra.instance().clear()


def _not_utf8(path: Path) -> str | None:
    try:
        path.read_text("utf-8")
    except UnicodeDecodeError as error:
        return f"{path}: not UTF-8: byte 0x{error.object[error.start]:02x} at {error.start + 1}; expected a file saved as UTF-8"
    return None


def _header(about: str, task: Task, schema: type[Job]) -> str:
    """How --help begins: how the command is called, and the keys that it has for itself, with the comments they have there."""
    module = sys.modules[task.__module__].__spec__
    command = f"-m {module.name}" if module else sys.argv[0]  # else a script's
    lines = [about, "", f"Usage: python {command} [option] [key=value …] [group=name …]"]
    own = [field for field in dataclasses.fields(schema) if field.name not in Job.__dataclass_fields__]
    if own:
        lines += ["", "Keys of its own, besides all of fluxbatch.run's:", ""]
    for field in own:
        default = field.default.name if isinstance(field.default, Enum) else config.shown(field.default)
        word = f"{field.name}={'…' if default == MISSING else default.lower() if isinstance(field.default, bool) else default}"
        comment = re.search(rf"^    {field.name}: .*?  # (.*)$", inspect.getsource(schema), re.MULTILINE)
        lines.append(f"  {word:25} {comment[1] if comment else overrides.expected(*overrides.kind_of(schema, field.name))}")
    return "\n".join(lines)


class _HydraTask:
    """What Hydra calls with each composed config; plain enough for a launcher to send elsewhere."""

    def __init__(self, task: Task, schema: type[Job], rows: bool, fixed: frozenset[str]):
        self.task, self.schema, self.rows, self.fixed = task, schema, rows, fixed
        self.stopped: int | None = None  # the code of a job that was cut off, and the sweep with it

    def __call__(self, cfg: DictConfig) -> int:
        if self.stopped is not None:
            return self.stopped
        try:
            job = self._job(cfg)
            if job.sweep:
                varied = (config.shown(f"{key}={value}") for key, value in job.sweep.items())
                print("fluxbatch:", job.run_name, *varied, file=sys.stderr)
            code = int(self.task(job))
        except (UserError, HydraException, OmegaConfBaseException) as error:
            return _report(error, self.schema, debug=bool(cfg.get("debug")))
        except Exception:  # not the user's mistake: the whole story, without Hydra's part in it
            traceback.print_exc()
            return 1
        if code in (Exit.PREEMPTED, Exit.PEER_LOST):
            self.stopped = code
        return code

    def _job(self, cfg: DictConfig) -> Job:
        """The checked job, paths of the user's home expanded and the run named."""
        job = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(self.schema), cfg))
        assert isinstance(job, Job)
        if problems := [*overrides.misplaced(job, self.schema)]:
            raise UserError(*problems)
        for key in ("output_dir", "manifest", "jax_cache_dir", "text_cache_dir"):
            if (path := getattr(job, key)) is not None:
                setattr(job, key, os.path.expanduser(path))
        hydra = HydraConfig.get()
        if hydra.mode == RunMode.MULTIRUN:
            job.sweep = _swept(cfg, hydra.overrides.task, self.fixed)
            job.run_name = f"{job.run_name or hydra.job.name}/{_place(job.sweep)}"
        config.check(job, self.rows)
        if job.run_name is None and (job.manifest or job.prompt):
            job.run_name = config.default_run_name(job)
        return job


def _swept(cfg: DictConfig, words: Sequence[str], fixed: frozenset[str]) -> dict[str, Any]:
    """Full key (or group) → plain value, of what this job of a multirun has for itself."""
    swept = {}
    for override in OverridesParser.create().parse_overrides(list(words)):
        if override.key_or_group not in fixed:
            value = OmegaConf.select(cfg, override.key_or_group)
            if isinstance(value, DictConfig | ListConfig | None):  # None: of a group whose files are about the whole job, as experiment
                value = override.value()  # a group's choice, or a list as it was given
            swept[override.key_or_group] = value.name if isinstance(value, Enum) else value
    return swept


def _place(swept: dict[str, Any]) -> str:
    """A job's directory within its sweep: its values and not its number, which others get when a sweep is extended."""
    lasts = [key.rpartition(".")[2] for key in swept]
    parts = []
    for key, value in sorted(swept.items()):
        last, text = key.rpartition(".")[2], config.shown(value)
        safe = re.sub(r"[^\w.+-]+", "-", text, flags=re.ASCII)[:40]
        exact = text if text == safe else f"{safe}-{config.digest(value)}"
        parts.append(f"{last if lasts.count(last) == 1 else key}={exact}")
    name = ",".join(parts) or "0"
    return name if len(name) <= 150 else f"{name[:150]}-{config.digest(swept)}"


def _sweep_dir(output_dir: str, run_name: str | None, label: str) -> str:
    """Where Hydra keeps a sweep's own files: with the output, unless that is not on this machine. Of several
    processes the first one's are enough."""
    if any(os.environ.get(name, "0") not in ("", "0") for name in RANKS):
        return _scratch()
    base = Path(tempfile.gettempdir(), "fluxbatch") if "://" in output_dir or config.lost_slash(output_dir) else Path(output_dir).expanduser()
    return str(base / (run_name if run_name and config.stays_inside(run_name, config.COLONS) else label))


@functools.cache
def _scratch() -> str:
    """A directory that goes with this process."""
    folder = tempfile.mkdtemp(prefix="fluxbatch-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


atexit.register(gc.freeze)  # a third of a second goes into looking through what JAX and Flax leave for cycles
OmegaConf.register_new_resolver("fluxbatch_sweep", _sweep_dir, replace=True)


class _Stream:
    """Standard output or error, which may be a pipe that nobody reads any more: what cannot be written is dropped."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._drop()

    def _drop(self) -> None:
        with contextlib.suppress(OSError):  # nor does what is left in the buffer, and what others write, reach anyone
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _whoever_reads() -> Iterator[None]:
    """Within, no print fails: neither for who reads it, nor for a character that the terminal does not know."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    # For those that are closed, in this order: each open takes the least free number, so no picture's file gets one that compilers write to
    if sys.stdin is None:
        os.open(os.devnull, os.O_RDONLY)
    out, err = (_Stream(stream or open(os.devnull, "w", encoding="utf-8")) for stream in (sys.stdout, sys.stderr))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            yield
        finally:
            for stream in (out, err):
                stream.flush()


def _severity(code: int) -> int:
    """Order of exit codes within a sweep: jobs that were cut off want another start, so they win."""
    order = [Exit.OK, Exit.REJECTED_ROWS, Exit.BAD_INPUT, 1, Exit.PREEMPTED, Exit.PEER_LOST]
    return order.index(code if code in order else 1)


def _usage(message: str) -> NoReturn:
    hint = "; keys have no dashes, as in seed=3" if "unrecognized" in message else ""
    raise UserError(message + hint)


def _report(error: BaseException, schema: type[Job], debug: bool) -> int:
    """Print a mistake, a line for each part of it, and return its exit code."""
    if debug or os.environ.get("HYDRA_FULL_ERROR") == "1":
        traceback.print_exception(error)
    for line in error.lines if isinstance(error, UserError) else [_explain(error, schema)]:
        print("fluxbatch: error:", line, file=sys.stderr)
    return error.code if isinstance(error, UserError) else Exit.BAD_INPUT


def _explain(error: BaseException, schema: type[Job]) -> str:
    """Hydra's, OmegaConf's, YAML's and the system's messages in one line."""
    if isinstance(error, MissingConfigException) and error.options:
        group, _, option = (error.missing_cfg_file or "").rpartition("/")
        return overrides.no_option(group, option, error.options)
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else None
    text = f"{error}\n{cause or ''}" if str(error) else type(error).__name__
    key = re.search(r"full_key: (\S+)", text)
    text = re.sub(r"\s*\b(full_key: |reference_type=|object_type=).*", "", text)
    if (key and key[1].startswith("lora.") and "struct" in text) or "override +lora." in text:
        text = "no such adapter is chosen; lora=NAME chooses one, the arrays of lora_config name files"
    if isinstance(error, MissingMandatoryValue):
        text = "a value is missing"
    if key is None and (merged := re.search(r"Merge error: \w+ is not a subclass of (\w+)\. value: (.*)", text)):  # which has no key
        key = next(name for name, kind in typing.get_type_hints(schema).items() if getattr(kind, "__name__", "") == merged[1])
        wanted = overrides.expected(*overrides.kind_of(schema, key))
        choice = f"; a choice of the group belongs into the list of defaults: override {key}: …" if (CONF / key).is_dir() else ""
        return f"{key}: {' '.join(text[: merged.start()].split())} got {config.shown(merged[2])}, expected {wanted}{choice}"
    if key is None:
        return " ".join(text.split())
    kind = overrides.kind_of(schema, key[1])
    near = overrides.nearest(key[1], overrides.leaves(schema))
    hint = f"; expected {overrides.expected(*kind)}" if kind[0] else f"; did you mean {near}?" if near else ""
    return f"{key[1]}: {' '.join(text.split())}{hint}"
