"""The models to measure: SDXL's architecture or another with random weights, or a stored UNet."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from mixdq_ao import families
from mixdq_ao.errors import MixDQError, UnsupportedError
from mixdq_ao.files import first_line, parse_json, read_text
from mixdq_ao.pipelines import TINY, in_dtype
from mixdq_ao.tiny_model import TINY_SDXL

SDXL = "sdxl"
SDXL_CONFIG = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
LATENT_SCALE = 8  # pixels of a latent pixel's side, where no VAE says so


@dataclass(frozen=True)
class Source:
    """Where a model comes from. ``build(dtype, device)`` makes it anew, with the same weights each time.

    ``config``: the UNet's; ``latent_scale``: how many pixels of a picture one of the UNet's input stands for, along a
    side.
    """

    name: str
    config: Mapping
    build: Callable[[torch.dtype, torch.device], nn.Module]
    latent_scale: int = LATENT_SCALE


def find_model(name: str, layers: int | None = None, seed: int = 0) -> Source:
    """``sdxl``, ``tiny-sdxl``, a diffusers UNet's ``config.json`` (random weights), or a pipeline or UNet with weights:
    a folder, or a Hub name in the local cache.

    ``layers``: at most that many transformer layers in each block, for random weights only. Nothing is downloaded.
    Raises ``MixDQError`` for a name that is not there.
    """
    if name == SDXL or name.endswith(".json"):
        config = _with_layers(name, SDXL_CONFIG if name == SDXL else _read_config(name), layers)
        return Source(name, config, _random(name, config, seed))
    if layers is not None:
        raise MixDQError(f"--layers leaves out layers of {SDXL} or of a config.json; {name} has weights for all of its")
    return _stored(name, TINY_SDXL if name == TINY else name)


def _read_config(path: str) -> dict:
    config = parse_json(path, "", read_text(path))
    if not isinstance(config, dict) or "_class_name" not in config:
        raise MixDQError(f"{path}: must be the config.json of a diffusers UNet, with its _class_name")
    return config


def _with_layers(name: str, config: Mapping, layers: int | None) -> dict:
    if layers is None:
        return dict(config)
    # The second is for up blocks that are no mirror image of the down blocks.
    keys = ("transformer_layers_per_block", "reverse_transformer_layers_per_block")
    shorter = {key: _at_most(layers, config[key], f"{name}: '{key}'") for key in keys if config.get(key) is not None}
    return {**config, **shorter}


def _at_most(layers: int, depth, what: str) -> int | list:
    if type(depth) is int:
        return min(depth, layers)
    if not isinstance(depth, list | tuple):
        raise MixDQError(f"{what} must be a number or a list of numbers; found {depth!r}")
    return [_at_most(layers, d, what) for d in depth]


def _model_class(config: Mapping, name: str):
    import diffusers

    known = (diffusers.UNet2DConditionModel, diffusers.UNet2DModel)  # what make_inputs() makes inputs for
    found = getattr(diffusers, str(config.get("_class_name")), None)
    if not (isinstance(found, type) and issubclass(found, known)):
        raise UnsupportedError(
            f"{name}: a UNet of diffusers can be measured ({', '.join(c.__name__ for c in known)}); found "
            f"{config.get('_class_name')!r}, which can be quantized, but must be timed by calls of your own"
        )
    return found


def _random(name: str, config: Mapping, seed: int) -> Callable[[torch.dtype, torch.device], nn.Module]:
    """Builds on the device and in the dtype at once: no copy of the weights is ever made elsewhere."""
    model_class = _model_class(config, name)

    def build(dtype: torch.dtype, device: torch.device) -> nn.Module:
        before = torch.get_default_dtype()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            torch.set_default_dtype(dtype)
            try:
                with device:
                    model = model_class.from_config(dict(config))
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a constructor meets whatever a file says, and raises almost anything
                raise MixDQError(
                    f"{name}: diffusers makes no {model_class.__name__} of this configuration ({first_line(error)})"
                ) from error
            finally:
                torch.set_default_dtype(before)
        return model.eval().requires_grad_(False)

    return build


def _stored(name: str, where: str | os.PathLike) -> Source:
    where = os.fspath(where)
    part, in_pipeline = next(
        ((part, found) for part in families.DENOISERS if (found := _config_of(where, part))), (None, None)
    )
    config = in_pipeline or _config_of(where, None)
    if config is None:
        raise MixDQError(
            f"{name}: not '{SDXL}', '{TINY}' or a config.json, and no diffusers pipeline or UNet on this machine. Give "
            "a folder, or download it first: huggingface-cli download <name>"
        )
    if "quantization_config" in config:
        raise MixDQError(f"{name}: is quantized already. Give the floating model: each variant quantizes it anew")
    model_class = _model_class(config, name)
    subfolder = {"subfolder": part} if in_pipeline else {}

    def build(dtype: torch.dtype, device: torch.device) -> nn.Module:
        model = model_class.from_pretrained(where, **in_dtype(dtype), local_files_only=True, **subfolder)
        return model.to(device).eval().requires_grad_(False)

    vae = _config_of(where, "vae") if in_pipeline else None
    channels = (vae or {}).get("block_out_channels")
    return Source(name, config, build, 2 ** (len(channels) - 1) if channels else LATENT_SCALE)


def _config_of(where: str, subfolder: str | None) -> dict | None:
    from diffusers import UNet2DConditionModel

    if Path(where).is_dir() and not (Path(where) / (subfolder or "") / "config.json").is_file():
        return None
    try:
        return UNet2DConditionModel.load_config(where, subfolder=subfolder, local_files_only=True)
    except (OSError, ValueError):
        return None
