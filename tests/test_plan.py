"""Bit plans and lists of layer names."""

from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mixdq_ao.errors import PlanError
from mixdq_ao.plan import BitPlan, cut_prefix, read_names

DATA = Path(__file__).resolve().parents[2] / "shared/data/mixdq"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the published bit plans are not beside this checkout")

names = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=20)
plans = st.dictionaries(names, st.sampled_from([2, 4, 8, None]), min_size=1, max_size=30)


def sizes(kind: str) -> dict[str, float]:
    table = yaml.safe_load((DATA / f"ratio/sdxl_turbo_{kind}.yaml").read_text())
    return {cut_prefix(name): size for name, size in table.items()}


@needs_data
@pytest.mark.parametrize(
    "file, entries, low, mean, mean_with_protected",
    [
        ("weight/uniform_8", 794, 0, 8.0, None),
        ("weight/uniform_4", 794, 794, 4.0, None),
        ("weight/weight_8.00", 794, 4, 7.9883, None),
        ("weight/weight_5.02", 794, 147 + 246, 5.0299, None),
        ("weight/weight_4.00", 794, 209 + 347, 4.0064, None),
        ("act/uniform_8", 794, 0, 8.0, None),
        ("act/act_8.00", 785, 0, 8.0, 8.2513),
        ("act/act_7.84", 785, 20, 7.8531, 8.1091),
        ("act/act_7.77", 785, 66, 7.7764, 8.0347),
    ],
)
def test_published_plans(file, entries, low, mean, mean_with_protected):
    plan = BitPlan.read(DATA / f"{file}.yaml")
    assert len(plan) == entries
    assert sum(bits < 8 for bits in plan.values()) == low
    table = sizes(file.partition("/")[0])
    assert plan.mean_bits(table) == pytest.approx(mean, abs=6e-5)
    if mean_with_protected is not None:
        protected = dict.fromkeys(read_names(DATA / "act_protect.json"))
        assert not protected.keys() & plan.keys()
        assert BitPlan({**plan, **protected}).mean_bits(table) == pytest.approx(mean_with_protected, abs=6e-5)


@needs_data
def test_published_protect_list():
    protected = read_names(DATA / "act_protect.json")
    assert len(protected) == 9
    assert protected[:2] == ["conv_in", "conv_out"]
    assert set(protected) < set(sizes("act"))


@settings(max_examples=60, deadline=None)
@given(bits=plans, suffix=st.sampled_from([".json", ".yaml", ".yml"]))
def test_round_trip(bits, suffix, tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / f"plan{suffix}"
    bits = {name: value for name, value in bits.items() if cut_prefix(name) == name}
    if bits:
        BitPlan(bits).write(path)
        again = BitPlan.read(path)
        assert again == bits
        assert list(again) == list(bits)
        assert again.source == str(path)


def test_prefix_is_cut_in_the_originals_yaml_only(tmp_path):
    (tmp_path / "a.yaml").write_text("model.conv_in: 8\nunet.model.mid.model.x: 4\nsupermodel.y: 16\nz: null\n")
    assert BitPlan.read(tmp_path / "a.yaml") == {"conv_in": 8, "mid.model.x": 4, "supermodel.y": None, "z": None}
    BitPlan({"model.conv_in": 8}).write(tmp_path / "a.json")
    assert BitPlan.read(tmp_path / "a.json") == {"model.conv_in": 8}


def test_plan_is_an_immutable_mapping():
    plan = BitPlan({"a": 8, "b": None, "c": 16})
    assert dict(plan) == {"a": 8, "b": None, "c": None}
    assert "b" in plan and len(plan) == 3 and plan == {"a": 8, "b": None, "c": None}
    with pytest.raises(TypeError):
        plan["a"] = 4


def test_uniform_and_mean():
    plan = BitPlan.uniform(["a", "b"], 4)
    assert plan == {"a": 4, "b": 4} and plan.source == "uniform 4 bits"
    assert BitPlan({"a": 2, "b": None}).mean_bits({"a": 3, "b": 1, "c": 9}) == (3 * 2 + 16) / 4
    with pytest.raises(PlanError, match="no size for b"):
        plan.mean_bits({"a": 1})
    with pytest.raises(PlanError, match="more than 0"):
        plan.mean_bits({"a": 0, "b": 0})


@pytest.mark.parametrize("bits", [3, 0, -8, True, 8.0, "8", [8], 32])
def test_bits_that_do_not_exist(bits):
    with pytest.raises(PlanError, match=r"mine: 'a': bits must be one of .* or null for floating; found"):
        BitPlan({"a": bits}, source="mine")


@pytest.mark.parametrize("name", [1, None, "", ("a",)])
def test_names_must_be_strings(name):
    with pytest.raises(PlanError, match="a layer name must be a non-empty string"):
        BitPlan({name: 8})


def test_write_refuses_what_reading_would_change(tmp_path):
    with pytest.raises(PlanError, match="lose their 'model.'; found model.a. Write .json"):
        BitPlan({"model.a": 8}).write(tmp_path / "a.yaml")
    with pytest.raises(PlanError, match="written as .json or .yaml; found '.txt'"):
        BitPlan({"a": 8}).write(tmp_path / "a.txt")
    with pytest.raises(PlanError, match="empty"):
        BitPlan({}).write(tmp_path / "a.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "file, content",
    [
        ("names.json", '["model.b", "a"]'),
        ("names.yaml", "- model.b\n- a\n"),
        ("names.txt", "# kept floating\nmodel.b  # large\n\n  a\n"),
        ("names", "b\na"),
    ],
)
def test_read_names(tmp_path, file, content):
    (tmp_path / file).write_text(content)
    assert read_names(tmp_path / file) == ["b", "a"]


def test_read_names_of_the_original(tmp_path):
    torch.save(["model.b", "a"], tmp_path / "list_a8_1%.pt")
    assert read_names(tmp_path / "list_a8_1%.pt") == ["b", "a"]
