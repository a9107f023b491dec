"""The CUDA library on a CPU: csrc compiled for the host, with threads, copies and tensor cores emulated.

``tests/emulator`` stands in for nvcc's language, the GPU and the part of torch that knows CUDA; what is tested are the
sources of the kernels and of their operators as they are. Threads run in random order, asynchronous work ends at random
or as late as it may, and every tensor lies at the edge of memory that cannot be touched. It assumes the documented
meaning of instructions, descriptors and tensor maps, has one order of memory for everybody, and says nothing of speed.
``planted_mistakes.py`` shows what it finds.
"""

import contextlib
import ctypes
import hashlib
import importlib.util
import mmap
import os
import re
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

ROOT = Path(__file__).resolve().parents[1]
EMULATOR = ROOT / "tests" / "emulator"
BUILD = ROOT / "build" / "emulator"

# Functions of torch that a build without CUDA does not have, or that would see a CPU.
REPLACED = (
    "device_type_cuda",
    "get_device_index",
    "create_device_guard",
    "delete_device_guard",
    "get_current_cuda_stream",
    "empty_strided",
    "cuda_caching_allocator_raw_alloc",
    "cuda_caching_allocator_raw_delete",
)
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fPIC", "-w", "-DUSE_CUDA", "-DMIXDQ_SM90=1"]
# Rounding as on the GPU; values read under other types, which nvcc allows; jumps from stack to stack.
FLAGS += ["-ffp-contract=off", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE"]
# A GPU stops at a vector that is not aligned; a CPU would read it.
SANITIZER = ["-fsanitize=alignment", "-fno-sanitize-recover=alignment"]
SM90, SM80 = 0, 1  # devices


def _setup():
    spec = importlib.util.spec_from_file_location("mixdq_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def why_not() -> str:
    """Why nothing can be emulated here; empty where it can."""
    if sys.platform != "linux":
        return "only on Linux"
    if importlib.util.find_spec("setuptools") is None:
        return "no setuptools, which setup.py needs to tell where the CUDA toolkit is"
    if not _setup().find_nvcc():
        return "no CUDA toolkit, whose headers the emulator needs"
    return "" if shutil.which("c++") else "no C++ compiler"


def on_a_host(source: str) -> str:
    """What no macro can replace: dynamic shared memory, and the instructions of dependent launches."""
    source = re.sub(
        r"extern __shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[\];",
        r"\1* \2 = reinterpret_cast<\1*>(emulator::shared);",
        source,
    )
    for instruction, function in (("wait", "wait_for_previous"), ("launch_dependents", "let_next_start")):
        assembly = rf'#if __CUDA_ARCH__ >= 900\n  asm volatile\("griddepcontrol.{instruction};" ::: "memory"\);\n#endif'
        source = re.sub(assembly, f"\nemulator::{function}();\n", source)
    return source


def read_sources() -> dict[Path, str]:
    """Every file that is compiled or included, by its place in the folder where that happens."""
    sources = {path.relative_to(ROOT / "csrc"): on_a_host(path.read_text()) for path in (ROOT / "csrc").rglob("*.*")}
    return sources | {path.relative_to(EMULATOR): path.read_text() for path in EMULATOR.rglob("*.*")}


def build(sources: dict[Path, str], folder: Path = BUILD) -> Path:
    """Compile the library into the folder unless it is there; about half a minute on two cores."""
    import fcntl  # Linux only, as all of this

    how = Path(__file__).read_text()
    key = hashlib.sha256(repr((sorted(sources.items()), how, torch.__version__)).encode()).hexdigest()[:16]
    library = folder / f"{key}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests may run side by side
        if not library.exists():
            for old in folder.glob("*.so"):
                old.unlink()
            _compile(sources, folder / "sources", library)
    return library


def _compile(sources: dict[Path, str], folder: Path, library: Path) -> None:
    setup = _setup()
    shutil.rmtree(folder, ignore_errors=True)
    for path, text in sources.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    package = Path(torch.__file__).parent
    # nvcc may be a script that stands elsewhere than the toolkit; it tells where it looks.
    told = setup.run([setup.find_nvcc(), "--dryrun", "-c", str(folder / "unpack.cu")])
    cuda = re.search(r'INCLUDES="-I([^"]+?)"', told)[1].strip()
    flags = [*FLAGS, *SANITIZER, f"-DTORCH_TARGET_VERSION={setup.TORCH_TARGET}"]
    flags += [f"-I{folder / 'include'}", f"-I{folder}", "-isystem", str(package / "include"), "-isystem", cuda]
    renamed = [f"-Daoti_torch_{name}=emulated_{name}" for name in REPLACED]

    def compile_one(path: Path) -> str:
        out = (folder / path).with_suffix(".o")
        # The emulator's own files define what the others' names are replaced by.
        extra = [] if (EMULATOR / path).exists() else [*renamed, "-include", "cuda_on_cpu.h"]
        setup.run(["c++", "-x", "c++", "-c", str(folder / path), "-o", str(out), *flags, *extra])
        return str(out)

    units = [path for path in sources if path.suffix in (".cu", ".cpp") and path.name != "host.cpp"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, units))
    partial = library.with_suffix(".partial")
    torch_libraries = [f"-L{package / 'lib'}", "-ltorch_cpu", "-lc10"]
    # Symbolic: a torch with CUDA has loaded the real runtime, which is not to be found first.
    setup.run(["c++", "-shared", *SANITIZER, "-Wl,-z,defs,-Bsymbolic", "-o", str(partial), *objects, *torch_libraries])
    partial.rename(library)


def edge_of_memory(storage: torch.UntypedStorage) -> Tensor:
    """A copy as bytes that ends, but for alignment to 16, where memory cannot be touched."""
    size = storage.nbytes()
    pages = -(-size // mmap.PAGESIZE)
    area = mmap.mmap(-1, (pages + 2) * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    for page in (0, pages + 1):
        if protect(ctypes.c_void_p(start + page * mmap.PAGESIZE), mmap.PAGESIZE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = (pages + 1) * mmap.PAGESIZE - -(-size // 16) * 16
    copy = torch.frombuffer(area, dtype=torch.uint8, count=size, offset=offset)
    return copy.copy_(torch.empty(0, dtype=torch.uint8).set_(storage))


def at_the_edge(args):
    """The same arguments, their tensors in such copies; those that share memory still do."""
    copies = {}

    def move(t: Tensor) -> Tensor:
        if not t.numel():
            return t
        storage = t.untyped_storage()
        if storage.data_ptr() not in copies:
            copies[storage.data_ptr()] = edge_of_memory(storage).untyped_storage()
        return torch.empty(0, dtype=t.dtype).set_(copies[storage.data_ptr()], t.storage_offset(), t.size(), t.stride())

    return tree_map_only(Tensor, move, args)


class Operators:
    """``torch.ops.mixdq_ao`` as on a GPU, for tensors of a CPU; built and loaded when first needed."""

    @cached_property
    def _library(self) -> ctypes.CDLL:
        path = os.environ.get("MIXDQ_EMULATED_LIBRARY") or str(build(read_sources()))
        torch.ops.load_library(path)
        return ctypes.CDLL(path)

    def load(self) -> None:
        """Now, and not at the first call."""
        _ = self._library

    def seed(self, number: int) -> None:
        """Another number, another order of events."""
        self._library.emulator_seed(number)

    def set_device(self, number: int) -> None:
        """SM90, as from the start, or SM80."""
        self._library.emulator_set_device(number)

    def __getattr__(self, name: str):
        if name.startswith("_"):
            raise AttributeError(name)
        op, library = getattr(torch.ops.mixdq_ao, name).default, self._library
        cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
        parameters = [parameter.name for parameter in op._schema.arguments]

        def call(*args):
            args = at_the_edge(args)
            library.emulator_begin()
            # The kernel ahead of the operator may have written all that it reads but weights.
            read = [arg for parameter, arg in zip(parameters, args, strict=False) if parameter != "qdata"]
            tensors = [t for t in tree_leaves(read) if isinstance(t, Tensor) and t.numel()]
            for storage in {s.data_ptr(): s for s in map(Tensor.untyped_storage, tensors)}.values():
                library.emulator_written_ahead(ctypes.c_void_p(storage.data_ptr()), ctypes.c_int64(storage.nbytes()))
            result = op.redispatch(cuda, *args)
            assert library.emulator_count_overruns() == 0, f"{name} wrote past the ends of its tensors"
            return result

        return call


@contextlib.contextmanager
def in_place_of_the_cpu(operators: Operators) -> Iterator[None]:
    """Within it our operators are the CUDA library's, whoever calls them: compiled code, too."""
    library = torch.library.Library("mixdq_ao", "IMPL")
    try:
        operators.load()
        for name in torch._C._dispatch_get_registrations_for_dispatch_key("CUDA"):
            namespace, _, op = name.partition("::")
            if namespace == "mixdq_ao":
                library.impl(op, getattr(operators, op), "CPU")
        yield
    finally:
        library._destroy()
