"""Quantize a pipeline, look at what became of it, save it, load it, and draw.

    python tutorials/01_quantize.py

Runs on a CPU in well under a minute with the small SDXL-type model that comes along; for another pipeline put
``DiffusionPipeline.from_pretrained(...)`` in the place of ``load_tiny_sdxl()``.
"""

import tempfile
from pathlib import Path

import torch

from mixdq_ao import MixDQConfig, calibrate, load, quantize_, save, summary
from mixdq_ao.evaluate import ssim
from mixdq_ao.scenes import held_out_captions, sample_scene
from mixdq_ao.tiny_model import load_tiny_sdxl


def draw(pipe, captions):
    """One picture for each caption, always from the same noise."""
    noise = [torch.Generator().manual_seed(i) for i in range(len(captions))]
    return pipe(captions, num_inference_steps=4, guidance_scale=0.0, generator=noise).images


pipe = load_tiny_sdxl()
pipe.set_progress_bar_config(disable=True)
captions = held_out_captions(4)
floating = draw(pipe, captions)

# 1. Calibrate: run the pipeline on some prompts and note the range of what enters each layer.
params = calibrate(pipe, [sample_scene(i).caption for i in range(16)], num_inference_steps=4)
print(f"calibrated {len(params.layers)} layers; the BOS token is treated apart: {params.bos_aware}")

# 2. Quantize: weights become MixDQTensor, in place. This is W8A8; weight_bits=4 would be W4A8.
before = summary(pipe.unet).total_bytes
quantize_(pipe.unet, MixDQConfig(params))
print(pipe.unet.mid_block.attentions[0].proj_in)
print(summary(pipe.unet).totals())
print(f"float32 took {before / 2**20:.1f} MiB")

# 3. Save the quantized UNet, and load it without ever holding the floating one.
with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "unet-w8a8.safetensors"
    save(pipe.unet, file)
    print(f"{file.name}: {file.stat().st_size / 2**20:.1f} MiB")
    pipe.unet = load(file)

# 4. Draw as before.
print(f"SSIM of the quantized pictures to the floating ones: {ssim(floating, draw(pipe, captions)):.3f}")
