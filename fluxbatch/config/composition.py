"""Hydra's part: which groups there are, who asks for a sweep, and the sweep by any sweeper and launcher."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from hydra._internal.callbacks import Callbacks
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, RunMode, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from fluxbatch.config import overrides
from fluxbatch.types import UserError

DEPTH = 2  # of groups within groups that are looked through for names; one that is named may lie deeper
OURS = {"hydra", "main", "schema"}  # providers of configuration that have no mode of their own


def open_hydra(conf: Path, own: Path | None) -> Hydra:
    """Hydra over our files and, before them, those of a directory of the user's own."""
    search_path = create_config_search_path(f"file://{conf}")
    if own:
        search_path.prepend("command-line", f"file://{own}", SearchPathQuery(provider="schema"))
    return Hydra.create_main_hydra2("fluxbatch", search_path)


class Groups(Mapping[str, Sequence[str]]):
    """Config group → its options, wherever Hydra finds them; a nested group's are also its parent's, by their path.

    Looks only into what it is asked for: the user's directory may hold anything.
    """

    def __init__(self, hydra: Hydra, config_name: str, words: Sequence[str]):
        self._open: Callable[[], Any] = lambda: cast(Any, hydra.config_loader)._parse_overrides_and_create_caching_repo(
            config_name, [word for word in words if word.startswith("hydra.searchpath=")]
        )[1]

    @functools.cached_property
    def _files(self) -> Any:
        return self._open()

    def __getitem__(self, group: str) -> Sequence[str]:
        if not group or group.startswith(("hydra/", "/")) or group == "hydra" or not self._files.group_exists(group):
            raise KeyError(group)
        if found := [*self._options(group, DEPTH)]:
            return found
        raise KeyError(group)  # a folder of something else

    def _options(self, group: str, depth: int) -> Iterator[str]:
        yield from self._files.get_group_options(group, ObjectType.CONFIG)
        for inner in self._inner(group) if depth else ():
            yield from (f"{inner}/{option}" for option in self._options(f"{group}/{inner}", depth - 1))

    def _inner(self, group: str) -> list[str]:
        names = self._files.get_group_options(group, ObjectType.GROUP)
        return [name for name in names if not name.startswith((".", "__")) and (group or name != "hydra")]

    def __iter__(self) -> Iterator[str]:
        def walk(group: str, depth: int) -> Iterator[str]:
            for name in self._inner(group):
                inner = f"{group}/{name}".lstrip("/")
                if inner in self:
                    yield inner
                    if depth:
                        yield from walk(inner, depth - 1)

        return walk("", DEPTH)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def asks_for_sweep(hydra: Hydra, config_name: str, words: Sequence[str], groups: Groups) -> bool:
    """Whether files or words set hydra.mode=MULTIRUN. False where they cannot be composed, which the run will say."""
    if not any(map(_is_hydra_s, words)) and all(
        path.provider in OURS for path in hydra.config_loader.get_search_path().get_path()
    ):
        return False  # 0.1 s less
    about = [word for word in words if _is_hydra_s(word) or overrides.group_of(word) in groups]
    return hydra.get_mode(config_name, about) == RunMode.MULTIRUN


def _is_hydra_s(word: str) -> bool:
    return word.lstrip("+~").startswith(("hydra.", "hydra/", "hydra="))


def sweep(
    hydra: Hydra, config_name: str, task: TaskFunction, words: Sequence[str], params: Sequence[str], codes: list[int]
) -> None:
    """As Hydra's own multirun, with ``params`` for hydra.sweeper.params.

    Every job's exit code goes to ``codes`` as soon as it is known, since sweepers need not return any.
    """
    cfg = hydra.compose_config(config_name, [*words], RunMode.MULTIRUN, with_log_configuration=True)
    if params:
        with open_dict(cfg.hydra.sweeper):
            cfg.hydra.sweeper.params = dict(param.split("=", 1) for param in params)
    callbacks = Callbacks(cfg)
    callbacks.on_multirun_start(config=cfg, config_name=config_name)
    with _watched(codes):
        sweeper = Plugins.instance().instantiate_sweeper(
            config=cfg,
            hydra_context=HydraContext(config_loader=hydra.config_loader, callbacks=callbacks),
            task_function=task,
        )
        sweeper.sweep(arguments=cast(list[str], OmegaConf.to_container(cfg.hydra.overrides.task, resolve=False)))
    callbacks.on_multirun_end(config=cfg, config_name=config_name)


def sweeper_params(
    hydra: Hydra,
    config_name: str,
    words: Sequence[str],
    read: Callable[[Sequence[str]], tuple[list[str], frozenset[str]]],
) -> tuple[list[str], frozenset[str]]:
    """hydra.sweeper.params through ``read``, which reads a command line: as overrides, and the full keys that hold
    still.

    A sweeper that is not Hydra's own may know values that are no overrides: these stay as they are.
    """
    cfg = hydra.compose_config(config_name, [*words], RunMode.MULTIRUN, with_log_configuration=False)
    params = OmegaConf.select(cfg, "hydra.sweeper.params")
    if not isinstance(params, DictConfig):
        return [], frozenset()
    given = [
        f"{key}={'null' if value is None else value}"
        for key, value in cast(dict[str, Any], OmegaConf.to_container(params, resolve=True)).items()
    ]
    if cfg.hydra.sweeper._target_.endswith(".BasicSweeper"):
        return read(given)
    known: list[str] = []
    fixed: set[str] = set()
    for word in given:
        try:
            [translated], still = read([word])
        except UserError:
            return [], frozenset()
        known.append(translated)
        fixed |= still
    return known, frozenset(fixed)


class _Watched(Launcher):
    """A launcher, and what its jobs have returned."""

    def __init__(self, launcher: Launcher, codes: list[int]):
        self._launcher, self._codes = launcher, codes

    def setup(self, **words: Any) -> None:
        self._launcher.setup(**words)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Any:
        results = self._launcher.launch(job_overrides, initial_job_idx)
        for result in results:
            try:
                self._codes.append(result.return_value)
            except Exception:  # the job's own; what becomes of the sweep is the sweeper's to say
                self._codes.append(1)
        return results

    def __getattr__(self, name: str) -> Any:
        return getattr(self._launcher, name)


@contextlib.contextmanager
def _watched(codes: list[int]) -> Iterator[None]:
    """Within, the launchers that sweepers get are watched: this process sees a job's code nowhere else."""
    instantiate = Plugins.instantiate_launcher
    # of the class, which mypy would not have: launchers send the instance to other processes
    watched = lambda *args, **words: _Watched(instantiate(*args, **words), codes)  # noqa: E731
    Plugins.instantiate_launcher = watched  # type: ignore[method-assign]
    try:
        yield
    finally:
        Plugins.instantiate_launcher = instantiate  # type: ignore[method-assign]
