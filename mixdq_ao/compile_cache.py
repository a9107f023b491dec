"""What was compiled in this process, as a file for the next one or for another machine of the same kind."""

import warnings

import torch

from mixdq_ao import precompiled
from mixdq_ao._version import __version__
from mixdq_ao.checkpoint import check_format
from mixdq_ao.errors import MixDQError
from mixdq_ao.files import TensorFile, write_tensors

FORMAT = "mixdq_ao.compile_cache"
FORMAT_VERSION = "2"

_ARTIFACTS = "artifacts"  # beside compiled steps, each under its own name


def save_compile_cache(path) -> None:
    """Write all that was compiled in this process to ``path``, whole or not at all. Call it after the first picture.

    It fits every model of the same architecture, bits and sizes, whatever its weights. Graphs and a GPU's kernels are
    in it; a CPU's kernels are not, which g++ then compiles anew, unless torch finds them in the folder that
    ``TORCHINDUCTOR_CACHE_DIR`` names. Raises ``MixDQError`` where nothing was compiled.
    """
    files = precompiled.used_files()
    saved = torch.compiler.save_cache_artifacts()
    if saved is not None and not saved[1].empty():
        files[_ARTIFACTS] = saved[0]
    if not files:
        raise MixDQError(
            "no code was generated in this process. Run the compiled model once, then save the cache; with "
            "backend='eager' there is none to keep"
        )
    tensors = {name: torch.frombuffer(bytearray(data), dtype=torch.uint8) for name, data in files.items()}
    header = {"format": FORMAT, "format_version": FORMAT_VERSION}
    write_tensors(path, tensors, header | _machine())


def load_compile_cache(path) -> bool:
    """Give torch what ``save_compile_cache`` wrote, before the first call of a compiled model.

    A cache of other versions or of another device fits nothing: it is left alone with a warning, and False returned.
    The file holds programs, and using it runs them: load only files that you trust. Raises ``CheckpointError`` for a
    file that is no such cache.
    """
    file = TensorFile(path)
    check_format(file, FORMAT, FORMAT_VERSION)
    here = _machine()
    there = {key: file.metadata.get(key) for key in here}
    other = [f"{key} {there[key]}, here {here[key]}" for key in here if there[key] != here[key]]
    if other:
        warnings.warn(f"{path} is left alone, everything is compiled anew: {'; '.join(other)}", stacklevel=2)
        return False
    if not file.entries:
        file.fail("", f"must hold {_ARTIFACTS} or compiled steps", "nothing")
    for name, entry in file.entries.items():
        if entry.dtype != torch.uint8 or not (name == _ARTIFACTS or precompiled.is_name(name)):
            file.fail(name, f"must be {_ARTIFACTS} or the name of a compiled step, and of bytes")
    data = {name: file.read(name).numpy().tobytes() for name in file.entries}
    artifacts = data.pop(_ARTIFACTS, None)
    if artifacts is not None and torch.compiler.load_cache_artifacts(artifacts) is None:
        file.fail(_ARTIFACTS, "must be what torch.compiler.save_cache_artifacts gives")
    for name, step in data.items():
        precompiled.keep_file(name, step)
    return True


def _machine() -> dict[str, str]:
    """What compiled code depends on besides the model; torch itself looks at more."""
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else torch.backends.cpu.get_cpu_capability()
    return {"mixdq_ao": __version__, "torch": torch.__version__, "device": device}
