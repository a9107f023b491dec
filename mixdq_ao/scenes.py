"""Captioned scenes drawn by our own code: sampling, captions, parsing and drawing.

A scene holds one to three flat objects on a plain or fading background. Its caption states everything that can be
seen except a small common shift of the objects (at most `MAX_SHIFT` pixels), so that a picture can be judged from its
caption alone (`mixdq_ao.scene_reader`). Lengths are in pixels of the 64x64 picture, x to the right and y down;
colours are RGB in 0..255.
"""

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np

from mixdq_ao.errors import MixDQError

PICTURE_SIZE = 64
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart")
SIZES = ("small", "large")
TEXTURES = ("plain", "striped", "dotted", "checkered")
COLOURS = {
    "red": (215, 30, 35),
    "orange": (250, 135, 10),
    "yellow": (250, 225, 30),
    "green": (30, 170, 55),
    "cyan": (0, 215, 225),
    "blue": (35, 75, 235),
    "purple": (135, 40, 190),
    "pink": (255, 115, 190),
}
BACKGROUNDS = {
    "black": (12, 12, 12),
    "grey": (125, 125, 125),
    "white": (245, 245, 245),
    "dark blue": (20, 25, 85),
    "dark green": (10, 60, 35),
    "brown": (90, 55, 30),
    "light blue": (185, 215, 245),
    "cream": (250, 238, 200),
}
RADIUS = {"small": 7.0, "large": 13.0}
SLOT_CENTRES = (17.0, 32.0, 47.0)
POSITIONS = (
    "at the top left",
    "at the top",
    "at the top right",
    "at the left",
    "in the centre",
    "at the right",
    "at the bottom left",
    "at the bottom",
    "at the bottom right",
)
# relation -> slots of the first and of the second object
RELATIONS = {"left of": (3, 5), "right of": (5, 3), "above": (1, 7), "below": (7, 1)}
SHIFT_STEP = 0.5
MAX_SHIFT = 1.5
SPRITE_SIZE = 34
MIN_GAP = 3.0
MIN_CONTRAST = 75.0
HELD_OUT_ONE_IN = 16
_SUPERSAMPLE = 8


@dataclass(frozen=True)
class SceneObject:
    """One object; `slot` is 0..8, row by row over the 3x3 grid of positions. Small objects are always plain."""

    shape: str
    colour: str
    size: str
    texture: str
    slot: int

    @property
    def phrase(self) -> str:
        """The object's part of a caption without its position, as "a large striped red circle"."""
        texture = "" if self.texture == "plain" else f"{self.texture} "
        return f"a {self.size} {texture}{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What a picture shows. `top == bottom` is a plain background; `shift` (dx, dy) is not in the caption."""

    objects: tuple[SceneObject, ...]
    relation: str | None
    top: str
    bottom: str
    shift: tuple[float, float] = (0.0, 0.0)

    @property
    def caption(self) -> str:
        """One line of lower-case English; `parse_caption` inverts it."""
        if self.relation is not None:
            first, second = self.objects
            objects = f"{first.phrase} {self.relation} {second.phrase}"
        else:
            placed = [f"{o.phrase} {POSITIONS[o.slot]}" for o in self.objects]
            objects = " and ".join([", ".join(placed[:-1]), placed[-1]]) if len(placed) > 1 else placed[0]
        fade = "" if self.top == self.bottom else f" to {self.bottom}"
        return f"{objects} on a {self.top}{fade} background"


def slot_centre(slot: int) -> tuple[float, float]:
    """Centre (x, y) of slot 0..8 in pixels."""
    return SLOT_CENTRES[slot % 3], SLOT_CENTRES[slot // 3]


def second_tone(colour: str) -> tuple[float, float, float]:
    """RGB of the other tone of a texture: a light tint of dark colours, a dark shade of light ones."""
    red, green, blue = COLOURS[colour]
    if 0.3 * red + 0.59 * green + 0.11 * blue < 120:
        return tuple(value + 0.7 * (255 - value) for value in (red, green, blue))
    return tuple(0.4 * value for value in (red, green, blue))


# ---------------------------------------------------------------------------------------------------------- sampling


def sample_scene(seed: int) -> Scene:
    """The scene number `seed` of an endless sequence; the same on every machine."""
    rng = random.Random(int(seed))
    count = _pick(rng, (1, 1, 1, 2, 2, 2, 2, 3, 3, 3))
    relation = _pick(rng, tuple(RELATIONS)) if count == 2 and rng.random() < 0.6 else None
    while True:
        looks = [_sample_look(rng) for _ in range(count)]
        slots = RELATIONS[relation] if relation else _sample_slots(rng, [look[2] for look in looks])
        if slots is not None:
            break
    objects = tuple(SceneObject(*look, slot) for look, slot in zip(looks, slots, strict=True))
    top, bottom = _sample_background(rng, objects)
    steps = int(2 * MAX_SHIFT / SHIFT_STEP) + 1
    shift = tuple(int(rng.random() * steps) * SHIFT_STEP - MAX_SHIFT for _ in range(2))
    return Scene(objects, relation, top, bottom, shift)


def _pick(rng: random.Random, options: tuple) -> object:
    # random() alone, because only its sequence is promised to be the same in every Python version
    return options[int(rng.random() * len(options))]


def _sample_look(rng: random.Random) -> tuple[str, str, str, str]:
    size = _pick(rng, SIZES)
    texture = _pick(rng, TEXTURES) if size == "large" else "plain"
    return _pick(rng, SHAPES), _pick(rng, tuple(COLOURS)), size, texture


def _sample_slots(rng: random.Random, sizes: list[str]) -> list[int] | None:
    """Slots in which objects of these sizes do not touch, or None when a few tries found none."""
    for _ in range(20):
        slots = [_pick(rng, range(9)) for _ in sizes]
        pairs = [(a, b) for a in range(len(slots)) for b in range(a)]
        if all(_apart(slots[a], slots[b], RADIUS[sizes[a]] + RADIUS[sizes[b]] + MIN_GAP) for a, b in pairs):
            return slots
    return None


def _apart(slot: int, other: int, distance: float) -> bool:
    (x0, y0), (x1, y1) = slot_centre(slot), slot_centre(other)
    return (x0 - x1) ** 2 + (y0 - y1) ** 2 >= distance**2


def _sample_background(rng: random.Random, objects: tuple[SceneObject, ...]) -> tuple[str, str]:
    """A background on which every object stands out; one always exists, the tests count them."""
    names = tuple(BACKGROUNDS)
    while True:
        top = _pick(rng, names)
        bottom = _pick(rng, names) if rng.random() < 0.4 else top
        if all(_stands_out(o.colour, o.texture != "plain", top, bottom) for o in objects):
            return top, bottom


@cache
def _stands_out(colour: str, textured: bool, top: str, bottom: str) -> bool:
    tones = [COLOURS[colour]] + ([second_tone(colour)] if textured else [])
    blend = np.linspace(0, 1, 9)[:, None]
    backdrop = (1 - blend) * np.array(BACKGROUNDS[top]) + blend * np.array(BACKGROUNDS[bottom])
    return all(np.linalg.norm(backdrop - tone, axis=1).min() >= MIN_CONTRAST for tone in np.array(tones))


def is_held_out(caption: str) -> bool:
    """Whether a caption belongs to the one in `HELD_OUT_ONE_IN` that training must never see."""
    return hashlib.blake2s(caption.encode()).digest()[0] % HELD_OUT_ONE_IN == 0


def held_out_scenes(seed: int) -> Iterator[Scene]:
    """Endless scenes with distinct held-out captions, far from the seeds that training uses."""
    seen = set()
    number = (int(seed) + 1) << 40
    while True:
        scene = sample_scene(number)
        number += 1
        if is_held_out(scene.caption) and scene.caption not in seen:
            seen.add(scene.caption)
            yield scene


def held_out_captions(n: int, seed: int = 0) -> list[str]:
    """`n` distinct held-out captions."""
    scenes = held_out_scenes(seed)
    return [next(scenes).caption for _ in range(n)]


# ----------------------------------------------------------------------------------------------------------- parsing

_OBJECT = rf"a ({'|'.join(SIZES)}) (?:({'|'.join(TEXTURES[1:])}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_PLACED = re.compile(rf"{_OBJECT} ({'|'.join(sorted(POSITIONS, key=len, reverse=True))})")
_RELATED = re.compile(rf"{_OBJECT} ({'|'.join(RELATIONS)}) {_OBJECT}")
_NAMES = "|".join(BACKGROUNDS)
_CAPTION = re.compile(rf"(.+) on a ({_NAMES})(?: to ({_NAMES}))? background")


def parse_caption(caption: str) -> Scene:
    """The scene that a caption describes, with shift (0, 0); anything outside the grammar is an error."""
    whole = _CAPTION.fullmatch(caption.strip().lower())
    if whole is None:
        raise _grammar_error(caption, 'it must end in "on a <colour> background"')
    body, top, bottom = whole.groups()
    related = _RELATED.fullmatch(body)
    if related is not None:
        found = related.groups()
        relation = found[4]
        parts = [found[:4], found[5:]]
        objects = tuple(_object(p, slot) for p, slot in zip(parts, RELATIONS[relation], strict=True))
    else:
        relation = None
        matches = [_PLACED.fullmatch(part) for part in re.split(r", | and ", body)]
        if len(matches) > 3 or not all(matches):
            raise _grammar_error(
                caption, "its objects must be one to three, each with a position, or two and a relation"
            )
        objects = tuple(_object(m.groups()[:4], POSITIONS.index(m.group(5))) for m in matches)
    scene = Scene(objects, relation, top, bottom or top)
    if any(o.size == "small" and o.texture != "plain" for o in objects):
        raise _grammar_error(caption, "small objects have no texture")
    return scene


def _object(words: tuple, slot: int) -> SceneObject:
    size, texture, colour, shape = words
    return SceneObject(shape, colour, size, texture or "plain", slot)


def _grammar_error(caption: str, rule: str) -> MixDQError:
    example = sample_scene(0).caption
    return MixDQError(f"not a scene caption: {rule}; got {caption!r}; write it like {example!r}")


# ----------------------------------------------------------------------------------------------------------- drawing


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points (x, y), in units of the object's radius, lie inside a shape."""
    if shape == "circle":
        return np.hypot(x, y) <= 0.95
    if shape == "square":
        return np.maximum(abs(x), abs(y)) <= 0.82
    if shape == "triangle":
        return (y <= 0.78) & (abs(x) <= 0.55 * (y + 1))
    if shape == "diamond":
        return abs(x) / 0.72 + abs(y) <= 1
    if shape == "star":
        return _inside_star(x, y + 0.05)
    if shape == "cross":
        return (np.minimum(abs(x), abs(y)) <= 0.3) & (np.maximum(abs(x), abs(y)) <= 0.92)
    if shape == "ring":
        return abs(np.hypot(x, y) - 0.75) <= 0.2
    u, v = 1.22 * x, 0.18 - 1.22 * y
    return (u**2 + v**2 - 1) ** 3 <= u**2 * v**3


def _inside_star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Five points, outer radius 1.05, inner 0.45: folded into one half point and cut by its straight edge."""
    angle = np.arctan2(x, -y)
    sector = 2 * np.pi / 5
    folded = abs((angle + sector / 2) % sector - sector / 2)
    radius = np.hypot(x, y)
    px, py = radius * np.sin(folded), radius * np.cos(folded)
    tip_y, dent_x, dent_y = 1.05, 0.45 * np.sin(sector / 2), 0.45 * np.cos(sector / 2)
    return px * (tip_y - dent_y) + (py - tip_y) * dent_x <= 0


def _second_tone_mask(texture: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Where a texture shows its second tone; x, y in pixels from the object's centre."""
    if texture == "striped":
        return (y + 1.5) % 6 >= 3
    if texture == "checkered":
        return (np.floor(x / 4.5) + np.floor(y / 4.5)) % 2 == 1
    if texture == "dotted":
        return np.hypot((x + 3) % 6 - 3, (y + 3) % 6 - 3) <= 1.8
    return np.zeros(x.shape, bool)


@lru_cache(maxsize=4096)
def sprite(shape: str, size: str, texture: str, dx: float = 0.0, dy: float = 0.0, scale: int = 1) -> np.ndarray:
    """Coverage of an object and of its second tone, float32 [2, P, P] in 0..1, P = `SPRITE_SIZE` * scale.

    The object's centre lies (dx, dy) pixels from the middle of the sprite.
    """
    samples = SPRITE_SIZE * scale * _SUPERSAMPLE
    axis = (np.arange(samples) + 0.5) / (scale * _SUPERSAMPLE) - SPRITE_SIZE / 2
    x, y = axis[None, :] - dx, axis[:, None] - dy
    x, y = np.broadcast_arrays(x, y)
    inside = _inside(shape, x / RADIUS[size], y / RADIUS[size])
    both = np.stack([inside, inside & _second_tone_mask(texture, x, y)])
    cells = both.reshape(2, SPRITE_SIZE * scale, _SUPERSAMPLE, SPRITE_SIZE * scale, _SUPERSAMPLE)
    coverage = cells.mean(axis=(2, 4), dtype=np.float32)
    coverage.setflags(write=False)
    return coverage


def split_centre(x: float, y: float) -> tuple[int, int, float, float]:
    """Left and top pixel of a sprite centred near (x, y), and the rest (dx, dy), each 0 or `SHIFT_STEP`."""
    left, top = np.floor(x), np.floor(y)
    half = SPRITE_SIZE // 2
    return int(left) - half, int(top) - half, float(x - left), float(y - top)


def render(scene: Scene, size: int = PICTURE_SIZE) -> np.ndarray:
    """Draw a scene: uint8 [size, size, 3], anti-aliased; size is a multiple of 64."""
    if size <= 0 or size % PICTURE_SIZE:
        raise MixDQError(f"the picture size must be a positive multiple of {PICTURE_SIZE}; got {size}")
    scale = size // PICTURE_SIZE
    blend = ((np.arange(size) + 0.5) / size)[:, None, None]
    rows = (1 - blend) * np.array(BACKGROUNDS[scene.top]) + blend * np.array(BACKGROUNDS[scene.bottom])
    pad = SPRITE_SIZE * scale
    canvas = np.pad(np.broadcast_to(rows, (size, size, 3)), ((pad, pad), (pad, pad), (0, 0)))
    for item in scene.objects:
        x, y = slot_centre(item.slot)
        left, top, dx, dy = split_centre(x + scene.shift[0], y + scene.shift[1])
        cover, second = sprite(item.shape, item.size, item.texture, dx, dy, scale)[..., None]
        window = canvas[top * scale + pad :, left * scale + pad :][:pad, :pad]
        tones = np.array(COLOURS[item.colour]) * (cover - second) + np.array(second_tone(item.colour)) * second
        window[...] = window * (1 - cover) + tones
    return np.rint(canvas[pad:-pad, pad:-pad]).astype(np.uint8)
