"""One row for each family of models: the only place with names of layers.

Also what can be read off a structure: which part of a pipeline denoises, which layers there are, and where skip
connections join.
"""

import re
from dataclasses import dataclass

from torch import nn

from mixdq_ao.errors import UnsupportedError

DENOISERS = ("unet", "transformer")  # what pipelines call the model that is quantized


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
    siblings_in_block: tuple[str, ...] = (r"(?<=attn1\.)to_[qkv]$", r"(?<=\battn\.)to_[qkv]$", r"add_[qkv]_proj$")
    siblings_in_model: tuple[str, ...] = (r"(^|\.)attn2\.to_[kv]$", r"(^|\.)time_emb_proj$")

    def is_content(self, layer: str) -> bool:
        return any(part in layer for part in self.content)

    def sees_text(self, layer: str) -> bool:
        return self.text_layers is not None and re.search(self.text_layers, layer) is not None


_UNET = {"content": ("ff", "attn2"), "text_layers": r"(^|\.)attn2\.to_[kv]$"}
SDXL = ModelFamily("sdxl", **_UNET)
SD = ModelFamily("sd", **_UNET)
# Text of CLIP joins the pictures' tokens after one layer, Gemma's is read as in a UNet. T5, which FLUX and PixArt read,
# has no token that every prompt begins with.
SD3 = ModelFamily("sd3", text_layers=r"^context_embedder$")
SANA = ModelFamily("sana", text_layers=r"^caption_projection\.linear_[12]$|(^|\.)attn2\.to_[kv]$")
GENERIC = ModelFamily("generic")
FAMILIES = {family.name: family for family in (SDXL, SD, SD3, SANA, GENERIC)}
_BY_CLASS = {
    "UNet2DConditionModel": SD,
    "UNetMotionModel": SD,
    "SD3Transformer2DModel": SD3,
    "SanaTransformer2DModel": SANA,
}


def family_of(model: nn.Module) -> ModelFamily:
    """The row of ``model``; ``generic`` for one that is not known (no BOS layers, all layers quality layers)."""
    names = (base.__name__ for base in type(model).__mro__)
    family = next((_BY_CLASS[name] for name in names if name in _BY_CLASS), GENERIC)
    return SDXL if family is SD and model.config.get("addition_embed_type") == "text_time" else family


def denoiser_name(pipe) -> str:
    """The attribute of a diffusers pipeline that holds the model to quantize: its UNet, or else its transformer.

    Raises ``UnsupportedError`` for a pipeline without one.
    """
    for name in DENOISERS:
        if getattr(pipe, name, None) is not None:
            return name
    raise UnsupportedError(
        f"{type(pipe).__name__} has no {' or '.join(DENOISERS)} to quantize. Quantize the parts that are large with "
        "quantize_(pipe.<part>, MixDQConfig()), and calibrate them with observe()"
    )


def denoiser_of(pipe) -> nn.Module:
    """The model of a pipeline that is quantized, see :func:`denoiser_name`."""
    return getattr(pipe, denoiser_name(pipe))


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
            if match and isinstance(layer, nn.Linear) and not (in_block and _is_of_cross_attention(model, name)):
                sets.setdefault((pattern, name[: match.start()] if in_block else ""), {})[name] = layer
    return list(sets.values())


def _is_of_cross_attention(model: nn.Module, name: str) -> bool:
    """Whether layer ``name`` belongs to an attention that reads the text, as a block's first one may.

    All blocks read one text: numbered within each block, two ranges would have one number, and so one quantizer.
    """
    return getattr(model.get_submodule(name.rpartition(".")[0]), "is_cross_attention", False)


def _stage(name: str) -> int:
    """The middle block runs between the others, but is declared after them."""
    stages = ("down_blocks", "mid_block", "up_blocks")
    first = name.partition(".")[0]
    return stages.index(first) if first in stages else -1


def layer_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name to weight shape of every layer."""
    return {name: tuple(m.weight.shape) for name, m in layers_of(model).items()}


def grouped_convolutions(model: nn.Module) -> list[str]:
    """Names of the layers that cannot be quantized, because their convolution is grouped: they stay floating."""
    return [name for name, layer in layers_of(model).items() if getattr(layer, "groups", 1) != 1]


def split_points(model: nn.Module) -> dict[str, list[int]]:
    """Input groups ``[hidden, skip]`` of the shortcuts that read a concatenation of hidden state and skip connection.

    Found by following the skip connections of a UNet: every down-block resnet and downsampler pushes its channels,
    every up-block resnet pops some. A model of another structure has none.
    """
    if not all(hasattr(model, part) for part in ("conv_in", "down_blocks", "up_blocks")):
        return {}
    blocks = [*model.down_blocks, *model.up_blocks]
    if not all(hasattr(r, "out_channels") for block in blocks for r in getattr(block, "resnets", (None,))):
        return {}
    skips = [model.conv_in.weight.shape[0]]
    for block in model.down_blocks:
        skips += [resnet.out_channels for resnet in block.resnets]
        if getattr(block, "downsamplers", None):
            skips.append(block.resnets[-1].out_channels)
    resnets = {
        f"up_blocks.{i}.resnets.{j}": resnet
        for i, block in enumerate(model.up_blocks)
        for j, resnet in enumerate(block.resnets)
    }
    if len(skips) != len(resnets):
        return {}  # not one skip for each resnet
    return {
        f"{name}.conv_shortcut": [resnet.in_channels - skip, skip]
        for (name, resnet), skip in zip(resnets.items(), reversed(skips), strict=True)
        if resnet.conv_shortcut is not None
    }
