"""Allocation: the programs against brute force and the published plans, the sweep, the joint program, the tables."""

import itertools
import json
import math
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from mixdq_ao import cli, families, tables
from mixdq_ao.allocate import (
    CONTENT,
    QUALITY,
    allocate,
    by_group,
    front,
    group_budgets,
    joint,
    least_noise,
    mean_bits_of_bytes,
    offered_means,
    plot_front,
    problem,
    sweep,
)
from mixdq_ao.errors import CheckpointError, MixDQError, PlanError
from mixdq_ao.plan import BitPlan, cut_prefix
from mixdq_ao.program import Group, solve

pytest.importorskip("scipy", reason="allocation needs SciPy")

DATA = Path(__file__).resolve().parents[2] / "shared/data/mixdq"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the published tables are not beside this checkout")


def published(kind: str = "weight"):
    """SSIM, SQNR and sizes of SDXL-Turbo's layers, as published."""
    names = f"sensitivity/sdxl_turbo_{kind}_ssim", f"sensitivity/sdxl_turbo_{kind}_sqnr"
    scores = [tables.read_scores(DATA / f"{name}.yaml") for name in names]
    return *scores, tables.read_sizes(DATA / f"ratio/sdxl_turbo_{kind}.yaml")


# --- one program ------------------------------------------------------------------------------------------------------


def best_by_brute_force(group: Group, upper: float, lower: float) -> float | None:
    names, best = list(group.scores), None
    for choice in itertools.product(*(group.scores[name] for name in names)):
        plan = dict(zip(names, choice, strict=True))
        if lower - 1e-9 <= group.mean_bits(plan) <= upper + 1e-9 and (best is None or group.score(plan) > best):
            best = group.score(plan)
    return best


layer_scores = st.lists(st.integers(0, 1000), min_size=2, max_size=3)


@given(
    st.lists(st.tuples(layer_scores, st.sampled_from([1.0, 2.0, 2.0, 7.3])), min_size=1, max_size=5),
    st.floats(1.5, 8.5),
    st.floats(0, 3),
)
@settings(max_examples=40)
def test_program_is_optimal(layers, upper, span):
    scores = {f"l{i}": dict(zip((8, 4, 2), s, strict=False)) for i, (s, _) in enumerate(layers)}
    group = Group("g", scores, {f"l{i}": size for i, (_, size) in enumerate(layers)})
    best = best_by_brute_force(group, upper, upper - span)
    if best is None:
        with pytest.raises(PlanError, match=r"g group .*lowest mean is .*highest"):
            solve(group, upper, upper - span)
    else:
        plan = solve(group, upper, upper - span)
        assert upper - span - 1e-6 <= group.mean_bits(plan) <= upper + 1e-6
        assert group.score(plan) == pytest.approx(best)


@needs_data
@pytest.mark.parametrize("name", ["weight_4.00", "weight_5.02"])
def test_published_plans_are_reproduced(name):
    plan = BitPlan.read(DATA / f"weight/{name}.yaml")
    p = problem(*published())
    start = time.perf_counter()
    found = by_group(p, {group.name: group.mean_bits(plan) for group in p.groups})
    assert time.perf_counter() - start < 5
    assert len(plan) == 794 and dict(found.plan) == dict(plan)


@needs_data
def test_rounded_mean_bits_give_nearly_the_published_plan():
    plan = BitPlan.read(DATA / "weight/weight_4.00.yaml")
    content, quality, sizes = published()
    found = allocate(content, quality, sizes, content_bits=3.36, quality_bits=5.45)
    assert sum(found[name] == plan[name] for name in plan) >= 785
    assert found.mean_bits(sizes) <= 4.01


@needs_data
def test_activations_with_protected_layers():
    names = [cut_prefix(n) for n in json.loads((DATA / "act_protect.json").read_text())]
    content, quality, sizes = published("act")
    plan = allocate(content, quality, sizes, kind="act", protect=names, content_bits=7.59, quality_bits=8)
    assert len(plan) == 785 and not plan.keys() & set(names)
    assert {plan[n] for n in plan if not families.SDXL.is_content(n)} == {8}


# --- groups, sweep, one scale -----------------------------------------------------------------------------------------

LAYERS = [f"block.{i}.{part}" for i in range(4) for part in ("attn1.to_q", "attn2.to_q", "ff.net.0", "conv")]


def damage(i: int) -> float:
    return 10 ** (-(i * 7) % 5 / 2)


def invented(seed: int = 0):
    """Scores as errors of the same kind in every layer: energy 4^-bits, times a factor of the layer."""
    scores = {CONTENT: {}, QUALITY: {}}
    for i, name in enumerate(LAYERS):
        energy = {bits: damage(i + seed) * 4.0**-bits + 1e-9 for bits in (2, 4, 8)}
        scores[QUALITY][name] = {bits: -10 * math.log10(e) for bits, e in energy.items()}
        if families.SDXL.is_content(name):
            scores[CONTENT][name] = {bits: 1 / (1 + 50 * e) for bits, e in energy.items()}
    sizes = {name: float(100 + 40 * (i % 3)) for i, name in enumerate(LAYERS)}
    return scores[CONTENT], scores[QUALITY], sizes


@pytest.mark.parametrize(
    "edges, advice", [((1, None), "more bits"), ((9, 8.5), "fewer bits"), ((5, 4.9), "further apart")]
)
def test_what_to_do_when_no_plan_fits_a_group(edges, advice):
    group = Group("g", {"a": {4: 0.5, 8: 1.0}}, {"a": 1.0})
    with pytest.raises(PlanError, match=advice):
        solve(group, *edges)


def test_sweep_keeps_the_budget_and_the_ratio():
    p = problem(*invented())
    budgets = group_budgets(p, 4.5, 0.7)
    assert budgets[CONTENT] / budgets[QUALITY] == pytest.approx(0.7)
    sizes = {group.name: group.size for group in p.groups}
    assert sum(budgets[g] * sizes[g] for g in sizes) / sum(sizes.values()) == pytest.approx(4.5)
    points = sweep(p, 4.5, progress=False)
    assert len(points) > 3
    assert len({tuple(a.plan.items()) for a in points}) == len(points)
    for a in points:
        assert a.mean_bits <= 4.5 + 1e-6
        assert a.mean_bits == pytest.approx(a.plan.mean_bits(p.sizes))


def test_the_joint_program_has_least_noise():
    p = problem(*invented())
    points = sweep(p, 4.5, progress=False)
    best = joint(p, 4.5)
    assert best.mean_bits <= 4.5 + 1e-6
    assert best.noise <= least_noise(points).noise + 1e-12


def test_the_common_scale_is_the_energy_that_scores_were_made_of():
    content, quality, sizes = invented()
    noise = problem(content, quality, sizes).noise
    for i, name in enumerate(LAYERS):
        assert noise[name][4] == pytest.approx(damage(i) * 4.0**-4, rel=0.01)


def test_without_sqnr_of_content_layers_there_is_no_common_scale():
    content, quality, sizes = invented()
    bare = {name: s for name, s in quality.items() if not families.SDXL.is_content(name)}
    assert allocate(content, bare, sizes, content_bits=4, quality_bits=6)
    for kwargs in ({"budget": 4.5}, {"budget": 4.5, "one_scale": True}):
        with pytest.raises(PlanError, match="SQNR"):
            allocate(content, bare, sizes, **kwargs)


def test_one_group_of_a_model_without_content_layers():
    _, quality, sizes = invented()
    plan = allocate(None, quality, sizes, family=families.GENERIC, budget=5.0)
    assert set(plan.values()) == {4, 8} and plan.mean_bits(sizes) <= 5 + 1e-6
    assert len(sweep(problem(None, quality, sizes, family=families.GENERIC), 5.0)) == 1


def test_a_budget_in_bytes():
    content, quality, sizes = invented()
    plan = allocate(content, quality, sizes, budget_bytes=4.5 * sum(sizes.values()) * 320 / 8, size_unit=320)
    assert sum(sizes[n] * 320 * b for n, b in plan.items()) / 8 <= 4.5 * sum(sizes.values()) * 320 / 8 + 1e-3
    assert mean_bits_of_bytes(100, {"a": 100.0}) == 8
    with pytest.raises(PlanError, match="11520"):
        mean_bits_of_bytes(100, {"a": 8.888})


def test_front_keeps_what_nothing_beats(tmp_path):
    p = problem(*invented())
    points = sweep(p, 4.5, progress=False) + sweep(p, 5.5, progress=False)
    kept = front(points)
    assert 0 < len(kept) <= len(points)
    best = max(points, key=lambda a: a.group_scores[CONTENT])
    assert any(a.group_scores[CONTENT] == best.group_scores[CONTENT] for a in kept)
    pytest.importorskip("matplotlib", reason="plots need Matplotlib")
    plot_front(points, tmp_path / "front.png", kept[0])
    assert (tmp_path / "front.png").read_bytes()[:4] == b"\x89PNG"


def test_command_line(tmp_path):
    content, quality, sizes = invented()
    for name, table in (("content", content), ("quality", quality)):
        tables.write_scores(tmp_path / f"{name}.yaml", table)
    tables.write_sizes(tmp_path / "sizes.yaml", sizes)
    files = [f"--{n}={tmp_path / n.partition('-')[0]}.yaml" for n in ("content-scores", "quality-scores", "sizes")]

    def run(*args: str):
        return CliRunner().invoke(cli.app, ["allocate", *files, f"--out={tmp_path / 'plan.yaml'}", *args])

    result = run("--budget", "4.5", "--json", f"--pareto={tmp_path / 'front.png'}")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert BitPlan.read(tmp_path / "plan.yaml") == report["bits"]
    assert report["chosen"]["noise"] == min(point["noise"] for point in report["points"])
    assert (tmp_path / "front.png").exists()
    mib = 5 * sum(sizes.values()) / 8 / 2**20
    for args in (["--content-bits", "3.5", "--quality-bits", "6"], ["--budget-mib", str(mib), "--joint"]):
        result = run(*args)
        assert result.exit_code == 0, result.output
        assert "16 layers written" in result.output and "mean bits" in result.output
    assert BitPlan.read(tmp_path / "plan.yaml").mean_bits(sizes) <= 5 + 1e-6
    for args, message in ((["--budget", "1"], "no plan"), (["--budget", "4", "--family", "x"], "--family")):
        assert message in str(run(*args).exception)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({}, "give one budget"),
        ({"budget": 4.0, "content_bits": 4.0}, "give one budget"),
        ({"content_bits": 4.0}, "content.*quality"),
        ({"content_bits": 4.0, "quality_bits": 6.0, "one_scale": True}, "joint"),
        ({"content_bits": 1.5, "quality_bits": 5}, r"content group \(8 layers\): no plan has at most 1.5"),
        ({"content_bits": 3, "quality_bits": 3.9}, "quality group .*lowest mean is 4.0000"),
        ({"budget": 2.5}, "lowest possible mean is 2.9455 and the highest 8.0000. Give more bits"),
        ({"budget": math.inf}, "the budget: mean bits must be a finite number; found inf"),
        ({"budget": math.nan}, "must be a finite number; found nan"),
        ({"budget": math.nan, "one_scale": True}, "joint group: mean bits must be a finite number; found nan"),
        ({"content_bits": math.inf, "quality_bits": 5}, "content group: mean bits must be a finite number; found inf"),
        ({"budget": 4.5, "kind": "bias"}, "kind"),
        ({"budget": 4.5, "protect": ["nothing"]}, "nothing"),
        ({"budget": 4.5, "candidates": {"content": (16,)}}, "no score at any of"),
    ],
)
def test_what_cannot_be_allocated_is_an_error(kwargs, message):
    with pytest.raises(MixDQError, match=message):
        allocate(*invented(), **kwargs)


@pytest.mark.parametrize("options", [{"budget": 16}, {"budget": 16, "one_scale": True}, {"budget_bytes": 1e9}])
def test_a_budget_above_every_plan_is_met_by_the_widest(options):
    assert set(allocate(*invented(), **options).values()) == {8}


def test_every_mean_that_the_widths_offer_has_a_plan():
    content, quality, sizes = invented()
    low, high = offered_means(sizes, "weight", families.SDXL)
    p = problem(content, quality, sizes)
    for budget in (low, low + 0.01, (low + high) / 2, high - 0.01, high):
        assert low - 1e-6 <= max(a.mean_bits for a in sweep(p, budget, progress=False)) <= budget + 1e-6


def test_missing_scores_are_an_error():
    content, quality, sizes = invented()
    with pytest.raises(PlanError, match="no score: block.3.conv. Give their SQNR$"):
        problem(content, {n: s for n, s in quality.items() if n != "block.3.conv"}, sizes)
    with pytest.raises(PlanError, match=r"content group: .* Give their SSIM; a transformer, .* family generic$"):
        problem(None, quality, sizes)
    with pytest.raises(PlanError, match="at least one|no layer"):
        problem(content, quality, {})


# --- tables -----------------------------------------------------------------------------------------------------------

numbers = st.floats(allow_nan=False, allow_infinity=False)
names = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=12).filter(
    lambda name: cut_prefix(name) == name
)


@given(
    scores=st.dictionaries(names, st.fixed_dictionaries({4: numbers}, optional={2: numbers, 8: numbers}), min_size=1)
)
@settings(max_examples=25)
def test_tables_round_trip(scores, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    for name in ("scores.yaml", "scores.json"):
        tables.write_scores(folder / name, scores)
        assert tables.read_scores(folder / name) == scores


def test_sizes_round_trip_and_lose_the_prefix(tmp_path):
    tables.write_sizes(tmp_path / "s.yaml", {"conv": 1.5, "ff.net": 8e20})
    assert tables.read_sizes(tmp_path / "s.yaml") == {"conv": 1.5, "ff.net": 8e20}
    (tmp_path / "s.yml").write_text("model.conv: 3\nmodel.ff: 1e3\n")
    assert tables.read_sizes(tmp_path / "s.yml") == {"conv": 3.0, "ff": 1000.0}


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "must be a YAML map"),
        ("[1, 2]", "must be a YAML map"),
        ("{}", "at least one layer"),
        ("a: 1", "'a': a layer must have 3 numbers"),
        ("a: [1, 2]", "'a': a layer must have 3 numbers"),
        ("a: [1, 2, x]", "'a': a score must be a finite number; found 'x'"),
        ("a: [1, 2, .nan]", "'a': a score must be a finite number"),
        ("a: [1, 2, 1e999]", "'a': a score must be a finite number"),
        ("a: [1, 2, '3']", "'a': a score must be a finite number"),
        ("a: [1, 2, [3]]", "'a': must be a number or one flat list"),
        ("a: {b: 1}", "'a': must be a number or one flat list"),
        ("a: [null, null, null]", "'a': a layer must have a score for at least one width"),
        ("a: &x [1, 2, 3]\nb: *x", "anchors"),
        ("a: !!python/tuple [1, 2, 3]", "tags"),
        ("a: [1, 2, 3]\na: [1, 2, 3]", "'a': a layer must be named once"),
        ("a: [1, 2, 3]\nmodel.a: [1, 2, 3]", "'a': a layer must be named once"),
        ("a: [1, 2, 3]\n---\nb: [1, 2, 3]", "a second document"),
        ("? [a]\n: [1, 2, 3]", "a layer name must be a string"),
        ("a: [1, 2", "must be YAML"),
    ],
)
def test_a_broken_score_table_is_refused(tmp_path, text, message):
    (tmp_path / "scores.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=message.replace("[", r"\[")):
        tables.read_scores(tmp_path / "scores.yaml")


@pytest.mark.parametrize("value", ["0", "-1", '"x"', "null", "[1]", "true", "1" + "0" * 400])
@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_a_broken_size_is_refused(tmp_path, value, suffix):
    file = tmp_path / f"sizes.{suffix}"
    file.write_text(f'{{"a": {value}}}')
    with pytest.raises(CheckpointError, match="'a': a size must be a positive number"):
        tables.read_sizes(file)
