"""Reading and changing the nodes of a Dynamo graph."""

import operator
import re
from collections.abc import Callable, Iterable, Iterator

import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true


def calls(graph: fx.Graph, function: Callable) -> Iterator[fx.Node]:
    """The calls of a function that the graph has now, in order; it may change meanwhile."""
    return iter([node for node in graph.nodes if node.op == "call_function" and node.target is function])


def value_of(node) -> Tensor | None:
    """The fake tensor that Dynamo computed for a node."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else None


def dtype_of(node: fx.Node):
    return getattr(value_of(node), "dtype", None)


def argument(node: fx.Node, name: str, position: int, default=None):
    """An argument of a call, wherever it stands."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def input_of(node: fx.Node):
    return node.args[0] if node.args else node.kwargs.get("input")


def writes(node: fx.Node) -> bool:
    """Whether a node changes a tensor that it is given."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    if getattr(node.target, "__module__", "") == operator.add.__module__:
        return name in _WRITING_OPERATORS
    inplace = node.kwargs.get("inplace") or node.target is F.silu and argument(node, "inplace", 1)
    return bool(inplace or "out" in node.kwargs or name == "__setitem__" or re.fullmatch(r"(?!__).*[^_]_", name))


_WRITING_OPERATORS = {"setitem", "delitem"} | {
    f"i{name}" for name in "add and concat floordiv lshift matmul mod mul or pow rshift sub truediv xor".split()
}


def is_input(node: fx.Node) -> bool:
    return node.op in ("placeholder", "get_attr")


def is_method(node: fx.Node, name: str, args: tuple | None = None) -> bool:
    """A method call, with those arguments whether given one by one or as one sequence."""
    if node.op != "call_method" or node.target != name:
        return False
    given = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], (tuple, list)) else node.args[1:]
    return args is None or tuple(given) == args


def call_method(graph: fx.Graph, name: str, x: fx.Node, *args) -> fx.Node:
    """A new call, with its value: before torch 2.12 a method of a node without one keeps a graph out of the cache."""
    node = graph.call_method(name, (x, *args))
    node.meta["example_value"] = getattr(value_of(x), name)(*fx.node.map_arg(args, value_of))
    return node


def has_one_user(node: fx.Node) -> bool:
    return len(node.users) == 1


def same_form(*nodes: fx.Node) -> bool:
    """Whether all are known to be tensors of one shape and dtype."""
    first, *others = [value_of(node) for node in nodes]
    return all(
        isinstance(v, Tensor)
        and v.dtype == first.dtype
        and len(v.shape) == len(first.shape)
        and known(a == b for a, b in zip(v.shape, first.shape, strict=True))
        for v in others
    )


def is_one_pixel(node: fx.Node, image: fx.Node) -> bool:
    """Whether a node holds one pixel for each image of another."""
    a, b = value_of(node), value_of(image)
    if not isinstance(a, Tensor) or a.dim() != 4 or a.dtype != b.dtype:
        return False
    return known(n == m for n, m in zip(a.shape, (*b.shape[:2], 1, 1), strict=True))


def holds_pixels(tokens: fx.Node, image: fx.Node) -> bool:
    """Whether a node is ``[batch, height * width, channels]`` where another is ``[batch, height, width, channels]``."""
    a, b = value_of(tokens).shape, value_of(image).shape
    if (len(a), len(b)) != (3, 4):
        return False
    return known(n == m for n, m in zip(a, (b[0], b[1] * b[2], b[3]), strict=True))


def known(conditions: Iterable) -> bool:
    """Whether all conditions on sizes, which may be symbols, hold whatever the sizes are."""
    return all(map(statically_known_true, conditions))


def replace_node(node: fx.Node, new: fx.Node) -> None:
    """Let the users of ``node`` use ``new``, which is taken for the same value, and erase ``node``."""
    new.meta = {**node.meta, **new.meta}
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def replace_by_call(graph: fx.Graph, node: fx.Node, function: Callable, args: tuple) -> None:
    with graph.inserting_before(node):
        new = graph.call_function(function, args)
    replace_node(node, new)
