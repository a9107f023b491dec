"""What ``mixdq-ao doctor`` finds."""

import torch

from mixdq_ao import doctor, ops


def by_name() -> dict[str, doctor.Finding]:
    return {f.name: f for f in doctor.examine()}


def test_finds_versions_and_devices():
    found = by_name()
    assert found["torch"].value == torch.__version__
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
