"""From the words of a command line to overrides that Hydra's grammar takes.

`num_inference_steps=8` becomes `sampler.num_inference_steps=8`, free text is quoted as Hydra
wants it, and every key and value is held against the schema, so that all mistakes are reported
at once, each with the key as it was typed.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from types import NoneType
from typing import Any, cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fluxbatch.config.schema import shown
from fluxbatch.types import UserError

# The headings under which the parameters are documented are accepted as groups of bare names.
HEADINGS = ("generation", "flow_matching", "performance", "parallelism", "system")
PROMPTS = (
    "prompt",
    "prompt_2",
    "negative_prompt",
    "negative_prompt_2",
    "prompt_template",
)  # in these , and ${ are text
# What Hydra's authors publish besides
PLUGINS = {"sweeper": ("optuna", "ax", "nevergrad"), "launcher": ("joblib", "submitit", "ray", "rq")}
# What keys are called elsewhere, by hand and in other tools
USUAL = {
    name: key
    for key, names in {
        "num_inference_steps": "steps step num_steps n_steps sampling_steps inference_steps denoising_steps iterations",
        "guidance_scale": "guidance cfg cfg_scale guidance_weight distilled_guidance",
        "resolution": "size res image_size img_size dim pixels",
        "width": "w",
        "height": "h",
        "per_device_batch_size": "batch_size batch batchsize bs b",
        "num_images": "n num count samples num_samples n_samples n_images images n_iter num_images_per_prompt",
        "seed": "random_seed manual_seed rng_seed generator",
        "prompt": "p text caption query",
        "manifest": "prompts input inputs file files prompt_file prompts_file from_file csv tsv jsonl dataset",
        "output_dir": "out o outdir out_dir output_path output_folder outputs save_dir save_path dest destination",
        "run_name": "name run run_id exp exp_name experiment_name job_name",
        "filename": "file_name outname template",
        "format": "ext extension image_format img_format fmt file_format",
        "overwrite": "force clobber",
        "pretrained_model_name_or_path": (
            "ckpt checkpoint model_path model_dir model_id model_name base_model weights repo"
        ),
        "vae_model_name_or_path": "vae vae_path ae",
        "clip_model_name_or_path": "clip clip_path clip_l text_encoder",
        "t5xxl_model_name_or_path": "t5 t5_path t5xxl text_encoder_2",
        "weights_dtype": "dtype precision torch_dtype",
        "hardware": "device backend accelerator",
        "sharding": "devices gpus num_gpus ngpus num_devices mesh strategy parallelism",
        "ici_tensor_parallelism": "tp tensor_parallel tp_size",
        "ici_context_parallelism": "cp sp context_parallel sequence_parallel",
        "ici_data_parallelism": "dp data_parallel",
        "max_sequence_length": "max_length max_len seq_len max_tokens",
        "jax_cache_dir": "cache cache_dir compilation_cache_dir",
        "offload_encoders": "offload cpu_offload",
        "stream_blocks": "lowvram low_vram sequential_offload",
        "lora": "loras adapter adapters lora_name lora_path lora_file",
    }.items()
    for name in names.split()
}
QUOTED = r"""(?:'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")"""
QUOTED_SWEEP = rf"{QUOTED}(?:\s*,\s*{QUOTED})*"
SWEEP_FUNCTION = r"(?:choice|shuffle|sort|tag|range|interval|glob)\(.*\)"


def read(
    words: Sequence[str], schema: type, groups: Mapping[str, Sequence[str]], multirun: bool
) -> tuple[list[str], frozenset[str]]:
    """Hydra's overrides for ``words``, and the full keys that hold still in a multirun.

    ``groups``: the config groups with their options. Raises `UserError` with a line for every
    word that is not an override, has an unknown key or a value of another type.
    """
    vocabulary = _Vocabulary(schema, groups)
    if not any(word.startswith("model=") for word in words):
        # The model's name alone, as MaxDiffusion has it, brings the model's sampler along.
        words = [f"model={word[10:]}" if word.startswith("flux_name=") else word for word in words]
    overrides: list[str] = []
    problems: list[str] = []
    fixed: set[str] = set()
    parser, scratch = OverridesParser.create(), OmegaConf.structured(schema)
    for word in words:
        try:
            override = vocabulary.translate(word, multirun)
            parsed = parser.parse_override(override)
            key, sweeps = parsed.key_or_group, parsed.is_sweep_override()
            is_choice = key in groups and not isinstance(parsed.value(), dict)
            if sweeps and not multirun:
                hint = "; several adapters go in brackets" if key == "lora" else ""
                asks = f"{call[1]}(…)" if (call := re.match(r"[^=]*=(\w+)\(", override)) else "a comma"
                raise UserError(f"{shown(word)}: {asks} asks for a sweep, which needs --multirun{hint}")
            if not is_choice and not parsed.is_delete() and kind_of(schema, key)[0] is not None:
                _try(scratch, schema, parsed, parser)
            if is_choice and not parsed.is_delete() and not isinstance(parsed.value(), Glob):
                _check_options(parsed, parser, groups[key])
            overrides.append(override)
            (fixed.discard if sweeps else fixed.add)(full_key(parsed))
        except UserError as error:
            problems += error.lines
        except OmegaConfBaseException:
            full = "" if word.lstrip("+").startswith(key) else f" ({key})"
            problems.append(f"{shown(word)}{full}: expected {expected(*kind_of(schema, key))}")
        except HydraException as error:
            problems.append(f"{shown(word)}: not a value that Hydra can read: {' '.join(str(error).split())}")
    if problems:
        raise UserError(*problems)
    return overrides, frozenset(fixed)


def _try(scratch: DictConfig, schema: type, override: Override, parser: OverridesParser) -> None:
    """Put the values of an override into a scratch config, for OmegaConf to say what it cannot take."""
    key = override.key_or_group
    for part in (key.rpartition(".")[0], key):  # OmegaConf merges only into what is there
        kind: Any = kind_of(schema, part)[0] if part else None
        is_group = dataclasses.is_dataclass(kind)
        if (is_group or typing.get_origin(kind) is dict) and not OmegaConf.select(scratch, part):
            OmegaConf.update(scratch, part, kind() if is_group else {})
    for value in _values(override, parser):
        # OmegaConf takes any number for true
        if kind_of(schema, key)[0] is bool and type(value) is int and value not in (0, 1):
            raise UserError(f"{key}={value}: expected {expected(*kind_of(schema, key))}")
        OmegaConf.update(scratch, key, value, merge=isinstance(value, dict))


def _check_options(override: Override, parser: OverridesParser, known: Sequence[str]) -> None:
    """UserError unless a group's choices are there."""
    for value in _values(override, parser):
        for option in value if isinstance(value, list) else [value]:
            if not (isinstance(option, str) and option.removesuffix(".yaml") in known):
                raise UserError(no_option(override.key_or_group, shown(option), known))


def no_option(group: str, option: str, known: Sequence[str]) -> str:
    """That a group has no such choice, and what it has."""
    near = nearest(option, known)
    hint = f"; did you mean {near}?" if near else ""
    plugin, kind = option.partition("_")[0], group.removeprefix("hydra/")
    if not near and plugin in PLUGINS.get(kind, ()):
        hint = f"; pip install hydra-{plugin}-{kind}"
    return f"{group}={option}: expected one of {', '.join(known)}{hint}"


def full_key(override: Override) -> str:
    """What an override is about, without its sign; of a group with the package, if it has one."""
    return override.get_key_element().lstrip("+~")


def group_of(word: str) -> str:
    """The group that a word is about, if it is about one."""
    return re.split("[@=]", word.lstrip("+~"))[0]


def _values(override: Override, parser: OverridesParser) -> list[Any]:
    """The value of an override, or all that it sweeps over; of an interval, its ends."""
    value = override.value()
    if isinstance(value, IntervalSweep):  # Hydra makes floats of the ends, a sweeper whole numbers again
        ends = (float(cast(float, end)) for end in (value.start, value.end))
        return [int(end) if end.is_integer() else end for end in ends]
    if isinstance(value, Glob):
        raise UserError(f"{override.input_line}: glob(…) is for the choices of a group, not for a key")
    swept = override.sweep_string_iterator() if override.is_discrete_sweep() else [override.get_value_element_as_str()]
    return [parser.parse_override(f"x={text}").value() for text in swept]


def leaves(schema: type, prefix: str = "") -> Iterator[str]:
    """The full key of every value in a schema."""
    for name, hint in typing.get_type_hints(schema).items():
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from leaves(hint, f"{prefix}{name}.")
        elif name != "sweep":
            yield prefix + name


def kind_of(schema: type, key: str) -> tuple[Any, bool]:
    """The type of the value at a full key (None: no such key) and whether it may be null."""
    kind: Any = schema
    optional = False
    for part in key.split("."):
        if dataclasses.is_dataclass(kind):
            kind = typing.get_type_hints(kind).get(part)
        else:
            kind = typing.get_args(kind)[1] if typing.get_origin(kind) is dict else None
        optional = NoneType in typing.get_args(kind)
        if optional:
            kind = next(k for k in typing.get_args(kind) if k is not NoneType)
    return kind, optional


def misplaced(value: Any, kind: Any, optional: bool = False, key: str = "") -> Iterator[str]:
    """A line for each group, list and table in whose place an interpolation has put something else: OmegaConf holds
    only single values against their types."""
    holds: Any = kind if dataclasses.is_dataclass(kind) else typing.get_origin(kind)
    if not (dataclasses.is_dataclass(holds) or holds in (list, dict)) or (value is None and optional):
        return
    if not isinstance(value, holds):
        yield f"{key}={shown(value)}: expected {expected(kind, optional)}"
    elif holds is kind:
        for name in typing.get_type_hints(kind):
            yield from misplaced(getattr(value, name), *kind_of(kind, name), f"{key}.{name}".lstrip("."))
    else:
        inner = typing.get_args(kind)[-1]
        items: Iterable[tuple[Any, Any]] = value.items() if holds is dict else enumerate(value)
        for name, item in items:
            at = f"{key}.{name}" if holds is dict else f"{key}[{name}]"
            if inner in (str, int, float, bool) and not isinstance(item, int | float if inner is float else inner):
                yield f"{at}={shown(item)}: expected {expected(inner, False)}"
                return
            yield from misplaced(item, inner, False, at)


def expected(kind: Any, optional: bool) -> str:
    """A type in words."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        text = "one of " + ", ".join(kind.__members__)
    elif typing.get_origin(kind) is list:
        text = f"a list, [{expected(typing.get_args(kind)[0], False)}, …]"
    elif typing.get_origin(kind) is dict:
        text = f"{{name: {expected(typing.get_args(kind)[1], False)}, …}}"
    elif dataclasses.is_dataclass(kind):
        text = f"{{{', '.join(f.name for f in dataclasses.fields(kind))}}}"
    else:
        text = {
            int: "a whole number",
            float: "a number",
            bool: "true or false",
            str: "text",
            bool | str: "true, false or a word",
        }.get(kind, "a value")
    return text + (" or null" if optional else "")


def quote(text: str) -> str:
    """``text`` as a quoted string of Hydra's grammar."""
    return QuotedString(text, Quote.single).with_quotes()


def nearest(typed: str, known: Iterable[str]) -> str | None:
    """The known word that was probably meant."""
    return next(iter(difflib.get_close_matches(typed, known, 1, cutoff=0.7)), None)


def meant(typed: str, known: Iterable[str]) -> str | None:
    """The known word that was probably meant: of the usual names for it, or one that looks like it."""
    known = [*known]
    usual = USUAL.get(typed.lower().replace("-", "_"))
    return usual if usual in known else nearest(typed, known)


def nearest_key(schema: type, typed: str) -> str | None:
    """The full key that was probably meant by a full key that is none."""
    keys = [*leaves(schema)]
    by_name = {key.rpartition(".")[2]: key for key in keys}
    last = typed.rpartition(".")[2]
    return by_name.get(USUAL.get(last, "")) or nearest(typed, keys) or by_name.get(nearest(last, by_name) or "")


class _Vocabulary:
    def __init__(self, schema: type, groups: Mapping[str, Sequence[str]]):
        self.schema, self.groups = schema, groups
        self.keys = list(leaves(schema))
        names = [key.rpartition(".")[2] for key in self.keys]
        self.full = {name: key for name, key in zip(names, self.keys, strict=True) if names.count(name) == 1}

    def translate(self, word: str, multirun: bool) -> str:
        """One word as an override of Hydra's, its key in full and its text quoted."""
        parts = re.fullmatch(r"(\+\+|\+|~|)([^=]*)(=?)(.*)", word, re.DOTALL)
        assert parts is not None  # any text does
        prefix, typed, equals, value = parts.groups()
        if typed.startswith(("hydra.", "hydra/")) or typed == "hydra":
            return word
        a_table = value.startswith("{")  # of the group's keys
        if (equals or prefix == "~") and group_of(typed) in self.groups and not a_table:
            return word
        if "/" in typed or "@" in typed:
            group = group_of(typed)
            raise UserError(f"{shown(word)}: there is no key or group {group}{self._nearest(group)}")
        if not equals and prefix != "~":
            raise UserError(f"{shown(word)}: expected key=value{self._nearest(typed)}")
        head, dot, tail = typed.partition(".")
        if head in HEADINGS:
            head, dot, tail = tail.partition(".")
        key = self.full.get(head, head) + dot + tail
        kind, optional = kind_of(self.schema, key)
        if kind is None or key.partition(".")[0] == "sweep":
            raise UserError(f"{shown(word)}: there is no key {typed}{self._nearest(typed)}")
        if not prefix and re.match(r"hardware\.flash_block_sizes\b", key):
            prefix = "++"  # an open table
        if key == "manifest" and not value.startswith("["):  # a list is Hydra's
            kind, optional = str, True
        if kind is str and equals and not (optional and value == "null"):
            value = _text(value, key in PROMPTS, multirun)
        elif value.startswith(("{", "[")):
            value = _from_json(value)
            if kind == list[str]:  # of flags, the dashes are text
                value = re.sub(r"(?<=[\[,])\s*(--?[a-zA-Z][^,\]'\"]*)", lambda flag: quote(flag[1].strip()), value)
        return f"{prefix}{key}{equals}{value}"

    def _nearest(self, typed: str) -> str:
        group, dot, name = typed.partition(".")
        options = {option: f"{group}={option}" for group, names in self.groups.items() for option in names}
        known = self.keys if dot else [*self.keys, *self.full, *self.groups, *options]
        last = typed.rpartition(".")[2].lower().replace("-", "_")
        if (usual := USUAL.get(last)) and dot:
            usual = self.full.get(usual)
        slip = USUAL.get(nearest(last, (word for word in USUAL if len(word) > 4)) or "")
        if near := usual or nearest(typed, known) or nearest(name or typed, self.full) or slip:
            return f"; did you mean {options.get(near, near)}?"
        siblings = [key.partition(".")[2] for key in self.keys if dot and key.startswith(f"{group}.")]
        return f"; {group} has {', '.join(siblings)}" if siblings else "; python -m fluxbatch.keys lists them all"


def _text(value: str, prompt: bool, multirun: bool) -> str:
    """Free text as Hydra's grammar wants it; what is quoted already stays as it is."""
    if prompt:  # ${ would be an interpolation: OmegaConf wants it, and the backslashes before it, escaped
        value = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    if re.fullmatch(QUOTED_SWEEP if multirun else QUOTED, value, re.DOTALL):
        return value
    if multirun and not prompt:
        if re.fullmatch(SWEEP_FUNCTION, value):
            return value
        return ",".join(part if part == "null" else quote(part) for part in value.split(","))
    return quote(value)


def _from_json(value: str) -> str:
    """A JSON object or list, as MaxDiffusion's users paste them, in Hydra's grammar."""

    def literal(item: Any) -> str:
        if isinstance(item, dict):
            return "{" + ",".join(f"{key}:{literal(child)}" for key, child in item.items()) + "}"
        if isinstance(item, list):
            return "[" + ",".join(map(literal, item)) + "]"
        return quote(item) if isinstance(item, str) else json.dumps(item)

    try:
        return literal(json.loads(value))
    except ValueError:
        return value
