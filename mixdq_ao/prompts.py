"""Where prompts come from: a text file, COCO captions, or what is built in."""

import itertools
import os
from pathlib import Path

from mixdq_ao.errors import CheckpointError, MixDQError
from mixdq_ao.files import parse_json, reading
from mixdq_ao.scenes import held_out_captions, is_held_out, sample_scene

MAX_BYTES = 2**30  # COCO's captions_train2017.json has 90 MB
# To calibrate with, and HELD_OUT to measure with: no prompt is in both.
BUILT_IN = (
    "a red fox sitting in fresh snow, photo",
    "a bowl of ramen with steam, food photography",
    "a lighthouse on a cliff at sunset, oil painting",
    "a small robot watering flowers, 3d render",
    "an old man with a beard, portrait photo",
    "a cat wearing a space suit, studio light",
    "a mountain lake with a wooden boat, morning mist",
    "a street market at night, neon signs, rain",
    "two children flying a kite on a beach",
    "a plate of pancakes with blueberries and syrup",
    "a black motorcycle parked in front of a brick wall",
    "a herd of elephants crossing a river, aerial view",
    "a castle in the clouds, fantasy illustration",
    "a bathroom with white tiles and a round mirror",
    "a train arriving at a small station in autumn",
    "a watercolour of a sailing boat in a storm",
    "a close-up of a bee on a yellow flower",
    "a chess board on a table by the window",
    "a baseball player swinging his bat at the ball",
    "a futuristic city with flying cars at dusk",
    "a golden retriever catching a frisbee in a park",
    "a still life with grapes, a skull and a candle",
    "a woman in a red coat walking through fog",
    "an astronaut riding a horse, pencil sketch",
    "a kitchen with wooden shelves and copper pots",
    "a snowboarder jumping over a slope, blue sky",
    "a stack of old books next to a cup of coffee",
    "a giraffe looking over a fence at a zoo",
    "a stained glass window with a peacock",
    "a vintage car on a desert road, film photo",
    "a pixel art dungeon with a treasure chest",
    "a jazz band on a stage, warm light",
)
HELD_OUT = (
    "a polar bear on drifting ice, documentary photo",
    "a cheese board with figs and walnuts, top view",
    "a windmill among tulip fields, impressionist painting",
    "a brass automaton playing the violin, 3d render",
    "a young dancer in mid-air, black and white photo",
    "a parrot wearing aviator goggles, studio portrait",
    "a waterfall in a rainforest, long exposure",
    "a quiet library with green reading lamps",
    "three surfers carrying their boards at dawn",
    "a slice of chocolate cake on a blue plate",
    "a yellow bicycle leaning on a wooden fence",
    "a flock of flamingos in shallow water, drone photo",
    "a dragon curled around a tower, ink drawing",
    "a living room with a grey sofa and many plants",
    "a double-decker bus on a bridge in heavy rain",
    "a pastel drawing of a harbour in winter",
    "a macro photo of dew on a spider web",
    "a typewriter and dried flowers on a desk",
    "a tennis player serving under floodlights",
    "an underwater city lit by jellyfish, concept art",
    "a black cat asleep on a stack of newspapers",
    "a still life with lemons and a pewter jug",
    "a fisherman mending nets on a pier at noon",
    "a knight in armour eating ice cream, comic style",
    "a bakery window full of bread and pastries",
    "a hot air balloon over vineyards, clear sky",
    "a pair of worn leather boots on a doorstep",
    "a zebra drinking at a waterhole with her foal",
    "a mosaic of a sun with a human face",
    "a steam locomotive crossing a stone viaduct",
    "an isometric model of a tiny island village",
    "a street violinist in the snow, shallow focus",
)


def read_prompts(path: str | os.PathLike, count: int | None = None) -> list[str]:
    """Prompts of a text file, one a line, or of a COCO captions file (``*.json``): the first caption of each picture,
    in the order of the file. ``count`` takes the first so many.

    Raises ``MixDQError`` for a file that is neither, is empty, or has fewer than ``count``.
    """
    path = Path(path)
    found = _coco(path) if path.suffix == ".json" else _lines(path)
    if not found:
        raise MixDQError(f"{path}: the file holds no prompts")
    return _first(found, count, str(path))


def built_in_prompts(
    count: int | None = None, *, scenes: bool = False, held_out: bool = False, seed: int = 0
) -> list[str]:
    """Prompts that come along: 32 everyday ones, or with ``scenes`` any number of captions for our own small model.

    Calibration takes these; ``held_out`` takes others to measure quality on, so that those pictures are new to it: 32
    more everyday ones, or captions that the small model has not seen in training either.
    """
    if not scenes:
        return _first(list(HELD_OUT if held_out else BUILT_IN), count, "the list of built-in prompts")
    count = len(BUILT_IN) if count is None else count
    if held_out:
        return held_out_captions(count, seed)
    drawn = (sample_scene(number).caption for number in itertools.count(seed))
    return list(itertools.islice((caption for caption in drawn if not is_held_out(caption)), count))


def _first(found: list[str], count: int | None, where: str) -> list[str]:
    if count is not None and not 0 < count <= len(found):
        raise MixDQError(f"{where} has {len(found)} prompts; {count} were asked for")
    return found[:count]


def _read(path: Path) -> str:
    with reading(path) as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise CheckpointError(path, "", f"must be at most {MAX_BYTES} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(path, "", "must be UTF-8 text", str(error)) from error


def _lines(path: Path) -> list[str]:
    return [text for text in (line.strip() for line in _read(path).splitlines()) if text]


def _coco(path: Path) -> list[str]:
    content = parse_json(path, "", _read(path))
    rows = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise CheckpointError(path, "annotations", "must be the list of captions of a COCO captions file")
    captions: dict[int, str] = {}
    for position, row in enumerate(rows):
        if not (isinstance(row, dict) and isinstance(row.get("caption"), str) and isinstance(row.get("image_id"), int)):
            raise CheckpointError(
                path, f"annotations[{position}]", "must have a caption and an image_id", repr(row)[:80]
            )
        captions.setdefault(row["image_id"], " ".join(row["caption"].split()))
    # COCO lists captions by annotation and pictures in an order of their own; without pictures, annotations decide.
    images = [image["id"] for image in content.get("images", ()) if isinstance(image, dict) and "id" in image]
    order = [number for number in images if number in captions] or list(captions)
    return [captions[number] for number in order if captions[number]]
