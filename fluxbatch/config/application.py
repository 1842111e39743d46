"""The command line: from what people type to a `Job`, by way of Hydra.

A command of the package is `main(task)`, where the task takes a checked `Job` and returns its
exit code. A mistake is one line, and nothing here imports JAX, so that help is quick.
"""

from __future__ import annotations

import argparse
import atexit
import functools
import gc
import os
import re
import shutil
import sys
import tempfile
import traceback
import typing
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

from hydra import version as hydra_version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from fluxbatch import __version__
from fluxbatch.config import checks, composition, overrides, reference
from fluxbatch.config import schema as config
from fluxbatch.config.reference import CONF
from fluxbatch.config.schema import Job
from fluxbatch.config.streams import whoever_reads
from fluxbatch.types import Exit, UserError, at_home

Task = Callable[[Any], int]  # a Job (or the schema given to `main`) → exit code

RANKS = ("JAX_PROCESS_ID", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")  # a process's number in its replica


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
    # what feeds the device waits this long, and not 5 ms, for a thread that traces or writes
    sys.setswitchinterval(0.001)
    # by default a tenth of the start goes into looking through imported modules for cycles
    gc.set_threshold(100_000, 50, 50)
    with whoever_reads():
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
    parser.error = _usage  # type: ignore[method-assign]  # Hydra makes the parser
    next(a for a in parser._actions if isinstance(a, argparse._VersionAction)).version = f"fluxbatch {__version__}"
    args = parser.parse_intermixed_args(argv)
    if args.experimental_rerun or args.config_path:
        raise UserError("--experimental-rerun, --config-path: not supported; --config-dir DIR adds a directory")
    if args.config_dir and not Path(args.config_dir).is_dir():
        raise UserError(f"--config-dir {args.config_dir}: expected a directory")
    own = Path(args.config_dir).absolute() if args.config_dir else None
    hydra_version.setbase("1.3")
    ConfigStore.instance().store("schema", schema)
    name = args.config_name or "config"
    hydra = composition.open_hydra(CONF, own)
    try:
        groups = composition.Groups(hydra, name, args.overrides)
        if not (args.help or args.hydra_help or args.cfg or args.info or args.multirun or args.shell_completion):
            args.multirun = composition.asks_for_sweep(hydra, name, args.overrides, groups)
        fixed: frozenset[str] = frozenset()
        if not args.shell_completion:
            args.overrides, fixed = overrides.read(args.overrides, schema, groups, args.multirun)
        if args.help:
            if about:
                args.overrides.append(f"hydra.help.header={overrides.quote(reference.header(about, task, schema))}")
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
            return _sweep(hydra, name, args.overrides, fixed, groups, _HydraTask(task, schema, rows), about is not None)
        else:
            return hydra.run(name, _HydraTask(task, schema, rows), [*args.overrides, "hydra.mode=RUN"]).return_value
        return 0
    except UnicodeDecodeError as error:  # which does not say of which file
        paths = sorted(path for root in (CONF, own) if root for path in root.rglob("*.yaml"))
        found = filter(None, map(_not_utf8, paths))
        raise UserError(*([*found] or [f"a file of the configuration is not UTF-8: {error}"])) from error
    finally:
        GlobalHydra.instance().clear()


def _sweep(
    hydra: Hydra, name: str, words: list[str], fixed: frozenset[str], groups: composition.Groups, job: _HydraTask,
    traceless: bool,
) -> int:  # fmt: skip
    """The worst exit code of the sweep's jobs. ``traceless``: whether the sweep itself is to leave nothing behind."""
    words = [*words, "hydra.mode=MULTIRUN"]
    try:
        read = functools.partial(overrides.read, schema=job.schema, groups=groups, multirun=True)
        params, still = composition.sweeper_params(hydra, name, words, read)
    except UserError as error:
        raise UserError(*(f"hydra.sweeper.params: {line}" for line in error.lines)) from error
    swept = {word.partition("=")[0].lstrip("+~") for word in words[:-1]} - fixed
    job.fixed = fixed | (still - swept)
    # Named by its content, not by the clock: the same sweep finds its finished work again.
    naming = [o for o in [*params, *words[:-1]] if not o.startswith(("debug=", "overwrite="))]
    naming = [config.whereabouts(o[9:].strip("'\"")) if o.startswith("manifest=") else o for o in naming]
    label = config.digest(naming)
    words.insert(0, f"hydra.job.name=sweep-{label}")
    if traceless:
        words.append(f"hydra.sweep.dir={overrides.quote(_scratch())}")
    codes: list[int] = []
    try:
        composition.sweep(hydra, name, job, words, params, codes)
    except Exception as error:
        if not codes:
            raise
        codes.append(_report(error, job.schema, debug=bool({"debug=true", "debug=True"} & {*words})))
    if not codes:
        raise UserError("the sweep has no jobs: expected values that its sweeper can propose")
    return max(codes, key=_severity)


def _not_utf8(path: Path) -> str | None:
    try:
        path.read_text("utf-8")
    except UnicodeDecodeError as error:
        return (
            f"{path}: not UTF-8: byte 0x{error.object[error.start]:02x} at {error.start + 1}; expected a file saved "
            "as UTF-8"
        )
    return None


class _HydraTask:
    """What Hydra calls with each composed config; plain enough for a launcher to send elsewhere."""

    def __init__(self, task: Task, schema: type[Job], rows: bool, fixed: frozenset[str] = frozenset()):
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
            if isinstance(path := getattr(job, key), list):
                setattr(job, key, [at_home(key, each) if isinstance(each, str) else each for each in path])
            elif isinstance(path, str):
                setattr(job, key, at_home(key, path))
        hydra = HydraConfig.get()
        if hydra.mode == RunMode.MULTIRUN:
            job.sweep = _swept(cfg, hydra.overrides.task, self.fixed)
            job.run_name = f"{job.run_name or hydra.job.name}/{_place(job.sweep)}"
        checks.check(job, self.rows)
        if job.run_name is None and (job.manifest or job.prompt):
            job.run_name = config.default_run_name(job)
        return job


def _swept(cfg: DictConfig, words: Sequence[str], fixed: frozenset[str]) -> dict[str, Any]:
    """Full key (or group) → plain value, of what this job of a multirun has for itself."""
    swept = {}
    for override in OverridesParser.create().parse_overrides(list(words)):
        if (key := overrides.full_key(override)) not in fixed:
            value = OmegaConf.select(cfg, override.key_or_group)
            # a group's choice (None: its files are about the whole job), or a list as it was given
            if isinstance(value, DictConfig | ListConfig | None):
                value = override.value()
            swept[key] = value.name if isinstance(value, Enum) else value
    return swept


def _place(swept: dict[str, Any]) -> str:
    """A job's directory within its sweep: its values and not its number, which others get when a sweep is extended."""

    def last_part(key: str) -> str:  # of experiment/final@package: final
        return re.split("[./]", key.partition("@")[0])[-1]

    lasts = [last_part(key) for key in swept]
    parts = []
    for key, value in sorted(swept.items()):
        last, text = last_part(key), config.shown(value)
        safe = re.sub(r"[^\w.+-]+", "-", text, flags=re.ASCII)[:40]
        exact = text if text == safe else f"{safe}-{config.digest(value)}"
        parts.append(f"{last if lasts.count(last) == 1 else key.replace('/', '.')}={exact}")
    name = ",".join(parts) or "0"
    return name if len(name) <= 150 else f"{name[:150]}-{config.digest(swept)}"


def _sweep_dir(output_dir: str, run_name: str | None, label: str) -> str:
    """Where Hydra keeps a sweep's own files: with the output, unless that is not on this machine. Of several
    processes the first one's are enough."""
    base = os.path.expanduser(output_dir)
    first = all(os.environ.get(name, "0") in ("", "0") for name in RANKS)
    if not first or "://" in base or base.startswith("~") or checks.lost_slash(base):
        return _scratch()
    return str(Path(base, run_name if run_name and checks.stays_inside(run_name, checks.COLONS) else label))


@functools.cache
def _scratch() -> str:
    """A directory that goes with this process."""
    folder = tempfile.mkdtemp(prefix="fluxbatch-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


atexit.register(gc.freeze)  # a third of a second goes into looking through what JAX and Flax leave for cycles
OmegaConf.register_new_resolver("fluxbatch_sweep", _sweep_dir, replace=True)


def _severity(code: int) -> int:
    """Order of exit codes within a sweep: jobs that were cut off want another start, so they win."""
    order = [Exit.OK, Exit.REJECTED_ROWS, Exit.BAD_INPUT, 1, Exit.PREEMPTED, Exit.PEER_LOST]
    return order.index(code if code in order else 1)


def _usage(message: str) -> NoReturn:
    hint = ""
    if "unrecognized" in message:
        named = re.findall(r"(?<!\S)--?([A-Za-z][\w-]*)", message)
        keys = [key.rpartition(".")[2] for key in overrides.leaves(Job)]
        near = next(filter(None, (overrides.meant(name.replace("-", "_"), keys) for name in named)), None)
        hint = f"; keys have no dashes, as in {f'{near}=…' if near else 'seed=3'}"
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
    if "BasicSweeper does not support" in text:
        text = "interval(…) is for sweepers that propose values, as hydra/sweeper=optuna does; else use range(…)"
    if key and key[1].startswith("hydra.sweeper.params.") and "KeyValidationError" in text:
        text += '; a value with commas is quoted within braces: params: {seed: "1,2"}'
    merged = re.search(r"Merge error: \w+ is not a subclass of (\w+)\. value: (.*)", text)
    if key is None and merged:
        kinds = typing.get_type_hints(schema)
        group = next(name for name, kind in kinds.items() if getattr(kind, "__name__", "") == merged[1])
        wanted = overrides.expected(*overrides.kind_of(schema, group))
        choice = f"; a choice of the group belongs into the list of defaults: override {group}: …"
        got = f"{' '.join(text[: merged.start()].split())} got {config.shown(merged[2])}"
        return f"{group}: {got}, expected {wanted}{choice if (CONF / group).is_dir() else ''}"
    if key is None:
        return " ".join(text.split())
    kind = overrides.kind_of(schema, key[1])
    near = overrides.nearest_key(schema, key[1])
    hint = f"; expected {overrides.expected(*kind)}" if kind[0] else f"; did you mean {near}?" if near else ""
    return f"{key[1]}: {' '.join(text.split())}{hint}"
