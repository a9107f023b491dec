"""Compiled steps as files: who finds one, who must not, and what happens where none can be kept."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers.utils import BaseOutput
from test_compiling import net, run, sample
from torch import nn
from torch._dynamo.utils import counters

import mixdq_ao
from mixdq_ao import Passes, precompiled
from mixdq_ao.files import write_tensors

STEP = torch.tensor(7.0)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """An empty one for this test, and no graphs of others."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(precompiled, "_used", {})
    torch._dynamo.reset()
    counters.clear()
    yield tmp_path / "mixdq_ao"
    torch._dynamo.reset()


def compiled(model=None, **options):
    return mixdq_ao.compile(net() if model is None else model, cache=True, **options)


def traced() -> int:
    return counters["stats"]["unique_graphs"]


def steps(folder: Path) -> int:
    return len(list(folder.glob("*.safetensors"))) if folder.exists() else 0


def test_a_step_is_traced_once_for_all_models_like_it(folder):
    first, x = compiled(), sample()
    y = run(first, x, STEP)
    assert torch.equal(y["sample"], run(net(), x, STEP)["sample"]) and (traced(), steps(folder)) == (1, 1)
    other = net()
    with torch.no_grad():
        other.norm.weight.mul_(3)
    second = compiled(other)
    assert torch.equal(run(second, x, STEP)["sample"], run(other, x, STEP)["sample"])
    assert not torch.equal(run(second, x, STEP)["sample"], y["sample"])
    assert (traced(), steps(folder)) == (1, 1)
    assert first.hits == second.hits and first.hits["layers"] == 3
    assert torch.equal(run(first, x, STEP)["sample"], y["sample"])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_model_can_be_moved_afterwards(mode, folder):
    model = net()
    before, parameters = run(model, sample(), STEP)["sample"], list(model.parameters())
    fast = compiled(model)
    with mode():
        y = fast(sample(), STEP)["sample"]
    assert torch.equal(y, before) and steps(folder) == 1
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    model.bfloat16().float()
    assert run(fast, sample(), STEP)["sample"].isfinite().all()


def test_tensors_that_nothing_can_stand_in_for_are_compiled_as_ever(folder):
    class Special(nn.Parameter):
        pass

    model = net()
    model.norm.weight = Special(model.norm.weight)
    expected = run(model, sample(), STEP)["sample"]
    with pytest.warns(UserWarning, match="makes a Parameter of a Special"):
        assert torch.equal(run(compiled(model), sample(), STEP)["sample"], expected)
    assert steps(folder) == 0


IN_ANOTHER_PROCESS = """
import sys, torch
sys.path.insert(0, {tests!r})
from torch._dynamo.utils import counters
import mixdq_ao
from test_compiling import net, run, sample
model, x = net(), (sample(), torch.tensor(7.0))
compiled = mixdq_ao.compile(model, cache=True)
assert torch.equal(run(compiled, *x)['sample'], run(model, *x)['sample'])
print(counters["stats"]["unique_graphs"], compiled.hits["layers"])
"""


def test_another_process_traces_nothing():
    code = IN_ANOTHER_PROCESS.format(tests=str(Path(__file__).parent))

    def output() -> list[str]:
        done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    assert [output(), output()] == [["1", "3"], ["0", "3"]]


@dataclass
class Output(BaseOutput):
    sample: torch.Tensor = None
    other: torch.Tensor | None = None


class OfDataclass(nn.Module):
    def forward(self, sample, return_dict=True):
        return Output(sample=sample * 2) if return_dict else (sample * 2,)


@pytest.mark.parametrize("return_dict", [True, False])
def test_outputs_as_a_dataclass(return_dict, recwarn):
    """As those of diffusers' models, for which Dynamo needs globals of its own."""
    model, x = OfDataclass(), sample()
    for _ in range(2):
        y = run(compiled(model), x, return_dict=return_dict)
        assert type(y) is (Output if return_dict else tuple) and torch.equal(y[0], x * 2)
        for name in [name for name in precompiled._step.__globals__ if name.startswith("___")]:
            del precompiled._step.__globals__[name]  # as in a process that has compiled nothing
        torch._dynamo.reset()
    assert traced() == 1 and not [w for w in recwarn if "anew" in str(w.message)]


def test_each_kind_of_call_has_its_own(folder):
    model, extra = net(), {"bias": {"value": torch.ones(16)}, "scale": 2.0}
    fast = compiled(model)
    transposed = sample(5, 2).transpose(0, 1)
    calls = [
        ((sample(), STEP), {}),
        ((sample(3), STEP), {}),
        ((transposed, STEP), {}),
        ((sample(), STEP), {"return_dict": False}),
        ((sample(), STEP, extra), {}),
        ((sample(), STEP, {**extra, "scale": 3.0}), {}),
    ]
    for count, (args, kwargs) in enumerate([*calls, *calls]):
        found, expected = run(fast, *args, **kwargs), run(model, *args, **kwargs)
        found, expected = (y["sample"] if isinstance(y, dict) else y[0] for y in (found, expected))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        assert steps(folder) == traced() == min(count + 1, len(calls))
    with torch.inference_mode():
        assert torch.equal(fast(sample(), STEP)["sample"], run(model, sample(), STEP)["sample"])
    assert steps(folder) == len(calls) + 1


def test_settings_have_their_own(folder):
    def kept(**options) -> int:
        run(compiled(**options), sample(), STEP)
        return steps(folder)

    assert kept() == 1
    assert kept(passes=Passes(merge=False)) == 2
    assert kept(attention="math") == 3
    assert kept(options={"max_fusion_size": 5}) == 4
    with torch._inductor.config.patch(max_fusion_size=6):
        assert kept() == 5
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert kept() == 6
    with torch.autocast("cpu", torch.bfloat16):
        assert kept() == 7
    assert kept() == kept(passes=Passes(), attention="auto") == 7 == traced()


def test_after_a_change_reset_finds_the_other_step(folder):
    class Scaled(nn.Module):
        scaling = 2.0

        def forward(self, sample):
            return sample * self.scaling

    model = Scaled()
    fast, x = compiled(model), sample()
    assert torch.equal(run(fast, x), x * 2)
    model.scaling = 3.0
    fast.reset()
    assert torch.equal(run(fast, x), x * 3)
    model.scaling = 2.0
    fast.reset()
    assert torch.equal(run(fast, x), x * 2) and steps(folder) == traced()


def test_code_that_changed_is_compiled_anew(folder, monkeypatch):
    model = nn.Sequential(nn.Linear(4, 4), nn.Hardsigmoid())
    fast, x = compiled(model), torch.randn(3, 4)
    run(fast, x)
    monkeypatch.setattr(nn.Hardsigmoid, "forward", lambda self, y: y * 0 + 5)
    assert torch.equal(run(compiled(model), x), torch.full((3, 4), 5.0))
    assert (steps(folder), traced()) == (1, 2)
    fast.reset()
    assert torch.equal(run(fast, x), torch.full((3, 4), 5.0)) and traced() == 2


@pytest.mark.parametrize("broken", [b"", b"no safetensors file at all", "metadata", "a step"])
def test_a_broken_file_is_replaced(folder, broken):
    run(compiled(), sample(), STEP)
    (path,) = folder.iterdir()
    if isinstance(broken, bytes):
        path.write_bytes(broken)
    else:
        header = {"format": precompiled.FORMAT, "format_version": precompiled.FORMAT_VERSION, "hits": "{}"}
        header |= {"code": "{}", "modules": "{}"} if broken == "a step" else {}
        write_tensors(path, {"program": torch.zeros(9, dtype=torch.uint8)}, header)
    with pytest.warns(UserWarning, match=f"{path.name} cannot be used, the step is compiled anew"):
        y = run(compiled(), sample(), STEP)
    assert torch.equal(y["sample"], run(net(), sample(), STEP)["sample"]) and traced() == 2
    run(compiled(), sample(), STEP)
    assert traced() == 2


def test_a_folder_that_cannot_be_written(folder):
    folder.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="not kept for other processes"):
        y = run(compiled(), sample(), STEP)
    assert torch.equal(y["sample"], run(net(), sample(), STEP)["sample"])


def test_what_cannot_be_kept_is_compiled_all_the_same(folder, monkeypatch):
    def refused(match, model=None):
        fast = compiled(model)
        with pytest.warns(UserWarning, match=match):
            y = fast(sample(), STEP)
        assert torch.equal(y["sample"], run(net(), sample(), STEP)["sample"])
        assert not steps(folder)

    strange = net()
    strange.generator = torch.Generator()
    with torch.no_grad():
        refused("a torch._C.Generator in it, of which nothing is known", strange)
        with torch._inductor.config.patch(force_disable_caches=True):
            refused("torch's caches are switched off")
        with torch._inductor.config.patch(post_grad_custom_pre_pass=lambda graph: None, fx_graph_cache=False):
            refused("Inductor's config has passes of its own")
        with torch.compiler.set_stance("force_eager"):
            refused("torch.compile is switched off")
        monkeypatch.delattr(torch.compiler, "load_compiled_function")
        refused("has no torch.compiler.load_compiled_function")


def test_gradients_of_a_floating_model():
    model = nn.Linear(4, 4)
    x = torch.randn(3, 4)
    with pytest.warns(UserWarning, match="gradients are on"):
        y = compiled(model)(x)
    y.sum().backward()
    assert torch.allclose(model.weight.grad, x.sum(0).expand(4, 4))


def test_auto_says_only_what_went_wrong(folder, recwarn):
    """And keeps nothing where no CUDA graph is recorded, or a change of the model would go unnoticed."""
    run(mixdq_ao.compile(net()), sample(), STEP)
    assert not steps(folder) and not [w for w in recwarn if "kept" in str(w.message)]


def test_where_aot_compile_fails(folder, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("for a reason\nof many lines")

    monkeypatch.setattr("torch._dynamo.aot_compile.aot_compile_fullgraph", fails)
    with pytest.warns(UserWarning, match="not kept for other processes: torch's aot_compile failed: for a reason$"):
        y = run(compiled(), sample(), STEP)
    assert torch.equal(y["sample"], run(net(), sample(), STEP)["sample"])


def test_another_torch_that_has_things_elsewhere(monkeypatch):
    monkeypatch.delattr(torch, "get_float32_matmul_precision")
    with pytest.warns(UserWarning, match="what it depends on cannot be read: .*get_float32_matmul_precision"):
        y = run(compiled(nn.Hardsigmoid(), cuda_graphs=False), sample())
    assert torch.equal(y, nn.functional.hardsigmoid(sample()))


def test_an_error_of_the_model_is_its_own(folder):
    with pytest.warns(UserWarning, match="aot_compile failed"), pytest.raises(Exception, match="(?i)size|shape|expand"):
        run(compiled(), torch.randn(2, 5, 7), STEP)
