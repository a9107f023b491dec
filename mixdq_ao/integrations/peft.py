"""peft: LoRA on quantized layers.

peft gives every torchao tensor to a LoRA layer for linears that quantizes again on a merge. Its plain layers suit ours
better: the base call goes through our own operators, for convolutions too. Merging into a quantized weight would lose
most of a LoRA to rounding, so it is refused before anything is changed.
"""

from types import ModuleType

from torch import nn

from mixdq_ao.errors import UnsupportedError
from mixdq_ao.integrations._imports import wrap_once
from mixdq_ao.tensor import MixDQTensor


def guard_lora_model(module: ModuleType) -> None:
    """Patch ``peft.tuners.lora.model``: plain LoRA layers over quantized weights, and no merging into them."""
    wrap_once(module, "dispatch_torchao", _skip_quantized)
    for method in ("merge_adapter", "merge_and_unload"):
        wrap_once(module.LoraModel, method, _refuse_quantized)


def guard_fuse_lora(module: ModuleType) -> None:
    """Patch ``diffusers.loaders.peft``: fusing changes scales and floating layers before it meets a quantized one."""
    wrap_once(module.PeftAdapterMixin, "fuse_lora", _refuse_quantized)


def _skip_quantized(dispatch):
    def dispatch_torchao(target: nn.Module, *args, **kwargs):
        base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
        if isinstance(getattr(base, "weight", None), MixDQTensor):
            return None
        return dispatch(target, *args, **kwargs)

    return dispatch_torchao


def _refuse_quantized(method):
    def merge(self: nn.Module, *args, **kwargs):
        for name, module in self.named_modules():
            if hasattr(module, "get_base_layer") and isinstance(module.get_base_layer().weight, MixDQTensor):
                raise UnsupportedError(
                    f"{name}: a LoRA cannot be fused into a quantized weight. Leave it unfused, which works as it is, "
                    "or load and fuse it before quantize_()"
                )
        return method(self, *args, **kwargs)

    return merge
