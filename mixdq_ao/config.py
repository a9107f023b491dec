"""What to quantize and how: ``MixDQConfig`` for a model, ``MixDQLayerConfig`` for a layer, and ``quantize_``."""

import functools
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torchao.core.config import AOBaseConfig
from torchao.quantization.transform_module import register_quantize_module_handler

from mixdq_ao import families, legacy, siblings
from mixdq_ao.bits import act_width, width
from mixdq_ao.checkpoint import QuantParams, model_hash
from mixdq_ao.errors import MixDQError, PlanError, UnsupportedError, name_list
from mixdq_ao.plan import BitPlan, read_names
from mixdq_ao.progress import track
from mixdq_ao.tensor import MAX_REDUCTION, MixDQTensor

AUTO = "auto"

# What integrations want done to a model once it is quantized; integrations.register() fills it.
after_quantize: list[Callable[[nn.Module], None]] = []


@dataclass
class MixDQConfig(AOBaseConfig):
    """How to quantize a model, for :func:`quantize_`.

    Args:
        checkpoint: a file of quantization parameters (ours, or the original project's), a ``QuantParams``, or None:
            then weights are scaled by their largest value and activations dynamically.
        weight_bits, act_bits: 8, 4 (or 2, weights only); None, leave floating; a mapping from layer name to one of
            these; a plan file (the original's YAML or our JSON); ``"auto"``, the default: the checkpoint's own plan
            if it has one, else 8. A layer that is missing from a plan of activations stays floating, as in the
            original's files; with None for its activations a layer is quantized weight-only.
        protect: names of layers that stay floating, or a file of names.
        bos: a file of BOS outputs, None for those of the checkpoint, or False to treat the BOS token like any other.
    """

    checkpoint: str | os.PathLike | QuantParams | None = None
    weight_bits: int | None | Mapping[str, int | None] | str | os.PathLike = AUTO
    act_bits: int | None | Mapping[str, int | None] | str | os.PathLike = AUTO
    protect: list[str] | str | os.PathLike = field(default_factory=list)
    bos: str | os.PathLike | bool | None = None

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, os.PathLike):  # torchao writes configs as JSON
                setattr(self, name, os.fspath(value))
        if not (self.checkpoint is None or isinstance(self.checkpoint, (str, QuantParams))):
            raise MixDQError(
                f"checkpoint must be a file, a QuantParams or None; found {type(self.checkpoint).__name__}"
            )
        for what, bits, check in (("weight", self.weight_bits, width), ("act", self.act_bits, act_width)):
            if isinstance(bits, (bool, int)):
                check(bits)
            elif not (bits is None or isinstance(bits, (str, Mapping))):
                raise MixDQError(
                    f"{what}_bits must be a number, None, a mapping, a plan file or 'auto'; found {bits!r}"
                )
        if not (self.bos is None or self.bos is False or isinstance(self.bos, str)):
            raise MixDQError(f"bos must be a file, None (what the checkpoint has) or False; found {self.bos!r}")
        if not isinstance(self.protect, str):
            self.protect = list(self.protect)


@dataclass
class MixDQLayerConfig(AOBaseConfig):
    """How to quantize one layer; the arguments of ``MixDQTensor.from_float``.

    Works in torchao's own ``quantize_`` and ``FqnToConfig``. Without ``act_scale`` activations are dynamic, and with
    ``act_bits=None`` as well the layer is weight-only.
    """

    bits: int = 8
    act_bits: int | None = 8
    scale: Tensor | None = None
    act_scale: Tensor | None = None
    act_zero_point: Tensor | None = None
    input_groups: list[int] | None = None
    bos_input: Tensor | None = None
    bos_output: Tensor | None = None

    def __post_init__(self):
        width(self.bits)
        if self.act_bits is not None:
            act_width(self.act_bits)


@register_quantize_module_handler(MixDQLayerConfig)
def _quantize_layer(module: nn.Module, config: MixDQLayerConfig, *, parameter_name: str = "weight") -> nn.Module:
    weight = getattr(module, parameter_name, None)
    if not isinstance(module, (nn.Linear, nn.Conv2d)) or weight is None:
        raise UnsupportedError(
            f"MixDQLayerConfig quantizes nn.Linear and nn.Conv2d; found {type(module).__name__}. "
            "Give quantize_() a filter_fn that takes those only"
        )
    if isinstance(weight, MixDQTensor):
        raise MixDQError(f"this {type(module).__name__} is quantized already ({weight.quantization_repr()})")
    quantized = MixDQTensor.from_float(
        weight,
        config.bits,
        input_groups=config.input_groups,
        act_bits=config.act_bits,
        **{name: _own(getattr(config, name)) for name in _LAYER_TENSORS},
    )
    setattr(module, parameter_name, nn.Parameter(quantized, requires_grad=False))
    _describe(module)
    return module


_LAYER_TENSORS = ("scale", "act_scale", "act_zero_point", "bos_input", "bos_output")


def _own(value: Tensor | float | None) -> Tensor | float | None:
    """Parameters may serve many layers and models, and a weight's tensors may be written to."""
    return value.clone() if isinstance(value, Tensor) else value


def _describe(module: nn.Module) -> None:
    module.extra_repr = functools.partial(_extra_repr, module)  # a bound method could not be pickled


def _extra_repr(module: nn.Module) -> str:
    described = type(module).extra_repr(module)
    weight = module.weight
    return f"{described}, {weight.quantization_repr()}" if isinstance(weight, MixDQTensor) else described


@register_quantize_module_handler(MixDQConfig)
def _quantize_model(module: nn.Module, config: MixDQConfig, *, parameter_name: str = "weight") -> nn.Module:
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        raise UnsupportedError(
            "MixDQConfig is for a whole model: torchao's quantize_() hands over single layers without their names, so "
            "their bits and scales cannot be looked up, and a layer whose LoRA is being fused has lost its own. "
            "Use mixdq_ao.quantize_(model, config); fuse a LoRA before that; or give torchao's "
            "quantize_(model, config, filter_fn=lambda module, name: name == '')"
        )
    quantize_(module, config)
    return module


def quantize_(
    model: nn.Module,
    config: MixDQConfig,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> None:
    """Quantize the weights of a model's linear and 2-D convolution layers in place.

    No module is replaced: each ``weight`` becomes a ``MixDQTensor``. Everything is checked before the first layer is
    changed. ``filter_fn(module, name)`` chooses among the layers (all by default), ``device`` moves each to a device
    before it is quantized, ``progress`` shows a bar (None: after two seconds on a terminal).

    Raises ``MixDQError`` and its children: for a model that is quantized already, names that plan, checkpoint, protect
    list or BOS file have and the model has not, and the reverse, scales of another shape, layers that cannot be
    quantized as asked.
    """
    if not isinstance(config, MixDQConfig):
        raise MixDQError(f"quantize_() needs a MixDQConfig; found {type(config).__name__}")
    if not isinstance(model, nn.Module):
        raise MixDQError(
            f"quantize_() needs a model; found {type(model).__name__}. Of a pipeline give the part that denoises: "
            f"pipe.{' or pipe.'.join(families.DENOISERS)}"
        )
    recipes = _resolve(model, config, filter_fn)
    layers = families.layers_of(model)
    for name, recipe in track(recipes.items(), "Quantizing", len(recipes), progress):
        module = layers[name]
        if device is not None:
            module.to(device)
        if isinstance(recipe, str):
            module.mixdq_reason = recipe
        else:
            _quantize_layer(module, recipe)
    if device is not None:
        model.to(device)
    finish(model)


def finish(model: nn.Module) -> None:
    """What a quantized model gets, however it came to be: layers that describe themselves, knowledge of which layers
    may share a quantized input, and the integrations."""
    for module in families.layers_of(model).values():
        if isinstance(module.weight, MixDQTensor):
            _describe(module)
    siblings.mark_shared(model)
    for hook in after_quantize:
        hook(model)


# --- from a config to one recipe for each layer -----------------------------------------------------------------------


def _resolve(model, config: MixDQConfig, filter_fn) -> dict[str, MixDQLayerConfig | str]:
    """Layer name to its config, or to the reason why it stays floating. Changes nothing; raises for what is wrong."""
    all_layers = families.layers_of(model)
    if "" in all_layers:
        raise UnsupportedError(
            f"quantize_() is for models; found a single {type(model).__name__}, whose name is not known. Use torchao's "
            "quantize_(layer, MixDQLayerConfig(...))"
        )
    quantized = [name for name, m in all_layers.items() if isinstance(m.weight, MixDQTensor)]
    if quantized:
        raise MixDQError(
            f"the model is quantized already ({len(quantized)} layers, first {quantized[0]}). Load the floating model "
            "again to quantize it in another way"
        )
    if not all_layers:
        raise MixDQError(f"{type(model).__name__} has no nn.Linear or nn.Conv2d layer to quantize")
    params = _params(config.checkpoint)
    _check_names(params, all_layers, model)
    protect = set(_protected(config.protect, params, all_layers))
    weight_plan = _plan(config.weight_bits, params and params.weight_plan, all_layers, protect, "weight")
    act_plan = _plan(config.act_bits, params and params.act_plan, all_layers, protect, "act")
    bos = _bos(config.bos, params, all_layers)
    points = families.split_points(model)
    recipes: dict[str, MixDQLayerConfig | str] = {
        name: reason
        for name, module in all_layers.items()
        if (reason := _floating_reason(name, module, weight_plan, act_plan, protect, filter_fn))
    }
    _refuse_grouped([name for name in families.grouped_convolutions(model) if name not in recipes], all_layers)
    for name, module in all_layers.items():
        if name in recipes:
            continue
        bits, act_bits = weight_plan[name], act_plan[name]
        recipes[name] = _layer_config(name, module, bits, act_bits, params, points.get(name))
        if act_bits is not None and name in bos:
            recipes[name].bos_input, recipes[name].bos_output = bos[name]
        _check_weight(name, module.weight, recipes[name].input_groups)
    if params is not None and params.bos_aware and config.bos is None:
        _warn_without_bos(recipes, families.family_of(model))
    return recipes


def _params(checkpoint) -> QuantParams | None:
    if isinstance(checkpoint, QuantParams):
        checkpoint.validate(checkpoint.source)  # one from a file has been checked
        return checkpoint
    return None if checkpoint is None else legacy.read_params(checkpoint)


def _check_names(params: QuantParams | None, layers, model) -> None:
    if params is None:
        return
    _refuse_unknown(params.layers, layers, f"checkpoint {params.source}")
    if params.model_hash is not None and params.model_hash != model_hash(families.layer_shapes(model)):
        raise MixDQError(
            f"checkpoint {params.source}: it was made for a model of another architecture (layer names and weight "
            "shapes differ: model_hash). Calibrate this model, or load the one it was made for"
        )


def _refuse_unknown(names, layers, source: str) -> None:
    unknown = [name for name in names if name not in layers]
    if unknown:
        raise PlanError(
            f"{source}: {len(unknown)} names are not layers of the model: {name_list(unknown)}. "
            "Is it made for this model?"
        )


def _plan(value, default: BitPlan | None, layers, protect: set[str], what: str) -> BitPlan:
    if isinstance(value, str) and value == AUTO:
        value = 8 if default is None else default
    if value is None or isinstance(value, int):
        return BitPlan.uniform(layers, value)
    if isinstance(value, BitPlan):
        plan = value
    elif isinstance(value, Mapping):
        plan = BitPlan(value, source=f"{what}_bits")
    else:
        plan = BitPlan.read(value)
    _refuse_unknown(plan, layers, plan.source)
    missing = [name for name in layers if name not in plan and name not in protect]
    if missing and what == "weight":
        raise PlanError(
            f"{plan.source}: {len(missing)} layers of the model have no entry: {name_list(missing)}. "
            "Give each a width, or null to leave it floating"
        )
    if what == "act":
        for name in layers:
            if plan.get(name) is not None:
                act_width(plan[name])
    return plan


def _protected(protect, params: QuantParams | None, layers) -> list[str]:
    if isinstance(protect, str):
        source, names = protect, read_names(protect)
    else:
        source, names = "protect", protect
    _refuse_unknown(names, layers, source)
    return [*names, *(params.protect if params else ())]


def _bos(bos, params: QuantParams | None, layers) -> dict[str, tuple[Tensor | None, Tensor]]:
    """Layer name to ``(bos_input or None, bos_output)``."""
    if bos is False:
        return {}
    if bos is None:
        layer_params = params.layers if params else {}
        source = f"checkpoint {params.source}" if params else ""
        found = {name: (p.bos_input, p.bos_output) for name, p in layer_params.items() if p.bos_output is not None}
    else:
        source = str(bos)
        found = {name: (None, output) for name, output in legacy.read_bos(bos).items()}
    _refuse_unknown(found, layers, source)
    for name, (bos_input, bos_output) in found.items():
        out_channels, in_channels = layers[name].weight.shape[:2]
        for what, value, size in (("input", bos_input, in_channels), ("output", bos_output, out_channels)):
            if value is not None and value.numel() != size:
                raise MixDQError(f"{source}: the BOS {what} of {name} must have {size} values; found {value.numel()}")
    return found


def _floating_reason(name, module, weight_plan, act_plan, protect, filter_fn) -> str:
    """Why a layer stays floating, or an empty string. Raises for a layer that cannot do what is asked."""
    if filter_fn is not None and not filter_fn(module, name):
        return "left out by filter_fn"
    if name in protect:
        return "protected"
    if name not in act_plan:
        return f"not in {act_plan.source}"
    if weight_plan[name] is None:
        return f"floating in {weight_plan.source}"
    if not module.weight.is_floating_point() or type(module.weight.data) is not Tensor:
        raise UnsupportedError(
            f"{name}: the weight must be a plain floating tensor; found {type(module.weight.data).__name__} of "
            f"{module.weight.dtype}. Protect the layer"
        )
    return ""


def _refuse_grouped(names: list[str], layers) -> None:
    if names:
        raise UnsupportedError(
            f"{name_list(names)}: grouped convolutions cannot be quantized; found groups={layers[names[0]].groups}. "
            "Protect them, as calibrate() does: MixDQConfig(protect=[name for name, m in model.named_modules() if "
            "getattr(m, 'groups', 1) > 1])"
        )


def _layer_config(name, module, bits, act_bits, params: QuantParams | None, points) -> MixDQLayerConfig:
    if params is None:
        return MixDQLayerConfig(bits, act_bits, input_groups=points)
    p = params.layer(name)
    if p.groups > 1 and (points is None or p.groups != len(points)):
        raise MixDQError(
            f"{name}: checkpoint {params.source} has {p.groups} input groups, but the model joins "
            f"{len(points) if points else 1} there"
        )
    out_channels = module.weight.shape[0]
    scale = params.scale(name, "weight", bits)
    if tuple(scale.shape) != (p.groups, out_channels):
        raise MixDQError(
            f"{name}: the weight scale in {params.source} must be [{p.groups}, {out_channels}]; "
            f"found {list(scale.shape)}"
        )
    return MixDQLayerConfig(
        bits,
        act_bits,
        scale=scale,
        act_scale=None if act_bits is None else params.scale(name, "act", act_bits),
        act_zero_point=None if act_bits is None else p.act_zero_point[act_bits],
        input_groups=points if p.groups > 1 else None,
    )


def _check_weight(name: str, weight: Tensor, input_groups: list[int] | None) -> None:
    """Raises what quantizing the weight would raise, before any other is changed."""
    products = max(input_groups or [weight.shape[1]]) * weight[0, 0].numel()
    if products > MAX_REDUCTION:
        raise UnsupportedError(
            f"{name}: an output may be the sum of at most {MAX_REDUCTION} products; found {products}. Protect the layer"
        )
    if not weight.is_meta and not torch.stack(torch.aminmax(weight.detach())).isfinite().all():
        raise MixDQError(f"{name}: the weight must be finite; found infinity or NaN")


def _warn_without_bos(recipes, family: families.ModelFamily) -> None:
    bare = [
        name
        for name, r in recipes.items()
        if family.sees_text(name) and isinstance(r, MixDQLayerConfig) and r.act_bits and r.bos_output is None
    ]
    if bare:
        warnings.warn(
            f"the checkpoint's ranges leave out the BOS token, and {len(bare)} layers that see it have no BOS output "
            f"({name_list(bare, 2)}): the token will be clipped hard. Give bos=<file of BOS outputs>, or bos=False to "
            "accept that.",
            stacklevel=4,
        )
