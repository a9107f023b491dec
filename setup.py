"""Installs the Python package and, where the CUDA toolkit is found, builds the kernels. Metadata is in pyproject.toml.

Two files come of ``csrc``: ``mixdq_ao/_cuda.so``, the operators for CUDA tensors, which fits every torch from
``TORCH_TARGET`` on and every Python; and ``mixdq_ao/_C``, the catalogue of kernels for Python. Without nvcc or without
torch, as in pip's isolated builds, the package installs without both: the operators then run on torch's own.

Environment: ``MIXDQ_CUDA`` 1 demands the kernels, 0 leaves them out; ``MIXDQ_CUDA_ARCHS``; ``CUDA_HOME``;
``CUTLASS_DIR``; ``MAX_JOBS``.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "cuda"  # objects, kept between builds

# +PTX: GPUs newer than all of these compile that form for themselves.
DEFAULT_ARCHS = "80;86;89+PTX;90a"
HOPPER = "90a"  # the only one that runs csrc/sm90
TORCH_TARGET = "0x020b000000000000"  # 2.11, the oldest torch that loads the result
NVCC_FLAGS = [
    *("-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "-diag-suppress", "20012"),
    *("-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xfatbin", "-compress-all"),
]


class BuildError(SystemExit):
    """What is missing and what to do; ends the installation without a traceback."""


# --- what is there ----------------------------------------------------------------------------------------------------


def find_nvcc(environ=os.environ) -> str | None:
    """nvcc of CUDA_HOME, on PATH, or in the usual place."""
    for home in (environ.get("CUDA_HOME"), environ.get("CUDA_PATH")):
        if home and (found := shutil.which("nvcc", path=os.path.join(home, "bin"))):
            return found
    return shutil.which("nvcc", path=environ.get("PATH")) or shutil.which("nvcc", path="/usr/local/cuda/bin")


def package_folder(name: str) -> Path | None:
    """Where a package lies, without importing it."""
    spec = importlib.util.find_spec(name)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def find_cutlass(environ=os.environ, root: Path = ROOT) -> Path:
    """The folder whose ``include`` holds CUTLASS."""
    package = package_folder("cutlass_library")
    given = environ.get("CUTLASS_DIR")
    candidates = (
        [Path(given)] if given else [root / "third_party" / "cutlass", *([package / "source"] if package else [])]
    )
    for folder in candidates:
        if (folder / "include" / "cutlass" / "version.h").exists():
            return folder
    raise BuildError(
        f"The CUDA kernels need CUTLASS, which is not in {' or '.join(map(str, candidates))}. Any of these gives it: "
        "git submodule update --init third_party/cutlass; pip install --no-deps nvidia-cutlass==4.2.0.0; "
        "CUTLASS_DIR=<folder of a CUTLASS checkout>. MIXDQ_CUDA=0 installs without kernels."
    )


def cutlass_version(folder: Path) -> str:
    text = (folder / "include" / "cutlass" / "version.h").read_text()
    return ".".join(re.search(rf"#define CUTLASS_{part}\s+(\d+)", text)[1] for part in ("MAJOR", "MINOR", "PATCH"))


def why_no_kernels(environ, nvcc: str | None, torch: Path | None) -> str:
    """Why the kernels are not built; empty where they are. Raises BuildError where they were demanded."""
    wanted = environ.get("MIXDQ_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise BuildError(f"MIXDQ_CUDA must be 0 or 1; found {wanted!r}")
    if wanted == "0":
        return "MIXDQ_CUDA=0"
    if not CSRC.exists():
        why = "this source distribution has no csrc folder; take the repository"
    elif nvcc is None:
        why = "nvcc was not found; set CUDA_HOME or put the CUDA toolkit's bin folder on PATH"
    elif torch is None:
        why = (
            "torch is not there while building. Install torch>=2.11, setuptools>=77 and pybind11 first, then run "
            "pip install --no-build-isolation"
        )
    else:
        return ""
    if wanted == "1":
        raise BuildError(f"MIXDQ_CUDA=1 demands the CUDA kernels, but {why}")
    return why


# --- what to compile and how ------------------------------------------------------------------------------------------


def parse_archs(text: str) -> list[str]:
    """``"80;89+PTX;90a"`` to its entries. Raises BuildError for what is none."""
    archs = [a.strip() for a in text.replace(",", ";").split(";") if a.strip()]
    wrong = [a for a in archs if not re.fullmatch(r"\d{2,3}[af]?(\+PTX)?", a)]
    if wrong or not archs:
        raise BuildError(f"MIXDQ_CUDA_ARCHS must be like {DEFAULT_ARCHS!r}; found {text!r}")
    return archs


def gencode(archs: list[str]) -> list[str]:
    """nvcc's options for machine code of all entries, and PTX of those that ask for it."""
    flags = []
    for entry in archs:
        arch, _, ptx = entry.partition("+")
        flags.append(f"-gencode=arch=compute_{arch},code=sm_{arch}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{arch},code=compute_{arch}")
    return flags


def kernel_sources(archs: list[str], csrc: Path = CSRC) -> dict[Path, list[str]]:
    """Each .cu file and the architectures that it is compiled for."""
    sources = {p: archs for p in sorted(csrc.rglob("*.cu")) if p.parent.name != "sm90"}
    if HOPPER in archs:
        sources |= {p: [HOPPER] for p in sorted((csrc / "sm90").glob("*.cu"))}
    return sources


@dataclass(frozen=True)
class Toolchain:
    """Where everything is that a build needs."""

    nvcc: str
    torch: Path
    cutlass: Path
    archs: list[str]

    def facts(self) -> dict[str, str]:
        """Macros that tell the code what it was built with."""
        version = re.search(r"V([\d.]+)", run([self.nvcc, "--version"]))[1]
        return {
            "MIXDQ_SM90": str(int(HOPPER in self.archs)),
            "MIXDQ_ARCHS": f'"{";".join(self.archs)}"',
            "MIXDQ_CUTLASS": f'"{cutlass_version(self.cutlass)}"',
            "MIXDQ_NVCC": f'"{version}"',
        }

    def commands(self) -> dict[Path, list[str]]:
        """For each object file the command that makes it, the longest first."""
        common = [f"-DMIXDQ_SM90={int(HOPPER in self.archs)}", f"-I{CSRC}"]
        units = {
            source: [*common, f"-I{self.cutlass / 'include'}", *gencode(archs)]
            for source, archs in kernel_sources(self.archs).items()
        }
        units = dict(sorted(units.items(), key=lambda unit: "matmul" not in unit[0].read_text()))
        torch_flags = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-DUSE_CUDA", "-isystem", str(self.torch / "include")]
        units |= {source: [*common, *torch_flags] for source in sorted((CSRC / "ops").glob("*.cpp"))}
        units |= {CSRC / "catalogue.cpp": common, CSRC / "functions.cpp": common}
        commands = {}
        for source, flags in units.items():
            out = BUILD / source.relative_to(CSRC).with_suffix(".o")
            commands[out] = [self.nvcc, "-c", str(source), "-o", str(out), *NVCC_FLAGS, *flags]
        return commands


# --- compiling and linking --------------------------------------------------------------------------------------------


def run(command: list[str]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}\nfailed with exit code {done.returncode}")
    return done.stdout


def is_fresh(out: Path, command: list[str], inputs: list[Path]) -> bool:
    """Whether ``out`` was made by this very command after every input's last change."""
    record = out.with_suffix(".command")
    if not (out.exists() and record.exists() and record.read_text() == " ".join(command)):
        return False
    made = out.stat().st_mtime
    return all(path.stat().st_mtime < made for path in inputs)


def compile_all(commands: dict[Path, list[str]]) -> None:
    """One compiler for each stale object, MAX_JOBS at a time."""
    headers = [p for p in CSRC.rglob("*") if p.suffix in (".h", ".cuh", ".inc")]
    stale = {o: c for o, c in commands.items() if not is_fresh(o, c, [Path(c[2]), *headers])}
    jobs = int(os.environ.get("MAX_JOBS", 0)) or os.cpu_count() or 1

    def compile_one(item) -> None:
        out, command = item
        out.parent.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        output = run(command)
        out.with_suffix(".command").write_text(" ".join(command))
        print(f"{Path(command[2]).relative_to(ROOT)}: {time.monotonic() - began:.0f} s", flush=True)
        if output.strip():
            print(output, flush=True)

    print(f"{len(stale)} of {len(commands)} files to compile, {jobs} at a time", flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        for _ in pool.map(compile_one, stale.items()):
            pass


def torch_stubs(objects: list[Path]) -> list[str]:
    """Libraries with the names of torch's, which define what the objects need of its stable interface.

    They stand in for torch's own at link time, so that any torch will do, also one without CUDA; and whatever else an
    object should need of torch is an error here and not on a user's machine. The result names both libraries as needed:
    they are loaded by then, but their symbols are visible only to those who do.
    """
    folder = BUILD / "stubs"
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(set(re.findall(r"\bU ((?:aoti_)?torch_\w+)", run(["nm", "-u", *map(str, objects)]))))
    on_cuda = [name for name in names if "_cuda_" in name]
    stubs = {"torch_cpu": [name for name in names if name not in on_cuda], "torch_cuda": on_cuda}
    for library, defined in stubs.items():
        source, out = folder / f"{library}.c", folder / f"lib{library}.so"
        source.write_text("".join(f"void {name}(void) {{}}\n" for name in defined))
        run(["cc", "-shared", "-fPIC", "-nostdlib", f"-Wl,-soname,{out.name}", str(source), "-o", str(out)])
    return [str(folder / f"lib{library}.so") for library in stubs]


def build_cuda(tools: Toolchain, out: Path) -> None:
    commands = tools.commands()
    compile_all(commands)
    objects = list(commands)
    out.parent.mkdir(parents=True, exist_ok=True)
    linker = [flag for option in ("-z", "defs", "--strip-all") for flag in ("-Xlinker", option)]
    # No kernel calls into another file, and linking GPU code would add some for nvcc's default GPU.
    options = ["-shared", "-cudart", "static", "--no-device-link", *linker]
    run([tools.nvcc, *options, "-o", str(out), *map(str, objects), *torch_stubs(objects)])
    print(f"{out}: {out.stat().st_size / 2**20:.1f} MiB", flush=True)


class BuildNative(build_ext):
    """``_cuda`` by nvcc, ``_C`` as any extension."""

    def get_ext_filename(self, fullname: str) -> str:
        *folders, name = fullname.split(".")
        # No tag of a Python version: it needs none.
        return os.path.join(*folders, "_cuda.so") if name == "_cuda" else super().get_ext_filename(fullname)

    def build_extension(self, ext: Extension) -> None:
        if isinstance(ext, CudaExtension):
            build_cuda(ext.tools, Path(self.get_ext_fullpath(ext.name)))
            return
        self.force = True  # setuptools does not see that macros changed
        super().build_extension(ext)


class CudaExtension(Extension):
    def __init__(self, tools: Toolchain):
        super().__init__("mixdq_ao._cuda", sources=[])
        self.tools = tools


def host_extension(tools: Toolchain) -> list[Extension]:
    """``_C``, where pybind11 is there."""
    pybind = package_folder("pybind11")
    if pybind is None:
        print("mixdq_ao: without mixdq_ao._C, since pybind11 is not installed", flush=True)
        return []
    return [
        Extension(
            "mixdq_ao._C",
            sources=["csrc/host.cpp", "csrc/catalogue.cpp"],
            include_dirs=[str(CSRC), str(pybind / "include")],
            define_macros=list(tools.facts().items()),
            extra_compile_args=["-std=c++17", "-O2", "-g0", "-fvisibility=hidden"],
            extra_link_args=["-s"],
            language="c++",
        )
    ]


def extensions() -> list[Extension]:
    nvcc, torch = find_nvcc(), package_folder("torch")
    why = why_no_kernels(os.environ, nvcc, torch)
    if why:
        print(f"mixdq_ao: installing without CUDA kernels: {why}", flush=True)
        return []
    archs = parse_archs(os.environ.get("MIXDQ_CUDA_ARCHS") or DEFAULT_ARCHS)
    tools = Toolchain(nvcc, torch, find_cutlass(), archs)
    return [CudaExtension(tools), *host_extension(tools)]


if __name__ == "__main__":
    setup(ext_modules=extensions(), cmdclass={"build_ext": BuildNative})
