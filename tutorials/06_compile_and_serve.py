"""Compile a quantized UNet, keep what was compiled for the next start, and export it so that a server compiles nothing.

Run it with `python tutorials/06_compile_and_serve.py`; it takes a minute on two cores and needs no download. The UNet
is a small untrained one with SDXL's kinds of layers; nearly all of the time goes to the C++ compiler.
"""

import time

import torch
from diffusers import UNet2DConditionModel

import mixdq_ao
from mixdq_ao import MixDQConfig, observe, quantize_

torch.manual_seed(0)
unet = UNet2DConditionModel(
    sample_size=8,
    block_out_channels=(16, 32),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    attention_head_dim=2,
    cross_attention_dim=64,
    use_linear_projection=True,
    norm_num_groups=8,
).eval()
inputs = {"sample": torch.randn(1, 4, 8, 8), "timestep": 999, "encoder_hidden_states": torch.randn(1, 7, 64)}


def run(unet) -> torch.Tensor:
    start = time.perf_counter()
    with torch.inference_mode():
        sample = unet(**inputs).sample
    print(f"  {time.perf_counter() - start:.2f} s, {type(unet).__name__}")
    return sample


with observe(unet) as recorder:  # for a pipeline: calibrate(pipe, prompts)
    run(unet)
quantize_(unet, MixDQConfig(recorder.params()))
expected = run(unet)

# 1. Compile. The first call of each size compiles; on a GPU it also records a CUDA graph. For a pipeline:
#    pipe.unet = mixdq_ao.compile(pipe.unet)
compiled = mixdq_ao.compile(unet, cache=True)
for call in "first", "second":
    print(f"{call} call of the compiled UNet:")
    found = run(compiled)
print(f"rewrites: {dict(compiled.hits)}; largest difference to eager: {(found - expected).abs().max():.1e}")

# The same rewrites without generated code need no C++ compiler and start in seconds; on a GPU a step takes longer.
print("first call of the UNet that runs operator by operator:")
found = run(mixdq_ao.compile(unet, backend="eager"))
print(f"largest difference to eager: {(found - expected).abs().max():.1e}")

# 2. Keep the compiled code. Where CUDA graphs are recorded, or with cache=True, each step is a file in torch's folder
#    (TORCHINDUCTOR_CACHE_DIR), and whoever compiles such a model next loads it, here or in another process.
print("first call of another UNet like it:")
run(mixdq_ao.compile(unet, cache=True))
#    For another machine of the same kind, all of it goes into one file, to be loaded there before the first call.
mixdq_ao.save_compile_cache("unet.cache")
print(f"the cache fits this machine: {mixdq_ao.load_compile_cache('unet.cache')}")

# 3. Export: weights and machine code in one file. It starts at once and needs no compiler; what it does not have is a
#    way to change weights, adapters or sizes (but for dynamic=True). For a pipeline the example can be a call of it:
#    mixdq_ao.export(pipe.unet, "unet.pt2", lambda: pipe("a fox", num_inference_steps=1, guidance_scale=0.0))
mixdq_ao.export(unet, "unet.pt2", inputs)
start = time.perf_counter()
served = mixdq_ao.load_exported("unet.pt2")  # pipe.unet = mixdq_ao.load_exported("unet.pt2")
print(f"loaded in {time.perf_counter() - start:.2f} s; a call:")
print(f"largest difference to eager: {(run(served) - expected).abs().max():.1e}")
