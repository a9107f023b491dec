"""Meeting points with other libraries, each used only where that library is installed."""

from mixdq_ao import config
from mixdq_ao.integrations import diffusers, peft, torchao
from mixdq_ao.integrations._imports import when_imported


def register() -> None:
    """Make torchao, diffusers and peft work with quantized models. Idempotent, and imports neither of the last two."""
    torchao.register()
    if diffusers.make_savable not in config.after_quantize:
        config.after_quantize.append(diffusers.make_savable)
    when_imported("diffusers.quantizers.torchao.torchao_quantizer", diffusers.complete_dequantize)
    when_imported("diffusers.loaders.peft", peft.guard_fuse_lora)
    when_imported("peft.tuners.lora.model", peft.guard_lora_model)
