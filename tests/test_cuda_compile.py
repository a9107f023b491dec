"""``mixdq_ao.compile`` on a CUDA device: one recorded graph for each size, which never gives anything stale."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import run_unet, tiny_sdxl_unet, unet_inputs
from torch import nn

import mixdq_ao
from mixdq_ao import MixDQConfig, MixDQTensor, UnsupportedError, attention, observe, ops, quantize_
from mixdq_ao.evaluate import sqnr

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def on_cuda(inputs: dict) -> dict:
    return {k: on_cuda(v) if isinstance(v, dict) else v.cuda() for k, v in inputs.items()}


def inputs(**options) -> dict:
    return on_cuda(unet_inputs(dtype=torch.float16, **options))


def quantized_unet() -> nn.Module:
    unet = tiny_sdxl_unet(layers_per_block=1).cuda()
    with observe(unet) as recorder:
        run_unet(unet, **on_cuda(unet_inputs()))
    quantize_(unet, MixDQConfig(recorder.params()))
    return unet.half()


@pytest.fixture(scope="module")
def quantized():
    return quantized_unet()


@pytest.fixture
def unet(quantized):
    return copy.deepcopy(quantized)


@pytest.fixture(scope="module", params=["inductor", "eager"])
def compiled(quantized, request):
    """Compiled once for all tests that leave it as it is."""
    return mixdq_ao.compile(copy.deepcopy(quantized), backend=request.param)


def close(expected, found) -> None:
    """As far apart as roundings before quantizers drive them."""
    assert found.isfinite().all() and sqnr(expected, found) > 20


def test_graphs_give_the_numbers_of_eager_for_other_inputs(quantized, compiled):
    for seed, timestep in ((1, 999.0), (2, 500.0), (3, 1.0)):
        x = inputs(seed=seed, timestep=timestep)
        close(run_unet(quantized, **x), run_unet(compiled, **x))
    assert compiled.recorded == 1
    again = [run_unet(compiled, **inputs(seed=2, timestep=500.0)) for _ in range(2)]
    assert torch.equal(*again)


def test_a_call_does_not_overwrite_an_earlier_output(compiled):
    first = run_unet(compiled, **inputs(seed=1))
    kept = first.clone()
    second = run_unet(compiled, **inputs(seed=2))
    assert torch.equal(first, kept) and not torch.equal(first, second)


def test_replay_launches_one_graph(compiled):
    x = inputs()
    run_unet(compiled, **x)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
        run_unet(compiled, **x)
        torch.cuda.synchronize()
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls.get("cudaGraphLaunch") == 1
    # Inputs are copied, the output is cloned; no kernel is launched one by one.
    assert calls.get("cudaLaunchKernel", 0) + calls.get("cuLaunchKernel", 0) + calls.get("cuLaunchKernelEx", 0) <= 8


def test_timesteps_of_any_kind(compiled):
    x = inputs()
    expected = run_unet(compiled, **x)
    for timestep in (999.0, torch.tensor(999.0)):
        x["timestep"] = timestep
        assert torch.equal(run_unet(compiled, **x), expected)
    with torch.inference_mode():
        x["timestep"] = 999
        close(expected, compiled(**x, return_dict=False)[0])


def test_outputs_as_a_dataclass(compiled):
    with torch.no_grad():
        assert torch.equal(compiled(**inputs()).sample, run_unet(compiled, **inputs()))


def test_sizes_are_recorded_one_by_one_and_the_oldest_goes(unet):
    fast = mixdq_ao.compile(unet, max_graphs=2)
    sizes = [{"batch": 1}, {"batch": 2}, {"batch": 1, "size": 24}]
    for options in [*sizes, *sizes]:
        x = inputs(**options)
        close(run_unet(unet, **x), run_unet(fast, **x))
        assert fast.recorded <= 2
    # Graphs share their memory, and one's replay leaves the other's output alone.
    first = run_unet(fast, **inputs(**sizes[2]))
    kept = first.clone()
    run_unet(fast, **inputs(**sizes[1]))
    assert torch.equal(first, kept)


def test_new_weights_are_recorded_again(unet):
    fast, x = mixdq_ao.compile(unet), inputs()
    before = run_unet(fast, **x)
    layer = unet.conv_out
    layer.weight = nn.Parameter(
        MixDQTensor.from_float(
            -layer.weight.dequantize(), act_scale=layer.weight.act_scale, act_zero_point=layer.weight.act_zero_point
        ),
        requires_grad=False,
    )
    close(run_unet(unet, **x), run_unet(fast, **x))
    assert not torch.equal(before, run_unet(fast, **x))
    unet.cpu()
    unet.cuda()
    close(run_unet(unet, **x), run_unet(fast, **x))


def test_values_changed_in_place_need_no_new_recording(unet):
    fast, x = mixdq_ao.compile(unet), inputs()
    run_unet(fast, **x)
    with torch.no_grad():
        unet.conv_out.bias.add_(1)
    close(run_unet(unet, **x), run_unet(fast, **x))


def test_adapters_are_noticed(unet):
    peft = pytest.importorskip("peft")
    fast, x = mixdq_ao.compile(unet), inputs()
    before = run_unet(fast, **x)
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["proj_in"], init_lora_weights=False), adapter_name="a")
    unet.half().cuda()
    for scale in (1.0, 0.25):
        unet.set_adapters("a", scale)
        close(run_unet(unet, **x), run_unet(fast, **x))
    unet.disable_adapters()
    close(before, run_unet(fast, **x))


IN_ANOTHER_PROCESS = """
import sys, torch
sys.path.insert(0, {tests!r})
from torch._dynamo.utils import counters
import mixdq_ao
from models import run_unet
from test_cuda_compile import close, inputs, quantized_unet
unet = quantized_unet()
compiled = mixdq_ao.compile(unet)
for options in ({{"seed": 1}}, {{"seed": 2}}, {{"seed": 1, "batch": 2}}):
    close(run_unet(unet, **inputs(**options)), run_unet(compiled, **inputs(**options)))
print(counters["stats"]["unique_graphs"], compiled.recorded, compiled.hits["layers"])
"""


def test_another_process_traces_nothing_and_records_what_was_compiled(tmp_path):
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    code = IN_ANOTHER_PROCESS.format(tests=str(Path(__file__).parent))

    def output() -> list[str]:
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    first, second = output(), output()
    assert first[0] == "2" and second == ["0", *first[1:]]


def test_static_output_without_copies(unet):
    fast = mixdq_ao.compile(unet, copy_outputs=False)
    first = run_unet(fast, **inputs(seed=1))
    second = run_unet(fast, **inputs(seed=2))
    assert first.data_ptr() == second.data_ptr()


def test_without_graphs(unet):
    fast, x = mixdq_ao.compile(unet, cuda_graphs=False), inputs()
    close(run_unet(unet, **x), run_unet(fast, **x))
    assert fast.recorded == 0


def test_with_gradients_on_a_floating_model_is_not_recorded(unet):
    fast = mixdq_ao.compile(unet)
    fast(**inputs())
    assert fast.recorded == 1  # which has no gradients to give
    floating = tiny_sdxl_unet(layers_per_block=1).cuda().half()
    fast = mixdq_ao.compile(floating.requires_grad_(False))
    fast(**inputs())
    assert fast.recorded == 0
    with pytest.raises(UnsupportedError, match="gradients are on"):
        mixdq_ao.compile(floating, cuda_graphs=True)(**inputs())


def test_a_floating_model():
    unet, x = tiny_sdxl_unet(layers_per_block=1).cuda().half(), inputs()
    fast = mixdq_ao.compile(unet)
    close(run_unet(unet, **x), run_unet(fast, **x))
    assert fast.recorded == 1


# --- attention --------------------------------------------------------------------------------------------------------


def qkv(batch, heads, tokens, keys, channels=64, dtype=torch.float16) -> list[torch.Tensor]:
    """Views of what merged layers give: Q, K and V side by side, or keys and values of the text."""
    g = torch.Generator("cuda").manual_seed(0)
    widths = (3,) if tokens == keys else (1, 2)
    parts = []
    for count, length in zip(widths, (tokens, keys), strict=False):
        x = torch.randn(batch, length, count * heads * channels, device="cuda", generator=g).to(dtype)
        parts += [t.unflatten(2, (heads, channels)).transpose(1, 2) for t in x.chunk(count, -1)]
    return parts


SIZES = [(2, 10, 256, 256), (1, 20, 1024, 1024), (2, 20, 256, 77), (1, 3, 100, 5)]


@pytest.fixture
def nothing_measured(monkeypatch):
    monkeypatch.setattr(attention, "_fastest", {})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES)
def test_every_backend_is_exact(sizes, dtype):
    x = qkv(*sizes, dtype=dtype)
    exact = torch.nn.functional.scaled_dot_product_attention(*(t.double() for t in x))
    names = attention.usable(*x)
    assert {"flash", "efficient", "math"} <= set(names)
    for name in names:
        found = torch.ops.mixdq_ao.attention(*x, None, name)
        assert sqnr(exact, found) > (45 if dtype == torch.bfloat16 else 60), name
        assert found.stride() == torch.empty_like(x[0]).stride(), name


@pytest.mark.parametrize("sizes", SIZES)
def test_the_fastest_backend_is_measured_once(sizes, nothing_measured, monkeypatch):
    x = qkv(*sizes)
    times = attention.timings(*x)
    assert set(times) == set(attention.usable(*x)) - {"math"} and all(0.001 < t < 10 for t in times.values())
    assert attention.fastest(*x) in times
    monkeypatch.delattr(attention, "timings")
    assert attention.fastest(*x) in times


def test_attention_in_a_capture(nothing_measured):
    x = qkv(*SIZES[0])
    expected = torch.ops.mixdq_ao.attention(*x, None, "flash")
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
        found = torch.ops.mixdq_ao.attention(*x, None, "auto")
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(expected, found) and not attention._fastest


@pytest.mark.parametrize("name", ["auto", "flash", "cudnn", "efficient", "math", None])
def test_attention_can_be_chosen(unet, name, nothing_measured):
    block = unet.down_blocks[1].attentions[0].transformer_blocks[0]
    g = torch.Generator("cuda").manual_seed(1)
    x, text = (torch.randn(2, n, 64, device="cuda", generator=g).half() for n in (64, 7))
    fast = mixdq_ao.compile(block, attention=name)
    with torch.no_grad():
        close(block(x, None, text), fast(x, None, text))
    assert fast.recorded == 1 and fast.hits.get("attention", 0) in (0, 2)  # 0 from the cache on disk
    assert len(attention._fastest) == (2 if name == "auto" else 0)


@pytest.mark.skipif(bool(ops.cuda_library_missing), reason=f"CUDA kernels: {ops.cuda_library_missing}")
def test_our_own_kernel_can_be_chosen():
    """It takes 64 channels a head, which the small model does not have."""

    class Attend(nn.Module):
        def forward(self, q, k, v):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    x, narrow = qkv(*SIZES[0]), qkv(*SIZES[0], channels=16)
    fast = mixdq_ao.compile(Attend(), attention="mixdq")
    with torch.no_grad():
        assert torch.equal(fast(*x), torch.ops.mixdq_ao.attention(*x, None, "mixdq"))
        with pytest.raises(Exception, match="attention='mixdq' cannot compute queries"):
            fast(*narrow)


def test_a_backend_that_cannot_compute_it():
    x = qkv(*SIZES[0], dtype=torch.float32)
    with pytest.raises(
        UnsupportedError, match="attention='flash' cannot compute .* of torch.float32 on cuda; efficient"
    ):
        torch.ops.mixdq_ao.attention(*x, None, "flash")
    assert attention.fastest(*x) == "efficient"
