"""The cache of compiled code as a file: another process compiles nothing again, another machine is told why it does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.compiler._cache import CacheInfo

from mixdq_ao import CheckpointError, MixDQError, compile_cache, load_compile_cache, precompiled, save_compile_cache
from mixdq_ao.files import write_tensors

IN_ANOTHER_PROCESS = """
import sys, torch
sys.path.insert(0, {tests!r})
from torch._dynamo.utils import counters
import mixdq_ao
from test_compiling import net, run, sample
loaded = mixdq_ao.load_compile_cache({file!r}) if {load} else False
run(mixdq_ao.compile(net(), cache={cache}), sample(), torch.tensor(7.0))
if not loaded:
    mixdq_ao.save_compile_cache({file!r})
print(loaded, *(counters["inductor"]["fxgraph_cache_" + kind] for kind in ("miss", "hit")),
      counters["aot_autograd"]["autograd_cache_hit"], counters["stats"]["unique_graphs"])
"""


@pytest.mark.parametrize(
    "cache, first, second", [(False, "1 0 0 1", "0 1 1 1"), (True, "0 0 0 1", "0 0 0 0")], ids=["Inductor's", "whole"]
)
def test_another_process_compiles_nothing_again(tmp_path, cache, first, second):
    def run(load: bool) -> list[str]:
        """In a process that finds nothing in torch's own folder."""
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / f"{load}")}
        names = {"tests": str(Path(__file__).parent), "file": str(tmp_path / "unet.cache")}
        code = IN_ANOTHER_PROCESS.format(**names, load=load, cache=cache)
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    assert run(load=False) == ["False", *first.split()]
    assert run(load=True) == ["True", *second.split()]


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A file as ``save_compile_cache`` writes it, whose bytes torch cannot read."""
    path = tmp_path / "unet.cache"
    info = CacheInfo()
    info.artifacts["inductor"].append("a key")
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"bytes", info))
    monkeypatch.setattr(precompiled, "_used", {})
    save_compile_cache(path)
    return path


@pytest.mark.parametrize("key", ["mixdq_ao", "torch", "device"])
def test_another_machine(file, key, monkeypatch):
    machine = {**compile_cache._machine(), key: "other"}
    monkeypatch.setattr(compile_cache, "_machine", lambda: machine)
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", lambda data: pytest.fail("must not be read"))
    with pytest.warns(UserWarning, match=f"compiled anew: {key} .*, here other"):
        assert not load_compile_cache(file)


def test_files_that_are_no_cache(file, tmp_path, caplog):
    with pytest.raises(CheckpointError, match="must be what torch.compiler.save_cache_artifacts gives"):
        load_compile_cache(file)
    header = {"format": compile_cache.FORMAT, "format_version": compile_cache.FORMAT_VERSION}
    write_tensors(tmp_path / "other", {"x": torch.zeros(3)}, header | compile_cache._machine())
    with pytest.raises(CheckpointError, match="'x': must be artifacts or the name of a compiled step"):
        load_compile_cache(tmp_path / "other")
    write_tensors(tmp_path / "other", {}, header | compile_cache._machine())
    with pytest.raises(CheckpointError, match="must hold artifacts or compiled steps; found nothing"):
        load_compile_cache(tmp_path / "other")
    for name in ("../../evil", "0" * 63, "0" * 64 + "/x"):
        write_tensors(tmp_path / "other", {name: torch.zeros(3, dtype=torch.uint8)}, header | compile_cache._machine())
        with pytest.raises(CheckpointError, match="the name of a compiled step"):
            load_compile_cache(tmp_path / "other")
    write_tensors(tmp_path / "model", {"x": torch.zeros(3)}, {})
    with pytest.raises(CheckpointError, match="must be 'mixdq_ao.compile_cache'"):
        load_compile_cache(tmp_path / "model")


def test_nothing_compiled(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: None)
    monkeypatch.setattr(precompiled, "_used", {})
    with pytest.raises(MixDQError, match="Run the compiled model once.*backend='eager'"):
        save_compile_cache(tmp_path / "unet.cache")
    assert not list(tmp_path.iterdir())
