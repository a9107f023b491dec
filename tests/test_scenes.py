"""Scenes: deterministic, endless, many, captions that say what the pictures show."""

from dataclasses import replace

import numpy as np
import pytest

from mixdq_ao import scenes
from mixdq_ao.errors import MixDQError

SAMPLE = [scenes.sample_scene(seed) for seed in range(20_000)]


def test_the_same_seed_gives_the_same_scene_and_picture():
    assert scenes.sample_scene(3) == scenes.sample_scene(3)
    assert scenes.sample_scene(3) != scenes.sample_scene(4)
    first = scenes.render(scenes.sample_scene(3))
    scenes.sprite.cache_clear()
    assert np.array_equal(first, scenes.render(scenes.sample_scene(3)))


def test_scenes_are_the_same_on_every_machine():
    # drawn once and written down: training data must not change with the Python or numpy version
    assert SAMPLE[0].caption == (
        "a large striped cyan triangle at the top right, a small yellow ring at the bottom left"
        " and a small pink star at the bottom right on a brown background"
    )
    assert scenes.held_out_captions(1, seed=0) == ["a large striped blue diamond at the top left on a brown background"]
    assert int(scenes.render(SAMPLE[0]).sum()) == 808608


def least_number_of_captions(some: list[scenes.Scene]) -> float:
    """A lower bound, from how many pairs of draws agree: two agree with probability sum(p^2) >= 1 / number."""
    _, counts = np.unique([scene.caption for scene in some], return_counts=True)
    agreeing = (counts * (counts - 1) / 2).sum()
    return len(some) * (len(some) - 1) / 2 / (agreeing + 3 * np.sqrt(agreeing + 1))  # three deviations of the count


def test_there_are_over_a_million_captions():
    assert least_number_of_captions([scene for scene in SAMPLE if len(scene.objects) == 1]) > 20_000
    assert least_number_of_captions([scene for scene in SAMPLE if len(scene.objects) > 1]) > 1_000_000


def test_every_attribute_occurs():
    objects = [item for scene in SAMPLE[:4000] for item in scene.objects]
    assert {item.shape for item in objects} == set(scenes.SHAPES)
    assert {item.colour for item in objects} == set(scenes.COLOURS)
    assert {item.texture for item in objects} == set(scenes.TEXTURES)
    assert {item.slot for item in objects} == set(range(9))
    assert {scene.top for scene in SAMPLE} == {scene.bottom for scene in SAMPLE} == set(scenes.BACKGROUNDS)
    assert {scene.relation for scene in SAMPLE} == {None, *scenes.RELATIONS}
    assert {len(scene.objects) for scene in SAMPLE} == {1, 2, 3}


def test_objects_do_not_touch_and_stay_inside():
    for scene in SAMPLE[:500]:
        ground = scenes.render(replace(scene, objects=()))
        alone = [scenes.render(replace(scene, objects=(item,))) for item in scene.objects]
        covered = [np.any(picture != ground, axis=2) for picture in alone]
        assert np.sum(covered, axis=0).max() <= 1
        border = np.ones((64, 64), bool)
        border[1:-1, 1:-1] = False
        assert not any((mask & border).any() for mask in covered)


def test_parsing_inverts_captions():
    for scene in SAMPLE[:3000]:
        assert scenes.parse_caption(scene.caption) == replace(scene, shift=(0.0, 0.0))


@pytest.mark.parametrize(
    ("caption", "rule"),
    [
        ("a photo of a cat", "background"),
        ("a large red circle on a black background", "position"),
        ("a small striped red circle at the top on a black background", "texture"),
        ("a large mauve circle at the top on a black background", "position"),
    ],
)
def test_other_text_is_refused_with_the_rule(caption, rule):
    with pytest.raises(MixDQError, match=rule):
        scenes.parse_caption(caption)


def test_pictures_of_other_sizes():
    scene = SAMPLE[1]
    small, large = scenes.render(scene).astype(float), scenes.render(scene, size=128).astype(float)
    assert large.shape == (128, 128, 3)
    assert np.abs(large.reshape(64, 2, 64, 2, 3).mean((1, 3)) - small).max() < 24
    with pytest.raises(MixDQError, match="multiple of 64"):
        scenes.render(scene, size=100)


def test_held_out_captions_are_distinct_and_a_fixed_share():
    captions = scenes.held_out_captions(300, seed=5)
    assert len(set(captions)) == 300
    assert all(map(scenes.is_held_out, captions))
    share = np.mean([scenes.is_held_out(scene.caption) for scene in SAMPLE])
    assert share == pytest.approx(1 / scenes.HELD_OUT_ONE_IN, abs=0.01)
    assert captions[:10] != scenes.held_out_captions(10, seed=6)
