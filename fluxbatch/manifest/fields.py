"""The named values of a manifest's line → its rows, with the job's settings where the line is silent."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping
from typing import Any, cast

from fluxbatch.config.checks import sigmas_wanted
from fluxbatch.config.schema import MAX_SIDE, MAX_STEPS, SIDES, Job
from fluxbatch.manifest.formats import BadLine, described, shown
from fluxbatch.storage.picture import located
from fluxbatch.types import Picture, Row, UserError

MAX_SEED = 2**64 - 1
_WHOLE = 2**53  # up to it a float that is whole is the integer that was meant
_MAX_FLOAT = 1e4  # of guidance and LoRA scales: beyond it bfloat16 only makes NaN
_MAX_IMAGES = 100_000  # per row
_MAX_ID = 200  # bytes: with its extension it must fit a file name
INTEGERS = ("seed", "height", "width", "num_inference_steps", "num_images", "padding_mask_crop")
SURROGATES = re.compile("[\ud800-\udfff]")
NUMBERS = ("guidance_scale", "true_cfg_scale", "strength")
PICTURES = ("image", "mask_image", "control_image")
TEXTS = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")
FIELDS = (*TEXTS, *PICTURES, "id", *NUMBERS, "lora", "sigmas", *INTEGERS)
_FIELDS = frozenset(FIELDS)


class Resolver:
    """Named values of one line → its rows, with the job's settings where the line is silent."""

    def __init__(self, job: Job, size_multiple: int):
        sampler = job.sampler
        self._size_multiple = size_multiple
        self._format = job.output.format.name
        self._seed = job.seed
        self._pictures = {key: getattr(job, key) for key in PICTURES if getattr(job, key) is not None}
        self._sized = sampler.height is not None or sampler.width is not None
        self._texts = {key: getattr(job, key) for key in TEXTS[1:]}
        self._adapters = {*job.lora, *job.lora_config.adapter_name}
        self._sigmas = tuple(map(float, sampler.sigmas or ()))
        self._seen: dict[str, str] = {}  # id → where
        self._given: dict[frozenset[str], frozenset[str]] = {}
        self._defaults = {
            "height": sampler.resolution if sampler.height is None else sampler.height,
            "width": sampler.resolution if sampler.width is None else sampler.width,
            "num_inference_steps": len(sampler.sigmas or ()) or sampler.num_inference_steps,
            **{key: float(getattr(sampler, key)) for key in NUMBERS},
            "num_images": job.num_images,
        }
        if job.padding_mask_crop is not None:
            self._defaults["padding_mask_crop"] = job.padding_mask_crop
        problems: list[str] = []
        for key, text in self._texts.items():
            if text is not None:
                _text({key: text}, key, problems, empty=key.startswith("negative"))
        self._numbers({**self._defaults, "seed": job.seed}, problems)
        if problems:  # of a setting of the job, not of a line
            homes = {key: f"sampler.{key}" for key in ("height", "width", "num_inference_steps", *NUMBERS)}
            homes |= {key: "sampler.resolution" for key in ("height", "width") if getattr(sampler, key) is None}
            named = (problem.partition(":") for problem in problems)
            raise UserError(*dict.fromkeys(f"{homes.get(key, key)}:{rest}" for key, _, rest in named))

    def __call__(self, fields: dict[str, Any] | BadLine, index: int, where: str, empty: bool = False) -> list[Row]:
        """``empty``: whether an empty prompt is meant, as it is where it is written out.

        Raises BadLine with everything that is wrong with the line."""
        if isinstance(fields, BadLine):
            raise fields
        given = {key: value for key, value in fields.items() if value is not None}
        problems: list[str] = []
        prompt = _text(given, "prompt", problems, empty=empty)
        if "prompt" not in given:
            texts = [shown(key) for key, value in given.items() if key not in FIELDS and isinstance(value, str)]
            hint = f" (prompt_column=… takes another field for it, of {', '.join(texts)})" if texts else ""
            problems.append(f"prompt: missing{hint}")
        read = self._texts | {key: _text(given, key, problems, key != "prompt_2") for key in TEXTS[1:] if key in given}
        negative = read["negative_prompt"]
        base = _id(given, problems)
        numbers = {**self._defaults, **self._numbers(given, problems)}
        pictures = self._read(given, where.rpartition("/")[0], problems)
        lora = self._lora(given, problems)
        sigmas = self._levels(given, numbers, problems)
        if problems:
            raise BadLine("; ".join(problems))

        count, seed = numbers["num_images"], numbers.get("seed", self._seed + index)
        if seed + count - 1 > MAX_SEED:
            raise BadLine(f"seed: {seed + count - 1} is more than 2**64 - 1")
        if base is None:
            ids = [str(index + k) for k in range(count)]
        else:
            ids = [base] if count == 1 else [f"{base}-{k}" for k in range(count)]
        for id in ids:
            if id in self._seen:
                by_default = "" if base is not None else " (its number, as it gives none)"
                raise BadLine(f"id: {json.dumps(id)}{by_default} is already that of {self._seen[id]}")
        self._seen.update(dict.fromkeys(ids, where))
        extra = {key: value for key, value in fields.items() if key not in FIELDS}
        known = frozenset(given) & _FIELDS | ({"num_inference_steps"} if sigmas else set())  # of which sigmas decide
        known = self._given.setdefault(known, known)  # one set for all rows that have the same fields
        return [
            Row(
                index=index + k,
                id=id,
                prompt=prompt,
                prompt_2=read["prompt_2"] or prompt,
                seed=seed + k,
                height=numbers["height"],
                width=numbers["width"],
                num_inference_steps=numbers["num_inference_steps"],
                guidance_scale=numbers["guidance_scale"],
                negative_prompt=negative,
                negative_prompt_2=negative if read["negative_prompt_2"] is None else read["negative_prompt_2"],
                true_cfg_scale=numbers["true_cfg_scale"],
                strength=numbers["strength"],
                padding_mask_crop=numbers.get("padding_mask_crop"),
                image=pictures["image"],
                mask_image=next(iter(pictures["mask_image"]), None),
                control_image=next(iter(pictures["control_image"]), None),
                sized=self._sized or not {"height", "width"}.isdisjoint(given),
                lora=lora,
                sigmas=sigmas,
                extra=extra,
                named=base is not None,
                where=where,
                given=known,
            )
            for k, id in enumerate(ids)
        ]

    def _numbers(self, given: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
        numbers: dict[str, Any] = {}
        largest = min(MAX_SIDE, SIDES[self._format])
        for key, low, high, step in (
            ("seed", 0, MAX_SEED, 1),
            ("height", self._size_multiple, largest - largest % self._size_multiple, self._size_multiple),
            ("width", self._size_multiple, largest - largest % self._size_multiple, self._size_multiple),
            ("num_inference_steps", 1, MAX_STEPS, 1),
            ("num_images", 1, _MAX_IMAGES, 1),
            ("padding_mask_crop", 0, MAX_SIDE, 1),
        ):
            if key not in given:
                continue
            value = given[key]
            if type(value) is float and value.is_integer() and abs(value) <= _WHOLE:
                value = int(value)
            if type(value) is not int:  # a bool is an int to isinstance
                problems.append(f"{key}: got {described(value)}, expected an integer")
            elif not low <= value <= high or value % step:
                kind = "an integer" if step == 1 else f"a multiple of {step}"
                limit = "2**64 - 1" if high == MAX_SEED else high
                held = key in ("height", "width") and largest < MAX_SIDE
                why = f", as output={self._format} holds {largest:,} at most" if held else ""
                problems.append(f"{key}: got {shown(value)}, expected {kind} from {low} to {limit}{why}")
            numbers[key] = value
        for key in NUMBERS:
            if key in given:
                numbers[key] = _float(key, given[key], problems, low=0.0)
        if not 0 <= numbers.get("strength", 1) <= 1:
            problems.append(f"strength: got {numbers['strength']:g}, expected a number from 0 to 1")
        return numbers

    def _levels(self, given: Mapping[str, Any], numbers: dict[str, Any], problems: list[str]) -> tuple[float, ...]:
        """The row's noise levels or the job's, whose count is the number of steps; none where neither has any."""
        sigmas, named = self._sigmas, "sampler.sigmas has"
        if "sigmas" in given:
            if wanted := sigmas_wanted(given["sigmas"]):
                got = shown(given["sigmas"]) if isinstance(given["sigmas"], list) else described(given["sigmas"])
                problems.append(f"sigmas: got {got}, expected {wanted}")
                return ()
            sigmas, named = tuple(map(float, given["sigmas"])), "sigmas has"
        if sigmas:
            if (steps := given.get("num_inference_steps", len(sigmas))) != len(sigmas):
                wanted = f"expected {len(sigmas)}, as many as {named}, or none"
                problems.append(f"num_inference_steps: got {shown(steps)}, {wanted}")
            numbers["num_inference_steps"] = len(sigmas)
        return sigmas

    def _read(self, given: Mapping[str, Any], folder: str, problems: list[str]) -> dict[str, tuple[Picture, ...]]:
        """The pictures of each field; the job's where the line has none. A path is relative to the manifest, one of
        the job to the working directory. ``folder``: of the manifest."""
        found: dict[str, tuple[Picture, ...]] = dict.fromkeys(PICTURES, ())
        for key in PICTURES:
            own = key in given
            value = given[key] if own else self._pictures.get(key)
            paths = value if key == "image" and isinstance(value, list) else [] if value is None else [value]
            if not all(isinstance(path, str) and path.strip() and "\0" not in path for path in paths):
                wanted = "a path or address, or a list of them" if key == "image" else "a path or address"
                problems.append(f"{key}: got {described(value)}, expected {wanted}")
                continue
            found[key] = tuple(Picture(path, located(path, folder if own else "")) for path in paths)
        return found

    def _lora(self, given: Mapping[str, Any], problems: list[str]) -> tuple[tuple[str, float], ...] | None:
        if "lora" not in given:
            return None
        if not isinstance(given["lora"], dict):
            problems.append(f'lora: got {described(given["lora"])}, expected an object like {{"adapter": 0.8}}')
            return None
        scales = []
        for adapter, scale in given["lora"].items():
            if adapter in self._adapters:
                scales.append((adapter, _float(f"lora.{adapter}", scale, problems)))
            else:
                have = ", ".join(sorted(self._adapters)) or "none; add lora=…"
                problems.append(f"lora: no adapter {shown(adapter)} in this job (it has {have})")
        return tuple(sorted(scales))


def _text(given: Mapping[str, Any], key: str, problems: list[str], empty: bool = False) -> str:
    value = given.get(key, " ")
    if not isinstance(value, str):
        problems.append(f"{key}: got {described(value)}, expected a string")
    elif key in given and not value.strip() and not empty:
        problems.append(f"{key}: empty")
    elif "\0" in value:
        problems.append(f"{key}: contains a NUL character")
    elif not value.isascii() and SURROGATES.search(value):
        encoding = sys.getfilesystemencoding()
        or_else = f", or not read so, as the locale's encoding is {encoding}: set PYTHONUTF8=1"
        why = "" if encoding == "utf-8" else or_else
        problems.append(f"{key}: not UTF-8{why}")  # bytes of the command line that are no text
    return value


def _id(given: Mapping[str, Any], problems: list[str]) -> str | None:
    """The id that the line gives: usable as a file name, and not a way out of the output place."""
    value: Any = given.get("id")
    if value is None:
        return None
    if type(value) is float and value.is_integer() and abs(value) <= _WHOLE:
        value = int(value)
    if type(value) is int and abs(value) <= MAX_SEED:
        value = str(value)
    if not isinstance(value, str):
        problems.append(f"id: got {described(value)}, expected a string")
    elif not value or value[0] == "." or len(value.encode()) > _MAX_ID or re.search(r"[/\\\x00-\x1f\x7f-\x9f]", value):
        problems.append(
            f"id: got {shown(value)}, expected 1 to {_MAX_ID} bytes "
            "without slashes, control characters or a leading dot"
        )
    return cast(str, value)  # a fault is in ``problems``


def _float(key: str, value: Any, problems: list[str], low: float = -math.inf) -> float:
    if type(value) not in (int, float):
        problems.append(f"{key}: got {described(value)}, expected a number")
    elif not math.isfinite(value) or abs(value) > _MAX_FLOAT or value < low:
        problems.append(
            f"{key}: got {shown(value)}, expected a number from {max(low, -_MAX_FLOAT):g} to {_MAX_FLOAT:g}"
        )
    else:
        return float(value)
    return math.nan
