"""What ``mixdq-ao doctor`` finds."""

import pytest
import torch
from expecttest import assert_expected_inline

from mixdq_ao import doctor, ops
from mixdq_ao.errors import MixDQError


def by_name() -> dict[str, doctor.Finding]:
    return {f.name: f for f in doctor.examine()}


def test_finds_versions_and_devices():
    found = by_name()
    # A wheel's own version may lack the part that names its CUDA.
    assert torch.__version__.startswith(found["torch"].value)
    assert ("GPU" in found) == (not torch.cuda.is_available())
    assert found["int8 products"].ok


def test_says_why_there_are_no_kernels(monkeypatch):
    monkeypatch.setattr(ops, "cuda_library_missing", "no compiler was found")
    assert not by_name()["kernels"].ok
    assert "no compiler was found" in by_name()["kernels"].value


def test_inexact_products_are_reported(monkeypatch):
    right = ops.int_matmul
    monkeypatch.setattr(ops, "int_matmul", lambda a, b: right(a, b).clamp(max=2**15 - 1))
    assert not by_name()["int8 products"].ok
    assert "NOT exact" in by_name()["int8 products"].value


def test_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(doctor, "LIBRARIES", ("torch", "surely-not-installed"))
    assert by_name()["surely-not-installed"] == doctor.Finding("surely-not-installed", "not installed", ok=False)


@pytest.mark.skipif(doctor._catalogue() is None, reason="mixdq_ao._C was not built")
def test_which_kernel_runs_a_layer():
    found = doctor.layer_kernels(*doctor.parse_layer("4096,640,8"), arch=80)
    rows = [f"{name}: {what}" for name, what in doctor.layer_table(found) if not name.startswith("sm90")]
    assert_expected_inline(
        "\n".join([f"{found.problem}, on sm_{found.arch}", *rows]),
        """\
m 4096, n 640, k 8, 8-bit weight, on sm_80
sm80_128x160: needs a multiple of 16 input channels; found 8
sm80_128x128: needs a multiple of 16 input channels; found 8
sm80_128x80: needs a multiple of 16 input channels; found 8
sm80_64x64: needs a multiple of 16 input channels; found 8
sm80_64x32: needs a multiple of 16 input channels; found 8
sm80_128x16: needs a multiple of 16 input channels; found 8
few_rows: takes up to 16 rows; found 4096
direct: runs, by rule""",
    )
    if "90a" in doctor._catalogue().facts()["archs"].split(";"):
        of_eager = dict(doctor.layer_table(doctor.layer_kernels(256, 1280, 1280, arch=90)))["sm90_64x80_quantizing"]
        assert of_eager == "quantizes as well, in eager calls that no graph records, 2 parts of the reduction"
    packed = doctor.layer_kernels(256, 1280, 1280, bits=4, arch=90)
    assert packed.eager is None and dict(doctor.layer_table(packed))["sm90_64x80_quantizing"] != "could"
    with pytest.raises(MixDQError, match="k a multiple of taps"):
        doctor.layer_kernels(1, 1, 10, taps=3)


@pytest.mark.skipif(doctor._catalogue() is None, reason="mixdq_ao._C was not built")
def test_wrong_settings_of_the_kernels_are_named(monkeypatch):
    monkeypatch.setenv("MIXDQ_KERNEL", "fastest")
    with pytest.raises(MixDQError, match="MIXDQ_KERNEL names no kernel: 'fastest'"):
        doctor.layer_kernels(4096, 640, 640)

    class WithoutItsTable:
        facts, kernels = doctor._catalogue().facts, doctor._catalogue().kernels

        @staticmethod
        def tuning_table():
            raise RuntimeError("MIXDQ_TUNING_TABLE: t.inc cannot be read")

    monkeypatch.setattr(doctor, "_catalogue", lambda: WithoutItsTable)
    assert by_name()["kernels built"] == doctor.Finding(
        "kernels built", "MIXDQ_TUNING_TABLE: t.inc cannot be read", ok=False
    )


def test_a_layer_without_the_catalogue(monkeypatch):
    monkeypatch.setattr(doctor, "_catalogue", lambda: None)
    with pytest.raises(MixDQError, match="Install with CUDA kernels"):
        doctor.layer_kernels(4096, 640, 640)
    assert by_name()["kernels built"].value == "none"


def test_a_layer_is_three_or_four_numbers():
    assert doctor.parse_layer("1, 2,3,4") == (1, 2, 3, 4)
    for wrong in ("1,2", "1,2,3,4,5", "1,2,x", "1,-2,3"):
        with pytest.raises(MixDQError, match="--layer must be M,N,K"):
            doctor.parse_layer(wrong)
