"""Pipelines by name: our own small model, or a diffusers pipeline."""

import os

import torch

from mixdq_ao import families
from mixdq_ao.errors import MixDQError, UnsupportedError
from mixdq_ao.files import first_line
from mixdq_ao.tiny_model import load_tiny_sdxl

TINY = "tiny-sdxl"


def checked_device(name: str | torch.device) -> torch.device:
    """The device of that name. Raises ``MixDQError`` unless it is the CPU, or a GPU that torch sees."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise MixDQError(f"device must be cpu or cuda; found {str(name)!r}") from error
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= gpus):
        known = f"cpu, or cuda:0 to cuda:{gpus - 1}" if gpus else "cpu, for torch sees no GPU"
        raise MixDQError(f"device must be {known}; found {str(name)!r}")
    return device


def in_dtype(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype as an argument of ``from_pretrained``: diffusers renamed it, and older ones ignore the new name."""
    import diffusers

    version = tuple(int(part) for part in diffusers.__version__.split(".")[:2])
    return {"dtype" if version >= (0, 40) else "torch_dtype": dtype}


def load_pipeline(name: str | os.PathLike, device: str = "cpu", dtype: torch.dtype | None = None):
    """The pipeline ``tiny-sdxl``, or one of diffusers from a folder or the local cache of a Hub name; without its
    progress bars. ``dtype`` is float32 on a CPU and float16 on a GPU by default.

    Nothing is downloaded. Raises ``MixDQError`` for a name that is not there or has no model to quantize, and for a
    device that is not there.
    """
    dtype = dtype or (torch.float32 if checked_device(device).type == "cpu" else torch.float16)
    if str(name) == TINY:
        return load_tiny_sdxl(dtype).to(device)
    from diffusers import DiffusionPipeline

    try:
        pipe = DiffusionPipeline.from_pretrained(os.fspath(name), **in_dtype(dtype), local_files_only=True)
    except (OSError, ValueError) as error:
        if os.path.isfile(os.path.join(name, "model_index.json")):
            raise MixDQError(f"{name}: diffusers cannot load this pipeline: {error}") from error
        raise MixDQError(
            f"{name}: not '{TINY}', and no diffusers pipeline on this machine ({first_line(error)}). Give a folder, or "
            "download it first: huggingface-cli download <name>"
        ) from error
    try:
        families.denoiser_name(pipe)
    except UnsupportedError as error:
        raise UnsupportedError(f"{name}: {error}") from None
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)
