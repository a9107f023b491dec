"""What this machine can run, and why not more: versions, GPU, kernels, and a check that int8 arithmetic is exact."""

import importlib.metadata
import platform
from dataclasses import asdict, dataclass

import torch

from mixdq_ao import ops
from mixdq_ao._version import __version__
from mixdq_ao.errors import MixDQError

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
    findings += [_kernels(), _build()]
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


def _catalogue():
    """The compiled catalogue of kernels, or None where it was not built."""
    try:
        from mixdq_ao import _C
    except ImportError:
        return None
    return _C


def _build() -> Finding:
    native = _catalogue()
    if native is None:
        # Nothing is lost where there is no GPU.
        return Finding("kernels built", "none", ok=not torch.cuda.is_available())
    facts = native.facts()
    archs = ", ".join(f"sm_{arch.replace('+', ' and ')}" for arch in facts["archs"].split(";"))
    try:
        counts = f"{len(native.kernels())} kernels, {len(native.tuning_table())} measured sizes"
    except RuntimeError as error:
        return Finding("kernels built", str(error), ok=False)
    return Finding("kernels built", f"for {archs}; CUTLASS {facts['cutlass']}, nvcc {facts['nvcc']}; {counts}")


def _int8_is_exact() -> Finding:
    """Old CPUs saturate sums of int8 products in 16 bits; extreme codes show it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(0, 2, shape, generator=generator) * 255 - 128 for shape in ((32, 512), (64, 512)))
    one, none = torch.ones(1, 64, device=device), torch.zeros(64, device=device)
    # Sums of up to 2^23, which float32 holds; by the operator, so that it is what layers run.
    found = torch.ops.mixdq_ao.linear_int8(
        a.to(device, torch.int8), b.to(device, torch.int8), one, none, None, 8, [512], torch.float32
    ).cpu()
    exact = torch.equal(found.long(), a @ b.t())
    return Finding("int8 products", f"{'exact' if exact else 'NOT exact: results will be wrong'} on {device}", exact)


# --- which kernel runs a layer ----------------------------------------------------------------------------------------

# Multiprocessors of the largest GPU of each architecture, for those that are not here.
SM_COUNTS = {80: 108, 86: 84, 89: 128, 90: 132}


@dataclass(frozen=True)
class LayerKernels:
    """The kernel that is chosen for a problem, and for every kernel why it cannot do it, or an empty string.

    ``eager``: the one that quantizes and multiplies if 16-bit activations come in an eager call that no CUDA graph
    records; None where a quantizer runs first.
    """

    problem: str
    arch: int
    kernel: str
    splits: int
    tuned: bool
    eager: str | None
    eager_splits: int
    reasons: dict[str, str]


def layer_kernels(m: int, n: int, k: int, taps: int = 1, bits: int = 8, arch: int | None = None) -> LayerKernels:
    """Which kernel multiplies ``[m, k]`` by ``[n, k]`` with weights of ``bits`` bits; needs no GPU.

    ``k`` is the whole reduction: input channels times ``taps``, the positions of a convolution's window. ``arch`` is 90
    for sm_90; without it, that of this machine's GPU, or 90.
    """
    native = _catalogue()
    if native is None:
        raise MixDQError(
            "the catalogue of kernels was not built with this installation. The README's 'Install with CUDA kernels' "
            "tells how"
        )
    sm_count = SM_COUNTS.get(arch or 90, SM_COUNTS[90])
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(torch.cuda.current_device())
        if arch in (None, 10 * p.major + p.minor):
            arch, sm_count = 10 * p.major + p.minor, p.multi_processor_count
    size = {"m": m, "n": n, "k": k, "taps": taps, "bits": bits}
    arch = arch or 90
    try:
        choice = native.select(**size, arch=arch, sm_count=sm_count)
        eager = native.select(**size, arch=arch, sm_count=sm_count, quantizes=True)
        reasons = {kernel.name: native.why_not(kernel.name, **size, arch=arch) for kernel in native.kernels()}
    except (ValueError, RuntimeError) as error:  # of the size, or of MIXDQ_KERNEL and MIXDQ_TUNING_TABLE
        raise MixDQError(str(error)) from None
    problem = f"m {m}, n {n}, k {k}" + (f" in {taps} taps" if taps > 1 else "") + f", {bits}-bit weight"
    return LayerKernels(
        problem, arch, choice.kernel, choice.splits, choice.tuned,
        eager=eager and eager.kernel, eager_splits=eager.splits if eager else 1, reasons=reasons,
    )  # fmt: skip


def parse_layer(text: str) -> tuple[int, ...]:
    """``"M,N,K"`` or ``"M,N,K,TAPS"`` to numbers."""
    parts = text.split(",")
    if len(parts) not in (3, 4) or not all(p.strip().isdecimal() for p in parts):
        raise MixDQError(
            f"--layer must be M,N,K or M,N,K,TAPS: rows (or output pixels), output channels, input channels times "
            f"taps, taps of the window; found {text!r}"
        )
    return tuple(int(p) for p in parts)


def layer_table(found: LayerKernels) -> list[tuple[str, str]]:
    """A row for each kernel: its name, and what speaks for or against it."""

    def parts(splits: int) -> str:
        return f", {splits} parts of the reduction" if splits > 1 else ""

    chosen = {}
    if found.eager:
        chosen[found.eager] = f"quantizes as well, in eager calls that no graph records{parts(found.eager_splits)}"
    chosen[found.kernel] = f"runs, {'measured' if found.tuned else 'by rule'}{parts(found.splits)}"
    return [(name, chosen.get(name) or why or "could") for name, why in found.reasons.items()]


def as_json(findings: list[Finding]) -> list[dict]:
    return [asdict(f) for f in findings]
