"""What flux-mini learns from: emoji drawn on plain backgrounds, and the words for them.

A ``Scene`` is a caption and what it shows; ``render`` draws it. Every picture is a function of the
random generator it was sampled with, so the data set is this file and a seed.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")  # Debian: fonts-noto-color-emoji, OFL 1.1
FONT_SIZE = 109  # the only size of the font's bitmaps

OBJECTS = {
    "apple": "🍎",
    "banana": "🍌",
    "grapes": "🍇",
    "watermelon": "🍉",
    "lemon": "🍋",
    "pineapple": "🍍",
    "strawberry": "🍓",
    "cherries": "🍒",
    "carrot": "🥕",
    "mushroom": "🍄",
    "avocado": "🥑",
    "pizza": "🍕",
    "hamburger": "🍔",
    "doughnut": "🍩",
    "cake": "🎂",
    "ice cream": "🍦",
    "popcorn": "🍿",
    "cat": "🐱",
    "dog": "🐶",
    "fox": "🦊",
    "panda": "🐼",
    "lion": "🦁",
    "pig": "🐷",
    "frog": "🐸",
    "monkey": "🐵",
    "rabbit": "🐰",
    "unicorn": "🦄",
    "penguin": "🐧",
    "owl": "🦉",
    "fish": "🐠",
    "whale": "🐳",
    "octopus": "🐙",
    "crab": "🦀",
    "turtle": "🐢",
    "snail": "🐌",
    "bee": "🐝",
    "butterfly": "🦋",
    "car": "🚗",
    "bus": "🚌",
    "rocket": "🚀",
    "sailboat": "⛵",
    "balloon": "🎈",
    "gift": "🎁",
    "guitar": "🎸",
    "alarm clock": "⏰",
    "light bulb": "💡",
    "camera": "📷",
    "crown": "👑",
    "soccer ball": "⚽",
    "basketball": "🏀",
    "trophy": "🏆",
    "heart": "❤",
    "star": "⭐",
    "snowman": "⛄",
    "fire": "🔥",
    "palm tree": "🌴",
    "cactus": "🌵",
    "sunflower": "🌻",
    "rose": "🌹",
    "robot": "🤖",
    "ghost": "👻",
    "alien": "👽",
    "pumpkin": "🎃",
    "house": "🏠",
    "key": "🔑",
}
# Said now and then, so that "a red apple" is as good as "an apple".
ADJECTIVES = {
    "apple": "red", "banana": "yellow", "grapes": "purple", "lemon": "yellow", "strawberry": "red", "carrot": "orange",
    "frog": "green", "fox": "orange", "pig": "pink", "whale": "blue", "octopus": "purple",
    "crab": "red", "turtle": "green", "butterfly": "blue", "car": "red", "balloon": "red", "heart": "red",
    "star": "yellow", "cactus": "green", "rose": "red", "pumpkin": "orange", "crown": "golden",
}  # fmt: skip
COLORS = {
    "red": (214, 48, 49),
    "orange": (245, 146, 46),
    "yellow": (250, 222, 96),
    "green": (72, 168, 86),
    "blue": (58, 108, 214),
    "purple": (128, 72, 178),
    "pink": (248, 172, 204),
    "white": (252, 252, 252),
    "gray": (140, 144, 150),
    "black": (22, 22, 28),
}
PAPER, PENCIL = np.float32([250, 248, 240]), np.float32([50, 50, 60])
SHAPES = ((128, 128), (128, 192), (192, 128))  # height, width
PLACES = ("left", "right", "top", "bottom")
PLURAL = {"grapes", "cherries", "popcorn", "fire"}  # these take no article

CENTERED, PLACED, PAIRED = 88, 56, 52  # pixels of an object's longer side
CENTER_TEMPLATES = (
    "{o} on {ac} background", "{o}, {c} background", "{o} against {ac} backdrop", "{c} background with {o}",
    "a picture of {o} on {c}", "an emoji of {o}, {c} backdrop", "{o} in the center of {ac} background", "{o} on {c}",
    "a drawing of {o} in front of {ac} wall", "{o} in the middle, {c} background",
)  # fmt: skip
PLACE_TEMPLATES = (
    "{o} {p} on {ac} background",
    "{o} {p}, {c} background",
    "a small {o1} {p}, {c} backdrop",
    "{c} background, {o} {p}",
    "{o} {p} of {ac} background",
    "a picture of {o} {p} on {c}",
)
PLACE_WORDS = ("at the {p}", "on the {p}", "on the {p} side", "at the {p} side")
PAIR_TEMPLATES = (
    "{o} {r} {q} on {ac} background",
    "{o} {r} {q}, {c} background",
    "{o} {r} {q}, {c} backdrop",
    "{c} background, {o} {r} {q}",
    "a picture of {o} {r} {q} on {c}",
)
# relation → where the first object goes; the second takes the opposite side
RELATIONS = {
    "left of": "left", "to the left of": "left", "and": "left", "next to": "left", "right of": "right",
    "to the right of": "right", "above": "top", "over": "top", "below": "bottom", "under": "bottom",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Item:
    name: str
    x: int  # of the object's centre, pixels
    y: int
    size: int  # of its longer side


@dataclasses.dataclass(frozen=True)
class Scene:
    caption: str
    color: str
    items: tuple[Item, ...]
    height: int = 128
    width: int = 128
    place: str | None = None


def held_out(name: str, color: str) -> bool:
    """Whether this pair is kept from training: about one in six, the same on every machine."""
    return zlib.crc32(f"{name}/{color}".encode()) % 6 == 0


@functools.cache
def drawing(name: str) -> Image.Image:
    """The font's picture of an object, cropped."""
    image = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(image).text((12, 12), OBJECTS[name], font=font(), embedded_color=True)
    return image.crop(image.getchannel("A").getbbox())


@functools.cache
def font() -> ImageFont.FreeTypeFont:
    if not FONT.exists():
        raise SystemExit(f"{FONT}: not found; on Debian: apt-get install fonts-noto-color-emoji")
    return ImageFont.truetype(str(FONT), FONT_SIZE)


@functools.cache
def sprite(name: str, size: int) -> np.ndarray:
    """``[h, w, 4]`` float32 in 0..1, premultiplied; the longer side is ``size`` pixels."""
    image = drawing(name)
    scale = size / max(image.size)
    image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    rgba = np.asarray(image, np.float32) / 255
    return np.concatenate([rgba[..., :3] * rgba[..., 3:], rgba[..., 3:]], axis=-1)


def render(scene: Scene) -> np.ndarray:
    """``[height, width, 3]`` uint8."""
    image = np.empty((scene.height, scene.width, 3), np.float32)
    image[:] = np.float32(COLORS[scene.color]) / 255
    for item in scene.items:
        rgba = sprite(item.name, item.size)
        h, w = rgba.shape[:2]
        y, x = item.y - h // 2, item.x - w // 2
        window = image[y : y + h, x : x + w]
        window *= 1 - rgba[..., 3:]
        window += rgba[..., :3]
    return (np.clip(image, 0, 1) * 255).round().astype(np.uint8)


def pixel_art(image: np.ndarray, block: int = 8) -> np.ndarray:
    """A picture ``[h, w, 3]`` uint8 in squares of ``block`` pixels."""
    h, w, _ = image.shape
    small = image.reshape(h // block, block, w // block, block, 3).mean((1, 3))
    return small.round().astype(np.uint8).repeat(block, axis=0).repeat(block, axis=1)


def outline(image: np.ndarray) -> np.ndarray:
    """A picture ``[h, w, 3]`` uint8 as a pencil draws it: its edges on paper."""
    soft = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(1.0)), np.float32)
    dy, dx = np.gradient(soft, axis=(0, 1))
    lead = np.clip((np.hypot(dx, dy).max(axis=-1, keepdims=True) - 6) / 26, 0, 1)
    return (PAPER + (PENCIL - PAPER) * lead).round().astype(np.uint8)


STYLES = {"pixel-art": pixel_art, "outline": outline}  # what the adapters learn


def spot(place: str, height: int, width: int, size: int) -> tuple[int, int]:
    """Centre (x, y) of an object of this size that lies at a side."""
    margin = size // 2 + 5
    return {
        "left": (margin, height // 2), "right": (width - margin, height // 2),
        "top": (width // 2, margin), "bottom": (width // 2, height - margin),
    }[place]  # fmt: skip


def opposite(place: str) -> str:
    return {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}[place]


def phrase(name: str, rng: np.random.Generator, article: bool = True) -> str:
    """The object in words: "a red apple", "apple", "an owl"."""
    words = f"{ADJECTIVES[name]} {name}" if name in ADJECTIVES and rng.random() < 0.25 else name
    if not article or name in PLURAL or rng.random() < 0.2:
        return words
    return f"{'an' if (words[0] in 'aeiou' and not words.startswith('un')) or words.startswith('umb') else 'a'} {words}"


def make(rng: np.random.Generator, names: tuple[str, ...], color: str, place: str | None, shape=(128, 128)) -> Scene:
    """One object (at a ``place`` or, if None, in the centre) or two (the first at ``place``)."""
    height, width = shape
    pick = lambda options: options[rng.integers(len(options))]  # noqa: E731
    jitter = lambda n: int(rng.integers(-n, n + 1))  # noqa: E731
    words = {
        "o": phrase(names[0], rng),
        "o1": phrase(names[0], rng, article=False),
        "c": color,
        "ac": f"{'an' if color == 'orange' else 'a'} {color}",
    }
    if place is None:
        size = round(CENTERED * pick((0.95, 1.0, 1.05)))
        items = (Item(names[0], width // 2 + jitter(2), height // 2 + jitter(2), size),)
        # Now and then nothing is said of the background: white it is.
        caption = words["o"] if color == "white" and rng.random() < 0.3 else pick(CENTER_TEMPLATES).format(**words)
        return Scene(caption, color, items, height, width)
    if len(names) == 1:
        x, y = spot(place, height, width, PLACED)
        items = (Item(names[0], x + jitter(2), y + jitter(2), PLACED),)
        caption = pick(PLACE_TEMPLATES).format(**words, p=pick(PLACE_WORDS).format(p=place))
        return Scene(caption, color, items, height, width, place)
    spots = (place, opposite(place))
    items = tuple(
        Item(name, x + jitter(2), y + jitter(2), PAIRED)
        for name, (x, y) in zip(names, (spot(s, height, width, PAIRED) for s in spots), strict=True))  # fmt: skip
    relation = pick([r for r, side in RELATIONS.items() if side == place])
    caption = pick(PAIR_TEMPLATES).format(**words, q=phrase(names[1], rng), r=relation)
    return Scene(caption, color, items, height, width, place)


def sample(rng: np.random.Generator, shape: tuple[int, int] = (128, 128)) -> Scene:
    """A training scene: half centred, a third at a side, the rest pairs; never a held-out pair."""
    names, colors = list(OBJECTS), list(COLORS)
    kind = rng.random()
    while True:
        color = colors[rng.integers(len(colors))]
        chosen = tuple(names[i] for i in rng.choice(len(names), 2 if kind > 0.85 else 1, replace=False))
        if not any(held_out(name, color) for name in chosen):
            break
    place = None if kind < 0.5 else PLACES[rng.integers(4)]
    return make(rng, chosen, color, place, shape)


def held_out_scenes(count: int = 200, seed: int = 0) -> list[Scene]:
    """For the evaluation: held-out pairs only, every other one at a named place."""
    rng = np.random.default_rng(seed)
    pairs = [(name, color) for name in OBJECTS for color in COLORS if held_out(name, color)]
    order = rng.permutation(len(pairs))
    return [
        make(
            rng,
            (pairs[order[i % len(pairs)]][0],),
            pairs[order[i % len(pairs)]][1],
            PLACES[i // 2 % 4] if i % 2 else None,
        )
        for i in range(count)
    ]
