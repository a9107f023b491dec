"""What a result on disk was made of, in hashes: whoever goes on from it compares them first."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mixdq_ao import families
from mixdq_ao.tensor import MixDQTensor


def digest(value) -> str:
    """SHA-256, in hex, of a JSON value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def arguments_digest(arguments: Mapping[str, object]) -> str:
    """SHA-256, in hex, of arguments by name: the same for equal values in every process, pictures and arrays too."""
    return digest([(name, _described(value)) for name, value in sorted(arguments.items())])


def _described(value):
    if isinstance(value, Mapping):
        return [(str(key), _described(v)) for key, v in value.items()]
    if isinstance(value, list | tuple):
        return [_described(v) for v in value]
    if isinstance(value, Tensor):
        value = value.detach().cpu().double().numpy()  # numpy has no bfloat16
    if hasattr(value, "__array_interface__"):  # arrays and pictures, whose text leaves out what is in them
        array = np.asarray(value)
        return [str(array.dtype), list(array.shape), hashlib.sha256(array.tobytes()).hexdigest()]
    return re.sub(" at 0x[0-9a-f]+", "", repr(value))


def fingerprint(model: nn.Module) -> str:
    """A hash, in hex, of all parameters and buffers of a model, quantized or not."""
    named = [item for name, value in sorted(model.state_dict().items()) for item in _plain(name, value)]
    with ThreadPoolExecutor() as pool:  # copies and hashes let go of the interpreter
        hashes = pool.map(_hash, [t for _, t in named])
        whole = "".join(what + found for (what, _), found in zip(named, hashes, strict=True))
    return hashlib.sha256(whole.encode()).hexdigest()


def _plain(name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors that ``value`` is made of, each with what else is to be known of it."""
    inner = {}
    if isinstance(value, MixDQTensor):
        # Two weights with dynamic activations hold the same tensors, and differ in act_bits.
        name = f"{name}:{value.bits}:{value.act_bits}:{value.input_groups}"
        inner = value.stored_tensors()
    elif is_traceable_wrapper_subclass(value):
        inner = {key: getattr(value, key) for key in value.__tensor_flatten__()[0]}
    else:
        yield f"{name}:{value.dtype}:{list(value.shape)};", value
    for key, tensor in sorted(inner.items()):
        yield from _plain(f"{name}.{key}", tensor)


def fingerprints(pipe) -> dict[str, str]:
    """Hashes of what a diffusers pipeline's pictures depend on: ``unet``, its UNet or transformer, and ``pipeline``,
    the weights of its other models and the configurations of all parts, the scheduler among them.
    """
    model = families.denoiser_of(pipe)
    parts = {
        name: [
            type(part).__name__,
            _configuration(part),
            fingerprint(part) if isinstance(part, nn.Module) and part is not model else None,
        ]
        for name, part in sorted(getattr(pipe, "components", {}).items())
    }
    return {"unet": fingerprint(model), "pipeline": digest([_configuration(pipe), parts])}


def _configuration(part) -> dict[str, str]:
    """The configuration of a part of diffusers', without what says where it comes from; empty for other parts."""
    config = getattr(part, "config", None)
    if not isinstance(config, Mapping):
        return {}
    return {key: repr(value) for key, value in sorted(config.items()) if not key.startswith("_")}


def _hash(tensor: Tensor) -> str:
    if tensor.is_meta:  # kept elsewhere by accelerate until it is needed
        return ""
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()
