"""What this machine can run, and why not more: versions, GPU, kernels, and a check that int8 arithmetic is exact."""

import importlib.metadata
import platform
from dataclasses import asdict, dataclass

import torch

from mixdq_ao import ops
from mixdq_ao._version import __version__

LIBRARIES = ("torch", "torchao", "diffusers", "transformers", "accelerate", "peft", "safetensors")


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and whether that is as good as it can be."""

    name: str
    value: str
    ok: bool = True


def examine() -> list[Finding]:
    """Everything that ``mixdq-ao doctor`` prints."""
    findings = [Finding("mixdq_ao", __version__), Finding("Python", platform.python_version())]
    findings += [Finding(name, *_version(name)) for name in LIBRARIES]
    findings += _devices()
    findings.append(_kernels())
    findings.append(_int8_is_exact())
    return findings


def _version(name: str) -> tuple[str, bool]:
    try:
        return importlib.metadata.version(name), True
    except importlib.metadata.PackageNotFoundError:
        return "not installed", name == "peft"  # only LoRA needs it


def _devices() -> list[Finding]:
    cpu = Finding("CPU int8", f"torch._int_mm, {torch.backends.cpu.get_cpu_capability()}")
    if not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
        return [cpu, Finding("GPU", f"none: {why}", ok=False)]
    found = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        memory = f"{p.total_memory / 2**30:.0f} GiB"
        found.append(Finding(f"GPU {i}", f"{p.name}, sm_{p.major}{p.minor}, {memory}, CUDA {torch.version.cuda}"))
    return [cpu, *found]


def _kernels() -> Finding:
    if ops.cuda_library_missing:
        value = f"torch's own operations; our CUDA kernels are not in use: {ops.cuda_library_missing}"
        return Finding("kernels", value, ok=False)
    return Finding("kernels", "mixdq_ao CUDA")


def _int8_is_exact() -> Finding:
    """Old CPUs saturate sums of int8 products in 16 bits; extreme codes show it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(0, 2, shape, generator=generator) * 255 - 128 for shape in ((32, 512), (64, 512)))
    found = ops.int_matmul(a.to(device, torch.int8), b.to(device, torch.int8)).cpu()
    exact = torch.equal(found.long(), a @ b.t())
    return Finding("int8 products", f"{'exact' if exact else 'NOT exact: results will be wrong'} on {device}", exact)


def as_json(findings: list[Finding]) -> list[dict]:
    return [asdict(f) for f in findings]
