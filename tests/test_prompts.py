"""Prompts from files and those that come along."""

import json

import pytest

from mixdq_ao import MixDQError
from mixdq_ao.prompts import BUILT_IN, HELD_OUT, built_in_prompts, read_prompts
from mixdq_ao.scenes import is_held_out, parse_caption

COCO = {
    "images": [{"id": 7}, {"id": 3}, {"id": 9}],
    "annotations": [
        {"id": 1, "image_id": 3, "caption": " a dog\n on a sofa "},
        {"id": 2, "image_id": 7, "caption": "a cat"},
        {"id": 3, "image_id": 3, "caption": "another dog"},
    ],
}


def test_text_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("  a fox \n\nein Bär\n", encoding="utf-8")
    assert read_prompts(path) == ["a fox", "ein Bär"]
    assert read_prompts(path, 1) == ["a fox"]
    with pytest.raises(MixDQError, match="has 2 prompts; 3 were asked for"):
        read_prompts(path, 3)


def test_coco_takes_the_first_caption_of_each_picture(tmp_path):
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(COCO))
    assert read_prompts(path) == ["a cat", "a dog on a sofa"]
    path.write_text(json.dumps({"annotations": COCO["annotations"]}))
    assert read_prompts(path) == ["a dog on a sofa", "a cat"]


@pytest.mark.parametrize(
    "content,message",
    [
        ("[]", "list of captions"),
        ('{"annotations": 3}', "list of captions"),
        ('{"annotations": [{"caption": 1, "image_id": 1}]}', "must have a caption"),
        ('{"annotations": []}', "holds no prompts"),
        ("{", "must be JSON"),
    ],
)
def test_broken_coco(tmp_path, content, message):
    path = tmp_path / "captions.json"
    path.write_text(content)
    with pytest.raises(MixDQError, match=message):
        read_prompts(path)


def test_broken_text(tmp_path):
    with pytest.raises(MixDQError, match="must exist"):
        read_prompts(tmp_path / "none.txt")
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(MixDQError, match="UTF-8"):
        read_prompts(path)
    path.write_text("\n \n")
    with pytest.raises(MixDQError, match="holds no prompts"):
        read_prompts(path)


def test_built_in():
    assert len(BUILT_IN) == len(HELD_OUT) == 32
    assert built_in_prompts() == list(BUILT_IN) and built_in_prompts(3) == list(BUILT_IN[:3])
    assert built_in_prompts(held_out=True) == list(HELD_OUT)
    with pytest.raises(MixDQError, match="built-in prompts has 32 prompts; 33 were asked for"):
        built_in_prompts(33, held_out=True)
    seen, unseen = built_in_prompts(20, scenes=True), built_in_prompts(20, scenes=True, held_out=True)
    assert not any(map(is_held_out, seen)) and all(map(is_held_out, unseen))
    assert all(parse_caption(c) for c in seen + unseen)
    assert built_in_prompts(5, scenes=True) == seen[:5]


@pytest.mark.parametrize("scenes, count", [(False, None), (True, 200)])
def test_what_is_measured_on_is_not_what_was_calibrated_on(scenes, count):
    calibration = built_in_prompts(count, scenes=scenes)
    measured = built_in_prompts(count, scenes=scenes, held_out=True)
    assert len(set(measured)) == len(measured) and not set(calibration) & set(measured)
