"""Random inputs that a diffusers UNet takes, as its configuration demands them."""

import inspect

import torch
from torch import Tensor, nn

from mixdq_ao.errors import UnsupportedError

TOKENS = 77
TIMESTEP = 999.0
TIME_IDS = 6  # SDXL's: original size, top left corner of the crop, target size
# In text the first token's embedding is that many times larger than the others', and always the same.
BOS_SIZE = 10.0


def make_inputs(
    model: nn.Module,
    batch: int,
    size: int,
    latent_scale: int = 8,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    channels_last: bool = False,
    seed: int = 0,
) -> dict:
    """Keyword arguments of one forward, for pictures of ``size`` pixels. Picture i is the same in every batch.

    Raises ``UnsupportedError`` for a UNet with conditions of another kind than text, SDXL's, guidance and class labels.
    """
    config, takes = model.config, inspect.signature(model.forward).parameters
    generators = [torch.Generator().manual_seed(seed * 1_000_003 + i) for i in range(batch)]

    def draw(*shape: int) -> Tensor:
        return torch.cat([torch.randn(1, *shape, generator=g) for g in generators]).to(device, dtype)

    side = size // latent_scale
    sample = draw(config.in_channels, side, side)
    if channels_last:
        sample = sample.contiguous(memory_format=torch.channels_last)
    inputs = {"sample": sample, "timestep": torch.tensor(TIMESTEP, device=device), "return_dict": False}
    if "encoder_hidden_states" in takes:
        text = draw(TOKENS, _text_channels(config))
        text[:, 0] = BOS_SIZE * text[0, 0]
        inputs["encoder_hidden_states"] = text
    if config.get("time_cond_proj_dim") is not None:  # of guidance, in latent consistency models
        inputs["timestep_cond"] = draw(config.time_cond_proj_dim)
    kind = config.get("addition_embed_type")
    if kind == "text_time":
        pooled = config.projection_class_embeddings_input_dim - TIME_IDS * config.addition_time_embed_dim
        sizes = torch.tensor([size, size, 0, 0, size, size], device=device, dtype=dtype)
        inputs["added_cond_kwargs"] = {"text_embeds": draw(pooled), "time_ids": sizes.repeat(batch, 1)}
    elif kind not in (None, "text"):
        raise UnsupportedError(f"no inputs are known for a UNet whose addition_embed_type is {kind!r}")
    labels = config.get("class_embed_type")
    if config.get("num_class_embeds") is not None or labels == "timestep":
        inputs["class_labels"] = torch.zeros(batch, dtype=torch.int64, device=device)
    elif labels in ("projection", "simple_projection"):
        inputs["class_labels"] = draw(config.projection_class_embeddings_input_dim)
    elif labels is not None:
        raise UnsupportedError(f"no inputs are known for a UNet whose class_embed_type is {labels!r}")
    return inputs


def _text_channels(config) -> int:
    """Width of the text that goes in; a projection in front of the blocks may take another than they do."""
    projection = config.get("encoder_hid_dim_type")
    if projection not in (None, "text_proj"):
        raise UnsupportedError(f"no inputs are known for a UNet whose encoder_hid_dim_type is {projection!r}")
    width = config.encoder_hid_dim if projection else config.cross_attention_dim
    widths = {width} if isinstance(width, int) else set(width)
    if len(widths) != 1:
        raise UnsupportedError(f"blocks that take text of different widths cannot be measured; found {sorted(widths)}")
    return widths.pop()
