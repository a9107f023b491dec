"""What setup.py decides: whether kernels are built, for what, and from which CUTLASS."""

import importlib.util
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("setuptools", reason="setup.py needs setuptools")
spec = importlib.util.spec_from_file_location("mixdq_setup", ROOT / "setup.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)

TORCH = Path("site-packages/torch")


def test_kernels_are_built_where_everything_is_there():
    assert build.why_no_kernels({}, "nvcc", TORCH) == ""
    assert build.why_no_kernels({"MIXDQ_CUDA": "1"}, "nvcc", TORCH) == ""
    assert build.why_no_kernels({"MIXDQ_CUDA": "0"}, "nvcc", TORCH) == "MIXDQ_CUDA=0"


@pytest.mark.parametrize("nvcc, torch, what", [(None, TORCH, "CUDA_HOME"), ("nvcc", None, "--no-build-isolation")])
def test_what_is_missing_leaves_them_out_unless_they_are_demanded(nvcc, torch, what):
    assert what in build.why_no_kernels({}, nvcc, torch)
    with pytest.raises(SystemExit, match=f"MIXDQ_CUDA=1 demands.*{what}"):
        build.why_no_kernels({"MIXDQ_CUDA": "1"}, nvcc, torch)
    with pytest.raises(SystemExit, match="must be 0 or 1; found 'yes'"):
        build.why_no_kernels({"MIXDQ_CUDA": "yes"}, nvcc, torch)


def test_architectures():
    assert build.parse_archs("80; 89+PTX,90a") == ["80", "89+PTX", "90a"]
    assert build.gencode(["89+PTX", "90a"]) == [
        "-gencode=arch=compute_89,code=sm_89",
        "-gencode=arch=compute_89,code=compute_89",
        "-gencode=arch=compute_90a,code=sm_90a",
    ]
    for wrong in ("", "9.0", "sm_90", "80;hopper"):
        with pytest.raises(SystemExit, match="MIXDQ_CUDA_ARCHS must be like"):
            build.parse_archs(wrong)


def test_hopper_kernels_are_compiled_for_hopper_alone():
    everything = build.kernel_sources(["80", "90a"])
    assert everything.keys() == set((ROOT / "csrc").rglob("*.cu"))
    assert all(archs == (["90a"] if p.parent.name == "sm90" else ["80", "90a"]) for p, archs in everything.items())
    assert not [p for p in build.kernel_sources(["80"]) if p.parent.name == "sm90"]


def make_cutlass(folder: Path) -> Path:
    header = folder / "include" / "cutlass" / "version.h"
    header.parent.mkdir(parents=True)
    header.write_text("#define CUTLASS_MAJOR 4\n#define CUTLASS_MINOR 2\n#define CUTLASS_PATCH 1\n")
    return folder


def test_where_cutlass_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "package_folder", lambda name: tmp_path / name)
    with pytest.raises(SystemExit, match="git submodule.*nvidia-cutlass.*CUTLASS_DIR"):
        build.find_cutlass({}, tmp_path)
    package = make_cutlass(tmp_path / "cutlass_library" / "source")
    assert build.find_cutlass({}, tmp_path) == package
    submodule = make_cutlass(tmp_path / "third_party" / "cutlass")
    assert build.find_cutlass({}, tmp_path) == submodule
    given = make_cutlass(tmp_path / "given")
    assert build.find_cutlass({"CUTLASS_DIR": str(given)}, tmp_path) == given
    assert build.cutlass_version(given) == "4.2.1"
    with pytest.raises(SystemExit, match="not in .*/absent"):
        build.find_cutlass({"CUTLASS_DIR": str(tmp_path / "absent")}, tmp_path)


def test_an_object_is_stale_after_its_inputs_or_its_command_changed(tmp_path):
    source, out = tmp_path / "a.cu", tmp_path / "a.o"
    source.touch()
    assert not build.is_fresh(out, ["nvcc"], [source])
    out.touch()
    out.with_suffix(".command").write_text("nvcc -O3")
    os.utime(source, (1, 1))
    assert build.is_fresh(out, ["nvcc", "-O3"], [source])
    assert not build.is_fresh(out, ["nvcc", "-O2"], [source])
    os.utime(out, (1, 1))
    assert not build.is_fresh(out, ["nvcc", "-O3"], [source])
