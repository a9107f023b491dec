"""Acceptance of the attention kernel against float64: on a GPU, or fewer and smaller cases in the emulator."""

import math
import random

import pytest
import torch
from test_cuda_kernels import (  # noqa: F401  the fixtures are for all tests here
    DEVICE,
    NO_KERNELS,
    ON_GPU,
    in_a_process_whose_gpu_is_well,
    in_an_order_of_its_own,
    log_uniform,
    needs_gpu,
    ops,
    without_autograd,
)
from torch import Tensor

from mixdq_ao import attention
from mixdq_ao.evaluate import sqnr

pytestmark = pytest.mark.skipif(bool(NO_KERNELS), reason=f"CUDA kernels: {NO_KERNELS}")

CASES = 200 if ON_GPU else 30
C = 64
LAYOUTS = ("merged", "heads first", "one layer", "expanded", "channels of more")


def heads(rng: random.Random, batch: int, count: int, tokens: int, dtype: torch.dtype, layout: str) -> Tensor:
    """``[batch, count, tokens, 64]`` as a view of more, whose rest is NaN."""
    g = torch.Generator(DEVICE).manual_seed(rng.randrange(2**31))
    values = torch.randn(batch, count, tokens, C, device=DEVICE, generator=g).mul_(rng.choice((1, 4))).to(dtype)
    if layout == "merged":  # the middle one of three layers
        base = values.new_full((batch, tokens, 3, count, C), math.nan)
        view = base[:, :, 1].transpose(1, 2)
    elif layout == "one layer":
        view = values.new_empty(batch, tokens, count, C).transpose(1, 2)
    elif layout == "channels of more":
        view = values.new_full((batch, count, tokens, C + 24), math.nan)[..., 8 : 8 + C]
    elif layout == "expanded":  # one image's for all
        return values[:1].expand(batch, -1, -1, -1)
    else:
        return values
    return view.copy_(values)


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return (q.double() @ k.double().mT * scale).softmax(-1) @ v.double()


def check(found: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, what) -> None:
    assert found.dtype == q.dtype and found.stride() == torch.empty_like(q).stride(), what
    assert sqnr(exact(q, k, v, scale), found) > (45 if q.dtype == torch.bfloat16 else 60), what


def draw(rng: random.Random, shape: str) -> tuple[Tensor, Tensor, Tensor, float, tuple]:
    """Queries, keys, values, a scale, and what they are."""
    batch, count = rng.randint(1, 3), rng.randint(1, 3)
    most = FEW_KEYS if shape.startswith("few") else 300
    queries, keys = log_uniform(rng, 300 if ON_GPU else 100), rng.choice((log_uniform(rng, most), rng.randint(1, most)))
    dtype, scale = rng.choice((torch.float16, torch.bfloat16)), rng.choice((0.125, 0.125, 0.3, 1.7))
    layouts = [rng.choice([layout for layout in LAYOUTS if layout != "expanded"]), *rng.choices(LAYOUTS, k=2)]
    q, k, v = (
        heads(rng, batch, count, tokens, dtype, layout)
        for tokens, layout in zip((queries, keys, keys), layouts, strict=True)
    )
    return q, k, v, scale, (batch, count, queries, keys, dtype, scale, layouts)


# Warps by rows and keys, or the kernel for few keys, its blocks and warps. "": what the library chooses by itself.
SHAPES = ["", "1:1", "2:1", "3:4", "4:2", "5:3", "4:4", "10:1", "few", "few:1:1", "few:1:3", "few:3:2", "few:1:10"]
FEW_KEYS = 80  # the most of that kernel


@pytest.mark.parametrize("shape", SHAPES)
def test_random_problems(shape, monkeypatch):
    monkeypatch.setenv("MIXDQ_ATTENTION", shape)
    for i in range(CASES):
        q, k, v, scale, what = draw(random.Random(f"{shape} {i}"), shape)
        check(ops.short_attention(q, k, v, scale), q, k, v, scale, what)


def draw_static(rng: random.Random) -> tuple[Tensor, Tensor, int]:
    """From codes of which most are at an end of their range to some that are nearly all zero."""
    bits = rng.choice((8, 8, 4))
    scale, zero_point = 10 ** rng.uniform(-3, 0.5), rng.randint(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return torch.tensor([scale], device=DEVICE), torch.tensor([float(zero_point)], device=DEVICE), bits


@pytest.mark.parametrize("shape", SHAPES)
def test_codes_equal_those_of_its_output(shape, monkeypatch):
    monkeypatch.setenv("MIXDQ_ATTENTION", shape)
    for i in range(CASES):
        rng = random.Random(f"codes {shape} {i}")
        q, k, v, scale, what = draw(rng, shape)
        if rng.random() < 0.2:
            v[0, 0, 0, 0] = rng.choice((math.nan, math.inf, -math.inf))
        static = draw_static(rng)
        found = ops.short_attention_quantize(q, k, v, scale, *static)
        rows = ops.short_attention(q, k, v, scale).transpose(1, 2).flatten(2)
        expected = ops.quantize(rows, *static, [rows.shape[2]], None)
        assert found.dtype == torch.int8 and found.is_contiguous() and torch.equal(found, expected), (*what, static)


@pytest.mark.parametrize("keys", [1, 31, 32, 33, 77, 79, 80, 81, 127, 128, 129, 256, 257, 300])
def test_lengths_around_the_sizes_of_tiles(keys):
    rng = random.Random(keys)
    q, k, v = (heads(rng, 1, 2, tokens, torch.float16, "merged") for tokens in (17, keys, keys))
    check(ops.short_attention(q, k, v, 0.125), q, k, v, 0.125, keys)


@pytest.mark.parametrize("shape", ["1:1", "1:4", "few"])
def test_large_scores(shape, monkeypatch):
    """Scores of thousands, in which the largest key comes first, last or in between: no overflow, no NaN."""
    monkeypatch.setenv("MIXDQ_ATTENTION", shape)
    rng = random.Random(0)
    keys = FEW_KEYS if shape == "few" else 140
    q, k, v = (heads(rng, 1, 1, tokens, torch.float16, "one layer") * 20 for tokens in (16, keys, keys))
    for order in (1, -1):
        k = k.take_along_dim((order * (q[:, :, :1] * k).sum(-1, keepdim=True)).argsort(2), 2)
        check(ops.short_attention(q, k, v, 0.125), q, k, v, 0.125, order)


@pytest.mark.parametrize("shape, keys", [("few", FEW_KEYS + 1), ("few:0:4", 8), ("few:1:11", 8), ("17:1", 8), ("?", 8)])
def test_shapes_that_there_are_not(shape, keys, monkeypatch):
    monkeypatch.setenv("MIXDQ_ATTENTION", shape)
    q, k = torch.zeros(1, 1, 9, C, device=DEVICE).half(), torch.zeros(1, 1, keys, C, device=DEVICE).half()
    with pytest.raises(RuntimeError, match="the kernel"):
        ops.short_attention(q, k, k, 0.125)


def test_nothing_to_compute():
    q, k = torch.empty(2, 3, 0, C, device=DEVICE).half(), torch.empty(2, 3, 5, C, device=DEVICE).half()
    assert ops.short_attention(q, k, k, 0.125).shape == q.shape
    codes = ops.short_attention_quantize(q, k, k, 0.125, *draw_static(random.Random(0)))
    assert (codes.shape, codes.dtype) == ((2, 0, 3 * C), torch.int8)


def wrong(**changed):
    inputs = {name: torch.zeros(1, 2, 9, C, device=DEVICE).half() for name in "qkv"}
    scale = changed.pop("scale", 0.125)
    return *(changed.get(name, lambda t: t)(t) for name, t in inputs.items()), scale


# What mixdq_ao.attention does not ask for; the operator by itself must not compute it.
ERRORS = {
    "another dtype": (lambda: wrong(k=Tensor.bfloat16), "of one dtype"),
    "float32": (lambda: wrong(q=Tensor.float, k=Tensor.float, v=Tensor.float), "must be float16 or bfloat16"),
    "other channels": (lambda: wrong(q=lambda t: t[..., :56]), "must be .batch, heads, tokens, 64."),
    "other heads": (lambda: wrong(v=lambda t: t[:, :1]), "must be .batch"),
    "other keys": (lambda: wrong(v=lambda t: t[:, :, 1:]), "must be .batch"),
    "no keys": (lambda: wrong(k=lambda t: t[:, :, :0], v=lambda t: t[:, :, :0]), "needs a key"),
    "a negative scale": (lambda: wrong(scale=-1.0), "a scale above 0"),
    "channels apart": (lambda: wrong(k=lambda t: t.mT.contiguous().mT), "channels of k must lie side by side"),
    "odd rows": (lambda: wrong(q=lambda t: torch.cat([t, t[..., :2]], -1)[..., :C]), "row of q must begin at"),
    "an odd start": (lambda: wrong(v=lambda t: torch.cat([t, t[..., :8]], -1)[..., 1 : 1 + C]), "row of v must begin"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_the_kernel_cannot_do_is_an_error(name):
    args, message = ERRORS[name]
    with pytest.raises(RuntimeError, match=message):
        ops.short_attention(*args())
    with pytest.raises(RuntimeError, match=message):
        ops.short_attention_quantize(*args(), *draw_static(random.Random(0)))
    q, k, v, scale = args()
    assert not attention._fits_our_kernel(q, k, v, scale)


ODD_CODES = {
    "two scales": (lambda s, z, bits: (s.repeat(2), z, bits), "scale must have 1 values; found 2"),
    "two zero points": (lambda s, z, bits: (s, z.repeat(2), bits), "zero_point must have 1 values; found 2"),
    "half scales": (lambda s, z, bits: (s.half(), z, bits), "scale has the wrong dtype"),
    "5 bits": (lambda s, z, bits: (s, z, 5), "activation bits must be 8 or 4; found 5"),
}


@pytest.mark.parametrize("name", ODD_CODES)
def test_codes_that_there_are_not(name):
    change, message = ODD_CODES[name]
    with pytest.raises(RuntimeError, match=message):
        ops.short_attention_quantize(*wrong(), *change(*draw_static(random.Random(0))))


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("keys", [77, None], ids=["cross", "self"])
@pytest.mark.parametrize("tokens, count", [(256, 20), (1024, 10), (1024, 20), (4096, 10)])
def test_sizes_of_sdxl(tokens, count, keys, dtype):
    rng = random.Random(tokens)
    q, k, v = (heads(rng, 2, count, n, dtype, "merged") for n in (tokens, keys or tokens, keys or tokens))
    found = torch.ops.mixdq_ao.attention(q, k, v, None, "mixdq")
    check(found, q, k, v, C**-0.5, (tokens, count, keys))
    static, rows = draw_static(rng), found.transpose(1, 2).flatten(2)
    codes = torch.ops.mixdq_ao.attention_quantize(q, k, v, None, "mixdq", *static)
    assert torch.equal(codes, ops.quantize(rows, *static, [rows.shape[2]], None))


@needs_gpu
def test_it_waits_for_the_kernel_ahead():
    """What it reads was written by the kernel ahead, and what it writes is read by the next."""
    rng = random.Random(0)
    inputs = [[heads(rng, 1, 20, 256, torch.float16, "one layer") for _ in range(3)] for _ in range(4)]
    expected = [ops.short_attention(*x, 0.125) + 1 for x in inputs]
    x, flags = [t.clone() for t in inputs[0]], []
    for i in range(400):
        for to, value in zip(x, inputs[i % 4], strict=True):
            torch.add(value, 0, out=to)  # a kernel, where copy_() would copy memory
        flags.append((ops.short_attention(*x, 0.125) + 1 != expected[i % 4]).any())
    assert not torch.stack(flags).any()
