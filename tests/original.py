"""Makes checkpoints in the original project's exact layouts, for any diffusers UNet; the true one takes seconds.

Weight scales are the real symmetric min/max ones of the model (random for a model on the meta device); activation
ranges are drawn at random, since nothing here runs the model.
"""

from collections import OrderedDict

import torch
from torch import nn

from mixdq_ao.bench import models

STACKED_BITS = (2, 4, 8)
TWO_DIMENSIONAL = ("time_emb_proj", "linear_1", "linear_2")  # layers whose input is [batch, channels]

SDXL_CONFIG = {k: v for k, v in models.SDXL_CONFIG.items() if not k.startswith("_")}
TINY_CONFIG = {
    **SDXL_CONFIG,
    "sample_size": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 24,
    "transformer_layers_per_block": 1,
    "attention_head_dim": (2, 4),
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
}


def make_unet(config, *, device="cpu", dtype=torch.float32, seed=0) -> nn.Module:
    """A random UNet of ``SDXL_CONFIG`` or ``TINY_CONFIG``, built in ``dtype`` at once."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return UNet2DConditionModel(**config).eval()
    finally:
        torch.set_default_dtype(default)


def quantizable(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


def split_points(unet: nn.Module) -> dict[str, int]:
    """Up-block shortcut -> channels of its first part; the rest comes over the skip connection."""
    skips = [unet.conv_in.out_channels]
    for block in unet.down_blocks:
        skips += [resnet.out_channels for resnet in block.resnets]
        skips += [sampler.out_channels for sampler in block.downsamplers or ()]
    splits = {}
    for i, block in enumerate(unet.up_blocks):
        for j, resnet in enumerate(block.resnets):
            skip = skips.pop()
            if resnet.conv_shortcut is not None:
                splits[f"up_blocks.{i}.resnets.{j}.conv_shortcut"] = resnet.in_channels - skip
    return splits


def raw_checkpoint(model: nn.Module, splits: dict[str, int] | None = None, seed: int = 0) -> OrderedDict:
    """The layout of ``ckpt.pth``: quantizer -> [buffers, parameters], fp32, attention's unused quantizers included.

    ``splits`` maps a shortcut to the channels of its first part; by default those of ``split_points``.
    """
    splits = split_points(model) if splits is None else splits
    generator = torch.Generator().manual_seed(seed)
    content = OrderedDict()
    for name, module in model.named_modules():
        if hasattr(module, "to_q"):
            for part in "qkv":
                content[f"{name}.act_quantizer_{part}"] = [_buffers(torch.empty(0), torch.empty(0)), OrderedDict()]
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        weight = module.weight.detach()
        parts = weight.split([splits[name], weight.shape[1] - splits[name]], 1) if name in splits else [weight]
        for part, suffix in zip(parts, ("", "_0"), strict=False):
            scale = _weight_scale(part, generator)
            content[f"{name}.weight_quantizer{suffix}"] = [_buffers(scale, torch.zeros_like(scale)), OrderedDict()]
            scale, zero_point = _act_range(module, name, generator)
            content[f"{name}.act_quantizer{suffix}"] = [_buffers(scale, zero_point), OrderedDict()]
    return content


def converted_checkpoint(model: nn.Module, splits: dict[str, int] | None = None, seed: int = 0) -> OrderedDict:
    """The layout of ``new_ckpt.pth`` and of the public file: quantizer -> two fp16 lists."""
    content = OrderedDict()
    for key, (buffers, _) in raw_checkpoint(model, splits, seed).items():
        if not key.endswith(("_q", "_k", "_v")):
            kept = 2 if ".weight_quantizer" in key else 1
            lists = {name: buffers[name] for name in ("delta_list", "zero_point_list")}
            content[key] = {name: value.half().reshape(value.shape[:kept]) for name, value in lists.items()}
    return content


def bos_outputs(model: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """The layout of ``bos_pre_computed.pt``: cross-attention key or value layer -> fp16 ``[1, 1, out]``."""
    layers = {n: m for n, m in quantizable(model).items() if n.endswith(("attn2.to_k", "attn2.to_v"))}
    return {name: m(bos_token(model, seed).to(m.weight.dtype)).detach().half() for name, m in layers.items()}


def bos_token(model: nn.Module, seed: int = 0) -> torch.Tensor:
    """The text embedding ``[1, 1, channels]`` that ``bos_outputs`` belongs to."""
    generator = torch.Generator().manual_seed(seed)
    return 10 * torch.randn(1, 1, model.config.cross_attention_dim, generator=generator)


def write(content, path):
    """Writes a checkpoint, a BOS dict or a list of names as the original did. Returns ``path``."""
    torch.save(content, path)
    return path


def _buffers(scale: torch.Tensor, zero_point: torch.Tensor) -> OrderedDict:
    last = scale[-1] if len(scale) else scale, zero_point[-1] if len(zero_point) else zero_point
    return OrderedDict(
        delta_list=scale, zero_point_list=zero_point, delta=last[0].clone(), zero_point=last[1].clone(), alpha=None
    )


def _weight_scale(weight: torch.Tensor, generator) -> torch.Tensor:
    """``[3, out, 1]`` for a linear, ``[3, out, 1, 1, 1]`` for a convolution."""
    ones = (1,) * (weight.dim() - 1)
    if weight.is_meta:
        high = 0.1 + torch.rand(weight.shape[0], generator=generator)
    else:
        high = weight.abs().amax(tuple(range(1, weight.dim()))).float().clamp_min(1e-6)
    return torch.stack([high / (2 ** (bits - 1) - 1) for bits in STACKED_BITS]).reshape(-1, weight.shape[0], *ones)


def _act_range(module: nn.Module, name: str, generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and unsigned zero points ``[3, 1, ...]``, with as many axes as the layer's input has, plus one."""
    low, high = (0.1 + 6 * torch.rand(2, generator=generator)).tolist()
    scale = torch.tensor([(low + high) / (2**bits - 1) for bits in STACKED_BITS])
    dims = 4 if isinstance(module, nn.Conv2d) else 2 if name.rpartition(".")[2] in TWO_DIMENSIONAL else 3
    shape = (len(STACKED_BITS), *(1,) * dims)
    return scale.reshape(shape), (low / scale).round().reshape(shape)
