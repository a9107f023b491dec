"""How close a quantized model's outputs are to the floating ones, at equal seeds."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mixdq_ao.errors import MixDQError


def sqnr(reference: Tensor, value: Tensor) -> float:
    """Signal to quantization noise ratio in dB: ``10 log10(sum ref^2 / sum (value - ref)^2)``; inf where equal.

    Any shape and floating dtype, computed in float64. Raises ``MixDQError`` for different shapes.
    """
    if reference.shape != value.shape:
        raise MixDQError(f"sqnr() needs equal shapes; found {list(reference.shape)} and {list(value.shape)}")
    reference, value = reference.double(), value.double()
    noise = (value - reference).square().sum()
    return float(10 * torch.log10(reference.square().sum() / noise))


def picture_batch(pictures: Sequence) -> Tensor:
    """PIL pictures of one size, or arrays uint8 ``[h, w, 3]``, as float32 ``[n, 3, h, w]`` in 0..1."""
    arrays = [np.asarray(p) for p in pictures]
    if not arrays or any(a.shape != arrays[0].shape or a.ndim != 3 or a.shape[2] != 3 for a in arrays):
        raise MixDQError(f"pictures must be RGB and of one size; found shapes {sorted({a.shape for a in arrays})}")
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


def ssim(reference: Sequence, pictures: Sequence) -> float:
    """Mean structural similarity of pictures to reference pictures (torchmetrics, data range 1); 1 where equal."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    return float(structural_similarity_index_measure(*_pair(reference, pictures), data_range=1.0))


def psnr(reference: Sequence, pictures: Sequence) -> float:
    """Peak signal to noise ratio in dB over all pictures (torchmetrics, data range 1); inf where equal."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return float(peak_signal_noise_ratio(*_pair(reference, pictures), data_range=1.0))


def _pair(reference, pictures) -> tuple[Tensor, Tensor]:
    reference, pictures = picture_batch(reference), picture_batch(pictures)
    if reference.shape != pictures.shape:
        raise MixDQError(f"need equal pictures; found {list(reference.shape)} and {list(pictures.shape)}")
    return pictures, reference
