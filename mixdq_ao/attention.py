"""Attention without a mask by one of torch's exact backends or our own: a named one, or the fastest for the sizes.

torch picks a backend by a fixed order while a graph is traced. ``auto`` measures instead, when the operator first meets
sizes on a CUDA device: so neither the graph nor its key in a compile cache depends on what was measured, dynamic sizes
are chosen one by one, and what is timed are the very strides, and the plans of cuDNN, that are used from then on.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.backends import cuda

from mixdq_ao import ops
from mixdq_ao.errors import UnsupportedError
from mixdq_ao.ops import define, fake

aten = torch.ops.aten

# In the order in which they are preferred where they are equally fast: flash attention needs no plan and no workspace.
# "mixdq" is our own kernel, for few tokens.
BACKENDS = ("flash", "mixdq", "cudnn", "efficient", "math")
AUTO = "auto"

_CAN_USE = {
    "flash": cuda.can_use_flash_attention,
    "cudnn": cuda.can_use_cudnn_attention,
    "efficient": cuda.can_use_efficient_attention,
}
# From this version on torch itself prefers cuDNN: lengths that are no multiples of 128 were repaired in it.
_CUDNN = 91501
_TOLERANCE = 0.01  # of the norm; two backends differ by 0.001 in float16 and 0.004 in bfloat16
_MARGIN = 1.03  # a faster backend gains at least that much

_ROUNDS, _RUNS = 3, 20
_WAIT_CYCLES = 200_000  # about 0.1 ms: the graph is launched while the GPU waits

_fastest: dict[tuple, str] = {}


# q, k and v: [batch, heads, tokens, channels], channels a multiple of 8, k and v with tokens of their own. scale: None
# for 1 / sqrt(channels). The output is as q, dense, its strides in the order of those of q.
@define("attention(Tensor q, Tensor k, Tensor v, float? scale, str backend) -> Tensor")
def _attention(q, k, v, scale, backend):
    return _run(_checked(backend, q, k, v, scale), q, k, v, scale)


@fake("attention")
def _(q, k, v, scale, backend):
    return torch.empty_like(q)


# What quantize makes of its output, heads merged: int8 [batch, tokens, heads * channels]. act_scale and act_zero_point:
# float32 [1]. Our own kernel writes codes by itself.
@define(
    "attention_quantize(Tensor q, Tensor k, Tensor v, float? scale, str backend, Tensor act_scale, "
    "Tensor act_zero_point, int bits) -> Tensor"
)
def _attention_quantize(q, k, v, scale, backend, act_scale, act_zero_point, bits):
    static = act_scale, act_zero_point, bits
    return _run_quantized(_checked(backend, q, k, v, scale, static), q, k, v, scale, static)


@fake("attention_quantize")
def _(q, k, v, scale, backend, act_scale, act_zero_point, bits):
    return _empty_codes(q)


# The CUDA library computes these two for what fits our kernel; elsewhere, as every operator of ours, torch does.
@define("short_attention(Tensor q, Tensor k, Tensor v, float scale) -> Tensor")
def _short_attention(q, k, v, scale):
    return _run("math", q, k, v, scale)


@fake("short_attention")
def _(q, k, v, scale):
    return torch.empty_like(q)


@define(
    "short_attention_quantize(Tensor q, Tensor k, Tensor v, float scale, Tensor act_scale, Tensor act_zero_point, "
    "int bits) -> Tensor"
)
def _short_attention_quantize(q, k, v, scale, act_scale, act_zero_point, bits):
    return _quantize_merged(_run("math", q, k, v, scale), (act_scale, act_zero_point, bits))


@fake("short_attention_quantize")
def _(q, k, v, scale, act_scale, act_zero_point, bits):
    return _empty_codes(q)


def _empty_codes(q: Tensor) -> Tensor:
    batch, heads, tokens, channels = q.shape
    return torch.empty((batch, tokens, heads * channels), dtype=torch.int8, device=q.device)


def usable(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> list[str]:
    """The backends that can compute these sizes on this device, and that torch's switches allow."""
    return [name for name in BACKENDS if _is_usable(name, q, k, v, scale)]


def fastest(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, static: tuple | None = None) -> str:
    """The fastest usable backend for these sizes, measured once in a process; ``math`` only if it is the only one.

    ``static``: the scale, zero point and bits of codes, whose quantizer then counts as well.
    """
    names = tuple(usable(q, k, v, scale))
    key = q.device, q.dtype, q.shape, k.shape, names, static is not None
    if key not in _fastest:
        if len(names) <= 2 or torch.cuda.is_current_stream_capturing():
            return names[0]
        times = timings(q, k, v, scale, static)
        _fastest[key] = next((name for name, t in times.items() if t <= _MARGIN * min(times.values())), "math")
    return _fastest[key]


def timings(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, static: tuple | None = None
) -> dict[str, float]:
    """Milliseconds on the GPU of each usable backend but ``math``, up to codes where ``static`` says which; one that
    fails, or disagrees with the first that does not, is left out."""
    run = _run if static is None else functools.partial(_run_quantized, static=static)
    times, expected = {}, None
    for name in usable(q, k, v, scale)[:-1]:
        try:
            found = _run(name, q, k, v, scale).float()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # cuDNN finds out when it builds a plan
            continue
        expected = found if expected is None else expected
        if (found - expected).norm() <= _TOLERANCE * expected.norm():
            times[name] = _time(lambda name=name: run(name, q, k, v, scale), q.device)
    return times


def _checked(backend: str, q: Tensor, k: Tensor, v: Tensor, scale: float | None, static: tuple | None = None) -> str:
    """The backend that is meant; an error if it cannot compute these sizes."""
    if backend == AUTO:
        return fastest(q, k, v, scale, static)
    if not _is_usable(backend, q, k, v, scale):
        raise UnsupportedError(
            f"attention={backend!r} cannot compute queries {list(q.shape)} and keys {list(k.shape)} of {q.dtype} on "
            f"{q.device.type}; {' or '.join(usable(q, k, v, scale))} can. Use one of them, or attention='auto'"
        )
    return backend


def _is_usable(name: str, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> bool:
    if name == "math":
        return True
    if not q.is_cuda:
        return name == "flash"
    if name == "mixdq":
        return not ops.cuda_library_missing and _fits_our_kernel(q, k, v, scale)
    if name == "cudnn" and (torch.backends.cudnn.version() or 0) < _CUDNN:
        return False
    return _CAN_USE[name](cuda.SDPAParams(q, k, v, None, 0.0, False, False))


def _fits_our_kernel(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> bool:
    """Half precision, 64 channels, positive scales, and rows that vectors of 16 bytes can be loaded from."""
    if q.dtype not in (torch.float16, torch.bfloat16) or q.dim() != 4 or q.shape[-1] != 64:
        return False
    if k.shape != v.shape or k.shape[:2] != q.shape[:2] or k.shape[-1] != 64 or k.shape[2] == 0:
        return False
    if max(q.shape[:2]) >= 65536:  # blocks of a grid
        return False
    return (scale is None or scale > 0) and all(t.dtype == q.dtype and _is_of_vectors(t) for t in (q, k, v))


def _is_of_vectors(t: Tensor) -> bool:
    walked = [stride for size, stride in zip(t.shape[:-1], t.stride(), strict=False) if size > 1]
    return t.stride(-1) == 1 and t.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in walked)


def _run(name: str, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    if name == "cudnn":
        return aten._scaled_dot_product_cudnn_attention(q, k, v, None, False, scale=scale)[0]
    if name == "mixdq":
        return torch.ops.mixdq_ao.short_attention(q, k, v, _scale(q, scale))
    if name == "flash" and q.is_cuda:
        return aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[0]
    if name == "flash":
        y = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)[0]
    elif name == "efficient":
        y = aten._scaled_dot_product_efficient_attention(q, k, v, None, False, scale=scale)[0]
    else:
        y = aten._scaled_dot_product_attention_math(q, k, v, scale=scale)[0]
    # These have an order of their own.
    promised = torch.empty_like(q, device="meta").stride()
    return y if y.stride() == promised else torch.empty_like(q).copy_(y)


def _run_quantized(name: str, q: Tensor, k: Tensor, v: Tensor, scale: float | None, static: tuple) -> Tensor:
    if name == "mixdq":
        return torch.ops.mixdq_ao.short_attention_quantize(q, k, v, _scale(q, scale), *static)
    return _quantize_merged(_run(name, q, k, v, scale), static)


def _quantize_merged(y: Tensor, static: tuple) -> Tensor:
    """The codes of ``[batch, heads, tokens, channels]`` as ``[batch, tokens, heads * channels]``."""
    rows = y.transpose(1, 2).flatten(2)
    return torch.ops.mixdq_ao.quantize(rows, *static, [rows.shape[2]], None)


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _time(run: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of a run in a recorded graph, in the best of a few rounds.

    Launched one by one, a backend of several kernels would be measured by how fast the host is.
    """
    with torch.cuda.device(device):
        stream, graph = _stream_of_timings(device), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                for _ in range(_RUNS):
                    run()
            events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(_ROUNDS)]
            for start, end in events:
                torch.cuda._sleep(_WAIT_CYCLES)
                start.record()
                graph.replay()
                end.record()
        stream.synchronize()
    return min(start.elapsed_time(end) for start, end in events) / _RUNS


@functools.cache
def _stream_of_timings(device: torch.device) -> "torch.cuda.Stream":
    """One for all: each costs memory in the libraries that have seen it."""
    return torch.cuda.Stream(device)
