"""Calibrate a model that nobody has quantized before, and see what each way of finding ranges is worth.

Run it with `python tutorials/02_calibrate.py`; it takes half a minute on two cores and needs no download.
"""

import copy

from mixdq_ao import MixDQConfig, calibrate, quantize_, save
from mixdq_ao.calibrate import run_batches
from mixdq_ao.evaluate import evaluate
from mixdq_ao.pipelines import load_pipeline
from mixdq_ao.prompts import built_in_prompts
from mixdq_ao.rounding import round_from_data_

pipe = load_pipeline("tiny-sdxl")  # or the folder of any SDXL-like pipeline
prompts = built_in_prompts(16, scenes=True)  # or read_prompts("captions_val2014.json", 128)
captions = built_in_prompts(8, scenes=True, held_out=True)

# Nothing is changed in the pipeline: its weights watch what they are multiplied with while calibrate() runs.
# With state="calibration.state" a run that is stopped goes on where it was.
params = calibrate(pipe, prompts)
params.save("params.safetensors")

# The text encoders' first token is the same for every prompt and far larger than the others. It is left out of the
# ranges, and its output is kept instead.
layer = next(name for name, p in params.layers.items() if p.bos_output is not None)
naive = calibrate(pipe, prompts, bos=False)
print(f"{layer}:")
print(f"  one step of its input is {naive.layers[layer].act_scale[8].item():.4f} with the first token,")
print(f"  {params.layers[layer].act_scale[8].item():.4f} without it")

# Three ways to a 4-bit model: scales from the largest weight, scales with the least error, and GPTQ rounding on top.
coarse = calibrate(pipe, prompts, weight_method="minmax")
text_layers = [name for name, p in params.layers.items() if p.bos_output is not None]
rounded = copy.deepcopy(pipe.unet)
quantize_(rounded, MixDQConfig(params, weight_bits=4))
round_from_data_(rounded, pipe.unet, lambda: list(run_batches(pipe, prompts)), without_bos=text_layers)
save(rounded, "w4a8.safetensors")  # codes, scales and all: mixdq_ao.load() gives it back

result = evaluate(
    pipe,
    {
        "W8A8": MixDQConfig(params),
        "W4A8, largest weight": MixDQConfig(coarse, weight_bits=4),
        "W4A8, least error": MixDQConfig(params, weight_bits=4),
        "W4A8, GPTQ": "w4a8.safetensors",
    },
    captions,
)
for row in result.rows[1:]:
    print(f"{row.name:22} SQNR {row.mean('sqnr'):5.1f} dB, SSIM {row.mean('ssim'):.4f}")
