"""Attention by a named backend or the fastest one. What CUDA alone has is in ``test_cuda_compile.py``."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixdq_ao import UnsupportedError, attention


def heads(tokens: int, channels: int = 16, seed: int = 0) -> Tensor:
    """``[2, 3, tokens, channels]`` as a view of a layer's output."""
    x = torch.randn(2, tokens, 3 * channels, generator=torch.Generator().manual_seed(seed))
    return x.unflatten(2, (3, channels)).transpose(1, 2)


def packed(tokens: int) -> tuple[Tensor, ...]:
    """Queries, keys and values side by side in memory."""
    return heads(tokens, 48).split(16, dim=-1)


INPUTS = {
    "self": (heads(9), heads(9, seed=1), heads(9, seed=2)),
    "cross": (heads(9), heads(7, seed=1), heads(7, seed=2)),
    "packed": packed(9),
    "contiguous": tuple(t.contiguous() for t in packed(5)),
}


@pytest.mark.parametrize("backend", ["flash", "math", "auto"])
@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
def test_the_numbers_of_torch(inputs, backend):
    for scale in (None, 0.3):
        found = torch.ops.mixdq_ao.attention(*inputs, scale, backend)
        torch.testing.assert_close(found, F.scaled_dot_product_attention(*inputs, scale=scale), rtol=1e-5, atol=1e-5)
        assert found.stride() == torch.empty_like(inputs[0]).stride()


STATIC = torch.tensor([0.02]), torch.tensor([-3.0])


@pytest.mark.parametrize("backend", ["flash", "math", "auto"])
@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_those_of_its_output(inputs, backend, dtype, bits):
    inputs = [x.to(dtype) for x in inputs]
    for scale in (None, 0.3):
        rows = torch.ops.mixdq_ao.attention(*inputs, scale, backend).transpose(1, 2).reshape(2, -1, 48)
        expected = torch.ops.mixdq_ao.quantize(rows, *STATIC, bits, [48], None)
        found = torch.ops.mixdq_ao.attention_quantize(*inputs, scale, backend, *STATIC, bits)
        assert torch.equal(found, expected) and found.is_contiguous() and len(found.unique()) > bits


@pytest.mark.parametrize("backend", ["mixdq", "cudnn", "efficient"])
def test_a_backend_that_is_not_there(backend):
    message = r"queries \[2, 3, 9, 16\].* on cpu; flash or math can"
    with pytest.raises(UnsupportedError, match=message):
        torch.ops.mixdq_ao.attention(*INPUTS["self"], None, backend)
    with pytest.raises(UnsupportedError, match=message):
        torch.ops.mixdq_ao.attention_quantize(*INPUTS["self"], None, backend, *STATIC, 8)


@pytest.mark.parametrize("dtype, channels, fits", [("half", 64, True), ("bfloat16", 64, True), ("float", 64, False),
                                                   ("half", 32, False)])  # fmt: skip
def test_what_our_kernel_takes(dtype, channels, fits):
    x = [t.to(getattr(torch, dtype)) for t in heads(9, 3 * channels).split(channels, dim=-1)]
    assert attention._fits_our_kernel(*x, None) == attention._fits_our_kernel(*x, 0.3) == fits
    assert not attention._fits_our_kernel(*x, -0.3)


# --- the choice, with a GPU that is made up ---------------------------------------------------------------------------


class Gpu:
    """Backends that take as long as they are told to; ``measured`` has the queries' shapes in turn."""

    def __init__(self, monkeypatch, **milliseconds):
        self.milliseconds, self.measured, self.capturing = milliseconds, [], False
        self.broken: dict[str, Exception | Tensor] = {}
        run = attention._run

        def fake_run(name, q, k, v, scale):
            self.last = name
            found = self.broken.get(name)
            if isinstance(found, Exception):
                raise found
            return run("math", q, k, v, scale) if found is None else found

        def fake_time(run, device):
            run()
            return self.milliseconds[self.last]

        real = attention.timings

        def timings(q, *rest):
            self.measured.append(q.shape)
            return real(q, *rest)

        monkeypatch.setattr(attention, "_run", fake_run)
        monkeypatch.setattr(attention, "_time", fake_time)
        monkeypatch.setattr(attention, "timings", timings)
        monkeypatch.setattr(attention, "_is_usable", lambda name, *_: name == "math" or name in milliseconds)
        monkeypatch.setattr(attention, "_fastest", {})
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)


@pytest.mark.parametrize(
    "milliseconds, fastest",
    [
        ({"flash": 2.0, "cudnn": 1.0, "efficient": 3.0}, "cudnn"),
        ({"flash": 2.0, "cudnn": 2.5, "efficient": 3.0}, "flash"),
        ({"flash": 2.0, "mixdq": 1.0, "cudnn": 2.5, "efficient": 3.0}, "mixdq"),
        ({"flash": 1.02, "cudnn": 1.0, "efficient": 3.0}, "flash"),  # as good as equal: the simpler one
        ({"cudnn": 2.0, "efficient": 1.0}, "efficient"),
    ],
)
def test_the_fastest_is_taken(monkeypatch, milliseconds, fastest):
    Gpu(monkeypatch, **milliseconds)
    assert attention.fastest(*INPUTS["self"]) == fastest


def test_it_is_measured_once_for_sizes_and_backends(monkeypatch):
    gpu = Gpu(monkeypatch, flash=2.0, cudnn=1.0, efficient=3.0)
    for name in ("self", "cross", "packed", "contiguous", "self"):  # the third is as large as the first
        torch.ops.mixdq_ao.attention(*INPUTS[name], None, "auto")
        assert gpu.last == "cudnn"
    assert gpu.measured == [INPUTS[name][0].shape for name in ("self", "cross", "contiguous")]
    del gpu.milliseconds["cudnn"]  # as if torch's switch for it had been turned off
    assert attention.fastest(*INPUTS["self"]) == "flash" and len(gpu.measured) == 4


def test_a_quantizer_counts_where_codes_are_wanted(monkeypatch):
    """Our kernel is slower than another, but not slower than that and a quantizer."""
    gpu = Gpu(monkeypatch, flash=3.0, mixdq=2.5, cudnn=2.0)
    run_quantized = attention._run_quantized

    def fake_run_quantized(name, *args, **kwargs):
        codes = run_quantized("math", *args, **kwargs)
        gpu.last = f"{name}, quantized"
        return codes

    monkeypatch.setattr(attention, "_run_quantized", fake_run_quantized)
    gpu.milliseconds |= {"flash, quantized": 4.0, "mixdq, quantized": 2.5, "cudnn, quantized": 3.0}
    inputs = INPUTS["self"]
    for _ in range(2):
        torch.ops.mixdq_ao.attention(*inputs, None, "auto")
        assert gpu.last == "cudnn"
        torch.ops.mixdq_ao.attention_quantize(*inputs, None, "auto", *STATIC, 8)
        assert gpu.last == "mixdq, quantized"
    assert len(gpu.measured) == 2


@pytest.mark.parametrize("milliseconds, fastest", [({}, "math"), ({"efficient": 1.0}, "efficient")])
def test_one_candidate_is_not_measured(monkeypatch, milliseconds, fastest):
    gpu = Gpu(monkeypatch, **milliseconds)
    assert attention.fastest(*INPUTS["self"]) == fastest and not gpu.measured


def test_in_a_capture_nothing_is_measured_or_remembered(monkeypatch):
    gpu = Gpu(monkeypatch, flash=2.0, cudnn=1.0)
    gpu.capturing = True
    assert attention.fastest(*INPUTS["self"]) == "flash" and not gpu.measured
    gpu.capturing = False
    assert attention.fastest(*INPUTS["self"]) == "cudnn"


def test_what_fails_or_disagrees_is_not_taken(monkeypatch):
    gpu = Gpu(monkeypatch, flash=3.0, cudnn=1.0, efficient=2.0)
    inputs = INPUTS["cross"]
    gpu.broken["cudnn"] = torch.full_like(inputs[0], torch.nan)
    assert attention.timings(*inputs) == {"flash": 3.0, "efficient": 2.0}
    gpu.broken["cudnn"] = torch.zeros_like(inputs[0])
    assert attention.fastest(*inputs) == "efficient"
    gpu.broken["cudnn"] = RuntimeError("cuDNN Frontend error: No execution plans support the graph.")
    assert attention.timings(*inputs) == {"flash": 3.0, "efficient": 2.0}
    gpu.broken["cudnn"] = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        attention.timings(*inputs)
