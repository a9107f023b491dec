"""The reader: right on real drawings, wrong where the picture is wrong."""

import numpy as np
import pytest
from PIL import Image

from mixdq_ao import scenes
from mixdq_ao.errors import MixDQError
from mixdq_ao.scene_reader import caption_accuracy, judge, read_picture

FRESH = [scenes.sample_scene(10_000_000 + i) for i in range(500)]
CAPTIONS = [scene.caption for scene in FRESH]
PICTURES = np.stack([scenes.render(scene) for scene in FRESH])


def test_real_drawings_are_read():
    result = caption_accuracy(PICTURES, CAPTIONS)
    assert result.overall >= 0.98
    assert min(result.by_attribute.values()) >= 0.98
    assert result.per_picture.shape == (500,)


def test_noisy_drawings_are_read():
    noise = np.random.default_rng(0).normal(0, 12, PICTURES[:100].shape)
    noisy = np.clip(PICTURES[:100] + noise, 0, 255).astype(np.uint8)
    assert caption_accuracy(noisy, CAPTIONS[:100]).overall >= 0.98


def test_pictures_of_other_captions_fail():
    other = caption_accuracy(PICTURES[:150], CAPTIONS[1:151])
    assert other.overall < 0.3
    assert other.by_attribute["shape"] < 0.2
    assert other.by_attribute["colour"] < 0.2


@pytest.mark.parametrize("kind", ["noise", "grey", "static"])
def test_pictures_of_nothing_fail(kind):
    rng = np.random.default_rng(1)
    pictures = {
        "noise": rng.integers(0, 256, (40, 64, 64, 3)),
        "grey": np.full((40, 64, 64, 3), 128),
        "static": np.repeat(rng.integers(0, 256, (40, 8, 8, 3)), 8, axis=1).repeat(8, axis=2),
    }[kind].astype(np.uint8)
    assert caption_accuracy(pictures, CAPTIONS[:40]).overall < 0.15


def test_swapped_objects_are_wrong():
    right = "a large red circle left of a small green star on a white background"
    swapped = "a small green star left of a large red circle on a white background"
    score = judge(read_picture(scenes.render(scenes.parse_caption(swapped))), scenes.parse_caption(right))
    assert score["shape"] == score["colour"] == score["size"] == (0, 2)
    assert score["position"] == (2, 2)


@pytest.mark.parametrize(
    ("wrong", "attribute"),
    [
        ("a large striped blue circle in the centre on a white background", "colour"),
        ("a large striped red square in the centre on a white background", "shape"),
        ("a large dotted red circle in the centre on a white background", "texture"),
        ("a large red circle in the centre on a white background", "texture"),
        ("a small red circle in the centre on a white background", "size"),
        ("a large striped red circle at the left on a white background", "position"),
        ("a large striped red circle in the centre on a dark blue background", "background"),
        ("a large striped red circle in the centre on a white to light blue background", "fade"),
        (
            "a large striped red circle in the centre and a small red star at the top left on a white background",
            "count",
        ),
    ],
)
def test_each_attribute_can_fail(wrong, attribute):
    asked = scenes.parse_caption("a large striped red circle in the centre on a white background")
    hits, count = judge(read_picture(scenes.render(scenes.parse_caption(wrong))), asked)[attribute]
    assert (hits, count) == (0, 1)


def test_pictures_may_be_pil_or_larger():
    scene = FRESH[0]
    large = Image.fromarray(scenes.render(scene, size=128))
    assert caption_accuracy([large], [scene.caption]).overall == 1.0


def test_wrong_input_is_refused():
    with pytest.raises(MixDQError, match="uint8"):
        read_picture(np.zeros((64, 64, 3)))
    with pytest.raises(MixDQError, match="as many pictures"):
        caption_accuracy(PICTURES[:2], CAPTIONS[:3])
