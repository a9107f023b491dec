"""One row for each UNet family: the only place with names of layers.

Also what can be read off a model's structure: which layers there are, and where skip connections join.
"""

import re
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class ModelFamily:
    """What the method needs to know of a kind of model.

    ``content``: a layer is a content layer, judged by SSIM of pictures, if its name contains one of these; the others
    are quality layers, judged by SQNR of the UNet output. ``text_layers``: pattern of the names of layers that see
    text tokens, the first of which is the BOS token. ``siblings_in_block`` and ``siblings_in_model``: patterns of the
    names of linear layers that may read the same tensor, within a block or anywhere in the model; a name too many does
    no harm.
    """

    name: str
    content: tuple[str, ...] = ()
    text_layers: str | None = None
    siblings_in_block: tuple[str, ...] = (r"(?<=attn1\.)to_[qkv]$",)
    siblings_in_model: tuple[str, ...] = (r"(^|\.)attn2\.to_[kv]$", r"(^|\.)time_emb_proj$")

    def is_content(self, layer: str) -> bool:
        return any(part in layer for part in self.content)

    def sees_text(self, layer: str) -> bool:
        return self.text_layers is not None and re.search(self.text_layers, layer) is not None


_UNET = {"content": ("ff", "attn2"), "text_layers": r"(^|\.)attn2\.to_[kv]$"}
SDXL = ModelFamily("sdxl", **_UNET)
SD = ModelFamily("sd", **_UNET)
GENERIC = ModelFamily("generic")
FAMILIES = {family.name: family for family in (SDXL, SD, GENERIC)}


def family_of(model: nn.Module) -> ModelFamily:
    """The row of ``model``; ``generic`` for one that is not known (no BOS layers, all layers quality layers)."""
    if type(model).__name__ != "UNet2DConditionModel":
        return GENERIC
    return SDXL if model.config.get("addition_embed_type") == "text_time" else SD


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear and 2-D convolution layer of ``model`` by name, in order.

    It looks through peft's wrappers: a layer under a LoRA keeps its name, and what the LoRA adds is no layer.
    """
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            parts = name.split(".")
            if not any(part.startswith("lora_") for part in parts):
                found[".".join(part for part in parts if part != "base_layer")] = module
    return found


def siblings_of(model: nn.Module) -> list[dict[str, nn.Module]]:
    """Sets of linear layers that may read the same tensor, by name, each in the order in which they run."""
    family, sets = family_of(model), {}
    patterns = [(p, True) for p in family.siblings_in_block] + [(p, False) for p in family.siblings_in_model]
    for name, layer in sorted(layers_of(model).items(), key=lambda item: _stage(item[0])):
        for pattern, in_block in patterns:
            match = re.search(pattern, name)
            if match and isinstance(layer, nn.Linear):
                sets.setdefault((pattern, name[: match.start()] if in_block else ""), {})[name] = layer
    return list(sets.values())


def _stage(name: str) -> int:
    """The middle block runs between the others, but is declared after them."""
    stages = ("down_blocks", "mid_block", "up_blocks")
    first = name.partition(".")[0]
    return stages.index(first) if first in stages else -1


def layer_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name to weight shape of every layer."""
    return {name: tuple(m.weight.shape) for name, m in layers_of(model).items()}


def split_points(model: nn.Module) -> dict[str, list[int]]:
    """Input groups ``[hidden, skip]`` of the shortcuts that read a concatenation of hidden state and skip connection.

    Found by following the skip connections of a UNet: every down-block resnet and downsampler pushes its channels,
    every up-block resnet pops some. A model of another structure has none.
    """
    if not all(hasattr(model, part) for part in ("conv_in", "down_blocks", "up_blocks")):
        return {}
    skips = [model.conv_in.weight.shape[0]]
    for block in model.down_blocks:
        skips += [resnet.out_channels for resnet in block.resnets]
        if getattr(block, "downsamplers", None):
            skips.append(block.resnets[-1].out_channels)
    points = {}
    for i, block in enumerate(model.up_blocks):
        for j, resnet in enumerate(block.resnets):
            skip = skips.pop()
            if resnet.conv_shortcut is not None:
                points[f"up_blocks.{i}.resnets.{j}.conv_shortcut"] = [resnet.in_channels - skip, skip]
    return points
