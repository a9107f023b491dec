"""diffusers: ``save_pretrained`` of a quantized model, which the stock ``from_pretrained`` can read."""

import sys
from types import ModuleType

from torch import nn

from mixdq_ao import families
from mixdq_ao.config import MixDQConfig
from mixdq_ao.integrations._imports import wrap_once
from mixdq_ao.tensor import MixDQTensor


def portable_config(model: nn.Module) -> MixDQConfig:
    """What a quantized model holds, as a config of names and numbers only: no paths, no tensors."""
    weights = {name: layer.weight for name, layer in families.layers_of(model).items()}
    quantized = {name: w for name, w in weights.items() if isinstance(w, MixDQTensor)}
    floating = [name for name in weights if name not in quantized]
    return MixDQConfig(
        weight_bits=_plan({name: w.bits for name, w in quantized.items()}, floating),
        act_bits=_plan({name: w.act_bits for name, w in quantized.items()}, floating),
        protect=floating,
    )


def _plan(bits: dict[str, int | None], floating: list[str]) -> int | None | dict[str, int | None]:
    """One number where all quantized layers have the same."""
    if len(set(bits.values())) == 1:
        return next(iter(bits.values()))
    return bits | dict.fromkeys(floating)


def make_savable(model: nn.Module) -> None:
    """Give a quantized diffusers model what one loaded by ``from_pretrained`` has, so that it saves itself likewise.

    Does nothing for other models; a model of diffusers cannot be here without diffusers being imported.
    """
    modeling = sys.modules.get("diffusers.models.modeling_utils")
    if modeling is None or not isinstance(model, modeling.ModelMixin):
        return
    from diffusers import TorchAoConfig
    from diffusers.quantizers.torchao import TorchAoHfQuantizer

    quantizer = TorchAoHfQuantizer(TorchAoConfig(portable_config(model)), pre_quantized=True)
    quantizer.validate_environment()
    model.hf_quantizer = quantizer
    model.register_to_config(quantization_config=quantizer.quantization_config)


def complete_dequantize(module: ModuleType) -> None:
    """Patch ``diffusers.quantizers.torchao.torchao_quantizer``, whose ``dequantize`` knows linear layers only."""

    def wrapper(dequantize):
        def _dequantize(self, model: nn.Module):
            for layer in families.layers_of(model).values():
                if isinstance(layer.weight, MixDQTensor):
                    layer.weight = nn.Parameter(layer.weight.dequantize(), requires_grad=False)
                    layer.__dict__.pop("extra_repr", None)
            return dequantize(self, model)

        return _dequantize

    wrap_once(module.TorchAoHfQuantizer, "_dequantize", wrapper)
