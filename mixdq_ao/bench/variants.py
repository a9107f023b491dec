"""What can be measured: floating, torchao's, and ours; eager or compiled. A variant is found by its name."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from mixdq_ao import compiling, families
from mixdq_ao.checkpoint import QuantParams
from mixdq_ao.config import MixDQConfig, quantize_
from mixdq_ao.errors import MixDQError
from mixdq_ao.plan import BitPlan

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
FLOAT = "float"
PLAN = "plan"
EAGER = "-eager"
NO_INDUCTOR = "-no-inductor"
MAX_AUTOTUNE = "-max-autotune"
COMPILED = "-compiled"
NAMES = (
    "float, float-compiled, float-max-autotune (or fp16, ... in the run's dtype), torchao-int8, torchao-int8-weight, "
    "torchao-fp8, w8a8, w4a8, w8a16, w4a16 (any of 8, 4, 2 and 16, 8, 4; -dynamic behind it for dynamic activations), "
    "plan; -eager behind a quantized one leaves it uncompiled, -no-inductor behind one of ours compiles it operator by "
    "operator (mixdq_ao.compile's backend='eager')"
)
_OURS = re.compile(r"w(8|4|2)a(16|8|4)(-dynamic)?")
# torch._int_mm on a GPU wants more than 16 rows, the fp8 product weights in multiples of 16; torchao does not ask.
_FEW_ROWS = 16
_MULTIPLE = 16


@dataclass
class Prepared:
    """What was learnt from the floating model once, for all variants.

    ``params``: activation ranges and weight scales; ``rows``: of each linear layer's input; ``outputs``: the eager
    output for each batch size that fits in memory, on the CPU.
    """

    params: QuantParams | None = None
    rows: dict[str, int] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Variant:
    """``name`` as shown, ``asked`` as it is asked for; ``quantize(model, prepared)`` changes the model in place;
    ``compile`` None leaves it eager."""

    name: str
    asked: str
    quantize: Callable[[nn.Module, Prepared], None] | None
    compile: Callable[[nn.Module], nn.Module] | None


def default_names(device: torch.device, compile: bool, plan: bool) -> list[str]:
    """What is measured unless something else is asked for; without max-autotune, which compiles for very long."""
    names = [FLOAT, *([FLOAT + COMPILED] if compile else ()), "torchao-int8"]
    names += ["torchao-fp8"] if device.type == "cuda" else []
    return [*names, "w8a8", "w4a8", "w8a16", "w4a16", *([PLAN] if plan else ())]


def with_plan(names: Sequence[str]) -> list[str]:
    """These, and the plan as one more where they do not name it."""
    return [*names, *(() if _asks_plan(names) else (PLAN,))]


def _asks_plan(names: Sequence[str]) -> bool:
    return PLAN in {_base(name) for name in names}


def _base(name: str) -> str:
    return name.removesuffix(EAGER).removesuffix(NO_INDUCTOR)


def parse_variants(
    names: Sequence[str], dtype: torch.dtype, plan: str | None = None, whole: bool = True, compile: bool = True
) -> list[Variant]:
    """The variants of these names, each once. ``whole`` False: the model lacks layers, and ``plan`` may name them.

    Raises ``MixDQError`` for a name that means nothing or two things, and for a plan that cannot be read.
    """
    bits = None
    if plan is not None:
        bits = BitPlan.read(plan)
    elif _asks_plan(names):
        raise MixDQError(f"the variant {PLAN!r} needs --plan, a file with the bits of each layer's weight")
    found = {}
    for name in names:
        variant = _parse(name, dtype, bits, plan, whole, compile)
        same = found.setdefault(variant.name, variant)
        if _asks_plan([same.asked]) != _asks_plan([name]):
            raise MixDQError(
                f"{plan}: the rows of this plan would be called {variant.name!r} as others are. Give it another name"
            )
    if not found:
        raise MixDQError(f"nothing to measure: name at least one variant of {NAMES}")
    return list(found.values())


def float_name(dtype: torch.dtype) -> str:
    """ "fp16" and the like."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def _parse(name: str, dtype: torch.dtype, bits, plan, whole: bool, compile: bool) -> Variant:
    own = float_name(dtype)
    for suffix, way in (("", None), (COMPILED, _torch_compile), (MAX_AUTOTUNE, _max_autotune)):
        if name in (FLOAT + suffix, own + suffix):
            return Variant(own + suffix, name, None, way)
        if name.removesuffix(suffix) in DTYPES and name.endswith(suffix):
            raise MixDQError(f"{name}: this run computes in {own}; give --dtype {name.removesuffix(suffix)}")
    base = _base(name)
    asked = name.removeprefix(base)
    suffix = asked if compile else EAGER
    label = f"{Path(plan).stem if base == PLAN else base}{suffix}"
    if base in _TORCHAO and asked in ("", EAGER):
        return Variant(label, name, _TORCHAO[base], None if suffix else _torchao_compile)
    match = _OURS.fullmatch(base)
    if asked not in _OUR_WAYS or (match is None and base != PLAN):
        raise MixDQError(f"a variant is one of {NAMES}; found {name!r}")
    if base == PLAN:
        quantize = _planned(bits, whole)
    else:
        act = int(match[2])
        quantize = _uniform(int(match[1]), None if act == 16 else act, dynamic=bool(match[3]))
    return Variant(label, name, quantize, _OUR_WAYS[suffix])


# --- ours -------------------------------------------------------------------------------------------------------------


def _uniform(bits: int, act_bits: int | None, dynamic: bool):
    def quantize(model: nn.Module, prepared: Prepared) -> None:
        params = None if dynamic else prepared.params
        quantize_(model, MixDQConfig(params, bits, act_bits), progress=False)

    return quantize


def _planned(plan: BitPlan, whole: bool):
    def quantize(model: nn.Module, prepared: Prepared) -> None:
        bits = plan
        if not whole:
            bits = {name: plan[name] for name in families.layers_of(model) if name in plan}
        quantize_(model, MixDQConfig(prepared.params, bits, 8), progress=False)

    return quantize


def _our_compile(model: nn.Module) -> nn.Module:
    # The graph is captured by whoever measures, in the same way for every variant.
    return compiling.compile(model, cuda_graphs=False, cache=True, progress=False)


def _our_compile_without_inductor(model: nn.Module) -> nn.Module:
    return compiling.compile(model, cuda_graphs=False, progress=False, backend=compiling.EAGER)


_OUR_WAYS = {"": _our_compile, EAGER: None, NO_INDUCTOR: _our_compile_without_inductor}


# --- others' ----------------------------------------------------------------------------------------------------------


def _torch_compile(model: nn.Module) -> nn.Module:
    return torch.compile(model, fullgraph=True, dynamic=False)


def _torchao_compile(model: nn.Module) -> nn.Module:
    # What torchao would set for int8 products; the rest of what it would set holds for no other variant here.
    return torch.compile(model, fullgraph=True, dynamic=False, options={"force_fuse_int_mm_with_mul": True})


def _max_autotune(model: nn.Module) -> nn.Module:
    return torch.compile(model, fullgraph=True, dynamic=False, mode="max-autotune-no-cudagraphs")


def _torchao(config: Callable[[], object]):
    """torchao's quantize_ on the linear layers that its kernels can do; the others stay floating."""

    def quantize(model: nn.Module, prepared: Prepared) -> None:
        from torchao.quantization import quantize_ as torchao_quantize_

        def can(module: nn.Module, name: str) -> bool:
            return (
                isinstance(module, nn.Linear)
                and prepared.rows.get(name, 0) > _FEW_ROWS
                and not (module.in_features % _MULTIPLE or module.out_features % _MULTIPLE)
            )

        torchao_quantize_(model, config(), filter_fn=can)

    return quantize


def _int8():
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    # torchao would change Inductor's settings for the whole process, and so for every variant that follows.
    return Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)


def _int8_weight():
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig(set_inductor_config=False)


def _fp8():
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig

    return Float8DynamicActivationFloat8WeightConfig(set_inductor_config=False)


_TORCHAO = {
    "torchao-int8": _torchao(_int8),
    "torchao-int8-weight": _torchao(_int8_weight),
    "torchao-fp8": _torchao(_fp8),
}
