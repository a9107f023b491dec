"""The small SDXL model that mixdq_ao ships: 64x64 pictures of captioned scenes in one to four steps."""

from pathlib import Path

import torch

TINY_SDXL: Path = Path(__file__).resolve().parent / "assets" / "tiny_sdxl"


def load_tiny_sdxl(dtype: torch.dtype = torch.float32):
    """The pipeline, a `diffusers.StableDiffusionXLPipeline` on the CPU, with its weights in `dtype`.

    Call it with `guidance_scale=0.0` and one to four `num_inference_steps`, as SDXL-Turbo. See the model card beside
    the weights for the captions that it understands (`mixdq_ao.scenes`).
    """
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(TINY_SDXL)
    pipe.set_progress_bar_config(disable=True)
    # the safety of half precision on a CPU is the caller's business; .to(dtype) of the whole pipeline only warns of it
    for part in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        part.to(dtype)
    return pipe
