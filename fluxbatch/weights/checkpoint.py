"""A checkpoint as a set of components, opened from headers and configs alone.

Three layouts, told apart by what is there: diffusers' directory, single files (Black Forest Labs',
ComfyUI's), and the converted copy that ``fluxbatch.convert`` writes.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from fluxbatch.config.schema import Model, shown
from fluxbatch.models.family import Component, Family
from fluxbatch.models.key_tables import NATIVE, Table, shapes_of
from fluxbatch.models.registry import by_pipeline, families
from fluxbatch.types import UserError
from fluxbatch.weights import load, quantized, single_files, zarr
from fluxbatch.weights.digests import verify
from fluxbatch.weights.find import SMALL, SUFFIX, SUFFIXES, find, split
from fluxbatch.weights.headers import held, instead, notes, read_header, read_headers, weights_file, with_scales
from fluxbatch.weights.matching import lacked
from fluxbatch.weights.source import Source, Tensor, sampled
from fluxbatch.weights.tokenizer_files import TOKENIZER_FILES, find_tokenizer

INDEXES = "model_index.json", "modular_model_index.json"  # what diffusers calls a pipeline's own file


@dataclasses.dataclass(frozen=True)
class Opened:
    """A component of a checkpoint, as its config and headers have it."""

    definition: Component
    source: Source
    config: Any
    tensors: Mapping[str, Tensor]
    table: Table
    where: str  # its config.json, or the file whose shapes gave the config
    declared: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # all that its config.json says

    def plan(self, **options: Any) -> load.Plan:
        """Which bytes fill which parameter; UserError lists every disagreement, or names a quantization."""
        make = lambda rngs: self.definition.module(self.config, rngs=rngs, **options)  # noqa: E731
        table, tensors = self.table, dict(self.tensors)
        if options.get("encoder"):
            table = self._with_encoder()
        elif table is NATIVE and self.definition.encoder_namings:
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("encoder.")}
        try:
            return load.plan(make, tensors, table, self.source)
        except UserError as error:
            held = {t.file for t in self.tensors.values() if not isinstance(self.source, zarr.Arrays)}
            noted = (quantized.in_notes(notes(self.source, file), self.source.path(file)) for file in sorted(held))
            if line := quantized.in_config(self.declared, self.where) or next(filter(None, noted), None):
                raise UserError(line) from error
            raise

    def widened(self, config: Any, plan: load.Plan, **options: Any) -> load.Plan:
        """``plan`` for a module with this config, which reads more inputs: their weights are zeros."""
        graph, state = nnx.split(self.definition.module(config, rngs=None, **options), nnx.Param, ...)[:2]
        return dataclasses.replace(plan, graph=graph, state=state)

    @property
    def has_encoder(self) -> bool:
        """Whether there is what encodes pictures."""
        if self.table is NATIVE:
            return bool(self.definition.encoder_namings) and any(name.startswith("encoder.") for name in self.tensors)
        return any(naming.signs("") <= self.tensors.keys() for naming in self.definition.encoder_namings)

    def whole_plan(self) -> load.Plan:
        """Of all of it that rows may need, as a copy has it."""
        return self.plan(encoder=True) if self.has_encoder else self.plan()

    def _with_encoder(self) -> Table:
        """The table of a module that has its encoder beside it."""
        if self.table is NATIVE and self.has_encoder:
            return self.table
        known = (n for n in self.definition.encoder_namings if n.signs("") <= self.tensors.keys())
        if (naming := next(known, None)) is None:
            signs = " or ".join(sorted(sign for n in self.definition.encoder_namings for sign in n.signs("")))
            raise UserError(f"{self.where}: rows have pictures, and there is no encoder for them: expected {signs}")
        rules = (dataclasses.replace(r, target=f"encoder.{r.target}") for r in naming.table_for(self.tensors).rules)
        return Table((*self.table.rules, *rules), self.table.ignored)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    family: Family
    components: Mapping[str, Opened]
    tokenizers: Mapping[str, str]  # local directories; empty in a plan that has none
    scheduler: Mapping[str, Any]
    revision: str | None  # commit of a Hugging Face snapshot
    converted_from: str | None = None  # digest of what a converted copy was made from
    unseen: str = ""  # of one that a plan knows by its sizes alone: that it was not looked at

    def digest(self) -> str:
        """16 hex digits over configs, tokenizers and the weights' bytes (large files: samples); of a
        converted copy, whose bytes have checksums, those of its origin."""
        if self.converted_from and all(isinstance(c.source, zarr.Arrays) for c in self.components.values()):
            return self.converted_from
        digest = hashlib.sha256(json.dumps(self.scheduler, sort_keys=True).encode() + self._weights(self.components))
        for folder in self.tokenizers.values():
            for file in TOKENIZER_FILES:
                if os.path.exists(path := os.path.join(folder, file)):
                    with open(path, "rb") as f:
                        digest.update(f.read())
        return digest.hexdigest()[:16]

    def text_digest(self) -> str:
        """Likewise, over what decides the encoding of token ids: it is the same for models that share their
        encoders."""
        return self._weights({name: self.components[name] for name in self.family.encoders}).hex()

    def _weights(self, components: Mapping[str, Opened]) -> bytes:
        digest = hashlib.sha256((self.converted_from or "").encode())
        for name, component in sorted(components.items()):
            digest.update(name.encode() + json.dumps(dataclasses.asdict(component.config), sort_keys=True).encode())
        for source, file, _ in files(components):
            digest.update(self._contents[source.path(file)])
        return digest.digest()

    @functools.cached_property
    def _contents(self) -> dict[str, bytes]:
        """A digest of each file of weights."""
        found = {}
        for source, file, size in files(self.components):
            digest = hashlib.sha256()
            for part in sampled(source, file, size):
                digest.update(part)
            found[source.path(file)] = digest.digest()
        return found


def files(components: Mapping[str, Opened]) -> list[tuple[Source, str, int]]:
    """Each file of weights once, in a fixed order, with its size in bytes."""
    found = {}
    for _, component in sorted(components.items()):
        for file, size in sorted(component.source.sizes.items()):
            found[component.source.path(file)] = (component.source, file, size)
    return list(found.values())


def open_checkpoint(model: Model) -> Checkpoint:
    """Finds the checkpoint and its family, and reads its configs and headers; UserError for anything unsound."""
    path, revision = find(
        model.pretrained_model_name_or_path, "model.pretrained_model_name_or_path", model.revision, *_wanted(model)
    )
    folder, file = split(path)
    root = Source(folder)
    index_file = next((name for name in INDEXES if file is None and root.exists(name)), None)
    index = root.json(index_file) if index_file else {}
    marker = zarr.read_marker(root) if file is None else None
    file = file or (_only_file(root) if marker is None else None)
    whole = _read_file(root, file) if file else {}
    family = _family_of(root, index.get("_class_name"), file, whole)
    check_homes(family, model)

    opened = {name: open_component(family, name, model, root, file, whole, marker) for name in family.components}
    components = {name: component for name, (component, _) in opened.items()}
    if file:
        prefixes = {
            found[2] for component in family.components.values() if (found := single_files.recognise(component, whole))
        }
        single_files.check_whole(whole, list(prefixes), family.leftovers, root.path(file))
    if model.verify.name == "digest" and marker is None:  # a converted copy has checksums of its own
        verify(files(components))
    try:
        whole_family = agreed(family, components, family.index_of(file) if file else index)
    except ValueError as error:
        raise UserError(f"{root.path(file or index_file or '')}: {error}") from None
    tokenizers = {}
    for name, published in family.tokenizers.items():
        known = published.repo if components[published.component].config.vocab_size == published.vocabulary else None
        home = opened[published.component][1]  # a model directory of its own has its tokenizer beside the weights
        homes = [*([home / name, home] if home else []), *(root / folder for folder in (*published.folders, name))]
        tokenizers[name] = find_tokenizer(homes, known)
    # modular pipelines have theirs in code
    if (file or index_file == INDEXES[1]) and not root.exists("scheduler/scheduler_config.json"):
        scheduler = whole_family.published_scheduler()
    else:
        scheduler = (root / "scheduler").json("scheduler_config.json")
    return Checkpoint(
        whole_family,
        components,
        tokenizers,
        scheduler,
        revision or (marker or {}).get("revision"),
        (marker or {}).get("digest"),
    )


def _family_of(root: Source, pipeline: str | None, file: str | None, whole: Mapping[str, Tensor]) -> type[Family]:
    """By what ``model_index.json`` says; without one by the denoiser's config, or by its tensors in a single file."""
    if file:
        known = [family for family in families() if single_files.recognise(family.components[family.denoiser], whole)]
        by_name = (family for family in known if any(word in file.lower() for word in family.file_words))
        return next(by_name, (known or families())[0])  # which says what is missing
    if pipeline is not None:
        if (named := by_pipeline(pipeline)) is None:
            firsts = " or ".join(family.pipelines[0] for family in families())
            named_in = next(name for name in INDEXES if root.exists(name))
            raise UserError(f"{root.path(named_in)}: a {pipeline}, expected a {firsts}")
        return named
    for family in families():
        path = f"{family.denoiser}/config.json"
        if root.exists(path) and family.claims(root.json(path)):
            return family
    return families()[0]  # which says what is missing


def agreed(family: type[Family], components: Mapping[str, Opened], index: Mapping[str, Any]) -> Family:
    """The family with these components' configs and what ``model_index.json`` says; UserError where they do not fit
    each other."""
    found = family({name: component.config for name, component in components.items()}, index)
    for name, key, got, expected, of in found.mismatches():
        raise UserError(f"{components[name].where}: {key} is {got}, expected {expected} ({of})")
    return found


def check_homes(family: type[Family], model: Model) -> None:
    """UserError for a component that is named apart and that this family does not have."""
    homes = dict.fromkeys(component.home for other in families() for component in other.components.values())
    for home in homes.keys() - {component.home for component in family.components.values()}:
        if home and (given := getattr(model, home)):
            nothing = f"nothing of a {family.pipelines[0]} is read from it"
            raise UserError(f"model.{home}: {given!r}: expected null: {nothing}")


def _wanted(model: Model) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What to fetch of the base model's repository; and with a denoiser that is a file of it. No weights of what
    the configuration names apart."""
    homes = {family: {component.home for component in family.components.values()} for family in families()}
    apart = {home for home in set().union(*homes.values()) if home and getattr(model, home)}
    # one name may be of another component in another family
    fitting = [family for family in families() if apart <= homes[family]]
    parts = [part for family in fitting for part in family.components.items() if part[1].home not in apart]
    names = dict.fromkeys(name for name, _ in parts)
    denoisers = {family.denoiser for family in families()}
    decoders = [component for name, component in parts if name in {family.decoder for family in fitting}]
    beside = [f"{name}/*" for name in names if name not in denoisers]
    beside += [file for decoder in decoders for file in decoder.files]
    return (*SMALL, *(f"{name}/*" for name in names)), (*SMALL, *dict.fromkeys(beside))


def open_component(
    family: type[Family],
    name: str,
    model: Model,
    root: Source,
    file: str | None,
    whole: Mapping[str, Tensor],
    marker: Mapping[str, Any] | None,
) -> tuple[Opened, Source | None]:
    """A component, and the directory of one that the configuration names apart."""
    component = family.components[name]
    if component.home and (given := getattr(model, component.home)):
        ends = [f"{stem}{end}" for stem in component.stems for end in (SUFFIX, f"-*{SUFFIX}")]
        stems = *ends, *(f"{name}/{end}" for end in ends)
        path, other = split(find(given, f"model.{component.home}", None, (*stems, *SMALL), SMALL)[0])
        home = Source(path)
        if other:
            return _from_file(name, component, home, other, _read_file(home, other)), home
        return _from_directory(name, component, home / name if home.exists(f"{name}/config.json") else home), home
    if marker is not None:
        return _from_directory(name, component, root / name, marker), None
    if file and (name == family.denoiser or single_files.recognise(component, whole)):
        return _from_file(name, component, root, file, whole), None
    if weights_file(root / name, component.stems):
        return _from_directory(name, component, root / name), None
    folders = [root, *(root / f"../{folder}" for folder in component.folders if root.local)]
    for folder in folders:
        for other in component.files:
            if folder.exists(other):
                return _from_file(name, component, folder, other, _read_file(folder, other)), None
    if not file:
        return _from_directory(name, component, root / name, root=root), None  # says what is missing
    usual = f" or {component.files[0]} in {', '.join(folder.url for folder in folders)}" if component.files else ""
    other_home = f", or model.{component.home}=…" if component.home else ""
    raise UserError(f"{root.path(file)}: no {name} in it or beside it: expected {root.path(name)}/{usual}{other_home}")


def _only_file(root: Source) -> str | None:
    """The denoiser's file in a directory of single files."""
    if any(weights_file(root / family.denoiser, family.components[family.denoiser].stems) for family in families()):
        return None
    patterns = {pattern for family in families() for pattern in family.file_patterns}
    parts = [(part == family.denoiser, of) for family in families() for part, of in family.components.items()]
    others = {name for is_denoiser, of in parts if not is_denoiser for name in of.files}
    names = [name for name in root.top() if name.endswith(SUFFIXES) and name not in others]
    files = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    if len(files) > 1:
        raise UserError(f"{root.url}: holds {', '.join(files)}: name one of them")
    return files[0] if files else None


def _read_file(source: Source, file: str) -> dict[str, Tensor]:
    return with_scales(read_header(source, file), source.path(file))


def _from_file(name: str, component: Component, source: Source, file: str, whole: Mapping[str, Tensor]) -> Opened:
    where = source.path(file)
    found = single_files.recognise(component, whole)
    if found is None:
        signs = " or ".join(dict.fromkeys(" and ".join(sorted(naming.signs(""))) for naming in component.namings))
        names = f"its tensors are called {', '.join(list(whole)[:3])}, …"
        line = quantized.in_tensors(whole, where) or quantized.in_notes(notes(source, file), where)
        raise UserError(line or f"{where}: no {name} in it, which has {signs}: {names}")
    tensors, table, _ = found
    try:
        if line := quantized.in_tensors(tensors, where):
            raise UserError(line)
        config = component.sizes(*shapes_of(tensors, table))
        beside = _declared(component, source, f"{name}/config.json") or _declared(component, source, "config.json")
        config = (beside.get("text_config", beside) if beside else component.constants(config)) | config
        return Opened(component, source, _parsed(component, config), tensors, table, where)
    except KeyError as error:
        lacks = f": the file lacks {lack}" if (lack := lacked(table, error.args[0], None, tensors)) else ""
        raise UserError(f"{where}: no tensor gives the size of {error} of the {name}{lacks}") from error
    except (ValueError, TypeError, IndexError) as error:
        raise UserError(f"{where}: {error}") from error


def _declared(component: Component, source: Source, path: str) -> dict[str, Any] | None:
    """The config at ``path`` if it says it is of this kind."""
    config = source.json(path) if source.exists(path) else {}
    return config if _class_of(config) in component.classes else None


def _class_of(config: Mapping[str, Any]) -> str | None:
    return config.get("_class_name") or next(iter(config.get("architectures") or ()), None)


def _from_directory(
    name: str, component: Component, source: Source, marker: Mapping[str, Any] | None = None, root: Source | None = None
) -> Opened:  # fmt: skip
    if not source.exists("config.json"):
        folders, where = ([source, root] if root else [source]), source.path("config.json")
        raise UserError(instead(*folders) or f"{where}: not found: the checkpoint has no {name}{held(*folders)}")
    config = source.json("config.json")
    where = source.path("config.json")
    declared = _class_of(config)
    if declared is not None and declared not in component.classes:
        raise UserError(f"{where}: is a {declared}, expected {' or '.join(component.classes)}")
    try:
        parsed = _parsed(component, config)
    except KeyError as error:
        raise UserError(f"{where}: key {error} is missing") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: {error}") from error
    if marker is not None:
        arrays = zarr.Arrays(source.url)
        return Opened(component, arrays, parsed, zarr.tensors(marker, name, arrays), NATIVE, where)
    tensors = read_headers(source, component.stems)
    folders_own = component.namings[-1].table_for(tensors)
    own, table, _ = single_files.recognise(component, tensors) or (tensors, folders_own, "")
    if len(own) < len(tensors):  # the others would be left out without a word
        own, table = tensors, folders_own
    if line := quantized.in_tensors(own, source.url, config):
        raise UserError(line)
    return Opened(component, source, parsed, own, table, where, config)


# What an entry of a config.json may be, by the type of its field.
_ENTRIES: dict[Any, tuple[Callable[[Any], bool], str]] = {
    "int": (lambda value: type(value) is int and value >= 0, "a whole number from 0"),
    "float": (lambda value: type(value) in (int, float) and math.isfinite(value), "a number"),
    "bool": (lambda value: type(value) is bool, "true or false"),
    "str": (lambda value: type(value) is str, "a string"),
    "tuple[int, ...]": (
        lambda value: isinstance(value, list | tuple) and all(type(n) is int and n > 0 for n in value),
        "a list of whole numbers from 1",
    ),
}


def _parsed(component: Component, config: Mapping[str, Any]) -> Any:
    """The component's configuration; KeyError for an entry that is missing, ValueError for one that the model cannot
    have."""
    given = config.get("text_config", config)
    for field in dataclasses.fields(component.config):
        sound, expected = _ENTRIES[field.type]
        if (value := given.get(field.name)) is not None and not sound(value):
            raise ValueError(f"{field.name} is {shown(json.dumps(value))}, expected {expected}")
    parsed = component.config.from_json(config)
    if missing := [f.name for f in dataclasses.fields(parsed) if getattr(parsed, f.name) is None]:
        raise KeyError(missing[0])
    return parsed
