"""torchao's allow-lists: what its config and safetensors serialization may build by name."""

from torchao.core.config import ALLOWED_AO_MODULES

from mixdq_ao._quiet import quiet_torchao_import
from mixdq_ao.tensor import MixDQTensor


def register() -> None:
    """Let torchao find our configs and our tensor by class name. Idempotent."""
    ALLOWED_AO_MODULES.add("mixdq_ao")
    try:
        with quiet_torchao_import():
            from torchao.prototype.safetensors.safetensors_utils import ALLOWED_CLASSES, ALLOWED_TENSORS_SUBCLASSES
    except ImportError:  # a prototype, which may move; save_pretrained() then says that the tensor type is unsupported
        return
    name = MixDQTensor.__name__
    ALLOWED_CLASSES[name] = MixDQTensor
    if name not in ALLOWED_TENSORS_SUBCLASSES:
        ALLOWED_TENSORS_SUBCLASSES.append(name)
