"""A deterministic reader of the scenes of `mixdq_ao.scenes`: what a picture shows, and how much of a caption is true.

The reader knows the drawing rules and never sees the caption while it reads. It takes the background from the top and
bottom rows, cuts out what differs from it, compares each piece with every shape and size, and leaves an attribute
None where nothing fits, so that noise earns no credit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations

import numpy as np
from PIL import Image

from mixdq_ao.errors import MixDQError
from mixdq_ao.scenes import (
    BACKGROUNDS,
    COLOURS,
    PICTURE_SIZE,
    SHAPES,
    SHIFT_STEP,
    SIZES,
    SPRITE_SIZE,
    TEXTURES,
    Scene,
    parse_caption,
    second_tone,
    slot_centre,
    split_centre,
    sprite,
)

ATTRIBUTES = ("count", "background", "fade", "shape", "colour", "size", "texture", "position")
FOREGROUND_DISTANCE = 45.0  # RGB distance from the background that makes a pixel part of an object
COLOUR_DISTANCE = 80.0  # farther from every named colour than this: no colour
MIN_PIXELS = 20
MIN_OVERLAP = 0.6  # intersection over union with the best shape
EDGE_COVERAGES = (0.15, 0.3, 0.5)  # the cut above keeps thinner edges the more an object stands out
MIN_TEXTURE_FIT = 0.35  # share of the colour variance inside an object that its texture explains
SLOT_DISTANCE = 6.0  # pixels from the centre of a slot
# a texture may lie up to a pixel off the place where the shape was found
_NUDGES = [(dx * SHIFT_STEP, dy * SHIFT_STEP) for dx in range(-2, 3) for dy in range(-2, 3)]


@dataclass(frozen=True)
class FoundObject:
    """One object as read; `centre` is (x, y) in pixels, None stands for "none that we know"."""

    shape: str | None
    colour: str | None
    size: str | None
    texture: str | None
    slot: int | None
    centre: tuple[float, float]


@dataclass(frozen=True)
class FoundScene:
    """What the reader found; `top == bottom` is a plain background."""

    objects: tuple[FoundObject, ...]
    top: str | None
    bottom: str | None


@dataclass(frozen=True)
class CaptionAccuracy:
    """`overall` is the share of all caption attributes found, in [0, 1]; `by_attribute` the same for each kind.

    `per_picture` is float64 [N], the share of each picture's own attributes.
    """

    overall: float
    by_attribute: dict[str, float]
    per_picture: np.ndarray


def read_picture(picture: np.ndarray | Image.Image) -> FoundScene:
    """Read one RGB picture: uint8 [H, W, 3] or a PIL image; other sizes than 64x64 are resampled first."""
    pixels = _as_pixels(picture)
    top, bottom = np.median(pixels[:2], axis=(0, 1)), np.median(pixels[-2:], axis=(0, 1))
    blend = ((np.arange(PICTURE_SIZE) + 0.5) / PICTURE_SIZE)[:, None, None]
    backdrop = (1 - blend) * top + blend * bottom
    foreground = np.linalg.norm(pixels - backdrop, axis=2) > FOREGROUND_DISTANCE
    objects = tuple(_read_object(pixels, piece) for piece in _pieces(foreground))
    return FoundScene(objects, _nearest(BACKGROUNDS, top), _nearest(BACKGROUNDS, bottom))


def _as_pixels(picture: np.ndarray | Image.Image) -> np.ndarray:
    """float32 [64, 64, 3] in 0..255."""
    if not isinstance(picture, Image.Image):
        picture = np.asarray(picture)
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            found = f"{picture.dtype} {list(picture.shape)}"
            raise MixDQError(f"a picture must be uint8 [height, width, 3] or a PIL image; got {found}")
        picture = Image.fromarray(picture)
    if picture.size != (PICTURE_SIZE, PICTURE_SIZE):
        picture = picture.resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.BOX)
    return np.asarray(picture.convert("RGB"), np.float32)


def _nearest(palette: dict[str, tuple[int, int, int]], tone: np.ndarray) -> str | None:
    distances = np.linalg.norm(np.array(list(palette.values())) - tone, axis=1)
    best = int(distances.argmin())
    return list(palette)[best] if distances[best] <= COLOUR_DISTANCE else None


def _pieces(foreground: np.ndarray) -> list[np.ndarray]:
    """Connected pieces (by edges) of a boolean picture, largest first, specks left out."""
    size = foreground.size
    labels = np.where(foreground, np.arange(size).reshape(foreground.shape), size)
    while True:
        padded = np.pad(labels, 1, constant_values=size)
        neighbours = [padded[1:-1, 1:-1], padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]]
        lowest = np.where(foreground, np.minimum.reduce(neighbours), size)
        if np.array_equal(lowest, labels):
            break
        labels = lowest
    names, counts = np.unique(labels[foreground], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [labels == names[i] for i in order if counts[i] >= MIN_PIXELS]


@cache
def _centroid(shape: str, size: str) -> tuple[float, float]:
    """Offset (x, y) of a shape's centroid from the object's centre, in pixels."""
    cover = sprite(shape, size, "plain")[0]
    axis = np.arange(SPRITE_SIZE) + 0.5 - SPRITE_SIZE / 2
    return float((cover.sum(0) @ axis) / cover.sum()), float((cover.sum(1) @ axis) / cover.sum())


def _placed(shape: str, size: str, x: float, y: float) -> np.ndarray:
    """Coverage of an untextured object centred at (x, y) over the whole picture, float32 [64, 64]."""
    left, top, dx, dy = split_centre(x, y)
    rows, columns = (slice(max(0, k), max(0, min(PICTURE_SIZE, k + SPRITE_SIZE))) for k in (top, left))
    frame = np.zeros((PICTURE_SIZE, PICTURE_SIZE), np.float32)
    cover = sprite(shape, size, "plain", dx, dy)[0]
    frame[rows, columns] = cover[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    return frame


def _on_grid(value: float) -> float:
    return round(value / SHIFT_STEP) * SHIFT_STEP


def _read_object(pixels: np.ndarray, piece: np.ndarray) -> FoundObject:
    rows, columns = np.nonzero(piece)
    x, y = columns.mean() + 0.5, rows.mean() + 0.5
    overlap, shape, size, centre = max(_overlaps(piece, x, y))
    if overlap < MIN_OVERLAP:
        colour = _nearest(COLOURS, np.median(pixels[piece], axis=0))
        return FoundObject(None, colour, None, None, _slot_at(x, y), (x, y))
    texture, colour = _read_paint(pixels, shape, size, *centre)
    return FoundObject(shape, colour, size, texture, _slot_at(*centre), centre)


def _overlaps(piece: np.ndarray, x: float, y: float) -> list[tuple[float, str, str, tuple[float, float]]]:
    """Intersection over union of a piece with every shape and size laid on its centroid (x, y)."""
    found = []
    for shape in SHAPES:
        for size in SIZES:
            dx, dy = _centroid(shape, size)
            centre = _on_grid(x - dx), _on_grid(y - dy)
            cover = _placed(shape, size, *centre)
            for edge in EDGE_COVERAGES:
                mask = cover > edge
                found.append(((mask & piece).sum() / (mask | piece).sum(), shape, size, centre))
    return found


def _read_paint(pixels: np.ndarray, shape: str, size: str, x: float, y: float) -> tuple[str | None, str | None]:
    """Texture and main colour of an object whose shape is known."""
    rows, columns = np.nonzero(_placed(shape, size, x, y) > 0.95)
    inside = pixels[rows, columns]
    if len(inside) == 0:
        return None, None
    if size == "large":
        tries, seconds = [], []
        for texture in TEXTURES[1:]:
            for dx, dy in _NUDGES:
                left, top, *rest = split_centre(x + dx, y + dy)
                tries.append(texture)
                seconds.append(sprite(shape, size, texture, *rest)[1][rows - top, columns - left])
        fits, mains, others = _two_tones(inside, np.stack(seconds))
        for k in np.argsort(-fits, kind="stable"):
            if fits[k] < MIN_TEXTURE_FIT:
                break
            if _is_texture_of(mains[k], others[k]):
                return tries[k], _nearest(COLOURS, mains[k])
    return "plain", _nearest(COLOURS, np.median(inside, axis=0))


def _two_tones(inside: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Least-squares fits of pixels [n, 3] by K second-tone coverages [K, n].

    Gives the share of variance explained [K], and the tones [K, 3] where the second tone covers 0 and where 1.
    """
    mean, cover = inside.mean(axis=0), second.mean(axis=1, keepdims=True)
    centred = second - cover
    power = (centred**2).sum(axis=1, keepdims=True) + 1e-6
    slope = centred @ (inside - mean) / power
    total = float(((inside - mean) ** 2).sum()) + 1e-6
    return power[:, 0] * (slope**2).sum(axis=1) / total, mean - slope * cover, mean + slope * (1 - cover)


def _is_texture_of(main: np.ndarray, other: np.ndarray) -> bool:
    """Whether two measured tones differ as a colour and its second tone do (not as noise, not the other way round)."""
    colour = _nearest(COLOURS, main)
    if colour is None:
        return False
    wanted = np.array(second_tone(colour)) - np.array(COLOURS[colour])
    return float((other - main) @ wanted) / float(wanted @ wanted) > 0.4


def _slot_at(x: float, y: float) -> int | None:
    distances = [float(np.hypot(x - cx, y - cy)) for cx, cy in map(slot_centre, range(9))]
    best = int(np.argmin(distances))
    return best if distances[best] <= SLOT_DISTANCE else None


# ----------------------------------------------------------------------------------------------------------- judging


def judge(found: FoundScene, scene: Scene) -> dict[str, tuple[int, int]]:
    """For each attribute kind, how many of the scene's attributes the picture shows, and how many there are.

    Objects are paired by where they are, never by what they look like, so that swapped colours count as wrong.
    The texture of small objects, which is always plain, is not counted.
    """
    score = {
        "count": (int(len(found.objects) == len(scene.objects)), 1),
        "background": (int(found.top == scene.top), 1),
        "fade": (int(found.bottom == scene.bottom), 1),
    }
    pairs = _pair(found.objects, scene)
    for name in ("shape", "colour", "size", "texture"):
        asked = [(f, o) for f, o in pairs if name != "texture" or o.size == "large"]
        hits = sum(f is not None and getattr(f, name) == getattr(o, name) for f, o in asked)
        score[name] = (hits, len(asked))
    score["position"] = (sum(f is not None and f.slot == o.slot for f, o in pairs), len(pairs))
    return score


def _pair(found: Sequence[FoundObject], scene: Scene) -> list[tuple[FoundObject | None, object]]:
    """Each object of the scene with the found one nearest to its place (least total distance), or None."""
    wanted = scene.objects
    candidates: list[FoundObject | None] = [*found[:6], *([None] * len(wanted))]
    best = min(permutations(candidates, len(wanted)), key=lambda chosen: _total_distance(chosen, wanted))
    return list(zip(best, wanted, strict=True))


def _total_distance(chosen: Sequence[FoundObject | None], wanted: Sequence) -> float:
    total = 0.0
    for item, target in zip(chosen, wanted, strict=True):
        x, y = slot_centre(target.slot)
        # an object more than half a picture away is no match at all
        far = PICTURE_SIZE / 2
        total += far if item is None else min(float(np.hypot(item.centre[0] - x, item.centre[1] - y)), 2 * far)
    return total


def caption_accuracy(
    pictures: Sequence[np.ndarray | Image.Image] | np.ndarray, captions: Sequence[str]
) -> CaptionAccuracy:
    """How much of each caption its picture shows.

    `pictures` is uint8 [N, H, W, 3] or a sequence of pictures as `read_picture` takes them; `captions` has N captions.
    """
    if len(pictures) != len(captions) or len(captions) == 0:
        raise MixDQError(f"need as many pictures as captions, at least one; got {len(pictures)} and {len(captions)}")
    return summarize([judge(read_picture(p), parse_caption(c)) for p, c in zip(pictures, captions, strict=True)])


def summarize(scores: Sequence[dict[str, tuple[int, int]]]) -> CaptionAccuracy:
    """The accuracy over several pictures from what `judge` says of each."""
    counts = np.array([[score[name] for name in ATTRIBUTES] for score in scores], float)
    hits, asked = counts.sum(axis=0).T
    by_attribute = {n: float(h / a) for n, h, a in zip(ATTRIBUTES, hits, asked, strict=True) if a > 0}
    per_picture = counts[..., 0].sum(axis=1) / counts[..., 1].sum(axis=1)
    return CaptionAccuracy(float(hits.sum() / asked.sum()), by_attribute, per_picture)
