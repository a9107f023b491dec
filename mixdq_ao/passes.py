"""Rewrites of the graph that Dynamo captures, so that a quantized UNet runs in few launches.

At this level a quantized layer is one call, ``linear(x, weight, bias)``, whose weight is known to be a ``MixDQTensor``,
and norms, GEGLU and attention are single calls as well. Each layer is split into a quantizer and a product; then equal
quantizers become one, products of one input become one, and quantizers join the norm, GEGLU or attention before them.
What is put into the graph are the functions of the next section: AOTAutograd traces through them and leaves our
operators.
"""

import operator
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from mixdq_ao import attention, layers, nodes, ops, tensor
from mixdq_ao.nodes import (
    argument,
    call_method,
    calls,
    dtype_of,
    has_one_user,
    holds_pixels,
    input_of,
    is_input,
    is_method,
    is_one_pixel,
    known,
    replace_by_call,
    replace_node,
    same_form,
    value_of,
    writes,
)
from mixdq_ao.siblings import MAX_MERGED
from mixdq_ao.tensor import MixDQTensor


@dataclass(frozen=True)
class Passes:
    """Which rewrites to make, in the order in which they are made.

    Args:
        no_ops: remove dropout of nothing, division by 1 and casts to the same dtype, which hide what follows; compute
            the SiLU of one tensor once
        share: quantize once for layers that read the same tensor with equal activation parameters
        merge: one product for such layers: Q, K and V of self-attention, K and V of the text over all blocks, time
            embeddings
        residual: add a residual, or a ResNet's time embedding, in the product's epilogue
        layer_norm, geglu, group_norm: quantize in the operator that computes the layer's input; GroupNorm with the
            SiLU and the reordering of pixels to tokens that may follow
        geglu_product: GEGLU and quantize in the product that computes the value and its gate
        attention_quantize: quantize in the operator that computes attention, where a backend is chosen at all: our own
            writes codes
        opaque: quantize by our operator where Inductor has nothing to fuse the quantizer with; without Inductor that is
            everywhere, whatever is said here
        max_merged: as many layers in one product at most
    """

    no_ops: bool = True
    share: bool = True
    merge: bool = True
    residual: bool = True
    layer_norm: bool = True
    geglu: bool = True
    geglu_product: bool = True
    attention_quantize: bool = True
    group_norm: bool = True
    opaque: bool = True
    max_merged: int = MAX_MERGED

    @classmethod
    def none(cls) -> "Passes":
        """No rewrite at all; ``dataclasses.replace`` then switches on what is to be measured alone."""
        return cls(**{f.name: False for f in fields(cls) if f.type is bool})


# --- what rewritten graphs call ---------------------------------------------------------------------------------------


def quantize(x: Tensor, w: MixDQTensor, pad=None) -> Tensor:
    return torch.ops.mixdq_ao.quantize(x, w.act_scale, w.act_zero_point, w.act_bits, w.input_groups, pad)


def quantize_traced(x: Tensor, w: MixDQTensor, pad=None) -> Tensor:
    return ops.quantize_traced(x, w.act_scale, w.act_zero_point, w.act_bits, w.input_groups, pad)


def layer_norm_quantize(x: Tensor, w: MixDQTensor, weight, bias, eps: float) -> Tensor:
    return torch.ops.mixdq_ao.layer_norm_quantize(
        x, weight, bias, eps, w.act_scale, w.act_zero_point, w.act_bits, w.input_groups
    )


def geglu_quantize(x: Tensor, w: MixDQTensor) -> Tensor:
    return torch.ops.mixdq_ao.geglu_quantize(x, w.act_scale, w.act_zero_point, w.act_bits, w.input_groups)


def group_norm_quantize(x: Tensor, w: MixDQTensor, num_groups: int, weight, bias, eps: float, silu: bool, pad):
    return torch.ops.mixdq_ao.group_norm_quantize(
        x, num_groups, weight, bias, eps, silu, w.act_scale, w.act_zero_point, w.act_bits, w.input_groups, pad
    )


def linear(xq: Tensor, w: MixDQTensor, bias, dtype, text=None, residual=None) -> Tensor:
    """``text`` is the floating input of a layer with a BOS output."""
    y = torch.ops.mixdq_ao.linear_int8(xq, w.qdata, w.alpha, w.beta, bias, w.bits, w.input_groups, dtype, residual)
    return y if text is None else ops.with_bos_row(y, text, w.bos_input, w.bos_output)


def linear_geglu(xq: Tensor, w: MixDQTensor, bias, dtype, reader: MixDQTensor) -> Tensor:
    """``reader`` is the weight that the codes are for."""
    static = reader.act_scale, reader.act_zero_point, reader.act_bits
    return torch.ops.mixdq_ao.linear_int8_geglu(
        xq, w.qdata, w.alpha, w.beta, bias, w.bits, w.input_groups, dtype, *static
    )


def linear_multi(xq: Tensor, ws: list[MixDQTensor], biases: list, dtype, text=None) -> tuple[Tensor, ...]:
    y = torch.ops.mixdq_ao.linear_int8_multi(
        xq,
        [w.qdata for w in ws],
        [w.alpha for w in ws],
        [w.beta for w in ws],
        biases,
        [w.bits for w in ws],
        ws[0].input_groups,
        dtype,
    )
    if text is not None:
        y = ops.with_bos_row(y, text, ws[0].bos_input, torch.cat([w.bos_output for w in ws]))
    return y.split([w.qdata.shape[0] for w in ws], dim=-1)


def conv2d(xq: Tensor, w: MixDQTensor, bias, dtype, stride, dilation, residual=None) -> Tensor:
    """``xq`` is padded."""
    return torch.ops.mixdq_ao.conv2d_int8(
        xq, w.qdata, w.alpha, w.beta, bias, stride, (0, 0), dilation, w.bits, w.input_groups, dtype, residual
    )


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None, backend: str) -> Tensor:
    return torch.ops.mixdq_ao.attention(q, k, v, scale, backend)


def attend_quantize(q: Tensor, k: Tensor, v: Tensor, scale: float | None, backend: str, w: MixDQTensor) -> Tensor:
    static = w.act_scale, w.act_zero_point, w.act_bits
    return torch.ops.mixdq_ao.attention_quantize(q, k, v, scale, backend, *static)


FUNCTIONS = (
    quantize,
    quantize_traced,
    layer_norm_quantize,
    geglu_quantize,
    group_norm_quantize,
    linear,
    linear_geglu,
    linear_multi,
    conv2d,
    attend,
    attend_quantize,
)


# --- the pass ---------------------------------------------------------------------------------------------------------


class FuseQuantizers(CustomGraphPass):
    """For ``pre_grad_custom_pass``. ``hits`` counts what the last graph got; graphs from a cache are not seen here.

    A graph that writes into a tensor keeps its order: its layers are split, and ``hits["in_place"]`` says why no more.
    One without a quantized weight stays as it is, but for its attention.

    Args:
        backend: which one computes attention, as for ``mixdq_ao.compile``; None leaves that to torch
    """

    def __init__(self, passes: Passes | None = None, backend: str | None = None):
        self.passes = passes or Passes()
        self.backend = backend
        self.hits: Counter[str] = Counter()

    def __call__(self, graph: fx.Graph) -> None:
        self.hits = Counter()
        in_place = sum(map(writes, graph.nodes))
        if in_place:
            self.hits["in_place"] = in_place
        if self.backend is not None:
            self.hits["attention"] = choose_attention(graph, self.backend)
        is_quantized = any(isinstance(value_of(node), MixDQTensor) for node in graph.nodes)
        for name, rewrite in REWRITES.items() if is_quantized else ():
            if name == "layers" or getattr(self.passes, name) and not in_place:
                self.hits[name] = rewrite(graph, self.passes)
                if not in_place:  # a write that nothing reads looks dead
                    graph.eliminate_dead_code()  # what is left counts as a reader of its inputs
        graph.lint()

    def uuid(self) -> bytes:
        others = [module.__file__ for module in (nodes, tensor, layers, ops, attention)]
        return get_hash_for_files((__file__, *others), extra=repr((self.passes, self.backend)))


def choose_attention(graph: fx.Graph, backend: str) -> int:
    """Attention that our operator can compute, which ``auto`` leaves alone where there is nothing to choose from."""
    hits = 0
    for node in calls(graph, F.scaled_dot_product_attention):
        arguments = _plain_attention(*node.args, **node.kwargs)
        if arguments is not None and dtype_of(node) != value_of(arguments[0]).dtype:
            continue  # autocast, of which our operator knows nothing
        if arguments is not None and (backend != attention.AUTO or value_of(arguments[0]).is_cuda):
            hits += 1
            replace_by_call(graph, node, attend, (*arguments, backend))
    return hits


def _plain_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Queries, keys, values and scale; None if there is a mask or dropout, a gradient is wanted, or sizes are odd."""
    if attn_mask is not None or dropout_p != 0 or is_causal or enable_gqa or isinstance(scale, fx.Node):
        return None
    values = [value_of(node) for node in (query, key, value)]
    if not all(isinstance(t, Tensor) and t.dim() == 4 and not t.requires_grad for t in values):
        return None
    q, k, v = values
    fits = all(t.dtype == q.dtype and known(t.shape[i] == q.shape[i] for i in (0, 1, 3)) for t in (k, v))
    return (query, key, value, scale) if fits and known([q.shape[3] % 8 == 0]) else None


def no_ops(graph: fx.Graph, passes: Passes) -> int:
    hits, silus = 0, {}
    for node in graph.nodes:
        same = _does_nothing(node)
        if same is None and node.target is F.silu:
            same = silus.setdefault(input_of(node), node)
        if same is not None and same is not node:
            hits += 1
            node.replace_all_uses_with(same)
            graph.erase_node(node)
    return hits


def _does_nothing(node: fx.Node) -> fx.Node | None:
    """The input of a node that returns it as it is."""
    x = input_of(node)
    if not isinstance(x, fx.Node):
        return None
    if node.target is F.dropout:
        nothing = argument(node, "p", 1, 0.5) == 0 or not argument(node, "training", 2, True)
    elif node.target is operator.truediv:
        nothing = isinstance(node.args[1], (int, float)) and node.args[1] == 1 and dtype_of(x) == dtype_of(node)
    elif (node.op, node.target) == ("call_method", "to"):
        a, b = value_of(x), value_of(node)
        plain = not {"copy", "memory_format"} & node.kwargs.keys() and len(node.args) == 2 - bool(node.kwargs)
        nothing = plain and b is not None and (a.dtype, a.device) == (b.dtype, b.device)
    else:
        return None
    return x if nothing else None


def split_layers(graph: fx.Graph, passes: Passes) -> int:
    """Every layer with static activations becomes a quantizer and a product."""
    hits = 0
    for node in list(graph.nodes):
        layer = _layer(node)
        if layer is not None:
            hits += 1
            x, w, pad, product, args = layer
            with graph.inserting_before(node):
                xq = graph.call_function(quantize_traced, (x, w, pad))
                y = graph.call_function(product, (xq, *args))
            replace_node(node, y)
    return hits


def _layer(node: fx.Node):
    """Input, weight, padding, and what multiplies with which arguments, if the node is a layer of ours."""
    if node.op != "call_function" or node.target not in (F.linear, F.conv2d):
        return None
    is_linear = node.target is F.linear
    x, w, bias, *options = (_bind_linear if is_linear else _bind_conv)(*node.args, **node.kwargs)
    weight, value = value_of(w), value_of(x)
    if not isinstance(weight, MixDQTensor) or weight.activation != "static" or isinstance(value, MixDQTensor):
        return None
    if weight.dim() != (2 if is_linear else 4) or value.shape[-1 if is_linear else 1] != weight.shape[1]:
        return None  # which raises an error that names both
    if is_linear:
        return x, w, None, linear, (w, bias, value.dtype, None if weight.bos_output is None else x)
    stride, padding, dilation, groups = options
    if value.dim() != 4 or groups != 1:
        return None
    stride, dilation, pad = layers.conv_geometry(weight.shape[2:], stride, padding, dilation)
    return x, w, pad, conv2d, (w, bias, value.dtype, stride, dilation)


def _bind_linear(input, weight, bias=None):
    return input, weight, bias


def _bind_conv(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    return input, weight, bias, stride, padding, dilation, groups


def share(graph: fx.Graph, passes: Passes) -> int:
    hits, first = 0, {}
    for node in calls(graph, quantize_traced):
        x, w, pad = node.args
        weight = value_of(w)
        if weight.act_group is not None:
            key = x, pad, weight.act_group, weight.act_bits, tuple(weight.input_groups)
            if first.setdefault(key, node) is not node:
                hits += 1
                replace_node(node, first[key])
    return hits


def merge(graph: fx.Graph, passes: Passes) -> int:
    """Linears of one quantized input. Weights are inputs of the graph, so the product can stand at the first linear."""
    groups = defaultdict(list)
    for node in calls(graph, linear):
        xq, w, bias, dtype, text = node.args
        if is_input(w) and (bias is None or is_input(bias)):
            groups[xq, value_of(w).bits, bias is None, dtype, text].append(node)
    hits = 0
    for (xq, _, _, dtype, text), products in groups.items():
        for start in range(0, len(products), passes.max_merged):
            siblings = products[start : start + passes.max_merged]
            if len(siblings) > 1:
                hits += 1
                _merge(graph, xq, siblings, dtype, text)
    return hits


def _merge(graph: fx.Graph, xq: fx.Node, products: list[fx.Node], dtype, text) -> None:
    with graph.inserting_before(products[0]):
        ws, biases = [n.args[1] for n in products], [n.args[2] for n in products]
        outputs = graph.call_function(linear_multi, (xq, ws, biases, dtype, text))
        parts = [graph.call_function(operator.getitem, (outputs, i)) for i in range(len(products))]
    for node, part in zip(products, parts, strict=True):
        replace_node(node, part)


def residual(graph: fx.Graph, passes: Passes) -> int:
    hits = 0
    for node in list(graph.nodes):
        if node.target not in (operator.add, torch.add) or node.kwargs or len(node.args) != 2:
            continue
        a, b = node.args
        if isinstance(a, fx.Node) and isinstance(b, fx.Node) and a is not b:
            # Of two layers the later one takes the other's output.
            later, earlier = (b, a) if a < b else (a, b)
            hits += _add_residual(graph, node, later, earlier) or _add_residual(graph, node, earlier, later)
    return hits


def _add_residual(graph: fx.Graph, node: fx.Node, y: fx.Node, other: fx.Node) -> bool:
    """``node`` is ``y + other``; let the layer that computes ``y`` add, if nothing else reads it."""
    of_image = y.target is conv2d and is_one_pixel(other, node) and same_form(y, node)  # a time embedding
    if not (of_image or same_form(y, other, node)):
        return False
    product, pixels = y, None
    if is_method(y, "contiguous") and has_one_user(y) and is_method(y.args[0], "permute", (0, 3, 1, 2)):
        # The end of a transformer: its tokens become pixels again.
        pixels = y.args[0].args[0]
        if not (is_method(pixels, "reshape") and has_one_user(pixels) and has_one_user(y.args[0])):
            return False
        product = pixels.args[0]
        if not holds_pixels(product, pixels):
            return False
    if product.target not in (linear, conv2d) or not has_one_user(product) or "residual" in product.kwargs:
        return False
    if product.target is linear and product.args[4] is not None:  # a row is replaced after the product
        return False
    with graph.inserting_before(node):
        if pixels is not None:
            # Left as channels-last instead of contiguous, which is the layout that our operators like.
            other = call_method(graph, "permute", other, 0, 2, 3, 1)
            other = call_method(graph, "flatten", other, 1, 2)
        fused = graph.call_function(product.target, product.args, {"residual": other})
        fused.meta = dict(product.meta)
        if pixels is not None:
            fused = call_method(graph, "reshape", fused, *pixels.args[1:])
            fused = call_method(graph, "permute", fused, 0, 3, 1, 2)
    replace_node(node, fused)
    for dead in [y] if pixels is None else [y, y.args[0], pixels, product]:
        graph.erase_node(dead)
    return True


def layer_norm(graph: fx.Graph, passes: Passes) -> int:
    hits = 0
    for node in calls(graph, quantize_traced):
        norm = node.args[0]
        if norm.target is not F.layer_norm or not _only_quantized(norm):
            continue
        x, shape, weight, bias, eps = _bind_layer_norm(*norm.args, **norm.kwargs)
        if len(shape) == 1:
            hits += 1
            replace_by_call(graph, node, layer_norm_quantize, (x, node.args[1], weight, bias, eps))
    return hits


def _bind_layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    return input, normalized_shape, weight, bias, eps


def geglu(graph: fx.Graph, passes: Passes) -> int:
    hits = 0
    for node in calls(graph, quantize_traced):
        x = _geglu_input(node.args[0])
        if x is not None and _only_quantized(node.args[0]):
            hits += 1
            replace_by_call(graph, node, geglu_quantize, (x, node.args[1]))
    return hits


def geglu_product(graph: fx.Graph, passes: Passes) -> int:
    hits = 0
    for node in calls(graph, geglu_quantize):
        product, w = node.args
        fits = product.target is linear and has_one_user(product) and not product.kwargs  # no residual
        if fits and product.args[4] is None and len(value_of(w).input_groups) == 1:  # nor a replaced row
            hits += 1
            replace_by_call(graph, node, linear_geglu, (*product.args[:4], w))
    return hits


def _geglu_input(product: fx.Node) -> fx.Node | None:
    """The tensor whose halves a node multiplies as ``value * gelu(gate)``."""
    if product.target is not operator.mul or not all(isinstance(a, fx.Node) for a in product.args):
        return None
    for value, gelu in (product.args, product.args[::-1]):
        gate = input_of(gelu) if gelu.target is F.gelu and argument(gelu, "approximate", 1, "none") == "none" else None
        halves = [half.args for half in (value, gate) if half is not None and half.target is operator.getitem]
        if len(halves) == 2 and halves[0][0] is halves[1][0] and [half[1] for half in halves] == [0, 1]:
            chunk = halves[0][0]
            x = input_of(chunk)
            last = argument(chunk, "dim", 2, 0) in (-1, len(value_of(x).shape) - 1)
            if chunk.target in ("chunk", torch.chunk) and argument(chunk, "chunks", 1) == 2 and last:
                return x
    return None


def attention_quantize(graph: fx.Graph, passes: Passes) -> int:
    hits = 0
    for node in calls(graph, quantize_traced):
        x, w, pad = node.args
        if pad is None and len(value_of(w).input_groups) == 1 and has_one_user(x):
            heads = _merged_heads(x)
            if heads is not None and heads.target is attend:
                hits += 1
                replace_by_call(graph, node, attend_quantize, (*heads.args, w))
    return hits


def _merged_heads(x: fx.Node) -> fx.Node | None:
    """``[batch, heads, tokens, channels]`` of which ``x`` is ``[batch, tokens, heads * channels]``, for ``x`` alone."""
    if not (is_method(x, "reshape") or is_method(x, "flatten")):
        return None
    swapped = x.args[0]
    if not (is_method(swapped, "transpose", (1, 2)) or is_method(swapped, "permute", (0, 2, 1, 3))):
        return None
    heads = swapped.args[0]
    if not (has_one_user(swapped) and has_one_user(heads)):
        return None
    whole, merged = value_of(heads).shape, value_of(x).shape
    fits = len(merged) == 3 and known([merged[0] == whole[0], merged[2] == whole[1] * whole[3]])
    return heads if fits else None


def group_norm(graph: fx.Graph, passes: Passes) -> int:
    hits = 0
    for node in calls(graph, quantize_traced):
        x, w, pad = node.args
        tokens = x if pad is None else None
        if tokens is not None:
            # Pixels as tokens: quantized before they are reordered, which is free for channels-last codes.
            pixels = x.args[0] if is_method(x, "reshape") and _only_quantized(x) else None
            if pixels is None or not is_method(pixels, "permute", (0, 2, 3, 1)) or not has_one_user(pixels):
                continue
            x, keeps_channels = pixels.args[0], value_of(tokens).shape[-1] == value_of(pixels).shape[-1]
            if not keeps_channels or not has_one_user(x):
                continue
        elif not _only_quantized(x):
            continue
        silu = x.target is F.silu and has_one_user(input_of(x))
        norm = input_of(x) if silu else x
        if norm.target is not F.group_norm or len(value_of(norm).shape) != 4:
            continue
        hits += 1
        image, num_groups, weight, bias, eps = _bind_group_norm(*norm.args, **norm.kwargs)
        args = (image, w, num_groups, weight, bias, eps, silu, pad)
        if tokens is None:
            replace_by_call(graph, node, group_norm_quantize, args)
            continue
        with graph.inserting_before(node):
            xq = graph.call_function(group_norm_quantize, args)
            xq.meta["example_value"] = torch.empty_like(value_of(norm), dtype=torch.int8)
            xq = call_method(graph, "permute", xq, 0, 2, 3, 1)
            xq = call_method(graph, "reshape", xq, *tokens.args[1:])
        replace_node(node, xq)
    return hits


def _bind_group_norm(input, num_groups, weight=None, bias=None, eps=1e-5):
    return input, num_groups, weight, bias, eps


def use_operators(graph: fx.Graph) -> None:
    """Whole operators instead of aten arithmetic, for a graph that nothing fuses any further."""
    for node in calls(graph, linear):
        xq, w, bias, _, text = node.args
        if text is not None:  # the eager layer writes the known row by itself; that it quantizes again costs less
            replace_by_call(graph, node, layers.linear, (text, w, bias))
            if not xq.users:
                graph.erase_node(xq)
    for node in calls(graph, quantize_traced):
        replace_by_call(graph, node, quantize, node.args)


def opaque(graph: fx.Graph, passes: Passes) -> int:
    """Where the input comes out of an operator that Inductor cannot fuse, a kernel of its own is needed anyway."""
    hits = 0
    for node in calls(graph, quantize_traced):
        source = node.args[0]
        while source.op == "call_method" and source.target in _VIEWS or source.target is operator.getitem:
            source = source.args[0]
        if source.op == "placeholder" or source.target in (*FUNCTIONS, F.scaled_dot_product_attention):
            hits += 1
            replace_by_call(graph, node, quantize, node.args)
    return hits


_VIEWS = ("view", "reshape", "permute", "transpose", "flatten", "unflatten")

REWRITES: dict[str, Callable[[fx.Graph, Passes], int]] = {
    "no_ops": no_ops,
    "layers": split_layers,
    "share": share,
    "merge": merge,
    "residual": residual,
    "layer_norm": layer_norm,
    "geglu": geglu,
    "geglu_product": geglu_product,
    "attention_quantize": attention_quantize,
    "group_norm": group_norm,
    "opaque": opaque,
}


def _only_quantized(node: fx.Node) -> bool:
    return all(user.target is quantize_traced for user in node.users)
