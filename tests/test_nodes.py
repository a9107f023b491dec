"""What is read from the nodes of a Dynamo graph, and how they are replaced."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from mixdq_ao import nodes


@pytest.fixture
def graph():
    return fx.Graph()


def holding(graph: fx.Graph, name: str, *size: int, dtype=torch.float32) -> fx.Node:
    node = graph.placeholder(name)
    node.meta["example_value"] = torch.empty(size, dtype=dtype, device="meta")
    return node


@pytest.mark.parametrize(
    ("op", "target", "kwargs", "expected"),
    [
        ("call_function", operator.iadd, {}, True),
        ("call_function", operator.setitem, {}, True),
        ("call_function", operator.add, {}, False),
        ("call_function", operator.index, {}, False),
        ("call_function", operator.invert, {}, False),
        ("call_function", torch.add, {"out": None}, True),
        ("call_function", F.relu, {"inplace": True}, True),
        ("call_function", F.relu, {"inplace": False}, False),
        ("call_method", "mul_", {}, True),
        ("call_method", "__setitem__", {}, True),
        ("call_method", "__add__", {}, False),
        ("call_method", "mul", {}, False),
        ("placeholder", "add_", {}, False),
    ],
)
def test_what_writes(graph, op, target, kwargs, expected):
    x = graph.placeholder("x")
    node = graph.create_node(op, target, () if op == "placeholder" else (x,), kwargs)
    assert nodes.writes(node) == expected


def test_silu_writes_if_its_second_argument_says_so(graph):
    x = graph.placeholder("x")
    assert [nodes.writes(graph.call_function(F.silu, (x, inplace))) for inplace in (True, False)] == [True, False]


@pytest.mark.parametrize("args", [(0, 2, 1), ((0, 2, 1),), ([0, 2, 1],)])
def test_a_method_s_arguments_may_be_one_sequence(graph, args):
    node = graph.call_method("permute", (graph.placeholder("x"), *args))
    assert nodes.is_method(node, "permute") and nodes.is_method(node, "permute", (0, 2, 1))
    assert not nodes.is_method(node, "permute", (0, 1, 2)) and not nodes.is_method(node, "reshape")


def test_an_argument_stands_anywhere(graph):
    x = graph.placeholder("x")
    by_place, by_name = graph.call_function(F.dropout, (x, 0.0)), graph.call_function(F.dropout, (), {"input": x})
    assert nodes.argument(by_place, "p", 1, 0.5) == 0.0 and nodes.argument(by_name, "p", 1, 0.5) == 0.5
    assert nodes.input_of(by_place) is nodes.input_of(by_name) is x


def test_a_new_method_call_has_its_value(graph):
    node = nodes.call_method(graph, "permute", holding(graph, "x", 2, 3, 4), 0, 2, 1)
    assert nodes.value_of(node).shape == (2, 4, 3)


def test_forms(graph):
    image, pixel = holding(graph, "image", 2, 8, 4, 4), holding(graph, "pixel", 2, 8, 1, 1)
    other = holding(graph, "other", 2, 8, 4, 4, dtype=torch.float16)
    assert nodes.same_form(image, image, image)
    assert not nodes.same_form(image, other) and not nodes.same_form(image, pixel)
    assert not nodes.same_form(image, graph.placeholder("nothing_known"))
    assert nodes.is_one_pixel(pixel, image)
    assert not nodes.is_one_pixel(image, image) and not nodes.is_one_pixel(pixel, other)
    pixels, tokens, lines = (holding(graph, "x", *shape) for shape in ((2, 3, 4, 8), (2, 12, 8), (6, 4, 8)))
    assert nodes.holds_pixels(tokens, pixels)
    assert not any(nodes.holds_pixels(*pair) for pair in ((lines, pixels), (pixels, pixels), (tokens, tokens)))


def test_a_node_is_replaced_by_a_call(graph):
    x = graph.placeholder("x")
    old = graph.call_function(F.relu, (x,))
    old.meta["example_value"] = value = torch.empty(2)
    graph.output((old, old))
    assert nodes.has_one_user(old) and not nodes.is_input(old) and nodes.is_input(x)
    nodes.replace_by_call(graph, old, torch.neg, (x,))
    graph.lint()
    (new,) = nodes.calls(graph, torch.neg)
    assert nodes.value_of(new) is value and not list(nodes.calls(graph, F.relu))
    y = fx.GraphModule({}, graph)(torch.ones(2))
    assert torch.equal(y[0], -torch.ones(2))
