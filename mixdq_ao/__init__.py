"""Few-step text-to-image diffusion models, quantized: W8A8, W4A8 and mixed plans as torchao-style tensor subclasses."""

from mixdq_ao._quiet import quiet_torchao_import
from mixdq_ao._version import __version__

with quiet_torchao_import():
    from mixdq_ao.calibrate import calibrate, observe
    from mixdq_ao.checkpoint import QuantParams
    from mixdq_ao.compile_cache import load_compile_cache, save_compile_cache
    from mixdq_ao.compiling import compile
    from mixdq_ao.config import MixDQConfig, MixDQLayerConfig, quantize_
    from mixdq_ao.errors import CheckpointError, MixDQError, PlanError, UnsupportedError
    from mixdq_ao.exporting import export, load_exported
    from mixdq_ao.integrations import register
    from mixdq_ao.model_file import load, save
    from mixdq_ao.passes import Passes
    from mixdq_ao.plan import BitPlan
    from mixdq_ao.summary import summary
    from mixdq_ao.tensor import MixDQTensor


__all__ = [
    "BitPlan",
    "CheckpointError",
    "MixDQConfig",
    "MixDQError",
    "MixDQLayerConfig",
    "MixDQTensor",
    "Passes",
    "PlanError",
    "QuantParams",
    "UnsupportedError",
    "__version__",
    "calibrate",
    "compile",
    "export",
    "load",
    "load_compile_cache",
    "load_exported",
    "observe",
    "quantize_",
    "save",
    "save_compile_cache",
    "summary",
]

register()
