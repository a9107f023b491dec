"""MixDQTensor: the quantized weight of a linear or 2-D convolution layer, of any width.

Everything that a layer needs to compute lives on the weight, in tensors; attributes are few and equal for equal
layers, because they are guards under ``torch.compile``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.custom_graph_pass import get_hash_for_files
from torch.utils._python_dispatch import return_and_correct_aliasing
from torchao.utils import TorchAOBaseTensor

from mixdq_ao import layers, ops
from mixdq_ao.bits import act_width, width
from mixdq_ao.errors import MixDQError, UnsupportedError
from mixdq_ao.packing import pack, packed_channels, unpack

# A sum of this many products of two int8 codes, minus the zero point's share, fits int32.
MAX_REDUCTION = 2**16

_DERIVED = ("alpha", "beta", "weight_sum")


class MixDQTensor(TorchAOBaseTensor):
    """A weight ``[out, in]`` or ``[out, in, r, s]`` stored in 8, 4 or 2 bits, one scale per output channel and group.

    Make one with :meth:`from_float` or :meth:`from_codes`.

    Tensor attributes:
        qdata: int8 ``[out, in, ...]``, or packed uint8 below 8 bits (see ``packing``); channels-last for convolutions
        scale: float32 ``[groups, out]``
        act_scale: float32 ``[groups]``, static activation quantization; None otherwise
        act_zero_point: float32 ``[groups]``, integer-valued, in the signed range; None without ``act_scale``
        alpha: float32 ``[groups, out]`` = ``act_scale * scale``; static only, derived
        beta: float32 ``[out]`` = ``-sum_g alpha * act_zero_point * weight_sum``; static only, derived
        weight_sum: int32 ``[groups, out]``, sum of the codes; dynamic only, derived
        bos_input: ``[in]``, the token whose output is known; optional
        bos_output: ``[out]``, that output; optional

    Non-tensor attributes:
        bits: width of the weight: 8, 4 or 2
        act_bits: width of the activations: 8 or 4; None means weight-only
        input_groups: input channels of each group; they add up to ``in``
        shape: of the floating weight
        dtype: of the floating weight; what ``dequantize`` returns
        act_group: layers that read one tensor and have the same number also have equal ``act_bits``, ``act_scale``,
            ``act_zero_point`` and ``bos_input``, so that one quantized input serves them all; None promises nothing.
            Set by ``siblings.mark_shared``

    With ``q = clamp(rint(x / act_scale + act_zero_point))`` the layer computes, for group g and channels k of g,
    ``y[n] = sum_g act_scale[g] * scale[g, n] * sum_k (q[k] - act_zero_point[g]) * W[n, k] + bias[n]``
    with int32 accumulation, a float32 epilogue and one rounding to the dtype of ``x``.
    """

    tensor_data_names = ["qdata", "scale"]
    tensor_attribute_names = ["bits", "act_bits", "input_groups", "shape", "dtype"]
    optional_tensor_data_names = [
        "act_scale",
        "act_zero_point",
        "alpha",
        "beta",
        "weight_sum",
        "bos_input",
        "bos_output",
    ]
    optional_tensor_attribute_names = ["act_group"]

    def __new__(
        cls,
        qdata,
        scale=None,
        bits=None,
        act_bits=None,
        input_groups=None,
        shape=None,
        dtype=None,
        act_scale=None,
        act_zero_point=None,
        alpha=None,
        beta=None,
        weight_sum=None,
        bos_input=None,
        bos_output=None,
        act_group=None,
        *,
        requires_grad=False,
    ):
        # accelerate rebuilds parameters as param_cls(tensor, requires_grad=...).
        if isinstance(qdata, MixDQTensor):
            return qdata
        return torch.Tensor._make_wrapper_subclass(
            cls,
            torch.Size(shape),
            strides=_logical_strides(qdata, shape),
            dtype=dtype,
            device=qdata.device,
            requires_grad=False,
        )

    def __init__(
        self,
        qdata,
        scale=None,
        bits=None,
        act_bits=None,
        input_groups=None,
        shape=None,
        dtype=None,
        act_scale=None,
        act_zero_point=None,
        alpha=None,
        beta=None,
        weight_sum=None,
        bos_input=None,
        bos_output=None,
        act_group=None,
        *,
        requires_grad=False,
    ):
        if isinstance(qdata, MixDQTensor):
            return
        super().__init__()
        self.qdata = qdata
        self.scale = scale
        self.bits = bits
        self.act_bits = act_bits
        self.input_groups = list(input_groups)
        self.act_scale = act_scale
        self.act_zero_point = act_zero_point
        self.alpha = alpha
        self.beta = beta
        self.weight_sum = weight_sum
        self.bos_input = bos_input
        self.bos_output = bos_output
        self.act_group = act_group

    @classmethod
    def from_float(
        cls,
        weight: Tensor,
        bits: int = 8,
        *,
        scale: Tensor | None = None,
        input_groups: list[int] | None = None,
        act_bits: int | None = None,
        act_scale: Tensor | float | None = None,
        act_zero_point: Tensor | float | None = None,
        bos_input: Tensor | None = None,
        bos_output: Tensor | None = None,
    ) -> "MixDQTensor":
        """Quantize a floating weight ``[out, in]`` or ``[out, in, r, s]``.

        Weights are symmetric: ``code = clamp(rint(weight / scale))``. Without ``scale`` (float32 ``[groups, out]`` or
        ``[out]``) it is ``max|weight| / qmax`` of each output channel and group, and 1 for a channel of zeros.
        Activations: static with ``act_scale`` (8 bits unless ``act_bits`` says 4), dynamic with ``act_bits`` alone,
        weight-only with neither. Raises ``MixDQError`` for arguments that do not fit together.
        """
        if weight.dim() not in (2, 4) or not weight.is_floating_point():
            raise UnsupportedError(
                f"MixDQTensor holds floating weights of linear [out, in] or conv2d [out, in, r, s] layers; "
                f"found {weight.dtype} {list(weight.shape)}"
            )
        w = width(bits)
        input_groups = _checked_groups(input_groups, weight.shape)
        parts = weight.detach().float().split(input_groups, dim=1)
        dims = tuple(range(1, weight.dim()))
        high = torch.stack([p.abs().amax(dims) for p in parts])
        if not (weight.is_meta or bool(high.isfinite().all())):
            raise MixDQError("the weight must be finite; found NaN or infinite values")
        if scale is None:
            scale = torch.where(high > 0, high / w.qmax, 1.0)
        scale = _checked_scale(scale, len(parts), weight.shape[0], weight.device)
        ones = (1,) * len(dims)
        codes = [
            (p / s.view(-1, *ones)).round_().clamp_(w.qmin, w.qmax).to(torch.int8)
            for p, s in zip(parts, scale, strict=True)
        ]
        return cls.from_codes(
            pack(torch.cat(codes, dim=1), bits, input_groups),
            scale,
            bits=bits,
            shape=weight.shape,
            dtype=weight.dtype,
            input_groups=input_groups,
            act_bits=act_bits,
            act_scale=act_scale,
            act_zero_point=act_zero_point,
            bos_input=bos_input,
            bos_output=bos_output,
        )

    @classmethod
    def from_codes(
        cls,
        qdata: Tensor,
        scale: Tensor,
        *,
        bits: int,
        shape,
        dtype: torch.dtype,
        input_groups: list[int] | None = None,
        act_bits: int | None = None,
        act_scale: Tensor | float | None = None,
        act_zero_point: Tensor | float | None = None,
        bos_input: Tensor | None = None,
        bos_output: Tensor | None = None,
    ) -> "MixDQTensor":
        """Build from codes in their stored form. Derived tensors are computed here; see the class for the shapes."""
        input_groups = _checked_groups(input_groups, shape)
        w = width(bits)
        stored = (shape[0], packed_channels(bits, input_groups), *shape[2:])
        if tuple(qdata.shape) != stored or qdata.dtype != getattr(torch, w.storage):
            raise MixDQError(
                f"codes of {bits} bits for a weight {list(shape)} must be {w.storage} {list(stored)}; "
                f"found {qdata.dtype} {list(qdata.shape)}"
            )
        scale = _checked_scale(scale, len(input_groups), shape[0], qdata.device)
        reduction = max(input_groups) * int(torch.Size(shape[2:]).numel())
        if reduction > MAX_REDUCTION:
            raise UnsupportedError(
                f"int32 accumulators hold sums of at most {MAX_REDUCTION} products; this weight {list(shape)} sums "
                f"{reduction}. Leave the layer floating (protect=)"
            )
        if qdata.dim() == 4:
            # Strides of dimensions of size 1 are free; one choice for all weights, since strides are compile guards.
            _, c, r, s = qdata.shape
            qdata = qdata.contiguous(memory_format=torch.channels_last).as_strided(
                qdata.shape, (c * r * s, 1, s * c, c)
            )
        if act_scale is not None:
            act_bits = 8 if act_bits is None else act_bits
        if act_bits is not None:
            act_width(act_bits)
        act_scale, act_zero_point = _checked_act(act_scale, act_zero_point, act_bits, len(input_groups), qdata.device)
        derived = _derive(qdata, scale, bits, act_bits, input_groups, act_scale, act_zero_point)
        return cls(
            qdata,
            scale,
            bits,
            act_bits,
            input_groups,
            torch.Size(shape),
            dtype,
            act_scale,
            act_zero_point,
            **derived,
            **_checked_bos(bos_input, bos_output, shape, qdata.device),
        )

    def int_repr(self) -> Tensor:
        """The int8 codes in the weight's logical shape."""
        return unpack(self.qdata, self.bits, self.input_groups)

    def dequantize(self, output_dtype: torch.dtype | None = None) -> Tensor:
        """The floating weight that the codes stand for."""
        return ops.dequantize(self.qdata, self.scale, self.bits, self.input_groups, output_dtype or self.dtype)

    @property
    def activation(self) -> str:
        """``"static"``, ``"dynamic"`` or ``"none"`` (weight-only)."""
        if self.act_bits is None:
            return "none"
        return "dynamic" if self.act_scale is None else "static"

    def stored_tensors(self) -> dict[str, Tensor]:
        """The inner tensors that a file must hold, by name; derived ones are left out."""
        return {name: getattr(self, name) for name in self.__tensor_flatten__()[0] if name not in _DERIVED}

    def quantization_repr(self) -> str:
        """A few words for ``extra_repr`` of a module."""
        act = "weight-only" if self.act_bits is None else f"{self.activation} int{self.act_bits} activations"
        groups = f", input groups {self.input_groups}" if len(self.input_groups) > 1 else ""
        return f"int{self.bits} weight, {act}{groups}" + (", BOS" if self.bos_output is not None else "")

    def __repr__(self):
        return (
            f"MixDQTensor(shape={list(self.shape)}, dtype={self.dtype}, device={self.device}, "
            f"{self.quantization_repr()})"
        )

    def _quantization(self) -> tuple:
        """What two weights must share for one to be copied into the other."""
        return self.shape, self.bits, self.act_bits, self.input_groups, self.__tensor_flatten__()[0]

    def _stable_hash_for_caching(self) -> str:
        """For torch's cache of compiled graphs, which hashes this: everything about the tensor but its values, and the
        code that it is compiled to."""
        names, attributes = self.__tensor_flatten__()
        parts = [(name, getattr(self, name)) for name in names]
        facts = [(name, t.dtype, tuple(t.shape), t.stride(), str(t.device)) for name, t in parts]
        return repr((type(self).__name__, facts, sorted(attributes.items()), _code()))

    def _shared_values(self) -> tuple:
        """What layers of one ``act_group`` have in common. Reads values: slow where they are on a GPU."""
        tensors = (self.act_scale, self.act_zero_point, self.bos_input)
        return self.act_bits, self.input_groups, *(None if t is None else t.tolist() for t in tensors)

    def _with(self, fn, dtype: torch.dtype | None = None, qdata_fn=None) -> "MixDQTensor":
        """A copy with ``fn`` applied to every inner tensor (``qdata_fn`` to the codes) and another logical dtype."""
        tensors = {name: getattr(self, name) for name in self.tensor_data_names + self.optional_tensor_data_names}
        tensors = {
            name: None if t is None else (qdata_fn or fn)(t) if name == "qdata" else fn(t)
            for name, t in tensors.items()
        }
        return type(self)(
            **tensors,
            bits=self.bits,
            act_bits=self.act_bits,
            input_groups=self.input_groups,
            shape=self.shape,
            dtype=dtype or self.dtype,
            act_group=self.act_group,
        )

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        # torchao's way to the same handlers costs an eager call 1.5 microseconds more.
        layer = _LAYERS.get(func)
        if layer is None:
            return super().__torch_function__(func, types, args, kwargs)
        return layer(*args, **kwargs) if kwargs else layer(*args)

    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs):
        handler = cls._ATEN_OP_TABLE[cls].get(func)
        if handler is None:
            raise UnsupportedError(
                f"a quantized weight does not support {func}. Work on weight.dequantize(), or do it before quantize_()"
            )
        return handler(func, types, args, kwargs or {})


torch.serialization.add_safe_globals([MixDQTensor])


def _code() -> str:
    """A hash of what a layer is traced to: a graph in the cache may come from another version of it."""
    return get_hash_for_files((__file__, layers.__file__, ops.__file__)).hex()


# --- construction -----------------------------------------------------------------------------------------------------


def _logical_strides(qdata: Tensor, shape) -> tuple[int, ...]:
    if len(shape) == 4 and qdata.is_contiguous(memory_format=torch.channels_last):
        _, c, r, s = shape
        return c * r * s, 1, s * c, c
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return tuple(strides)


def _checked_groups(input_groups, shape) -> list[int]:
    groups = [shape[1]] if input_groups is None else [int(c) for c in input_groups]
    if sum(groups) != shape[1] or min(groups) < 1:
        raise MixDQError(f"input_groups must be positive and add up to {shape[1]} input channels; found {groups}")
    return groups


def _is_positive(scale: Tensor) -> bool:
    return scale.is_meta or bool((torch.isfinite(scale) & (scale > 0)).all())


def _checked_scale(scale: Tensor, groups: int, out: int, device) -> Tensor:
    scale = scale.detach().to(device, torch.float32)
    if scale.numel() != groups * out:
        raise MixDQError(f"scale must be [groups, out] = [{groups}, {out}]; found {list(scale.shape)}")
    if not _is_positive(scale):
        raise MixDQError("scale must be finite and positive; found NaN, infinity, zero or less")
    return scale.reshape(groups, out)


def _checked_act(act_scale, act_zero_point, act_bits, groups: int, device):
    if act_scale is None:
        if act_zero_point is not None:
            raise MixDQError("act_zero_point needs act_scale; give both, or neither for dynamic activations")
        return None, None
    values = []
    for name, v in (("act_scale", act_scale), ("act_zero_point", 0.0 if act_zero_point is None else act_zero_point)):
        v = torch.as_tensor(v, dtype=torch.float32).to(device).reshape(-1)
        if v.numel() == 1 and groups > 1:
            v = v.repeat(groups)
        if v.numel() != groups:
            raise MixDQError(f"{name} must have one value for each of {groups} input groups; found {v.numel()}")
        values.append(v)
    scale, zero_point = values
    w = act_width(act_bits)
    if not _is_positive(scale):
        raise MixDQError(f"act_scale must be finite and positive; found {scale.tolist()}")
    whole = (zero_point == zero_point.round()) & (zero_point >= w.qmin) & (zero_point <= w.qmax)
    if not (whole.is_meta or bool(whole.all())):
        raise MixDQError(
            f"act_zero_point must be a whole number from {w.qmin} to {w.qmax} for {act_bits} bits; "
            f"found {zero_point.tolist()}"
        )
    return scale, zero_point


def _checked_bos(bos_input, bos_output, shape, device) -> dict[str, Tensor]:
    if bos_output is None:
        if bos_input is not None:
            raise MixDQError("bos_input needs bos_output, the layer's output for that token")
        return {}
    if len(shape) != 2:
        raise MixDQError(f"bos_output is for linear layers; this weight has shape {list(shape)}")
    checked = {}
    for name, value, size in (("bos_input", bos_input, shape[1]), ("bos_output", bos_output, shape[0])):
        if value is None:
            continue
        if value.numel() != size or not value.is_floating_point():
            raise MixDQError(f"{name} must hold {size} floating values; found {value.dtype} {list(value.shape)}")
        checked[name] = value.detach().reshape(-1).to(device)
    return checked


def _derive(qdata, scale, bits, act_bits, input_groups, act_scale, act_zero_point) -> dict[str, Tensor]:
    if act_bits is None:
        return {}
    dims = tuple(range(1, qdata.dim()))
    parts = unpack(qdata, bits, input_groups).split(input_groups, dim=1)
    weight_sum = torch.stack([p.sum(dims, dtype=torch.int32) for p in parts])
    if act_scale is None:
        return {"weight_sum": weight_sum}
    alpha, beta = layers.static_alpha_beta(scale, act_scale, act_zero_point, weight_sum)
    return {"alpha": alpha, "beta": beta}


# --- op table ---------------------------------------------------------------------------------------------------------

aten = torch.ops.aten
implements = MixDQTensor.implements
implements_torch_function = MixDQTensor.implements_torch_function


class InferenceOnly(torch.autograd.Function):
    """``output`` as if ``source``, which wants a gradient, had a part in it; backward says what is missing.

    The operators alone would warn and give no gradient, or that of what is not quantized.
    """

    @staticmethod
    def forward(ctx, output, source):
        ctx.shape = source.shape
        return output.detach()

    @staticmethod
    def backward(ctx, grad):
        # An operator, so that a graph that is compiled with its backward raises when that runs.
        return None, torch.ops.mixdq_ao.no_backward(grad, ctx.shape)


def _run(layer, x, w, bias, *args) -> Tensor:
    if not isinstance(w, MixDQTensor):
        raise UnsupportedError(f"F.{layer.__name__}: only the weight may be a quantized tensor")
    wants_grad = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if not wants_grad or torch.compiler.is_exporting():
        return layer(x, w, bias, *args)
    with torch.no_grad():
        output = layer(x, w, bias, *args)
    return InferenceOnly.apply(output, x if x.requires_grad else bias)


def _linear(input, weight, bias=None):
    # Without _run() in between, where nothing can want a gradient: eager calls on a GPU wait for the host.
    if torch.is_grad_enabled() or not isinstance(weight, MixDQTensor):
        return _run(layers.linear, input, weight, bias)
    return layers.linear(input, weight, bias)


def _conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    if torch.is_grad_enabled() or not isinstance(weight, MixDQTensor):
        return _run(layers.conv2d, input, weight, bias, stride, padding, dilation, groups)
    return layers.conv2d(input, weight, bias, stride, padding, dilation, groups)


_LAYERS = {F.linear: _linear, F.conv2d: _conv2d}


@implements([aten.linear.default])
def _(func, types, args, kwargs):
    return _linear(*args, **kwargs)


@implements([aten.conv2d.default, aten.conv2d.padding])
def _(func, types, args, kwargs):
    return _conv2d(*args, **kwargs)


@implements([aten.convolution.default])
def _(func, types, args, kwargs):
    x, w, bias, stride, padding, dilation, transposed, _, groups = args
    if transposed:
        raise UnsupportedError("transposed convolutions cannot be quantized")
    return _run(layers.conv2d, x, w, bias, stride, padding, dilation, groups)


@implements([aten.t.default])
def _(func, types, args, kwargs):
    raise UnsupportedError(
        "a quantized weight cannot be transposed. If this came from F.linear, __torch_function__ was switched off "
        "(DisableTorchFunctionSubclass): run the layer under torch.inference_mode(), or leave it on"
    )


@implements([aten.cat.default])
def _(func, types, args, kwargs):
    raise UnsupportedError(
        "quantized weights cannot be concatenated. Fuse projections before quantize_(): "
        "unet.fuse_qkv_projections(), then quantize_(unet, ...)"
    )


@implements([aten._to_copy.default])
def _(func, types, args, kwargs):
    return return_and_correct_aliasing(func, args, kwargs, _copy_to(args[0], kwargs))


# Under inference_mode() these arrive instead of _to_copy.
@implements([aten.to.dtype, aten.to.device, aten.to.dtype_layout])
def _(func, types, args, kwargs):
    names = [a.name for a in func._schema.arguments]
    given = {**dict(zip(names[1:], args[1:], strict=False)), **kwargs}
    w, unchanged = args[0], (None, torch.preserve_format)
    wanted = given.get("dtype"), given.get("device"), given.get("memory_format")
    if given.get("copy") or wanted[0] not in (None, w.dtype) or wanted[1] not in (None, w.device):
        return _copy_to(w, given)
    return w if wanted[2] in unchanged else _copy_to(w, given)


def _copy_to(w: MixDQTensor, given: dict) -> MixDQTensor:
    dtype = given.get("dtype")
    if dtype is not None and not dtype.is_floating_point:
        raise UnsupportedError(f"a quantized weight stands for floating values; it cannot become {dtype}")
    device, non_blocking = given.get("device"), bool(given.get("non_blocking"))

    # Codes and scales keep their dtypes: scales in fp16 would underflow.
    def move(t, memory_format=torch.preserve_format):
        return t.to(device=device or t.device, non_blocking=non_blocking, copy=True, memory_format=memory_format)

    return w._with(move, dtype, lambda t: move(t, _memory_format(t, given)))


def _memory_format(qdata: Tensor, kwargs) -> torch.memory_format:
    wanted = kwargs.get("memory_format") or torch.preserve_format
    return wanted if qdata.dim() == 4 else torch.preserve_format


@implements([aten.clone.default])
def _(func, types, args, kwargs):
    w = args[0]
    out = w._with(torch.clone, qdata_fn=lambda t: t.clone(memory_format=_memory_format(t, kwargs)))
    return return_and_correct_aliasing(func, args, kwargs, out)


@implements_torch_function([torch.Tensor.contiguous])
@implements([aten.contiguous.default])
def _(func, types, args, kwargs):
    def bind(self, memory_format=torch.contiguous_format):
        return self, memory_format

    w, memory_format = bind(*args, **kwargs)
    if w.dim() != 4:
        return w
    return w._with(lambda t: t, qdata_fn=lambda t: t.contiguous(memory_format=memory_format))


@implements([aten.empty_like.default])
def _(func, types, args, kwargs):
    w, device = args[0], kwargs.get("device")
    pin = bool(kwargs.get("pin_memory"))
    return w._with(lambda t: torch.empty_like(t, device=device, pin_memory=pin), kwargs.get("dtype"))


@implements([aten.is_pinned.default])
def _(func, types, args, kwargs):
    return all(getattr(args[0], name).is_pinned() for name in args[0].__tensor_flatten__()[0])


@implements([aten._pin_memory.default])
def _(func, types, args, kwargs):
    return args[0]._with(lambda t: t.pin_memory())


@implements([aten.copy_.default])
def _(func, types, args, kwargs):
    target, source = args[:2]
    if not (isinstance(target, MixDQTensor) and isinstance(source, MixDQTensor)):
        raise UnsupportedError(
            "copy_() between a quantized and a floating weight would change what the layer computes. "
            "load_state_dict() into a floating model needs assign=True; fused projections must be fused before "
            "quantize_(); for a floating copy use weight.dequantize()"
        )
    if target._quantization() != source._quantization():
        raise MixDQError(f"copy_() needs equal quantization; found {target!r} and {source!r}")
    # Other layers share this one's quantizer only as long as its values are theirs.
    before = None if target.act_group is None else target._shared_values()
    for name in target.__tensor_flatten__()[0]:
        getattr(target, name).copy_(getattr(source, name), *args[2:], **kwargs)
    if before is not None and before != target._shared_values():
        target.act_group = None
    return target
