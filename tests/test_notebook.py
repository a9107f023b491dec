"""The notebook of a long measurement: nothing is lost, and nothing of another measurement is taken for its own."""

import json
import os

import pytest

from mixdq_ao import notebook
from mixdq_ao.errors import MixDQError
from mixdq_ao.notebook import Notebook

SETTINGS = {"seed": 0, "prompts": ["a", "b"]}


def test_what_is_noted_is_read_by_all(tmp_path):
    first, second = (Notebook(tmp_path, SETTINGS, rank) for rank in (0, 1))
    first.add("weight", "conv_in", {"sqnr": {"8": 40.5}})
    second.add("weight", "conv_out", {"sqnr": {"8": 41.5}})
    found = second.read()
    assert found == first.read() and found["weight", "conv_out"]["sqnr"] == {"8": 41.5}
    assert first.done == set()  # as it was when the run began
    assert Notebook(tmp_path, SETTINGS, 0).done == {("weight", "conv_in"), ("weight", "conv_out")}


def test_a_line_that_was_cut_off_is_dropped(tmp_path):
    Notebook(tmp_path, SETTINGS, 0).add("weight", "conv_in", {"sqnr": {}})
    path = tmp_path / "rows-0.jsonl"
    whole = path.read_bytes()
    for end in range(1, len(whole)):
        path.write_bytes(whole[:end])
        rows = Notebook(tmp_path, SETTINGS, 0).read()
        assert rows == {} and path.read_bytes().endswith(b"\n")
        assert whole.startswith(path.read_bytes())


def test_seconds_of_several_runs_add_up(tmp_path):
    notebook = Notebook(tmp_path, SETTINGS, 0)
    for seconds in (1.5, 2.0):
        notebook.add("seconds", 0, {"seconds": seconds})
    assert notebook.read()["seconds", 0]["seconds"] == 3.5


@pytest.mark.parametrize("settings", [{**SETTINGS, "seed": 1}, {"seed": 0}, {**SETTINGS, "bits": 4}])
def test_another_measurement_is_refused(tmp_path, settings):
    Notebook(tmp_path, SETTINGS, 0)
    different = {"seed", "prompts", "bits"} & {k for k in (*settings, *SETTINGS) if settings.get(k) != SETTINGS.get(k)}
    with pytest.raises(MixDQError, match=f"rows-0.jsonl: this is a measurement with other {different.pop()}. Give"):
        Notebook(tmp_path, settings, 1)


def test_a_refused_measurement_leaves_the_folder_as_it_was(tmp_path):
    Notebook(tmp_path, SETTINGS, 0).add("weight", "conv_in", {"sqnr": {}})
    with pytest.raises(MixDQError, match="other seed"):
        Notebook(tmp_path, {**SETTINGS, "seed": 1}, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["rows-0.jsonl"]
    assert Notebook(tmp_path, SETTINGS, 1).done == {("weight", "conv_in")}


@pytest.mark.parametrize("line", ["[]", "{}", '{"what": "weight"}', "3", '{"settings": {}}\n{"what": "weight"}'])
def test_a_file_of_something_else_is_named(tmp_path, line):
    (tmp_path / "rows-0.jsonl").write_text(line + "\n")
    with pytest.raises(MixDQError, match=r"rows-0.jsonl: must hold what a measurement has noted"):
        Notebook(tmp_path, SETTINGS, 0)


def test_a_broken_line_is_named(tmp_path):
    notebook = Notebook(tmp_path, SETTINGS, 0)
    with open(tmp_path / "rows-0.jsonl", "a") as file:
        file.write("{nonsense\n")
    with pytest.raises(MixDQError, match=r"rows-0.jsonl.*line 2"):
        notebook.read()


def test_a_number_that_json_lacks_is_not_written(tmp_path):
    notebook = Notebook(tmp_path, SETTINGS, 0)
    before = (tmp_path / "rows-0.jsonl").read_bytes()
    with pytest.raises(ValueError):
        notebook.add("weight", "conv_in", {"sqnr": float("nan")})
    assert (tmp_path / "rows-0.jsonl").read_bytes() == before


def test_a_nearly_full_disk_takes_a_line_in_parts_or_refuses_it(tmp_path, monkeypatch):
    one, left, write = Notebook(tmp_path, SETTINGS, 0), [10, 10, 10**6], os.write
    monkeypatch.setattr(notebook.os, "write", lambda file, data: write(file, data[: left.pop(0)]))
    one.add("weight", "conv_in", {"sqnr": {}})
    assert ("weight", "conv_in") in one.read()

    def full(file, data):
        if len(data) < 20:
            raise OSError(28, os.strerror(28))
        return write(file, data[:20])

    monkeypatch.setattr(notebook.os, "write", full)
    with pytest.raises(OSError, match="No space left on device: .*rows-0.jsonl"):
        one.add("weight", "conv_out", {"sqnr": {}})
    monkeypatch.undo()
    assert Notebook(tmp_path, SETTINGS, 0).done == {("weight", "conv_in")}


def test_two_calls_that_begin_a_file_at_one_moment(tmp_path):
    """Neither sees the other's first line; what either notes then is read by both."""
    one = Notebook(tmp_path, SETTINGS, 0)
    path = tmp_path / "rows-0.jsonl"
    path.write_bytes(2 * path.read_bytes())
    one.add("weight", "conv_in", {"sqnr": {}})
    assert Notebook(tmp_path, SETTINGS, 0).done == {("weight", "conv_in")}
    with open(path, "a") as file:
        file.write(json.dumps({"settings": {**SETTINGS, "seed": 1}}) + "\n")
    with pytest.raises(MixDQError, match="other seed"):
        one.read()


def test_bytes_that_are_no_text_are_named(tmp_path):
    (tmp_path / "rows-0.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(MixDQError, match="rows-0.jsonl.*line 1"):
        Notebook(tmp_path, SETTINGS, 0)
