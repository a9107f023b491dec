"""What was compiled of csrc, where it was: the kernels' library and the catalogue of kernels. No GPU is needed."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mixdq_ao

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import tune  # noqa: E402
from sdxl_shapes import layers, merged  # noqa: E402

try:
    from mixdq_ao import _C as native
except ImportError:
    native = None

LIBRARY = Path(mixdq_ao.__file__).parent / "_cuda.so"
compiled = pytest.mark.skipif(not LIBRARY.exists(), reason="mixdq_ao/_cuda.so was not built")
catalogued = pytest.mark.skipif(native is None, reason="mixdq_ao._C was not built")

# The C library, its loader, C++'s run time and CUDA's, which is linked in; and torch's stable interface.
OTHERS = {"libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "libgcc_s.so.1", "libstdc++.so.6"}
STABLE = re.compile(r"(aoti_)?torch_\w+$")


def run(*command) -> str:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=True).stdout


# --- the library ------------------------------------------------------------------------------------------------------


@compiled
@pytest.mark.skipif(not shutil.which("nm"), reason="no nm to read symbols")
def test_the_library_needs_of_torch_only_its_stable_interface():
    symbols = {line.split()[-1] for line in run("nm", "-D", "--undefined-only", LIBRARY).splitlines()}
    of_torch = {s for s in symbols if "torch" in s or "c10" in s or s.startswith(("_ZN2at", "_ZNK2at"))}
    assert of_torch and all(STABLE.match(s) for s in of_torch)
    # Everything else comes from libraries whose symbols carry versions, or may be missing (w).
    strong = {line.split()[-1] for line in run("nm", "-D", "--undefined-only", LIBRARY).splitlines() if " U " in line}
    assert all("@" in s for s in strong - of_torch)


@compiled
@pytest.mark.skipif(not shutil.which("readelf"), reason="no readelf to read what is needed")
def test_the_library_names_the_libraries_that_it_needs():
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", LIBRARY)))
    assert {"libtorch_cpu.so", "libtorch_cuda.so"} <= needed
    assert needed - {"libtorch_cpu.so", "libtorch_cuda.so"} <= OTHERS | {"ld-linux-x86-64.so.2"}


@compiled
@catalogued
@pytest.mark.skipif(not shutil.which("cuobjdump"), reason="no cuobjdump to read GPU code")
def test_the_library_holds_code_for_what_it_says():
    archs = native.facts()["archs"].split(";")
    built = set(re.findall(r"sm_(\d+\w?)\.cubin", run("cuobjdump", "--list-elf", LIBRARY)))
    assert built == {arch.removesuffix("+PTX") for arch in archs}
    ptx = set(re.findall(r"sm_(\d+\w?)\.ptx", run("cuobjdump", "--list-ptx", LIBRARY)))
    assert ptx == {arch.removesuffix("+PTX") for arch in archs if arch.endswith("+PTX")}


# --- the catalogue ----------------------------------------------------------------------------------------------------


@catalogued
def test_names_of_kernels_are_unique():
    names = [kernel.name for kernel in native.kernels()]
    assert len(set(names)) == len(names) and {"few_rows", "direct"} <= set(names)


def sizes_of(layer) -> dict:
    return {"m": layer.m, "n": layer.columns, "k": layer.k, "taps": layer.taps}


def in_this_build(arch: str) -> bool:
    return arch in native.facts()["archs"].split(";")


def check_choice(arch: int, **size) -> str:
    """The chosen kernel, which must be able to do it."""
    choice = native.select(**size, arch=arch)
    kernel = next(kernel for kernel in native.kernels() if kernel.name == choice.kernel)
    assert native.why_not(choice.kernel, **size, arch=arch) == ""
    assert 1 <= choice.splits <= kernel.max_splits
    return choice.kernel


@catalogued
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
def test_every_layer_of_sdxl_runs_on_tensor_cores(arch, bits):
    for pixels, batch in ((512, 1), (1024, 1), (512, 8)):
        for layer in [*layers(pixels, batch), *merged(pixels, batch)]:
            name = check_choice(arch, bits=bits, **sizes_of(layer))
            # On Hopper the tuner may have found a kernel of older GPUs faster, or one of many rows for few.
            hopper = arch == 90 and in_this_build("90a")
            families = ("sm90", "sm80") if hopper else ("sm80",)
            if layer.k // layer.taps % 16 == 0 and layer.m > 16:
                assert name.startswith(families), f"{layer}: {name}"
            elif layer.m <= 16:
                assert name == "few_rows" or (hopper and name.startswith(families)), f"{layer}: {name}"


@catalogued
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    "size", [(1, 1, 1), (17, 3, 5), (100, 7, 48), (10**6, 1, 16), (5, 9, 9 * 4, 9), (33, 1, 25, 25)]
)
def test_odd_sizes_have_a_kernel(size, arch):
    for bits in (8, 4, 2):
        check_choice(arch, **dict(zip(("m", "n", "k", "taps"), size, strict=False)), bits=bits)


@catalogued
@pytest.mark.skipif(native and not in_this_build("90a"), reason="only Hopper has such kernels")
def test_geglu_ends_a_product_of_many_tiles_in_large_ones():
    def chosen(m, n, k, arch=90, **more):
        choice = native.select(m, n, k, arch=arch, geglu=True, **more)
        return choice and choice.kernel

    for m, c in ((256, 1280), (512, 640)):
        assert chosen(m, 8 * c, c) == "sm90_64x160_geglu"
    for m, c in ((1024, 640), (1024, 1280), (4096, 640), (32768, 640)):  # 256 tiles and more for 132 multiprocessors
        assert chosen(m, 8 * c, c) == "sm90_128x160_geglu"
        # Of many rows spreading packed weights in every tile costs more than unpacking them first.
        assert chosen(m, 8 * c, c, bits=4) == f"sm90_128x160{'_packed' if m <= 1024 else ''}_geglu"
    assert chosen(4096, 5120, 640, arch=89) is chosen(4096, 5136, 640) is chosen(4096, 5120, 632) is None
    # Nobody else's.
    assert native.why_not("sm90_128x160_geglu", 4096, 5120, 640) == "ends with GEGLU"
    assert native.why_not("sm90_128x160", 4096, 5120, 640, geglu=True) == "has no GEGLU"


@catalogued
@pytest.mark.skipif(native and not in_this_build("90a"), reason="only Hopper has such a kernel")
def test_one_round_of_blocks_quantizes_and_multiplies():
    def chosen(m, n, k, arch=90, **more):
        choice = native.select(m, n, k, arch=arch, quantizes=True, **more)
        return choice and f"{choice.kernel}:{choice.splits}"

    assert chosen(1024, 640, 640) == chosen(1024, 640, 2560) == "sm90_64x80_quantizing:1"
    assert chosen(256, 1280, 1280) == chosen(256, 1280, 5120) == "sm90_64x80_quantizing:2"
    assert chosen(77, 1280, 2048) == "sm90_64x80_quantizing:3"
    assert chosen(256, 10240, 1280) is chosen(4096, 640, 640) is None
    assert chosen(256, 1280, 1280, bits=4) is chosen(256, 1280, 1288) is chosen(256, 1280, 1280, arch=89) is None
    assert native.why_not("sm90_64x80_quantizing", 256, 1280, 1280) == "quantizes its input"
    assert native.why_not("sm90_64x80", 256, 1280, 1280, quantizes=True) == "multiplies codes"


@catalogued
def test_sizes_that_are_none_are_refused():
    with pytest.raises(ValueError, match="multiple of taps"):
        native.select(16, 16, 10, taps=3)
    with pytest.raises(ValueError, match="bits must be"):
        native.select(16, 16, 16, bits=3)
    with pytest.raises(ValueError, match="no kernel 'best'"):
        native.why_not("best", 16, 16, 16)


@catalogued
def test_the_environment_forces_a_kernel_that_can(monkeypatch):
    monkeypatch.setenv("MIXDQ_KERNEL", "direct")
    assert native.select(4096, 640, 640).kernel == "direct"
    monkeypatch.setenv("MIXDQ_KERNEL", "sm80_64x64:4")
    choice = native.select(4096, 640, 640, arch=80)
    assert (choice.kernel, choice.splits) == ("sm80_64x64", 1)  # as many as the kernel has
    assert native.select(4096, 640, 9, arch=80).kernel == "direct"  # which that kernel cannot do
    monkeypatch.setenv("MIXDQ_KERNEL", "sm80")
    assert native.select(4096, 640, 640, arch=90).kernel == native.select(4096, 640, 640, arch=89).kernel
    assert [native.select(m, 640, k, arch=90).kernel for m, k in ((4, 640), (4096, 9))] == ["few_rows", "direct"]
    assert native.select(4096, 640, 640, arch=90, floating=True) is None  # that family has no such kernel
    monkeypatch.setenv("MIXDQ_KERNEL", "sm90")
    assert native.select(4096, 640, 640, arch=90).kernel.startswith("sm90" if in_this_build("90a") else "direct")
    assert native.select(4096, 640, 640, arch=80).kernel == "direct"
    monkeypatch.setenv("MIXDQ_KERNEL", "fastest")
    with pytest.raises(RuntimeError, match="MIXDQ_KERNEL names no kernel: 'fastest'. The kernels are "):
        native.select(4096, 640, 640)


def in_a_new_process(code: str, **settings: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", f"from mixdq_ao import _C as native\n{code}"]
    return subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)


@catalogued
def test_a_table_may_be_given_without_building_it_in(tmp_path):
    table = tmp_path / "table.inc"
    # On every GPU of the table, and one that the rule would not choose.
    rows = {(90, (4096, 640, 640, 1, 8)): ("sm80_128x16", 1), (80, (4096, 640, 640, 1, 8)): ("direct", 1)}
    tune.write_table(table, rows)
    code = "print([native.select(4200, 640, 640, arch=a) for a in (90, 80, 86)], len(native.tuning_table()))"
    done = in_a_new_process(code, MIXDQ_TUNING_TABLE=str(table))
    others = native.select(4200, 640, 640, arch=86), len(native.tuning_table()) + 2
    assert done.stdout == "[{}, {}, {}] {}\n".format("sm80_128x16:1 (tuned)", "direct:1 (tuned)", *others), done.stderr


@catalogued
@pytest.mark.parametrize(
    "line", ['{90, 4096, 640, 640, 1, 8, "sm90_1x1", 1},', '{90, 4096, 640, 640, 1, 8, "direct"},', "m, n, k", "{90, "]
)
def test_a_table_that_is_none_is_a_clear_error(tmp_path, line):
    table = tmp_path / "table.inc"
    table.write_text(f'// a comment\n\n{{90, 1, 16, 16, 1, 8, "direct", 1}},\n{line}\n')
    done = in_a_new_process("native.select(1, 16, 16)", MIXDQ_TUNING_TABLE=str(table))
    assert f"MIXDQ_TUNING_TABLE: {table}, line 4: '{line}' is no row" in done.stderr
    done = in_a_new_process("native.tuning_table()", MIXDQ_TUNING_TABLE=str(tmp_path / "absent"))
    assert "absent cannot be read" in done.stderr


@catalogued
def test_a_measured_size_holds_for_sizes_near_it():
    def row(m, arch=90, kernel="sm90_64x64"):
        return native.Tuned(arch=arch, m=m, n=640, k=5760, taps=9, bits=8, kernel=kernel, splits=2)

    table = [row(4096), row(1024), row(1200), row(1024, arch=80)]

    def found(m, **changed):
        size = {"n": 640, "k": 5760, "taps": 9, "bits": 8, "arch": 90} | changed
        hit = native.nearest(table, m, **size)
        return hit and hit.m

    assert [found(m) for m in (1024, 1100, 1150, 1800, 1801, 4096, 6144, 6145, 100)] == [
        *(1024, 1024, 1200, 1200, None, 4096, 4096, None, None)
    ]
    assert found(1024, n=320) is None and found(1024, bits=4) is None and found(1024, taps=1) is None
    assert found(4096, arch=80) is None


@catalogued
def test_the_tuning_table_names_kernels_that_can_do_their_sizes():
    for row in native.tuning_table():
        assert native.why_not(row.kernel, row.m, row.n, row.k, row.taps, row.bits, row.arch) == ""
