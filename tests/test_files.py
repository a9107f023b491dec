"""Writing: whole or not at all, with a message that says where, and without litter."""

import os
import time

import pytest
import torch

from mixdq_ao import files
from mixdq_ao.files import write_tensors, write_text

FULL = OSError(28, os.strerror(28))  # as a write to a full disk says it: no file is named


@pytest.mark.parametrize("call", [lambda p: write_text(p, "new"), lambda p: write_tensors(p, {"x": torch.ones(3)}, {})])
def test_a_full_disk_is_named_and_leaves_what_was_there(tmp_path, monkeypatch, call):
    path = tmp_path / "file.json"
    write_text(path, "old")

    def full(file):
        raise FULL

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device.*file.json'$") as caught:
        call(path)
    assert caught.value.filename == str(path)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file.json"]


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        write_text(tmp_path / "none" / "file.json", "new")
    assert caught.value.filename == str(tmp_path / "none")


def test_an_error_about_another_file_stays_one(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, files.replacing(tmp_path / "file.json"):
        open(tmp_path / "other")
    assert caught.value.filename == str(tmp_path / "other") and not os.listdir(tmp_path)


def test_what_a_killed_process_left_behind_is_removed(tmp_path):
    path = tmp_path / "model.safetensors"
    dead, alive = (tmp_path / f".model.safetensors.{digit * 16}.tmp" for digit in "0a")
    others = [tmp_path / f".other.safetensors.{'0' * 16}.tmp", tmp_path / ".model.safetensors.mine.tmp"]
    for file in (dead, alive, *others):
        file.write_text("half")
        if file != alive:
            os.utime(file, (time.time() - 4000,) * 2)
    write_text(path, "whole")
    assert sorted(tmp_path.iterdir()) == sorted([path, alive, *others])
