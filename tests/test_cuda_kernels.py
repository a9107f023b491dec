"""Acceptance of the CUDA library: every kernel against integers and float64, on random problems and all of SDXL's.

A test runs many cases and asks the GPU for one answer; the first case that failed is then run again and described.
Where there is no GPU, fewer and smaller cases run in the emulator (``emulated.py``). MIXDQ_CASES says how many random
problems each kernel gets.
"""

import math
import os
import random
import sys
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import emulated
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixdq_ao import ops as mixdq_ops
from mixdq_ao.packing import pack

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from sdxl_shapes import Conv, Linear, layers, merged

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
ops = torch.ops.mixdq_ao if ON_GPU else emulated.Operators()
NO_KERNELS = mixdq_ops.cuda_library_missing if ON_GPU else emulated.why_not()
pytestmark = pytest.mark.skipif(bool(NO_KERNELS), reason=f"CUDA kernels: {NO_KERNELS}")
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="CUDA kernels: no CUDA device")

# What MIXDQ_KERNEL may say: every kernel, those that split in all their ways. "" is the library's own choice.
FORCED = [
    "",
    *(f"sm90_{tile}" for tile in ("256x128", "128x160", "128x128", "64x160")),
    *(f"sm90_{tile}:{splits}" for tile in ("64x80", "128x64", "64x64", "128x16") for splits in (1, 2, 4, 8)),
    *(f"sm90_128x128_split:{splits}" for splits in (1, 2, 3, 6, 8)),
    *(f"sm90_128x160_split:{splits}" for splits in (2, 5, 7)),
    *(f"sm90_{tile}_sharing:{blocks}" for tile in ("64x64", "64x160") for blocks in (1, 2, 4)),
    *(f"sm90_128x160_pairs:{blocks}" for blocks in (1, 2)),
    *(f"sm90_{tile}_packed" for tile in ("128x160", "64x160")),
    *(f"sm90_{tile}_packed:{splits}" for tile in ("64x80", "128x64") for splits in (1, 2, 8)),
    *(f"sm80_{tile}" for tile in ("128x160", "128x128", "128x80", "64x64", "64x32", "128x16")),
    "few_rows",
    "direct",
]
CASES_ON_A_GPU = 112
CASES_OF_EACH = int(os.environ.get("MIXDQ_CASES", CASES_ON_A_GPU if ON_GPU else 12))
MOST_WORK = 2**31 if ON_GPU else 2**25  # multiplications of a case
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@pytest.fixture(autouse=True)
def without_autograd(monkeypatch):
    monkeypatch.delenv("MIXDQ_KERNEL", raising=False)
    with torch.inference_mode():
        yield


@pytest.fixture(autouse=not ON_GPU)
def in_an_order_of_its_own(request):
    ops.seed(zlib.crc32(request.node.name.encode()))


@pytest.fixture(autouse=ON_GPU)
def in_a_process_whose_gpu_is_well():
    """Some errors end all work of a process on a GPU: pytest-xdist then goes on with a fresh worker."""
    yield
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        if "PYTEST_XDIST_WORKER" not in os.environ:
            raise
        time.sleep(1)  # until the test's own report is sent
        os._exit(1)


def first_failure(flags: list[Tensor]) -> int | None:
    """Index of the first set flag; one wait for the GPU."""
    failed = torch.stack(flags).nonzero()
    return int(failed[0]) if len(failed) else None


# --- random problems --------------------------------------------------------------------------------------------------

LINEAR_LAYOUTS = ("contiguous", "channel slice", "odd channel slice", "token slice", "batch-strided", "transposed")
IMAGE_LAYOUTS = ("channels-last", "contiguous", "channel slice", "odd channel slice", "window", "batch-strided")


@dataclass
class Case:
    """A matrix product: everything but its numbers, which follow from the seed."""

    seed: int
    op: str  # linear, dynamic, multi, conv
    lead: tuple[int, ...]  # rows of a linear; batch, height, width of an image
    groups: list[int]
    columns: list[int]  # of each weight
    bits: list[int]  # of each weight
    exact: bool  # integers all through, so that every bit of the sums shows
    out_dtype: torch.dtype
    layout: str
    bias: torch.dtype | None = None
    residual: torch.dtype | None = None
    residual_layout: str = "contiguous"
    window: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    adjacent: bool = False
    generator: torch.Generator = field(default=None, repr=False)

    def __post_init__(self):
        self.generator = torch.Generator(DEVICE).manual_seed(self.seed)

    @property
    def k(self) -> int:
        return sum(self.groups)

    def integers(self, shape, low: int, high: int, dtype=torch.int8) -> Tensor:
        return torch.randint(low, high + 1, shape, dtype=dtype, device=DEVICE, generator=self.generator)

    def normal(self, shape, dtype=torch.float32) -> Tensor:
        """Random floats; small whole numbers, which every dtype holds, in an exact case."""
        if self.exact:
            return self.integers(shape, -100, 100, torch.int32).to(dtype)
        return torch.randn(shape, device=DEVICE, generator=self.generator).to(dtype)


def log_uniform(rng: random.Random, high: int) -> int:
    return int(math.exp(rng.uniform(0, math.log(high + 1))))


def draw(kernel: str, number: int) -> Case:
    """A case that the kernel can mostly do: aligned where it has to be, and few rows for the kernel of few rows."""
    rng = random.Random(f"{kernel} {number}")
    name, suits = kernel.partition(":")[0], rng.random() < 0.8
    bits = rng.choice((4, 2) if name.endswith("_packed") and suits else (8, 8, 4, 2))
    op = rng.choice(("linear", "linear", "dynamic", "multi", "conv", "conv", "conv"))
    few = name == "few_rows" and suits
    if few:
        op = rng.choice(("linear", "dynamic", "multi", "conv"))
    group_count = rng.choice((1, 1, 1, 1, 1, 1, 1, 2, 2, 3))
    groups = [log_uniform(rng, 4096 // group_count) for _ in range(group_count)]
    if suits and name != "direct":
        multiple = 16 * 8 // bits if "packed" in name or name == "few_rows" else 16
        groups = [-(-g // multiple) * multiple for g in groups]
    columns = [log_uniform(rng, 1500) for _ in range(rng.randint(1, 6) if op == "multi" else 1)]
    columns = [-(-n // m) * m for n, m in zip(columns, rng.choices((1, 1, 8, 16, 80), k=len(columns)), strict=True)]
    shared = rng.random() < 0.7
    exact = rng.random() < 0.5
    case = {
        "seed": rng.randrange(2**31),
        "op": op,
        "groups": groups,
        "columns": columns,
        "bits": [bits if shared else rng.choice((8, 4, 2)) for _ in columns],
        "exact": exact,
        "out_dtype": torch.float32 if exact else rng.choice(FLOATS),
        "bias": rng.choice((None, *FLOATS)),
        "adjacent": shared and rng.random() < 0.5,
    }
    if op in ("linear", "conv") and rng.random() < 0.4:
        case |= {"residual": rng.choice(FLOATS)}
    work = MOST_WORK // 16 if name == "direct" else MOST_WORK
    if op == "conv":
        window = rng.choice(((1, 1), (3, 3), (3, 3), (3, 3), (1, 3), (5, 2), (2, 2)))
        dilation = rng.choice(((1, 1), (1, 1), (1, 1), (2, 2), (1, 3)))
        padding = rng.choice(((0, 0), (0, 0), (0, 0), (1, 1), (2, 0)))
        steps = rng.choice(((1, 1), (1, 1), (1, 1), (2, 2), (2, 1), (3, 2)))
        batch, size = rng.randint(1, 9), [log_uniform(rng, 40) for _ in range(2)]
        if few:  # pixels, whatever the window
            window = dilation = steps = (1, 1)
            padding, batch, size = (0, 0), rng.randint(1, 3), [rng.randint(1, 2) for _ in range(2)]
        pixels = work // (sum(groups) * sum(columns) * window[0] * window[1])
        while batch * size[0] * size[1] > max(1, pixels) and max(batch, *size) > 1:
            batch, size = (batch + 1) // 2, [(s + 1) // 2 for s in size]
        size = [max(s, d * (w - 1) + 1 - 2 * p) for s, d, w, p in zip(size, dilation, window, padding, strict=True)]
        case |= {"lead": (batch, *size), "window": window, "dilation": dilation, "padding": padding}
        case |= {"stride": steps}
        case |= {"layout": rng.choice(IMAGE_LAYOUTS), "residual_layout": rng.choice(IMAGE_LAYOUTS)}
    else:
        high = 16 if few else 3000
        rows = max(1, min(log_uniform(rng, high), work // (sum(groups) * sum(columns))))
        batch = rng.randint(1, min(9, rows))
        case |= {"lead": rng.choice(((rows,), (batch, rows // batch), (batch, 1, rows // batch)))}
        if rows == 1 and rng.random() < 0.5:
            case |= {"lead": ()}
        case |= {"layout": rng.choice(LINEAR_LAYOUTS), "residual_layout": rng.choice(LINEAR_LAYOUTS)}
    return Case(**case)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """A view with the values of ``x``, whose memory is laid out in that way; what lies between is 77."""

    def inside(dim: int, before: int, after: int, t: Tensor) -> Tensor:
        shape = [n + (before + after) * (d == dim % t.dim()) for d, n in enumerate(t.shape)]
        return t.new_full(shape, 77).narrow(dim, before, t.shape[dim]).copy_(t)

    if x.dim() == 4 and layout in IMAGE_LAYOUTS:
        if layout == "contiguous":
            return x.contiguous()
        rows = x.permute(0, 2, 3, 1).contiguous()
        if layout.endswith("channel slice"):
            rows = inside(-1, *((3, 2) if layout.startswith("odd") else (16, 32)), rows)
        elif layout == "window":
            rows = inside(1, 1, 2, inside(2, 2, 1, rows))
        elif layout == "batch-strided":
            rows = rows.repeat_interleave(2, 0)[::2]
        return rows.permute(0, 3, 1, 2)
    if layout.endswith("channel slice"):
        return inside(-1, *((3, 2) if layout.startswith("odd") else (16, 32)), x)
    if layout == "token slice" and x.dim() > 1:
        return inside(-2, 1, 0, x)
    if layout == "batch-strided" and x.dim() > 1:
        return x.repeat_interleave(2, 0)[::2]
    if layout == "transposed" and x.dim() > 1:
        return x.mT.contiguous().mT
    return x.contiguous()


def product(x: Tensor, w: Tensor) -> Tensor:
    """Whole numbers ``x [..., k] @ w [n, k].T`` in float64, exact far beyond what int32 holds."""
    return x.double() @ w.double().mT


def correlation(x: Tensor, w: Tensor, stride, padding, dilation) -> Tensor:
    """Exact sums ``[batch, p, q, n]`` of a convolution of codes, one product for each tap."""
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0])).permute(0, 2, 3, 1)
    r, s = w.shape[2:]
    p, q = ((x.shape[1 + i] - dilation[i] * (w.shape[2 + i] - 1) - 1) // stride[i] + 1 for i in (0, 1))
    total = x.new_zeros((x.shape[0], p, q, w.shape[0]), dtype=torch.float64)
    for i in range(r):
        for j in range(s):
            top, left = i * dilation[0], j * dilation[1]
            lines = x[:, top : top + (p - 1) * stride[0] + 1 : stride[0]]
            total += product(lines[:, :, left : left + (q - 1) * stride[1] + 1 : stride[1]], w[:, :, i, j])
    return total


def run(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """The operator's result, the real value, and the sum of the sizes of what was added up to it."""
    image, groups, high = case.op == "conv", case.groups, 127
    shape = (case.lead[0], case.k, *case.lead[1:]) if image else (*case.lead, case.k)
    xq = laid_out(case.integers(shape, -high - 1, high), case.layout)
    window = case.window if image else ()
    codes = [
        case.integers((n, case.k, *window), -(2 ** (b - 1)), 2 ** (b - 1) - 1)
        for n, b in zip(case.columns, case.bits, strict=True)
    ]
    qdata = [pack(c, b, groups) for c, b in zip(codes, case.bits, strict=True)]
    # Results of about the size of one.
    unit = 1.0 if case.exact else 1 / (5000 * math.sqrt(case.k * math.prod(case.window)))
    scale = [torch.full((len(groups), n), unit, device=DEVICE) for n in case.columns]
    if not case.exact:
        scale = [s * (0.5 + case.normal(s.shape).abs()) for s in scale]
    beta = [case.normal((n,)) for n in case.columns]
    bias = [None if case.bias is None else case.normal((n,), case.bias) for n in case.columns]
    if case.adjacent:
        qdata, scale, beta = (neighbours(v, dim) for v, dim in ((qdata, 0), (scale, 1), (beta, 0)))
        bias = bias if case.bias is None else neighbours(bias, 0)
    offset = [0 if b is None else b.double() for b in bias]
    row_scale = torch.ones((*case.lead, len(groups)), device=DEVICE)
    row_zero = torch.zeros_like(row_scale)
    if case.op == "dynamic":
        row_zero = case.integers(row_scale.shape, -128, 127).float()
        row_scale = row_scale if case.exact else 0.5 + case.normal(row_scale.shape).abs()
    else:
        offset = [o + b.double() for o, b in zip(offset, beta, strict=True)]

    sums, sizes = [], []
    for c, s, o in zip(codes, scale, offset, strict=True):
        total = size = 0
        for g, (x, w) in enumerate(zip(xq.split(groups, 1 if image else -1), c.split(groups, 1), strict=True)):
            if image:
                acc = correlation(x, w, case.stride, case.padding, case.dilation)
            else:
                acc = product(x, w) - row_zero[..., g : g + 1].double() * w.double().sum(1)
            term = acc * row_scale[..., g : g + 1].double() * s[g].double() if not image else acc * s[g].double()
            total, size = total + term, size + term.abs()
        sums.append(total + o)
        sizes.append(size + (o.abs() if isinstance(o, Tensor) else 0))
    expected, size = torch.cat(sums, -1), torch.cat(sizes, -1)
    if image:
        expected, size = expected.permute(0, 3, 1, 2), size.permute(0, 3, 1, 2)
    residual = None
    if case.residual is not None:
        # Every third convolution gets one pixel for each image.
        one_pixel = case.op == "conv" and case.seed % 3 == 0
        shape = (*expected.shape[:2], 1, 1) if one_pixel else expected.shape
        residual = laid_out(case.normal(shape, case.residual), case.residual_layout)
        expected, size = expected + residual.double(), size + residual.double().abs()

    first = (qdata[0], scale[0], beta[0], bias[0])
    if case.op == "multi":
        y = ops.linear_int8_multi(xq, qdata, scale, beta, bias, case.bits, groups, case.out_dtype)
    elif case.op == "dynamic":
        weight_sum = torch.stack([w.sum(1, dtype=torch.int32) for w in codes[0].split(groups, 1)])
        y = ops.linear_int8_dynamic(
            xq, row_scale, row_zero, qdata[0], scale[0], weight_sum, bias[0], case.bits[0], groups, case.out_dtype
        )
    elif image:
        steps = (case.stride, case.padding, case.dilation)
        y = ops.conv2d_int8(xq, *first, *steps, case.bits[0], groups, case.out_dtype, residual)
    else:
        y = ops.linear_int8(xq, *first, case.bits[0], groups, case.out_dtype, residual)
    return y, expected, size


def neighbours(parts: list[Tensor], dim: int) -> list[Tensor]:
    """The same values, each beginning in memory where the one before it ends (where all are of one dtype)."""
    if len({(p.dtype, p.shape[1 - dim :] if dim == 0 else p.shape[:dim]) for p in parts}) > 1:
        return parts
    return list(torch.cat(parts, dim).split([p.shape[dim] for p in parts], dim))


def wrong(case: Case, y: Tensor, expected: Tensor, size: Tensor) -> Tensor:
    """Where the result is not what it must be: every bit in an exact case, else one rounding and the epilogue's."""
    if case.exact:
        return y.double() != expected
    info = torch.finfo(y.dtype)
    # A few roundings to float32 of sums of this size, then one to the output: half a unit in the last place.
    limit = 2**-21 * size + 0.5005 * info.eps * expected.abs() + info.smallest_normal * info.eps
    return ~((y.double() - expected).abs() <= limit)


def describe(case: Case) -> str:
    y, expected, size = run(case)
    off = wrong(case, y, expected, size)
    if not off.any():
        return f"{case}\nwas wrong, and right when run again: a race"
    at = off.nonzero()[0].tolist()
    found, right = y[tuple(at)].item(), expected[tuple(at)].item()
    return f"{case}\n{int(off.sum())} of {off.numel()} values are wrong, first at {at}: {found!r}, expected {right!r}"


def test_there_are_enough_cases():
    assert len(FORCED) * CASES_ON_A_GPU >= 3000


@pytest.mark.parametrize("kernel", FORCED)
def test_random_problems(kernel, monkeypatch):
    if kernel:
        monkeypatch.setenv("MIXDQ_KERNEL", kernel)
    cases, flags = [draw(kernel, i) for i in range(CASES_OF_EACH)], []
    for case in cases:
        y, expected, size = run(case)
        assert y.shape == expected.shape and y.dtype == case.out_dtype, case
        assert (y.permute(0, 2, 3, 1) if case.op == "conv" else y).is_contiguous(), case
        flags.append(wrong(case, y, expected, size).any())
    failed = first_failure(flags)
    if failed is not None:
        pytest.fail(f"case {failed} of {kernel!r}: {describe(draw(kernel, failed))}")


@pytest.fixture
def older_gpu():
    if ON_GPU:
        pytest.skip("needs the emulator's GPU of sm_80")
    ops.set_device(emulated.SM80)
    yield
    ops.set_device(emulated.SM90)


def test_random_problems_on_an_older_gpu(older_gpu):
    for i in range(CASES_OF_EACH):
        case = draw("", i)
        assert not wrong(case, *run(case)).any(), describe(case)


FLOATING = ["", "sm90_128x128_floating", *(f"sm90_64x80_floating:{splits}" for splits in (1, 2, 8))]


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("kernel", FLOATING)
def test_weight_only(kernel, bits, monkeypatch):
    """Against float64; every third case has channels or a dtype that only torch's own operators take."""
    if kernel:
        monkeypatch.setenv("MIXDQ_KERNEL", kernel)
    rng, flags = random.Random(bits), []
    for i in range(40):
        dtype = torch.float32 if i % 6 == 5 else rng.choice(FLOATS[:2])
        unit = rng.choice([8, 12]) if i % 6 == 2 else 128 // bits
        groups = [unit * rng.randint(1, 12) for _ in range(rng.choice([1, 1, 2]))]
        k, n, seed = sum(groups), rng.choice([1, 7, 80, 320, 333]), i
        generator = torch.Generator(DEVICE).manual_seed(seed)
        shape = (n, k, 3, 3) if i % 2 else (n, k)
        codes = torch.randint(
            -(2 ** (bits - 1)), 2 ** (bits - 1), shape, dtype=torch.int8, device=DEVICE, generator=generator
        )
        scale = torch.rand(len(groups), n, device=DEVICE, generator=generator) * 0.01 + 0.001
        bias = torch.randn(n, device=DEVICE, generator=generator) if i % 4 else None
        ones = (1,) * (len(shape) - 1)
        weight = torch.cat(
            [c.double() * s.double().view(-1, *ones) for c, s in zip(codes.split(groups, 1), scale, strict=True)],
            1,
        )
        if i % 2:
            x = torch.randn(
                rng.randint(1, 3), k, rng.randint(3, 20), rng.randint(3, 20), device=DEVICE, generator=generator
            ).to(dtype)
            x = x.contiguous(memory_format=torch.channels_last) if i % 4 == 1 else x
            pad, stride = (1, 0, 1, 1), rng.choice([(1, 1), (2, 1)])
            y = ops.conv2d_weight_only(x, pack(codes, bits, groups), scale, bias, stride, pad, (1, 1), bits, groups)
            expected = F.conv2d(F.pad(x.double(), pad), weight, None if bias is None else bias.double(), stride)
        else:
            x = torch.randn(2, rng.choice([1, 40, 300]), k + 8, device=DEVICE, generator=generator).to(dtype)[..., 8:]
            y = ops.linear_weight_only(x, pack(codes, bits, groups), scale, bias, bits, groups)
            expected = F.linear(x.double(), weight, None if bias is None else bias.double())
        assert y.dtype == dtype and y.shape == expected.shape
        error = (y.double() - expected).norm() / expected.norm()
        flags.append(error > {torch.float16: 1e-3, torch.bfloat16: 6e-3, torch.float32: 2e-3}[dtype])
    assert first_failure(flags) is None


# --- SDXL -------------------------------------------------------------------------------------------------------------


def sdxl_case(layer, bits: int, seed: int) -> Case:
    common = {"seed": seed, "bits": [bits], "exact": True, "out_dtype": torch.float32, "bias": torch.float16}
    if isinstance(layer, Linear):
        weights = {"columns": [layer.n] * layer.weights, "bits": [bits] * layer.weights, "groups": [layer.k]}
        op = "multi" if layer.weights > 1 else "linear"
        return Case(**common | weights, op=op, lead=(layer.m,), layout="contiguous", adjacent=seed % 2 == 0)
    size = layer.size + 2 * layer.pad
    window = {"window": (layer.kernel,) * 2, "stride": (layer.stride,) * 2, "layout": "channels-last"}
    return Case(
        **common | window, op="conv", lead=(layer.batch, size, size), groups=[layer.channels], columns=[layer.n]
    )


@pytest.mark.parametrize("kernel", ["", "sm80_128x128"] if ON_GPU else [""])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("pixels", [512, 768, 1024] if ON_GPU else [64])
def test_every_layer_of_sdxl(pixels, batch, kernel, monkeypatch):
    if kernel:
        monkeypatch.setenv("MIXDQ_KERNEL", kernel)
    found = [*layers(pixels, batch), *merged(pixels, batch)]
    every = [(layer, bits) for layer in found for bits in (8, 4)]
    flags = []
    for seed, (layer, bits) in enumerate(every):
        case = sdxl_case(layer, bits, seed)
        flags.append(wrong(case, *run(case)).any())
    failed = first_failure(flags)
    if failed is not None:
        layer, bits = every[failed]
        pytest.fail(f"{layer} with {bits} bits: {describe(sdxl_case(layer, bits, failed))}")
    assert {type(layer) for layer in found} == {Linear, Conv}


@pytest.mark.parametrize("kernel", ["", "sm90_128x128", "sm90_64x64:8", "sm80_128x80", "direct"])
def test_sums_reach_the_ends_of_int32(kernel, monkeypatch):
    """The longest reduction that a weight may have, every product at its extreme."""
    if kernel:
        monkeypatch.setenv("MIXDQ_KERNEL", kernel)
    k = 2**16
    one, none = torch.ones(1, 80, device=DEVICE), torch.zeros(80, device=DEVICE)
    for a, b in ((-128, -128), (-128, 127), (127, 127)):
        x = torch.full((65, k), a, dtype=torch.int8, device=DEVICE)
        w = torch.full((80, k), b, dtype=torch.int8, device=DEVICE)
        y = ops.linear_int8(x, w, one, none, None, 8, [k], torch.float32)
        assert y.unique().tolist() == [float(torch.tensor(a * b * k, dtype=torch.float32))]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("layout", IMAGE_LAYOUTS)
def test_few_channels(layout, exact):
    """As of a UNet's first layer: every alignment, up to lengths at which a reduction is no longer short."""
    flags, common = [], {"op": "conv", "layout": layout, "window": (3, 3), "bias": torch.float16}
    cases = [(c, n, d) for c in range(1, 13) for n in (72, 77) for d in FLOATS if d == torch.float32 or not exact]
    for seed, (channels, n, dtype) in enumerate(cases):
        sizes = {"lead": (2, 9 + seed % 2, 11), "groups": [channels], "columns": [n], "bits": [8]}
        case = Case(**common, **sizes, seed=seed, exact=exact, out_dtype=dtype, residual=dtype if seed % 3 else None)
        flags.append(wrong(case, *run(case)).any())
    failed = first_failure(flags)
    assert failed is None, cases[failed]


@pytest.mark.parametrize("kernel", ["", "few_rows", "sm90_64x64:2", "sm90_128x160", "sm80_128x16", "direct"])
@pytest.mark.parametrize("lead", [(1, 3, 3), (2, 2, 2), (3, 1, 5)])
def test_pixels_of_an_image_share_a_row_of_the_residual(lead, kernel, monkeypatch):
    if kernel:
        monkeypatch.setenv("MIXDQ_KERNEL", kernel)
    residual = {"residual": torch.float16, "residual_layout": "contiguous", "bias": None, "out_dtype": torch.float32}
    window = {"window": (1, 1), "stride": (1, 1), "layout": "channels-last"}
    case = Case(seed=3, op="conv", lead=lead, groups=[192], columns=[88], bits=[8], exact=True, **residual, **window)
    assert not wrong(case, *run(case)).any()


@needs_gpu
def test_tensors_of_more_than_2_to_the_31_elements():
    rows, k, n = 2**20 + 7, 32, 2080
    x = torch.randint(-128, 128, (rows, k), dtype=torch.int8, device=DEVICE)
    w = torch.randint(-128, 128, (n, k), dtype=torch.int8, device=DEVICE)
    one, none = torch.ones(1, n, device=DEVICE), torch.zeros(n, device=DEVICE)
    y = ops.linear_int8(x, w, one / 1000, none, None, 8, [k], torch.float16)
    static = (torch.tensor([0.1], device=DEVICE), torch.tensor([3.0], device=DEVICE), 8, [n])
    codes = ops.quantize(y, *static, None)
    for part in (slice(0, 300), slice(-300, None)):
        expected = ops.linear_int8(x[part], w, one / 1000, none, None, 8, [k], torch.float16)
        assert torch.equal(y[part], expected)
        assert torch.equal(codes[part], ops.quantize(expected, *static, None))


# --- quantizers -------------------------------------------------------------------------------------------------------


def draw_input(rng: random.Random, image: bool, widen: int = 1) -> tuple[Tensor, list[int]]:
    """A strided input on the GPU and its input groups; sometimes with values that are not numbers."""
    channels = log_uniform(rng, 2600)
    channels = channels if rng.random() < 0.5 else -(-channels // 16) * 16
    cut = rng.randint(1, channels - 1) if channels > 1 and rng.random() < 0.3 else 0
    lead = [rng.randint(1, 4), log_uniform(rng, 40), log_uniform(rng, 40)][: 3 if image else rng.randint(1, 3)]
    shape = (lead[0], channels, *lead[1:]) if image else (*lead, widen * channels)
    torch.manual_seed(rng.randrange(2**31))
    x = (torch.randn(shape, device=DEVICE) * rng.choice((0.1, 1.5, 20.0))).to(rng.choice(FLOATS))
    if rng.random() < 0.3:
        for value in (float("nan"), float("inf"), -float("inf"), 0.0):
            x.view(-1)[rng.randrange(x.numel())] = value
    layout = rng.choice(IMAGE_LAYOUTS if image else LINEAR_LAYOUTS)
    return laid_out(x, layout), [channels - cut, cut] if cut else [channels]


def draw_static(rng: random.Random, groups: list[int]):
    bits = rng.choice((8, 8, 4))
    scale = torch.tensor([rng.uniform(0.5, 2) * 4 / 2**bits for _ in groups], device=DEVICE)
    zero = torch.tensor([float(rng.randint(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)) for _ in groups], device=DEVICE)
    return scale, zero, bits


def draw_pad(rng: random.Random) -> tuple[int, ...]:
    return rng.choice(((0, 0, 0, 0), (1, 1, 1, 1), tuple(rng.randint(0, 3) for _ in range(4))))


def same_on_cpu(name: str, *args) -> None:
    """The CUDA operator against the one of any device."""
    cpu = [a.cpu() if isinstance(a, Tensor) else a for a in args]
    results = getattr(ops, name)(*args), getattr(torch.ops.mixdq_ao, name)(*cpu)
    for here, there in zip(*((r,) if isinstance(r, Tensor) else r for r in results), strict=True):
        told = [(tuple(a.shape), a.stride(), a.dtype) if isinstance(a, Tensor) else a for a in args]
        assert here.dtype == there.dtype and here.stride() == there.stride(), told
        assert torch.equal(here.cpu(), there), told


@pytest.mark.parametrize("image", [False, True], ids=["rows", "image"])
@pytest.mark.parametrize("chunk", range(2))
def test_quantize_gives_the_codes_of_the_cpu(image, chunk):
    for i in range(60):
        rng = random.Random(f"quantize {image} {chunk} {i}")
        x, groups = draw_input(rng, image)
        same_on_cpu("quantize", x, *draw_static(rng, groups), groups, draw_pad(rng) if image else None)


@pytest.mark.parametrize("chunk", range(2))
def test_quantize_per_token_gives_what_the_cpu_does(chunk):
    for i in range(60):
        rng = random.Random(f"per token {chunk} {i}")
        x, groups = draw_input(rng, image=False)
        same_on_cpu("quantize_per_token", x, rng.choice((8, 4)), groups)


def test_quantize_of_a_slice_behind_the_first_token():
    x = torch.randn(3, 77, 2048, dtype=torch.float16, device=DEVICE)[:, 1:]
    static = (torch.tensor([0.02], device=DEVICE), torch.tensor([5.0], device=DEVICE), 8, [2048])
    same_on_cpu("quantize", x, *static, None)
    same_on_cpu("quantize_per_token", x, 8, [2048])


def check_codes(q: Tensor, real: Tensor, static, groups, dim: int, what) -> None:
    """Codes of the float64 values ``real``: the nearest one, or its neighbour where a sum fell just beside a half."""
    scale, zero, bits = static
    shape = [-1 if d == dim % real.dim() else 1 for d in range(real.dim())]
    s, z = (torch.cat([v[g].expand(c) for g, c in enumerate(groups)]).view(shape).double() for v in (scale, zero))
    t = (real / s + z).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    difference = (q.double() - t).abs()
    assert q.dtype == torch.int8 and q.shape == t.shape, what
    assert difference.max() <= 0.5 + 0.02, what
    assert (q.double() != t.round()).sum() <= 2 + 2e-3 * q.numel(), what


def draw_vectors(rng: random.Random, channels: int, dtype: torch.dtype) -> list[Tensor | None]:
    return [torch.randn(channels, device=DEVICE).to(dtype) if rng.random() < 0.8 else None for _ in range(2)]


def finite(x: Tensor) -> Tensor:
    """In place, so that the layout stays."""
    return x.nan_to_num_(0.0, 1.0, -1.0)


def affine(y: Tensor, weight, bias, dim: int) -> Tensor:
    shape = [-1 if d == dim % y.dim() else 1 for d in range(y.dim())]
    y = y if weight is None else y * weight.double().view(shape)
    return y if bias is None else y + bias.double().view(shape)


def test_layer_norm_quantize():
    for i in range(80):
        rng = random.Random(f"layer norm {i}")
        x, groups = draw_input(rng, image=False)
        weight, bias = draw_vectors(rng, sum(groups), x.dtype)
        scale, zero, bits = draw_static(rng, groups)
        if rng.random() < 0.1:
            zero = zero + 0.4  # nobody asks for that, but a code has a definition
        static = scale, zero, bits
        q = ops.layer_norm_quantize(finite(x), weight, bias, 1e-3, *static, groups)
        real = affine(F.layer_norm(x.double(), x.shape[-1:], eps=1e-3), weight, bias, -1)
        check_codes(q, real, static, groups, -1, (x.shape, x.stride(), x.dtype))
        assert q.is_contiguous()


def test_geglu_quantize():
    for i in range(80):
        rng = random.Random(f"geglu {i}")
        x, groups = draw_input(rng, image=False, widen=2)
        static = draw_static(rng, groups)
        q = ops.geglu_quantize(finite(x), *static, groups)
        value, gate = x.double().chunk(2, -1)
        check_codes(q, value * F.gelu(gate), static, groups, -1, (x.shape, x.stride(), x.dtype))
        assert q.is_contiguous()


def test_geglu_of_what_is_not_a_number_or_huge():
    """Infinite gates are the limits, and what is then no number has the code of zero."""
    values = torch.tensor([float(v) for v in ("nan", "inf", "-inf", "0", "-0.4", "3", "-200", "60000", "-60000")])
    value, gate = (v.repeat_interleave(8).to(DEVICE) for v in torch.cartesian_prod(values, values).T)
    static = (torch.tensor([0.1], device=DEVICE), torch.tensor([-7.0], device=DEVICE), 8)
    for dtype in FLOATS:
        x = torch.cat((value, gate)).to(dtype)[None]
        q = ops.geglu_quantize(x, *static, [len(value)])
        v, g = x.double().chunk(2, -1)
        g = torch.where(g.isfinite(), F.gelu(g), g.nan_to_num(0.0, math.inf, 0.0))
        check_codes(q, (v * g).nan_to_num(0.0, 1e9, -1e9), static, [len(value)], -1, dtype)


def test_layer_norm_keeps_its_accuracy_far_from_zero():
    """A channel far from the others, first in its row or not; a mean of a thousand deviations."""
    for channels in (64, 640, 1280, 5120):
        x = torch.randn(40, channels, device=DEVICE)
        x[::3, 0], x[1::3, channels // 2] = 300.0, -300.0
        x[::5] += 1000
        static = (torch.tensor([0.02], device=DEVICE), torch.tensor([5.0], device=DEVICE), 8)
        q = ops.layer_norm_quantize(x, None, None, 1e-5, *static, [channels])
        check_codes(q, F.layer_norm(x.double(), (channels,)), static, [channels], -1, channels)


GEGLU_KERNELS = [
    *(f"sm90_{tile}_geglu" for tile in ("128x160", "64x160")),
    *(f"sm90_{tile}_packed_geglu" for tile in ("128x160", "64x160")),
]


@pytest.mark.parametrize("kernel", ["", *GEGLU_KERNELS, "sm80"])
def test_geglu_in_the_product_equals_two_operators(kernel, monkeypatch):
    """Bit for bit, also where no kernel joins them: odd sizes, several groups, float32."""
    if kernel:
        monkeypatch.setenv("MIXDQ_KERNEL", kernel)
    for i in range(48 if ON_GPU else 16):
        rng = random.Random(f"geglu product {kernel} {i}")
        suits, dtype = rng.random() < 0.8, rng.choice(FLOATS[:2])
        bits = rng.choice((4, 4, 2) if "packed" in kernel else (8, 8, 4, 2))
        half, k = 16 * rng.randint(1, 24), 16 * rng.randint(1, 90)
        rows, groups = log_uniform(rng, 4000 if ON_GPU else 600), [k]
        if not suits:
            groups, half = rng.choice((([k], half + 5), ([k, 16], half)))
        torch.manual_seed(i)
        codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (2 * half, sum(groups)), device=DEVICE)
        unit = 2 / (74 * 2 ** (bits - 1) * math.sqrt(sum(groups)))
        alpha = (0.5 + torch.rand(len(groups), 2 * half, device=DEVICE)) * unit
        beta, bias = torch.randn(2, 2 * half, device=DEVICE)
        for value in (float("nan"), float("inf"), 3e4, -1e5) if rng.random() < 0.3 else ():
            bias[rng.randrange(2 * half)] = value
        bias = rng.choice((None, bias, bias.to(dtype)))
        weight = pack(codes.to(torch.int8), bits, groups), alpha, beta, bias, bits, groups
        lead = rng.choice(((rows,), (2, rows), ()))
        x = torch.randint(-128, 128, (*lead, sum(groups)), dtype=torch.int8, device=DEVICE)
        x, static = laid_out(x, rng.choice(LINEAR_LAYOUTS)), draw_static(rng, [half])
        for rounded in (dtype, torch.float32):  # the same problem, which another kernel must do
            one = ops.linear_int8_geglu(x, *weight, rounded, *static)
            two = ops.geglu_quantize(ops.linear_int8(x, *weight, rounded), *static, [half])
            told = (lead, half, groups, bits, rounded, static)
            assert one.dtype == torch.int8 and one.shape == (*lead, half) and one.is_contiguous(), told
            assert torch.equal(one, two), (told, (one != two).nonzero()[:3].tolist())


def check_group_norms(name: str) -> None:
    for i in range(80):
        rng = random.Random(f"{name} {i}")
        x, groups = draw_input(rng, image=True)
        channels, silu, pad = sum(groups), rng.random() < 0.5, rng.choice((None, draw_pad(rng)))
        num_groups = rng.choice([g for g in range(1, min(64, channels) + 1) if channels % g == 0])
        weight, bias = draw_vectors(rng, channels, x.dtype)
        static = draw_static(rng, groups)
        q = ops.group_norm_quantize(finite(x), num_groups, weight, bias, 1e-3, silu, *static, groups, pad)
        y = affine(F.group_norm(x.double(), num_groups, eps=1e-3), weight, bias, 1)
        y = F.silu(y) if silu else y
        check_codes(q, F.pad(y, pad or (0,) * 4), static, groups, 1, (x.shape, x.stride(), x.dtype, num_groups, pad))
        assert q.permute(0, 2, 3, 1).is_contiguous()


def test_group_norm_quantize():
    check_group_norms("group norm")


def test_group_norm_quantize_on_an_older_gpu(older_gpu):
    """Which has no clusters: two kernels."""
    check_group_norms("group norm of two kernels")


@pytest.mark.parametrize("shape", [(1, 56, 97, 113), (2, 64, 80, 65), (3, 7 * 8, 1, 9), (1, 1280, 3, 5)], ids=str)
def test_group_norm_quantize_of_few_channels_or_pixels(shape):
    """Many pixels for a cluster to share, which two kernels do; fewer pixels than a cluster may have blocks."""
    torch.manual_seed(0)
    for dtype, pad in ((torch.float16, (1, 1, 1, 1)), (torch.bfloat16, (0, 2, 3, 0)), (torch.float32, None)):
        x = (torch.randn(shape, device=DEVICE) * 2 + 1).to(dtype).contiguous(memory_format=torch.channels_last)
        weight, bias = torch.randn(2, shape[1], device=DEVICE).to(dtype)
        static = (torch.tensor([0.03], device=DEVICE), torch.tensor([-20.0], device=DEVICE), 8)
        q = ops.group_norm_quantize(x, 8, weight, bias, 1e-5, True, *static, [shape[1]], pad)
        y = F.silu(F.group_norm(x.double(), 8, weight.double(), bias.double(), 1e-5))
        check_codes(q, F.pad(y, pad or (0,) * 4), static, [shape[1]], 1, (shape, dtype))


@needs_gpu
@pytest.mark.parametrize("silu", [False, True], ids=["plain", "silu"])
@pytest.mark.parametrize("shape", [(1, 320, 64, 64), (2, 640, 32, 32), (1, 2560, 16, 16), (2, 960, 128, 128)], ids=str)
def test_group_norm_quantize_at_sdxl_sizes(shape, silu):
    torch.manual_seed(0)
    x = (torch.randn(shape, device=DEVICE) * 2 + 1).half().contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, shape[1], device=DEVICE).half()
    static = (torch.tensor([0.03], device=DEVICE), torch.tensor([-20.0], device=DEVICE), 8)
    q = ops.group_norm_quantize(x, 32, weight, bias, 1e-5, silu, *static, [shape[1]], (1, 1, 1, 1))
    y = F.group_norm(x.double(), 32, weight.double(), bias.double(), 1e-5)
    check_codes(q, F.pad(F.silu(y) if silu else y, (1,) * 4), static, [shape[1]], 1, shape)


def test_quantize_and_multiply_in_one_call_equals_two():
    for i in range(60):
        rng = random.Random(f"one call {i}")
        image = rng.random() < 0.5
        x, groups = draw_input(rng, image)
        static, bits, n = draw_static(rng, groups), rng.choice((8, 4, 2)), log_uniform(rng, 300)
        window = rng.choice(((1, 1), (3, 3))) if image else ()
        codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (n, sum(groups), *window), device=DEVICE)
        weight = (pack(codes.to(torch.int8), bits, groups), torch.rand(len(groups), n, device=DEVICE) * 1e-2)
        weight = (*weight, torch.randn(n, device=DEVICE), torch.randn(n, device=DEVICE).to(x.dtype))
        if image:
            pad, steps = (1, 1, 1, 1), ((1, 1), (0, 0), (1, 1))
            pad = pad if window == (3, 3) else (0, 0, 0, 0)
            one = ops.quantized_conv2d(x, *static, *weight, steps[0], pad, steps[2], bits, groups)
            two = ops.conv2d_int8(ops.quantize(x, *static, groups, pad), *weight, *steps, bits, groups, x.dtype)
        else:
            one = ops.quantized_linear(x, *static, *weight, bits, groups)
            two = ops.linear_int8(ops.quantize(x, *static, groups, None), *weight, bits, groups, x.dtype)
        assert torch.equal(one, two) and one.stride() == two.stride(), (x.shape, x.stride(), groups, bits, n)


@pytest.mark.parametrize("kernel", ["", *(f"sm90_64x80_quantizing:{splits}" for splits in (1, 2, 8)), "sm80"])
def test_quantizing_in_the_product_equals_two_operators(kernel, monkeypatch):
    """Bit for bit, also where no kernel joins them: odd sizes and distances, packed weights, float32."""
    if kernel:
        monkeypatch.setenv("MIXDQ_KERNEL", kernel)
    for i in range(60 if ON_GPU else 20):
        rng = random.Random(f"quantizing product {kernel} {i}")
        suits = rng.random() < 0.8
        dtype, bits = (rng.choice(FLOATS[:2]), 8) if suits else (rng.choice(FLOATS), rng.choice((8, 4)))
        k = 16 * rng.randint(1, rng.choice((90, 240))) + (0 if suits else 3)
        n = log_uniform(rng, 1000 if ON_GPU else 200)
        lead = rng.choice(((log_uniform(rng, 1000 if ON_GPU else 150),), (2, 77), ()))
        torch.manual_seed(i)
        x = (torch.randn(*lead, k, device=DEVICE) * rng.choice((0.1, 1.5, 20.0))).to(dtype)
        for value in (float("nan"), float("inf"), -float("inf"), 0.0) if rng.random() < 0.5 else ():
            x.view(-1)[rng.randrange(x.numel())] = value
        codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (n, k), dtype=torch.int8, device=DEVICE)
        alpha, beta, bias = torch.rand(1, n, device=DEVICE) * 1e-3, *torch.randn(2, n, device=DEVICE)
        weight = pack(codes, bits, [k]), alpha, beta, rng.choice((None, bias.to(dtype))), bits, [k]
        static = draw_static(rng, [k])
        if rng.random() < 0.3:  # on halves between two codes, or beside them where the dtype has no such number
            x = (((x / static[0]).nan_to_num(0).clamp(-300, 300).floor() + 0.5) * static[0]).to(dtype)
        x = laid_out(x, rng.choice(("contiguous", rng.choice(LINEAR_LAYOUTS))))
        if rng.random() < 0.1:  # rows that are one
            x = x.reshape(-1, k)[:1].expand(5, k)
        one = ops.quantized_linear(x, *static, *weight)
        two = ops.linear_int8(ops.quantize(x, *static, [k], None), *weight, dtype)
        told = (x.shape, x.stride(), dtype, n, bits, static)
        assert one.dtype == dtype and one.stride() == two.stride() and torch.equal(one, two), told


def draw_bos(rng: random.Random, x: Tensor, columns: int) -> tuple[Tensor | None, Tensor]:
    """A token and its output, of any floating dtype; some samples of ``x`` begin with it, or nearly, or with a NaN."""
    dtypes = (*FLOATS, torch.float64)
    output = torch.randn(columns, device=DEVICE).to(rng.choice(dtypes))
    if rng.random() < 0.2:
        return None, output
    bos = (torch.randn(x.shape[-1], device=DEVICE) * 40).to(x.dtype).to(rng.choice(dtypes))
    if rng.random() < 0.2:
        bos[rng.randrange(len(bos))] = rng.choice((float("nan"), float("inf"), 3e4))
    if x.dim() > 1 and x.numel():
        first = x[..., 0, :]
        noise = torch.zeros_like(first)
        noise[..., rng.randrange(x.shape[-1])] = rng.choice((0, 0.9, 1.1, float("nan"))) * 2**-6 * bos.abs().max()
        known = torch.rand(first.shape[:-1], device=DEVICE)[..., None] < 0.6
        first.copy_(torch.where(known, bos.to(x.dtype) + noise, first))
    return bos, output


@pytest.mark.parametrize("name", ["quantized_linear", "quantized_linear_dynamic", "linear_weight_only"])
def test_known_first_tokens(name):
    """The very rows that the arithmetic writes, and nothing else."""
    written = 0
    for i in range(50):
        rng = random.Random(f"bos {name} {i}")
        x, groups = draw_input(rng, image=False)
        if rng.random() < 0.3 and x.dim() > 1:
            x = laid_out(x[None].expand(2, *x.shape).contiguous(), "batch-strided")
        n, bits = log_uniform(rng, 300) * rng.choice((1, 8)), rng.choice((8, 4, 2))
        codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (n, sum(groups)), dtype=torch.int8, device=DEVICE)
        weight, scale = pack(codes, bits, groups), torch.rand(len(groups), n, device=DEVICE) * 1e-2
        bias = torch.randn(n, device=DEVICE)
        if name == "quantized_linear":
            args = (x, *draw_static(rng, groups), weight, scale, torch.randn(n, device=DEVICE), bias, bits, groups)
        elif name == "quantized_linear_dynamic":
            weight_sum = torch.stack([p.sum(1, dtype=torch.int32) for p in codes.split(groups, 1)])
            args = (x, rng.choice((8, 4)), weight, scale, weight_sum, bias, bits, groups)
        else:
            args = (x, weight, scale, bias, bits, groups)
        bos = draw_bos(rng, x, n)
        plain, found = getattr(ops, name)(*args), getattr(ops, name)(*args, *bos)
        expected = mixdq_ops.with_bos_row(plain.clone(), x, *bos)
        told = (x.shape, x.stride(), x.dtype, n, [None if t is None else t.dtype for t in bos])
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True, msg=str(told))
        written += not torch.equal(expected.nan_to_num(), plain.nan_to_num())
    assert written > 10


@pytest.mark.parametrize("kernel", ["", "sm90_64x80_quantizing:4"])
def test_known_first_tokens_in_the_product(kernel, monkeypatch):
    """The same where one kernel quantizes, multiplies and knows the token, if samples have rows enough."""
    if kernel:
        monkeypatch.setenv("MIXDQ_KERNEL", kernel)
    written = 0
    for i in range(40 if ON_GPU else 16):
        rng = random.Random(f"bos in the product {kernel} {i}")
        samples, rows = rng.randint(1, 3), rng.choice((60, 64, 77, 130))
        k, n = 16 * rng.randint(1, 40), rng.randint(1, 170)
        x = torch.randn(samples, rows, k, device=DEVICE).to(rng.choice(FLOATS[:2]))
        codes = torch.randint(-128, 128, (n, k), dtype=torch.int8, device=DEVICE)
        scale = torch.rand(1, n, device=DEVICE) * 1e-2
        args = (x, *draw_static(rng, [k]), codes, scale, torch.randn(n, device=DEVICE), None, 8, [k])
        bos = draw_bos(rng, x, n)
        plain, found = ops.quantized_linear(*args), ops.quantized_linear(*args, *bos)
        expected = mixdq_ops.with_bos_row(plain.clone(), x, *bos)
        told = (x.shape, x.dtype, n, [None if t is None else t.dtype for t in bos])
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True, msg=str(told))
        written += not torch.equal(expected, plain)
    assert written > 5


def test_quantize_per_token_and_multiply_in_one_call_equals_two():
    for i in range(30):
        rng = random.Random(f"one dynamic call {i}")
        x, groups = draw_input(rng, image=False)
        bits, act_bits, n = rng.choice((8, 4, 2)), rng.choice((8, 4)), log_uniform(rng, 300)
        codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (n, sum(groups)), dtype=torch.int8, device=DEVICE)
        weight_sum = torch.stack([p.sum(1, dtype=torch.int32) for p in codes.split(groups, 1)])
        weight = (pack(codes, bits, groups), torch.rand(len(groups), n, device=DEVICE) * 1e-2, weight_sum)
        weight = (*weight, torch.randn(n, device=DEVICE).to(x.dtype), bits, groups)
        one = ops.quantized_linear_dynamic(x, act_bits, *weight)
        two = ops.linear_int8_dynamic(*ops.quantize_per_token(x, act_bits, groups), *weight, x.dtype)
        assert torch.equal(one, two) and one.stride() == two.stride(), (x.shape, x.stride(), groups, bits, n)


# --- streams, graphs, memory ------------------------------------------------------------------------------------------


class Chain:
    """Fused quantizers and products that feed one another, as in a block of a UNet: ``[batch, 256, 320]``, fp16."""

    def __init__(self):
        torch.manual_seed(0)
        c = 320
        self.static = (torch.tensor([0.03], device=DEVICE), torch.tensor([7.0], device=DEVICE), 8)
        self.norm = (torch.randn(c, device=DEVICE).half(), torch.randn(c, device=DEVICE).half())
        self.qkv = [self.weight(c, c, 8) for _ in range(3)]
        self.ff_in, self.ff_out = self.weight(8 * c, c, 4), self.weight(c, 4 * c, 8)
        self.second_ff_in = self.weight(8 * c, c, 8)
        self.conv = self.weight(c, c, 8, (3, 3))

    @staticmethod
    def weight(n: int, k: int, bits: int, window=()):
        codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (n, k, *window), dtype=torch.int8, device=DEVICE)
        unit = 1 / (74 * 2 ** (bits - 1) * math.sqrt(k * math.prod(window)))
        vectors = (torch.full((1, n), unit, device=DEVICE), torch.randn(n, device=DEVICE) * 0.1)
        return (pack(codes, bits, [k]), *vectors, torch.randn(n, device=DEVICE).half()), bits

    def __call__(self, x: Tensor) -> Tensor:
        c, half = x.shape[-1], torch.float16
        xq = ops.layer_norm_quantize(x, *self.norm, 1e-5, *self.static, [c])
        columns = [[w[i] for w, _ in self.qkv] for i in range(4)]
        q, k, v = ops.linear_int8_multi(xq, *columns, [b for _, b in self.qkv], [c], half).split(c, -1)
        x = x + q * torch.sigmoid(k) + v
        xq = ops.layer_norm_quantize(x, *self.norm, 1e-5, *self.static, [c])
        wide = ops.linear_int8(xq, *self.ff_in[0], 4, [c], half)
        xq = ops.geglu_quantize(wide, *self.static, [4 * c])
        x = ops.linear_int8(xq, *self.ff_out[0], 8, [4 * c], half, x)
        xq = ops.layer_norm_quantize(x, *self.norm, 1e-5, *self.static, [c])
        xq = ops.linear_int8_geglu(xq, *self.second_ff_in[0], 8, [c], half, *self.static)
        x = ops.linear_int8(xq, *self.ff_out[0], 8, [4 * c], half, x)
        image = x.view(-1, 16, 16, c).permute(0, 3, 1, 2)
        xq = ops.group_norm_quantize(image, 32, *self.norm, 1e-5, True, *self.static, [c], (1, 1, 1, 1))
        y = ops.conv2d_int8(xq, *self.conv[0], (1, 1), (0, 0), (1, 1), 8, [c], half, image)
        scaled, scale, zero = ops.quantize_per_token(y.permute(0, 2, 3, 1).reshape(-1, 256, c), 8, [c])
        weight_sum = self.qkv[0][0][0].sum(1, dtype=torch.int32)[None]
        (qdata, alpha, _, bias), _ = self.qkv[0]
        return ops.linear_int8_dynamic(scaled, scale, zero, qdata, alpha, weight_sum, bias, 8, [c], half)


def chain_input(seed: int) -> Tensor:
    return torch.randn(2, 256, 320, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(seed)).half()


def slow_chain(chain: Chain, x: Tensor) -> Tensor:
    """The chain with a wait for the GPU behind every launch: no kernel can meet the one ahead of it."""
    found = []

    class Waiting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            torch.cuda.synchronize()
            found.append(func)
            return out

    with Waiting():
        y = chain(x)
    assert len(found) > 10
    return y


@needs_gpu
def test_overlapping_launches_give_what_waiting_gives():
    """Kernels may begin while the one ahead of them ends; nothing of that may show."""
    chain = Chain()
    inputs = [chain_input(i) for i in range(8)]
    expected = [slow_chain(chain, x) for x in inputs]
    assert all(y.isfinite().all() for y in expected)
    results = [(i, chain(inputs[i])) for _ in range(25) for i in range(len(inputs))]
    assert not [i for i, y in results if not torch.equal(y, expected[i])]


@needs_gpu
def test_two_streams_at_once():
    chain = Chain()
    inputs = [chain_input(i) for i in range(2)]
    expected = [chain(x) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    found = []
    for _ in range(50):
        for i, (x, stream) in enumerate(zip(inputs, streams, strict=True)):
            with torch.cuda.stream(stream):
                found.append((i, chain(x)))
    torch.cuda.synchronize()
    assert not [i for i, y in found if not torch.equal(y, expected[i])]


@needs_gpu
def test_cuda_graph_with_changing_inputs():
    chain, inputs = Chain(), [chain_input(i) for i in range(20)]
    expected = [chain(x) for x in inputs]
    x = inputs[0].clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        chain(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(x)
    found = []
    for value in inputs:
        x.copy_(value)
        graph.replay()
        found.append(y.clone())
    # Replays directly behind one another, too.
    for _ in range(50):
        graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(y, expected[-1])


@needs_gpu
@pytest.mark.parametrize("rows", [4, 256], ids=["few rows", "rows"])
@pytest.mark.parametrize("kernel", ["", "sm90_128x160", "sm90_64x64:4", "sm80_64x64"])
def test_weights_and_scales_that_were_written_just_before(kernel, rows, monkeypatch):
    """As moved models do: the kernel ahead writes what this one reads first."""
    if kernel:
        monkeypatch.setenv("MIXDQ_KERNEL", kernel)
    k, n = 640, 640
    x = torch.randint(-128, 128, (rows, k), dtype=torch.int8, device=DEVICE)
    weights = [torch.randint(-128, 128, (n, k), dtype=torch.int8, device=DEVICE) for _ in range(2)]
    sums = [product(x, w).float() for w in weights]
    weight, alpha, none = weights[0].clone(), torch.ones(1, n, device=DEVICE), torch.zeros(n, device=DEVICE)
    which, factor, flags = 0, 1, []
    for i in range(400):
        if i % 2:
            which = i // 2 % 2
            torch.add(weights[which], 0, out=weight)  # a kernel, where copy_() would copy memory
        else:
            factor = i % 7 + 1
            alpha.fill_(factor)
        y = ops.linear_int8(x, weight, alpha, none, None, 8, [k], torch.float32)
        flags.append((y != sums[which] * factor).any())
    assert first_failure(flags) is None


@needs_gpu
def test_memory_comes_from_torch():
    chain, x = Chain(), chain_input(0)
    chain(x)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, reserved = torch.cuda.mem_get_info()[0], torch.cuda.memory_reserved()
    for _ in range(5):
        chain(x)
    torch.cuda.synchronize()
    assert free - torch.cuda.mem_get_info()[0] == torch.cuda.memory_reserved() - reserved


# --- edges ------------------------------------------------------------------------------------------------------------


def test_empty_inputs():
    (weight, bits), image_weight = Chain.weight(8, 16, 8), Chain.weight(8, 16, 8, (3, 3))[0]
    static = (torch.tensor([0.1], device=DEVICE), torch.tensor([0.0], device=DEVICE), 8)
    x = torch.empty(2, 0, 16, device=DEVICE)
    xq = ops.quantize(x, *static, [16], None)
    assert xq.shape == (2, 0, 16)
    assert ops.linear_int8(xq, *weight, bits, [16], torch.float16).shape == (2, 0, 8)
    assert ops.quantized_linear(x, *static, *weight, bits, [16]).shape == (2, 0, 8)
    bos = torch.ones(16, device=DEVICE), torch.ones(8, device=DEVICE)
    assert ops.quantized_linear(x, *static, *weight, bits, [16], *bos).shape == (2, 0, 8)
    weight_sum = torch.zeros(1, 8, dtype=torch.int32, device=DEVICE)
    assert ops.quantized_linear_dynamic(x, 8, *weight[:2], weight_sum, None, 8, [16], *bos).shape == (2, 0, 8)
    assert ops.linear_weight_only(x, *weight[:2], None, 8, [16], *bos).shape == (2, 0, 8)
    assert [t.shape for t in ops.quantize_per_token(x, 8, [16])] == [(2, 0, 16), (2, 0, 1), (2, 0, 1)]
    image = torch.empty(0, 16, 5, 5, device=DEVICE)
    y = ops.quantized_conv2d(image, *static, *image_weight, (1, 1), (1, 1, 1, 1), (1, 1), 8, [16])
    assert y.shape == (0, 8, 5, 5)


def error_cases():
    def args(**changed):
        (qdata, alpha, beta, _), bits = Chain.weight(8, 16, 8)
        x = torch.zeros(4, 16, dtype=torch.int8, device=DEVICE)
        given = {"xq": x, "qdata": qdata, "alpha": alpha, "beta": beta, "bias": None, "bits": bits, "groups": [16]}
        given |= {"out_dtype": torch.float16, "residual": None}
        return list((given | {name: make(given[name]) for name, make in changed.items()}).values())

    return {
        "weight on the CPU": (lambda: args(qdata=lambda t: t.cpu()), "weight must be on the input's device"),
        "floating input": (lambda: args(xq=lambda t: t.half()), "must be int8"),
        "too few channels": (lambda: args(xq=lambda t: t[:, :8]), "input_groups add up to 16; the input has 8"),
        "another width": (lambda: args(bits=lambda b: 4), "a weight of 4 bits must be uint8"),
        "no such width": (lambda: args(bits=lambda b: 3), "must be 8, 4 or 2; found 3"),
        "a short vector": (lambda: args(beta=lambda t: t[:4]), "beta must have 8 values; found 4"),
        "half scales": (lambda: args(alpha=lambda t: t.half()), "alpha has the wrong dtype"),
        "a double output": (lambda: args(out_dtype=lambda d: torch.float64), "output must be float16"),
        "a residual's shape": (lambda: args(residual=lambda _: torch.zeros(4, 1, device=DEVICE)), "residual must have"),
    }


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_gpu) if name == "weight on the CPU" else name for name in error_cases()]
)
def test_wrong_arguments_are_clear_errors(name):
    args, message = error_cases()[name]
    with pytest.raises(RuntimeError, match=message):
        ops.linear_int8(*args())


def test_an_unknown_kernel_is_a_clear_error(monkeypatch):
    monkeypatch.setenv("MIXDQ_KERNEL", "sm90_1x1")
    (weight, bits), x = Chain.weight(8, 16, 8), torch.zeros(4, 16, dtype=torch.int8, device=DEVICE)
    with pytest.raises(RuntimeError, match="names no kernel: 'sm90_1x1'. The kernels are .*sm90_128x160"):
        ops.linear_int8(x, *weight, bits, [16], torch.float16)
