"""The words every room shares. Standard library only."""

from __future__ import annotations

import dataclasses
import enum
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple


class Exit(enum.IntEnum):
    """What the process tells its launcher (also written to ``status.json``)."""

    OK = 0  # every row has its image
    BAD_INPUT = 2  # manifest, configuration or checkpoint is wrong; nothing was produced
    REJECTED_ROWS = 3  # finished, but some rows went to rejects.jsonl
    PREEMPTED = 75  # drained cleanly after a signal, or kept out by another start that is at work: run me again
    PEER_LOST = 76  # another process of this replica died


class UserError(Exception):
    """A mistake of the user's: printed without a stack trace, exit code 2, or 1 once something was made.

    Every line names the file, line or key, the value found and what was expected; never the password of an address.
    """

    code: int = Exit.BAD_INPUT

    def __init__(self, *lines: str):
        self.lines = tuple(map(public, lines))
        super().__init__("\n".join(self.lines))


def public(text: str) -> str:
    """The text without users and passwords in its addresses."""
    return re.sub(r"(?<=://)[^/@\s]+@", "", text)


def at_home(key: str, path: str) -> str:
    """``path`` with the home directory in place of its ``~``. UserError where there is none: nobody means a directory
    called ``~``."""
    full = os.path.expanduser(path)
    first = full.partition("/")[0]
    if first == "~":
        raise UserError(f"{key}={path}: no home directory is known (HOME is not set): expected a path without ~")
    if first.startswith("~") and not os.path.lexists(first):
        wanted = f"another path, or ./{path} for what is called so"
        raise UserError(f"{key}={path}: no user {first[1:]} is known: expected {wanted}")
    return full


@dataclasses.dataclass(frozen=True, slots=True)
class Picture:
    """A picture that a row reads."""

    path: str  # as the row has it
    url: str  # where it lies: an absolute path, or an address
    sha256: str = ""  # of the file
    height: int = 0  # pixels, as it is seen
    width: int = 0


class Mode(NamedTuple):
    """What of a row shapes its programs besides height and width: rows of one batch have the same."""

    negative: bool = False  # led away from a negative prompt: two evaluations a step
    start: bool = False  # begins with its image, noised as far as ``strength`` says
    mask: bool = False  # keeps what lies outside its mask
    guided_by: str = ""  # what stands beside the latents' channels: of a control map, or of a hole to fill
    references: tuple[tuple[int, int], ...] = ()  # heights and widths of pictures that are read as more image tokens
    # tokens that each text input of the prompt, and of the negative one, is padded to; none: those of the job
    texts: tuple[tuple[int, ...], ...] = ()

    @property
    def reads_pictures(self) -> bool:
        return self.start or self.mask or bool(self.guided_by or self.references)

    def __str__(self) -> str:
        """In a plan, behind the size."""
        words = {"from an image": self.start, "with a mask": self.mask, "with a negative prompt": self.negative}
        count = len(self.references)
        beside = [f"with {self.guided_by}"] if self.guided_by else []
        read = beside + ([f"{count} reference{'s' if count > 1 else ''}"] if count else [])
        lengths = dict.fromkeys(str(sum(each)) for each in self.texts)
        said = [f"{' and '.join(lengths)} text tokens"] if lengths else []
        return "".join(f", {word}" for word in (*(word for word, holds in words.items() if holds), *read, *said))

    @property
    def text_tokens(self) -> int:
        """Of the longest prompt; 0 where the job says how many."""
        return max(map(sum, self.texts), default=0)


PLAIN = Mode()  # text to image


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One image to make, with every parameter resolved. An image is a function of its Row.

    ``index`` is the row's place in the expanded manifest (``num_images`` already unrolled) and
    the ``{i}`` of its file name; it decides no pixel.
    """

    index: int
    id: str
    prompt: str
    prompt_2: str  # what the second text encoder reads; equal to ``prompt`` unless the manifest says otherwise
    seed: int
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    lora: tuple[tuple[str, float], ...] | None = None  # adapter → scale; None: the job's own
    sigmas: tuple[float, ...] = ()  # noise levels before the shift, one a step; none: the schedule's own
    negative_prompt: str | None = None  # what guidance leads away from; None: nothing
    negative_prompt_2: str | None = None  # the same for the second text encoder
    true_cfg_scale: float = 1.0  # how far, in a model that also has its guidance embedded
    image: tuple[Picture, ...] = ()
    mask_image: Picture | None = None  # white where the image is to be drawn anew
    control_image: Picture | None = None
    strength: float = 1.0  # how much of the start picture is noise: the share of the steps that are taken
    padding_mask_crop: int | None = None  # pixels kept around what is to be drawn anew, which alone is; None: all is
    sized: bool = True  # whether height and width were asked for; else a row with an image has its size
    mode: Mode = PLAIN  # as the checkpoint's family decides
    crop: tuple[int, ...] = ()  # left, top, right and bottom of what is kept of the image; none: all. The family's too
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # unknown fields, kept
    named: bool = True  # whether the manifest gave the id (else it is the index)
    where: str = ""  # "prompts.jsonl:12", for messages
    given: frozenset[str] = frozenset()  # the fields that the manifest gave, which no setting of the job decides

    @property
    def first_step(self) -> int:
        """Steps that are left out, as the image begins with a picture. Rounded as diffusers rounds."""
        steps = self.num_inference_steps
        return int(max(steps - min(steps * self.strength, steps), 0)) if self.mode.start else 0

    @property
    def steps(self) -> int:
        """Steps that are taken."""
        return self.num_inference_steps - self.first_step

    @property
    def kept(self) -> tuple[int, int]:
        """Height and width of the image that is written."""
        left, top, right, bottom = self.crop or (0, 0, self.width, self.height)
        return bottom - top, right - left

    @property
    def pictures(self) -> dict[str, tuple[Picture, ...]]:
        """What the row reads, by field."""
        single = {"mask_image": self.mask_image, "control_image": self.control_image}
        found = {"image": self.image} | {key: (picture,) for key, picture in single.items() if picture}
        return {key: pictures for key, pictures in found.items() if pictures}


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one compiled shape, at most ``size`` of them; the rest is padding."""

    rows: tuple[Row, ...]
    size: int
    pictures: tuple[Mapping[str, Any], ...] = ()  # what each row reads of its pictures, as the family prepares it

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows[0].height, self.rows[0].width

    @property
    def mode(self) -> Mode:
        return self.rows[0].mode


@dataclasses.dataclass(frozen=True, slots=True)
class Shard:
    """The unit of text encoding and of record compaction."""

    index: int
    batches: tuple[Batch, ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        return tuple(row for batch in self.batches for row in batch.rows)


@dataclasses.dataclass(frozen=True, slots=True)
class Reject:
    """A row (or a manifest line that never became one) that has no image, and why."""

    where: str
    reason: str
    id: str | None = None
    index: int | None = None
    prompt: str | None = None  # of a line that has one
