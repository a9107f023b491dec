"""Small models of the shapes that the library is made for."""

import torch
from torch import Tensor, nn

from mixdq_ao.tensor import MixDQTensor


def tiny_sdxl_unet(seed: int = 0, layers_per_block: int = 2, **config):
    """A UNet with SDXL's configuration, block types and conditioning, and 3.1 million weights."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=layers_per_block,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 4, 4),
        cross_attention_dim=64,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
        norm_num_groups=16,
        **config,
    ).eval()


def unet_inputs(batch: int = 1, size: int = 16, timestep: float = 999.0, dtype=torch.float32, seed: int = 1) -> dict:
    """Keyword arguments of one forward of :func:`tiny_sdxl_unet`."""
    g = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(batch, 4, size, size, generator=g).to(dtype),
        "timestep": torch.tensor(timestep),
        "encoder_hidden_states": torch.randn(batch, 7, 64, generator=g).to(dtype),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(batch, 32, generator=g).to(dtype),
            "time_ids": torch.full((batch, 6), 16.0).to(dtype),
        },
    }


def run_unet(unet, **kwargs) -> Tensor:
    with torch.no_grad():
        return unet(**kwargs, return_dict=False)[0]


def quantize_by_hand(model: nn.Module, calibrate, bits: int = 8) -> dict[str, Tensor]:
    """Put static W8A8 (or lower) weights into every Linear and Conv2d of ``model``, from what ``calibrate()`` feeds.

    It uses the tensor alone, so that tests of the tensor do not need the rest of the library. Returns the floating
    weights by layer name.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    ranges: dict[str, tuple[float, float]] = {}

    def watch(name):
        def hook(module, args):
            low, high = args[0].aminmax()
            before = ranges.get(name, (0.0, 0.0))
            ranges[name] = min(before[0], low.item()), max(before[1], high.item())

        return hook

    handles = [m.register_forward_pre_hook(watch(n)) for n, m in layers.items()]
    with torch.no_grad():
        calibrate()
    for handle in handles:
        handle.remove()
    floating = {}
    for name, (low, high) in ranges.items():
        scale = max(high - low, 1e-6) / 255
        floating[name] = layers[name].weight.detach().clone()
        weight = MixDQTensor.from_float(
            layers[name].weight, bits, act_scale=scale, act_zero_point=float(round(-low / scale) - 128)
        )
        layers[name].weight = nn.Parameter(weight, requires_grad=False)
    return floating
