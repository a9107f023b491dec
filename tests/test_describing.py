"""Descriptions of models and code: the same in every process, and another for everything that compiled code sees."""

import enum
import functools
import os
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
import torch
from models import unet_inputs
from pipelines import micro_unet
from test_compiling import net
from torch import nn

from mixdq_ao import describing
from mixdq_ao.describing import IndescribableError, describe, describe_code

IN_ANOTHER_PROCESS = """
import sys
sys.path.insert(0, {tests!r})
from diffusers.models import attention_processor
from pipelines import micro_unet
from test_compiling import net
from mixdq_ao.describing import describe, describe_code
modules = ["diffusers.models.attention_processor", "diffusers.models.unets.unet_2d_condition", "torch.nn.functional",
           "diffusers.utils.import_utils", "inspect", "mixdq_ao.tensor", "torch.nn.modules.module"]
print(describe([net(), micro_unet()]), describe_code(modules))
"""


def test_another_process_finds_the_same():
    def output(seed: str) -> str:
        code = IN_ANOTHER_PROCESS.format(tests=str(Path(__file__).parent))
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert output("1") == output("2") != ""


def test_values_of_tensors_do_not_count():
    model = net()
    before = describe(model)
    with torch.no_grad():
        model.norm.weight.add_(1)
        model.attn1["to_q"].weight.scale.mul_(2)
    assert describe(model) == before == describe(net())


class Color(enum.Enum):
    RED = 1
    BLUE = 2


def hooked(number):
    return lambda module, arguments: number


def _share(model):
    model.attn1["to_q"] = model.attn1["to_k"]


def _set(name, value):
    return lambda model: setattr(model, name, value)


CHANGES = {
    "a number": _set("scaling", 2.0),
    "its type": _set("scaling", 2),
    "a choice": _set("color", Color.RED),
    "another choice": _set("color", Color.BLUE),
    "a set": _set("names", {"a", "b"}),
    "a function": _set("act", torch.nn.functional.relu),
    "another function": _set("act", torch.nn.functional.silu),
    "a method": _set("act", Color.RED.__format__),
    "part of a call": _set("act", functools.partial(torch.nn.functional.silu, inplace=True)),
    "training": nn.Module.train,
    "half precision of what is not quantized": lambda m: m.norm.half(),
    "siblings": lambda m: setattr(m.attn1["to_q"].weight, "act_group", 5),
    "gradients": lambda m: m.norm.weight.requires_grad_(True),
    "strides": lambda m: setattr(m, "offset", torch.zeros(32)[::2]),
    "a shared layer": _share,
    "a hook": lambda m: m.register_forward_pre_hook(hooked(1)),
    "another hook": lambda m: m.register_forward_pre_hook(hooked(2)),
    "a slot": _set("slot", type("Slotted", (), {"__slots__": ("x", "y")})()),
    "a configuration": _set("config", {"_name_or_path": "/here", "groups": 2}),
}


def test_everything_else_counts():
    found = {"nothing": describe(net())}
    for what, change in CHANGES.items():
        model = net().requires_grad_(False)
        found.setdefault("none need gradients", describe(model))
        change(model)
        found[what] = describe(model)
    assert len(set(found.values())) == len(found)


def test_where_a_model_came_from_does_not_count():
    def described(path, order):
        return describe({"config": {"_name_or_path": path, "_use_default_values": order, "groups": 2}})

    assert described("/here", ["a", "b"]) == described("/there", ["b", "a"])


def test_equal_objects_are_told_from_one_that_is_there_twice():
    a, b = [1], [1]
    assert describe([a, a]) != describe([a, b]) == describe([b, a])
    assert describe([(1, 2), (1, 2)]) == describe([(1, 2)] * 2)  # not for what the interpreter may share


def test_a_real_unet_is_described_to_its_processors():
    unet = micro_unet()
    before = describe(unet)
    unet.set_attn_processor(type("Other", (type(next(iter(unet.attn_processors.values()))),), {})())
    assert describe(unet) != before


class Holder:
    def __init__(self, value):
        self.value = value


def test_what_cannot_be_described(monkeypatch):
    with pytest.raises(IndescribableError, match="a _thread.lock in it, of which nothing is known"):
        describe(Holder(threading.Lock()))
    nested = []
    for _ in range(sys.getrecursionlimit()):
        nested = [nested]
    with pytest.raises(IndescribableError, match="nested too deeply"):
        describe(nested)
    monkeypatch.setattr(describing, "_MAX_OBJECTS", 3)
    assert describe([[], []])
    with pytest.raises(IndescribableError, match="more than 3 objects"):
        describe([[], [], []])


SOURCE = """
import functools
LIMIT = 3
TABLE = {"a": 1}
kept = {}

def scaled(f):
    return lambda x: f(x) * LIMIT

def plain(x, *, by=2):
    return x + by

@scaled
def decorated(x):
    return x

class Thing:
    factor = 2
    @staticmethod
    def twice(x): return 2 * x
    @property
    def half(self): return 0.5
    @functools.cached_property
    def third(self): return 1 / 3
    def method(self, x): return x
"""


@pytest.fixture
def module(monkeypatch):
    def made(source=SOURCE) -> types.ModuleType:
        module = types.ModuleType("of_a_test")
        monkeypatch.setitem(sys.modules, "of_a_test", module)
        exec(source, module.__dict__)
        return module

    return made


@pytest.mark.parametrize(
    "old, new",
    [
        ("LIMIT = 3", "LIMIT = 4"),
        ('{"a": 1}', '{"a": 2}'),
        ("x + by", "x - by"),
        ("by=2", "by=3"),
        ("    return x\n\nclass", "    return -x\n\nclass"),
        ("f(x) * LIMIT", "f(x) / LIMIT"),
        ("factor = 2", "factor = 3"),
        ("return 2 * x", "return x + x"),
        ("return 0.5", "return 0.25"),
        ("return 1 / 3", "return 1 / 4"),
        ("def method(self, x): return x", "def method(self, x): return self"),
    ],
)
def test_code_that_somebody_replaced(module, old, new):
    module()
    before = describe_code(["of_a_test"])
    module()
    assert describe_code(["of_a_test"]) == before
    assert SOURCE.count(old) == 1
    module(SOURCE.replace(old, new))
    assert describe_code(["of_a_test"]) != before


def test_a_closure_over_what_is_not_there_yet(module):
    made = module("def outer():\n    def inner(): return later\n    if False: later = 1\n    return inner\nf = outer()")
    assert describe(made.f) and describe_code(["of_a_test"]) != {"of_a_test": ""}


def test_what_code_keeps_for_itself_does_not_count(module):
    module().kept["x"] = 1
    assert describe_code(["of_a_test"]) == describe_code(["of_a_test", "of_a_test"])
    before = describe_code(["of_a_test"])
    sys.modules["of_a_test"].kept["y"] = 1
    assert describe_code(["of_a_test"]) == before
    assert describe_code(["not_there"]) == {"not_there": ""}


def test_compiling_changes_nothing():
    """Another variant may have been compiled in this process before, or not."""
    modules = [name for name in sys.modules if name.startswith("torch.nn.") or name == "mixdq_ao.precompiled"]
    before, model = describe_code(modules), micro_unet()
    description = describe(model)
    with torch.no_grad():
        torch.compile(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), fullgraph=True)(torch.ones(2, 3))
        torch.compile(model, backend="eager")(**unet_inputs(size=8))
    assert describe_code(modules) == before and describe(model) == description


def test_another_attention_shows(monkeypatch):
    before = describe_code(["torch.nn.functional"])
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v: v)
    assert describe_code(["torch.nn.functional"]) != before
