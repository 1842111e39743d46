"""What flux-mini-kontext learns from: a picture, what is to be done with it, and the picture that comes out."""

from __future__ import annotations

import dataclasses

import data
import numpy as np

RECOLOR = (
    "make the background {c}", "change the background to {c}", "turn the background {c}", "{c} background",
    "put it on {ac} background", "put the {a} on {ac} background",
)  # fmt: skip
SWAP = (
    "replace the {a} with {b}", "turn the {a} into {b}", "change the {a} to {b}", "turn it into {b}", "make it {b}",
    "{b} instead of the {a}",
)  # fmt: skip
MOVE = ("move it {p}", "move the {a} {p}", "put it {p}", "put the {a} {p}")
MOVE_WORDS = ("to the {p}", "to the {p} side", "at the {p}", "on the {p} side")
CENTER_WORDS = ("to the center", "in the center", "in the middle")
OUTLINE = (
    "draw it as a pencil outline", "make it a pencil outline", "turn it into a pencil outline",
    "draw the {a} as a pencil outline", "a pencil outline of the {a}",
)  # fmt: skip
KINDS = ("recolor", "swap", "move", "outline")


@dataclasses.dataclass(frozen=True)
class Edit:
    """``before`` becomes ``after`` as the instruction says; an outline is drawn of ``after``."""

    kind: str
    instruction: str
    before: data.Scene
    after: data.Scene

    def pictures(self) -> tuple[np.ndarray, np.ndarray]:
        """``[h, w, 3]`` uint8, before and after."""
        after = data.render(self.after)
        return data.render(self.before), data.outline(after) if self.kind == "outline" else after


def _scene(rng: np.random.Generator, name: str, color: str, place: str | None, size: int) -> data.Scene:
    """One object: ``place`` None is the centre."""
    x, y = data.spot(place, 128, 128, size) if place else (64, 64)
    jitter = rng.integers(-2, 3, 2)
    return data.Scene("", color, (data.Item(name, x + int(jitter[0]), y + int(jitter[1]), size),), place=place)


def make(rng: np.random.Generator, kind: str, name: str, color: str, place: str | None) -> Edit:
    """An edit that ends with this object on this colour at this place, all else drawn at random."""
    pick = lambda options: options[rng.integers(len(options))]  # noqa: E731
    size = data.PLACED if place or kind == "move" else round(data.CENTERED * pick((0.95, 1.0, 1.05)))
    after = _scene(rng, name, color, place, size)
    words = {"c": color, "ac": f"{'an' if color == 'orange' else 'a'} {color}", "b": data.phrase(name, rng)}
    before = after
    if kind == "recolor":
        other = pick([c for c in data.COLORS if c != color])
        before, template = dataclasses.replace(after, color=other), pick(RECOLOR)
    elif kind == "swap":
        other = pick([o for o in data.OBJECTS if o != name])
        before = dataclasses.replace(after, items=(dataclasses.replace(after.items[0], name=other),))
        template = pick(SWAP)
    elif kind == "move":
        before = _scene(rng, name, color, pick([p for p in (*data.PLACES, None) if p != place]), size)
        # all that the words say: a place, and not two pixels of it
        x, y = data.spot(place, 128, 128, size) if place else (64, 64)
        after = dataclasses.replace(after, items=(data.Item(name, x, y, size),))
        template = pick(MOVE)
        words["p"] = pick(MOVE_WORDS).format(p=place) if place else pick(CENTER_WORDS)
    else:
        template = pick(OUTLINE)
    return Edit(kind, template.format(**words, a=before.items[0].name), before, after)


def sample(rng: np.random.Generator) -> Edit:
    """For training: no held-out pair on either side."""
    names, colors = list(data.OBJECTS), list(data.COLORS)
    while True:
        place = (*data.PLACES, None, None, None, None)[rng.integers(8)]
        kind = KINDS[rng.choice(4, p=(0.25, 0.3, 0.2, 0.25))]
        edit = make(rng, kind, names[rng.integers(len(names))], colors[rng.integers(len(colors))], place)
        if not any(data.held_out(s.items[0].name, s.color) for s in (edit.before, edit.after)):
            return edit


def held_out_edits(count: int = 200, seed: int = 0) -> list[Edit]:
    """For the evaluation: the kinds in turn, each ending with a held-out pair."""
    rng = np.random.default_rng(seed)
    pairs = [(name, color) for name in data.OBJECTS for color in data.COLORS if data.held_out(name, color)]
    order = rng.permutation(len(pairs))
    places = (*data.PLACES, None, None)
    return [make(rng, KINDS[i % 4], *pairs[order[i % len(pairs)]], places[i // 4 % len(places)]) for i in range(count)]
