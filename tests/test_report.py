"""The report: one file, nothing fetched, nothing of a caption run."""

import re

import pytest
import torch
from pipelines import FakePipeline

from mixdq_ao import BitPlan, MixDQConfig, MixDQError, calibrate, families
from mixdq_ao.evaluate import evaluate
from mixdq_ao.report import Point, pareto_svg, write_report

EVIL = '<script>alert("x")</script> & </figure>'


@pytest.fixture(scope="module")
def evaluation():
    pipe = FakePipeline()
    params = calibrate(pipe, ["a", "b"], progress=False)
    variants = {"W8A8": MixDQConfig(params, 8, 8), EVIL: MixDQConfig(params, 4, 8)}
    return evaluate(pipe, variants, [EVIL, "a caption"], progress=False)


def test_everything_is_in_one_file(evaluation, tmp_path):
    shapes = families.layer_shapes(FakePipeline().unet)
    plan = BitPlan({name: (2, 4, 8, None)[i % 4] for i, name in enumerate(shapes)})
    scores = {name: {4: 0.9 + 0.1 * i / len(shapes)} for i, name in enumerate(shapes)}
    path = tmp_path / "report.html"
    arguments = {
        "title": "Title of it",
        "plan": plan,
        "shapes": shapes,
        "sensitivity": {"Content": ("content", scores), "Quality": ("quality", scores)},
        "points": [Point("W4", 4.0, 0.5, "uniform"), Point("ours", 4.0, 0.9, "chosen"), Point("", 3.9, 0.8)],
        "facts": {"seed": "0"},
        "findings": ["A finding."],
    }
    write_report(path, evaluation, **arguments)
    text = path.read_text()
    assert EVIL not in text and "alert(" in text
    assert text.count("<script>") == text.count("</script>") == 1
    links = re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?(?!data:image/png|#)[^"\'\s>)]+', text)
    assert not [link for link in links if "xlink" not in link and "pictures[" not in link], links
    assert text.count('class="cell b') == len(shapes)
    assert all(name in text for name in ("Title of it", "A finding.", "Most sensitive", "Size against quality"))
    again = tmp_path / "again.html"
    write_report(again, evaluation, **arguments)
    assert again.read_text() == text


def test_parts_may_be_missing(evaluation, tmp_path):
    write_report(tmp_path / "r.html", evaluation, title="T", chosen="W8A8")
    text = (tmp_path / "r.html").read_text()
    assert "Most sensitive" not in text and "Size against" not in text and "Bits of each" not in text


def test_plot_follows_the_page():
    svg = pareto_svg([Point("W4", 4.0, 0.5, "uniform")], "SSIM")
    assert svg.startswith("<svg") and "currentColor" in svg and "#010203" not in svg


def test_wrong_arguments(evaluation, tmp_path):
    with pytest.raises(MixDQError, match="chosen must be one of"):
        write_report(tmp_path / "r.html", evaluation, title="T", chosen="W3")
    alone = evaluate(FakePipeline(), {}, ["a"], progress=False)
    with pytest.raises(MixDQError, match="at least one variant"):
        write_report(tmp_path / "r.html", alone, title="T")
    assert not list(tmp_path.iterdir()) and torch.is_tensor(evaluation.pictures["W8A8"])
