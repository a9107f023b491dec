"""One small launch of everything in the CUDA library, for NVIDIA's checker of memory accesses and races.

    compute-sanitizer --tool memcheck --error-exitcode 1 python benchmarks/sanitize.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python benchmarks/sanitize.py
    compute-sanitizer --tool initcheck --check-api-memory-access no --error-exitcode 1 python benchmarks/sanitize.py

Sizes are such that no tile is full and rows end in the middle of a vector. Inputs are made and results are checked on
the CPU, so that few kernels but ours run. ``--only sm90`` takes what has that in its name, ``--share 1/4`` every fourth
launch: a checker keeps one core of the CPU busy, and several may run side by side.

initcheck does not see what bulk copies (TMA) write, and would call every output that leaves by them uninitialized when
it is copied to the host: with that option it looks at what kernels read.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Annotated

# Every tensor becomes an allocation of its own, or a step over its end would land in another one unseen.
os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import torch
import typer
from gpu import KERNELS, Kernel, forced, ops, require_gpu
from sdxl_shapes import Conv, Layer, Linear
from torch import Tensor
from torch.utils._pytree import tree_map_only

from mixdq_ao import attention  # noqa: F401  which defines its operator
from mixdq_ao.packing import pack

ROWS, COLUMNS, CHANNELS, IMAGE_CHANNELS = 200, 168, 1088, 192
STATIC = (torch.tensor([0.03]), torch.tensor([-11.0]), 8)
# Kernels that read weights of these widths as they are stored.
AS_STORED = {"packed": (4, 2), "floating": (8, 4, 2), "few_rows": (8, 4, 2)}


def weight(n: int, channels: int, bits: int, window: tuple = (), groups: tuple = ()) -> tuple[Tensor, ...]:
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (n, channels, *window), dtype=torch.int8)
    groups = list(groups or (channels,))
    return pack(codes, bits, groups), torch.rand(len(groups), n) * 1e-4, torch.randn(n), torch.randn(n).half()


def codes(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def image_codes(batch: int, channels: int, height: int, width: int) -> Tensor:
    return codes(batch, height, width, channels).permute(0, 3, 1, 2)


def products(bits: int) -> dict[str, tuple[Layer, Callable, tuple]]:
    """For each kind of problem its layer, the operator and its arguments."""
    torch.manual_seed(bits)
    call, half = torch.ops.mixdq_ao, torch.float16
    x, few, n, k = codes(ROWS, CHANNELS), codes(5, CHANNELS), COLUMNS, CHANNELS
    w, image, small = weight(n, k, bits), image_codes(2, IMAGE_CHANNELS, 9, 13), image_codes(2, 4, 9, 7)
    window, narrow = weight(n, IMAGE_CHANNELS, bits, (3, 3)), weight(17, 4, bits, (3, 3))
    groups = (64, IMAGE_CHANNELS - 64)
    split = weight(n, IMAGE_CHANNELS, bits, (1, 1), groups)
    several, wide = [weight(c, k, bits) for c in (40, n, 1)], weight(2 * 176, k, bits)
    dynamic = (torch.rand(ROWS, 1), torch.randint(-9, 9, (ROWS, 1)).float(), w[0], w[1] * 0.1)
    weight_sum = torch.randint(-99, 99, (1, n), dtype=torch.int32)
    floats, pixels = torch.randn(ROWS, k).half(), torch.randn(2, IMAGE_CHANNELS, 9, 13).bfloat16()
    steps, strided = ((1, 1), (0, 0), (1, 1)), ((2, 2), (0, 0), (2, 1))
    residual, columns = torch.randn(ROWS, n).half(), [list(v) for v in zip(*several, strict=True)]
    image_residual = torch.randn(2, 9, 13, n).half().permute(0, 3, 1, 2)
    linear, conv = Linear(ROWS, n, k), Conv(2, 9, IMAGE_CHANNELS, n, 3)
    return {
        "linear": (linear, call.linear_int8, (x, *w, bits, [k], half, residual)),
        "linear, dynamic": (
            linear, call.linear_int8_dynamic, (x, *dynamic, weight_sum, w[3], bits, [k], torch.bfloat16),
        ),
        "several linears": (linear, call.linear_int8_multi, (x, *columns, [bits] * 3, [k], torch.float32)),
        "few rows": (Linear(5, n, k), call.linear_int8, (few, *w, bits, [k], half)),
        "conv2d": (conv, call.conv2d_int8, (image, *window, *steps, bits, [IMAGE_CHANNELS], half)),
        "conv2d, strided": (conv, call.conv2d_int8, (image, *window, *strided, bits, [IMAGE_CHANNELS], half)),
        "conv2d of two groups": (
            Conv(2, 9, IMAGE_CHANNELS, n, 1),
            call.conv2d_int8,
            (image, *split, *steps, bits, list(groups), half, image_residual),
        ),
        "linear, GEGLU": (Linear(ROWS, 2 * 176, k), call.linear_int8_geglu, (x, *wide, bits, [k], half, *STATIC)),
        "linear, quantizing": (linear, call.quantized_linear, (floats, *STATIC, *w, bits, [k])),
        "linear, weight-only": (linear, call.linear_weight_only, (floats, w[0], w[1], w[3], bits, [k])),
        "conv2d, weight-only": (
            conv, call.conv2d_weight_only,
            (pixels, window[0], window[1], None, (1, 1), (0, 0, 0, 0), (1, 1), bits, [IMAGE_CHANNELS]),
        ),
        "conv2d of 4 channels": (Conv(2, 9, 4, 17, 3), call.conv2d_int8, (small, *narrow, *steps, bits, [4], half)),
    }  # fmt: skip


def forced_products() -> Iterator[tuple[str, Kernel, int, Callable, tuple]]:
    for kernel in KERNELS:
        as_stored = next((widths for word, widths in AS_STORED.items() if word in kernel.name), ())
        for bits in as_stored or (8, 4):
            for name, (layer, op, args) in products(bits).items():
                if bits == 4 and not as_stored and name != "linear":
                    continue  # a kernel of its own unpacks them, then they are as 8 bits
                kind = {"floating": "weight-only" in name, "geglu": "GEGLU" in name, "quantizes": "quantizing" in name}
                able = kernel.splits(layer, bits, **kind)
                # First and last: not split, and split the most.
                for splits in sorted({*able[:1], *able[-1:]}):
                    yield f"{kernel.name}:{splits} {name}, {bits} bits", kernel, splits, op, args


def quantizers() -> Iterator[tuple[str, Callable, tuple]]:
    torch.manual_seed(0)
    call = torch.ops.mixdq_ao
    for channels in (321, 640):
        rows, image = torch.randn(2, 7, channels + 3).half()[:, 1:, :channels], torch.randn(2, channels, 5, 9)
        last = image.bfloat16().contiguous(memory_format=torch.channels_last)
        vectors, groups = (torch.randn(channels).half(), torch.randn(channels).half(), 1e-5), [channels]
        yield f"quantize {channels}", call.quantize, (rows, *STATIC, groups, None)
        yield f"quantize_per_token {channels}", call.quantize_per_token, (rows, 8, groups)
        yield f"layer_norm_quantize {channels}", call.layer_norm_quantize, (rows, *vectors, *STATIC, groups)
        qdata, alpha, beta, bias = weight(COLUMNS, channels, 8)
        bos = rows[1, 0].clone(), torch.randn(COLUMNS)
        yield (
            f"bos row {channels}",
            call.quantized_linear,
            (rows, *STATIC, qdata, alpha, beta, bias, 8, groups, *bos),
        )
        wide = torch.randn(13, 2 * channels).half()
        yield f"geglu_quantize {channels}", call.geglu_quantize, (wide, *STATIC, groups)
        for layout, x in (("contiguous", image), ("channels-last", last)):
            norm, pad = (x, channels // 20 if channels % 2 == 0 else 3), (1, 2, 0, 1)
            yield f"quantize image {channels} {layout}", call.quantize, (x, *STATIC, groups, pad)
            yield (
                f"group_norm_quantize {channels} {layout}",
                call.group_norm_quantize,
                (*norm, *vectors, True, *STATIC, groups, pad),
            )


def attentions() -> Iterator[tuple[str, Callable, tuple]]:
    torch.manual_seed(0)
    for dtype, queries, keys in ((torch.float16, 70, 300), (torch.bfloat16, 50, 77)):
        q, k, v = (torch.randn(2, n, 3, 64).to(dtype).transpose(1, 2) for n in (queries, keys, keys))
        call = torch.ops.mixdq_ao
        yield f"attention {queries} x {keys}", call.short_attention, (q, k, v, 0.125)
        yield f"attention {queries} x {keys} to codes", call.short_attention_quantize, (q, k, v, 0.125, *STATIC)


def check(op: Callable, args: tuple) -> None:
    """The same on both devices, but for a code or a rounding in rare places."""
    here = op(*tree_map_only(Tensor, Tensor.cuda, args))
    torch.cuda.synchronize()
    there = op(*args)
    for a, b in zip(*((r,) if isinstance(r, Tensor) else r for r in (here, there)), strict=True):
        atol = 1.0 if b.dtype == torch.int8 else 1e-2
        torch.testing.assert_close(a.cpu().float(), b.float(), rtol=1e-2, atol=atol)


def share_of(launches: list, share: str) -> list:
    """``1/3``: the first, the fourth, and so on; raises ``typer.BadParameter`` for what is no share."""
    first, slash, every = share.partition("/")
    if not (slash and first.isdecimal() and every.isdecimal() and 1 <= int(first) <= int(every)):
        raise typer.BadParameter(f"a share is written as 1/3, 2/3 or 3/3; found {share!r}")
    return launches[int(first) - 1 :: int(every)]


def main(
    only: Annotated[str, typer.Option(help="Run what has this in its name.")] = "",
    share: Annotated[str, typer.Option(help="Which of how many parts: 1/4 is every fourth launch.")] = "1/1",
) -> None:
    """Launch everything once and compare it with the CPU."""
    require_gpu()
    torch.set_num_threads(1)
    others = [*quantizers(), *attentions()]
    launches = [*forced_products(), *((name, None, 1, op, args) for name, op, args in others)]
    launches = share_of([x for x in launches if only in x[0]], share)
    wrong = 0
    with torch.inference_mode():
        for name, kernel, splits, op, args in launches:
            print(name, flush=True)
            try:
                with forced(kernel.name, splits) if kernel else nullcontext():
                    check(op, args)
            except AssertionError as error:
                wrong += 1
                print(f"WRONG: {error}", flush=True)
    kernels = ops.kernel_name(torch.device("cuda"), int8=True)
    print(f"{len(launches) - wrong} launches are right, {wrong} are wrong; {kernels}")
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
