"""What the GPU benchmarks decide without a GPU: shapes, candidates, the table of kernels, sums."""

import contextlib
import gzip
import json
import os
import sys
import time
from collections import Counter
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import typer
from expecttest import assert_expected_inline
from original import TINY_CONFIG
from rich.console import Console
from torch import nn
from torch._dynamo.utils import counters
from typer.main import get_command

from mixdq_ao import cli
from mixdq_ao.bench.inputs import make_inputs
from mixdq_ao.bench.models import find_model
from mixdq_ao.bench.results import Results, Row, Settings
from mixdq_ao.bench.run import warm_step
from mixdq_ao.bench.timing import Times
from mixdq_ao.bench.variants import parse_variants
from mixdq_ao.errors import MixDQError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import attention
import claims
import eager
import gpu
import kernels
import replay
import run_all
import sdxl_shapes
import sensitivity
import tune
import tune_step
from sdxl_shapes import Attention, Conv, Linear


def shapes_of_diffusers(pixels: int, batch: int) -> Counter:
    """The layers and attentions that diffusers' UNet of SDXL calls, on the meta device."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        found = Counter()

        def record(module, args):
            x = args[0]
            if isinstance(module, nn.Linear):
                found[Linear(x.numel() // x.shape[-1], module.out_features, module.in_features)] += 1
            else:
                shape = (x.shape[0], x.shape[2], x.shape[1], module.out_channels)
                found[Conv(*shape, module.kernel_size[0], module.stride[0])] += 1

        def attend(q, k, v, **options):
            found[Attention(*q.shape[:3], k.shape[2])] += 1
            return torch.empty_like(q)

        for module in unet.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.register_forward_pre_hook(record)
        size = pixels // 8
        with torch.inference_mode(), mock.patch.object(F, "scaled_dot_product_attention", attend):
            unet(
                torch.empty(batch, 4, size, size),
                torch.tensor(1),
                torch.empty(batch, 77, 2048),
                added_cond_kwargs={"text_embeds": torch.empty(batch, 1280), "time_ids": torch.empty(batch, 6)},
            )
    return found


def test_shapes_are_those_of_diffusers():
    assert sdxl_shapes.layers(768, 2) + sdxl_shapes.attentions(768, 2) == shapes_of_diffusers(768, 2)


def test_sizes_of_a_step():
    layers = sdxl_shapes.layers(512, 1)
    assert layers.total() == 743 + 51
    assert round(sum(count * layer.flops for layer, count in layers.items()) / 1e9) == 1534
    attentions = sdxl_shapes.attentions(1024, 1)
    assert attentions.total() == 2 * 70
    assert round(sum(count * one.flops for one, count in attentions.items()) / 1e9) == 784
    stride_2 = Conv(1, 64, 320, 320, 3, stride=2)
    assert stride_2 in layers and (stride_2.m, stride_2.k, stride_2.taps) == (1024, 2880, 9)


def test_kernels_are_those_of_the_catalogue():
    native = pytest.importorskip("mixdq_ao._C", reason="mixdq_ao._C was not built")
    assert {k.name: k.max_splits for k in gpu.KERNELS} == {k.name: k.max_splits for k in native.kernels()}
    layers = {*sdxl_shapes.layers(512, 1), *sdxl_shapes.merged(1024, 4), Linear(20, 8, 24), Linear(3, 8, 48)}
    for layer in layers:
        for bits in (8, 4, 2):
            for kernel in gpu.KERNELS:
                shape = (layer.m, layer.columns, layer.k, layer.taps, bits)
                # _C knows a 1x1 convolution only as the linear layer that it is.
                if not (kernel.name == "few_rows" and isinstance(layer, Conv)):
                    ends = {"floating": "_floating", "geglu": "_geglu", "quantizes": "_quantizing"}
                    kind = {name: kernel.name.endswith(end) for name, end in ends.items()}
                    able = not native.why_not(kernel.name, *shape, **kind)
                    assert bool(kernel.splits(layer, bits, **kind)) == able, (kernel, layer, bits)


def test_a_forced_kernel_ends_with_its_block(monkeypatch):
    for before in (None, "direct"):
        monkeypatch.delenv("MIXDQ_KERNEL", raising=False)
        if before:
            monkeypatch.setenv("MIXDQ_KERNEL", before)
        with pytest.raises(KeyError), gpu.forced("sm80_64x64", 2):
            assert os.environ["MIXDQ_KERNEL"] == "sm80_64x64:2"
            raise KeyError
        assert os.environ.get("MIXDQ_KERNEL") == before


def test_codes_are_those_of_normal_numbers():
    for bits, largest in ((8, 127), (4, 7)):
        codes = gpu.normal_codes(gpu.CHANNEL * 3 + 5, bits, "cpu")
        rows = codes[: gpu.CHANNEL * 3].view(3, gpu.CHANNEL)
        assert codes.dtype == torch.int8 and (rows.abs().amax(1) == largest).all() and codes.abs().max() == largest
        # The largest of 1,280 normal numbers is some three and a half times their deviation.
        assert largest / 5 < rows.float().std() < largest / 2.8


def test_what_fails_is_named_and_left_out(monkeypatch, capsys):
    def record(call, count):
        return call(0)

    def fails(i):
        raise RuntimeError("no such kernel\nand more")

    bench = object.__new__(gpu.Bench)
    monkeypatch.setattr(bench, "_record", record)
    monkeypatch.setattr(
        bench, "_replay", lambda graphs, repeats: {name: repeats + count for name, (_, count) in graphs.items()}
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert bench.try_in_turn({"a": (lambda i: i, 4), "b": (fails, 4)}, "a layer, ") == {"a": 9}
    assert capsys.readouterr().out == "a layer, b: no such kernel\n"
    assert bench.try_us("b", fails, 4) is None and bench.try_us("a", lambda i: i, 4, 3) == 7
    assert bench._at is None


def test_launches_go_through_more_weights_than_the_cache_holds():
    layer = Linear(256, 1280, 1280)
    assert gpu.launches(layer, 1280 * 1280) * 1280 * 1280 > 150e6
    long = Conv(4, 128, 640, 640, 3)
    assert 8 <= gpu.launches(long, long.n * long.k) <= 16


def test_every_problem_has_candidates():
    problems = tune.problems()
    assert {key[-1] for key in problems} == {8, 4}
    for key, layers in problems.items():
        for layer in layers:
            assert (layer.m, layer.columns, layer.k, layer.taps) == key[:4]
            for sm90 in (True, False):
                names = {name for name, _ in tune.candidates(layer, key[-1], sm90)}
                assert names and (sm90 or not any(n.startswith("sm90") for n in names))
    assert {c[0] for c in tune.candidates(Conv(1, 64, 4, 320, 3), 8, True)} == {"direct"}
    splits = {s for name, s in tune.candidates(Linear(256, 640, 640), 8, True) if name == "sm90_64x64"}
    assert splits == {1, 2, 4}
    found = tune.candidates(Linear(256, 1280, 5120), 8, True)
    assert {c for c in found if c[0] == "sm90_128x128_split"} == {("sm90_128x128_split", s) for s in (4, 5, 6)}


def test_only_what_comes_near_the_best_is_timed_again():
    first = {("a", 1): 10.0, ("a", 2): 11.5, ("b", 1): 30.0}
    again = {("a", 1): 10.4, ("a", 2): 9.0}
    assert tune.fastest(first, first.get, again.get) == {("a", 1): 10.0, ("a", 2): 9.0, ("b", 1): 30.0}
    fails = {("a", 1): None, ("a", 2): 11.5}
    assert tune.fastest(fails, fails.get, lambda option: None) == {("a", 2): 11.5}
    assert tune.fastest([("a", 1)], fails.get, fails.get) == {}


def test_layers_of_one_row_share_the_best_kernel():
    assert tune.best_of([{("a", 1): 1.0, ("b", 1): 2.0}, {("a", 1): 9.0, ("b", 1): 2.0}]) == ("b", 1)
    assert tune.best_of([{("a", 1): 1.0, ("b", 1): 2.0}, {("b", 1): 2.0}]) == ("b", 1)
    assert tune.best_of([{("a", 1): 1.0}, {("b", 1): 2.0}]) is None and tune.best_of([{}]) is None


def test_what_is_found_so_far_is_saved(monkeypatch, capsys):
    saved = []
    progress = gpu.Progress(3, lambda: saved.append(1))
    progress.step()
    assert not saved
    monkeypatch.setattr(gpu, "SAVE_SECONDS", 0.0)
    progress.step()
    progress.step()
    assert len(saved) == 2 and capsys.readouterr().out.endswith("3 of 3\n")


def test_the_table_keeps_what_was_not_measured_again(tmp_path):
    table = tmp_path / "tuning_table.inc"
    assert tune.read_table(table) == {}
    key, other = (256, 1280, 1280, 1, 8), (4096, 320, 2880, 9, 8)
    tune.write_table(
        table, {(90, other): ("sm90_128x160", 1), (90, key): ("sm90_64x64", 2), (80, key): ("sm80_64x64", 1)}
    )
    lines = table.read_text().splitlines()
    assert lines[0].startswith("// Written by benchmarks/tune.py")
    assert lines[2] == '{90, 256, 1280, 1280, 1, 8, "sm90_64x64", 2},'
    tune.write_table(table, tune.read_table(table) | {(90, key): ("sm90_64x80", 4)})
    assert tune.read_table(table) == {
        (80, key): ("sm80_64x64", 1),
        (90, key): ("sm90_64x80", 4),
        (90, other): ("sm90_128x160", 1),
    }
    assert [p.name for p in tmp_path.iterdir()] == [table.name]


def test_the_committed_table_names_kernels_that_exist():
    names = {k.name for k in gpu.KERNELS}
    rows = tune.read_table(tune.TABLE)
    assert len(rows) == sum(line.startswith("{") for line in tune.TABLE.read_text().splitlines())
    assert {name for name, _ in rows.values()} <= names


def test_sums_of_a_step():
    rows = [
        {"kind": "linear", "count": 10, "us": {"fp16": 20.0, "w8a8": 10.0, "w4a8": 8.0, "sm80": 16.0}},
        {"kind": "conv", "count": 2, "us": {"fp16": 100.0, "w8a8": 50.0, "w4a8": 50.0}},
    ]
    sums = kernels.sums(rows)
    assert sums["linear"]["w8a8_over_fp16"] == 2 and sums["linear"]["sm80_over_fp16"] == 1.25
    assert sums["conv"]["sm80_ms"] == 0.2 and sums["conv"]["sm80_missing"] == 2
    assert sums["all"]["fp16_ms"] == 0.4 and sums["all"]["w4a8_ms"] == pytest.approx(0.18)


def test_a_part_of_a_step_has_no_sums(tmp_path, monkeypatch):
    """What is saved between two layers: linear layers come first, and convolutions there are none then."""
    first, second = list(kernels.CASES)[:2]
    whole, times = len(kernels.layers(*kernels.CASES[first])), []

    def time_layer(bench, layer, in_time):
        times.append(layer)
        if len(times) == whole + 3:
            raise KeyboardInterrupt
        return {"us": {"fp16": 2.0, "w8a8": 1.0}, "kernels": {}}

    monkeypatch.setattr(gpu, "SAVE_SECONDS", 0.0)
    for name, stand_in in (
        ("require_gpu", lambda: None),
        ("environment", lambda: {"gpu": "none"}),
        ("Bench", lambda: SimpleNamespace(warm_up=lambda: None)),
        ("quantizers", lambda bench: []),
        ("time_layer", time_layer),
    ):
        monkeypatch.setattr(kernels, name, stand_in)
    with pytest.raises(KeyboardInterrupt):
        kernels.main(tmp_path / "kernels.json")
    cases = json.loads((tmp_path / "kernels.json").read_text())["cases"]
    assert cases[first]["sums"]["conv"]["w8a8_over_fp16"] == 2
    assert cases[second]["layers"] and not cases[second]["sums"]
    assert goals(tmp_path)[f"linear layers, W8A8, over fp16, {first}"].measured == 2


def test_sums_of_the_attention_of_a_step():
    rows = [
        {"count": 10, "us": {"flash": 20.0, "cudnn": 10.0, attention.TORCH: 10.0}, "auto": "cudnn"},
        {"count": 10, "us": {"flash": 4.0, attention.TORCH: 5.0}, "auto": "flash"},
    ]
    assert attention.sums(rows) == {"flash": 0.24, attention.TORCH: 0.15, "auto": 0.14, "best": 0.14}


def test_rates_of_the_sensitivity_stage(tmp_path, capsys):
    work = {0: [("weight", "ff", 2.0), ("act", "ff", 1.0)], 1: [("weight", "conv", 0.5), ("act", "conv", 0.5)]}
    for rank, rows in work.items():
        lines = [{"settings": {}}, *({"what": what, "key": key, "took": took} for what, key, took in rows)]
        (tmp_path / f"rows-{rank}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = sensitivity.full_rates(tmp_path, {"content": ["ff", "attn2"], "quality": ["conv"]})
    assert found["measured"] == 2 and found["layers_per_s"] == 2 / 3
    assert (found["content"]["s_per_layer"], found["quality"]["s_per_layer"]) == (3, 1)
    assert found["estimated_min"] == (2 * 3 + 1) / 60 / 2
    for processes, rate in ((1, 0.5), (2, 0.75)):
        report = sensitivity.Report(tmp_path / "out.json", processes, 0)
        report.add("layers", {"layers_per_s": rate})
    whole = json.loads((tmp_path / "out.json").read_text())
    assert whole["over_one_process"] == {"1": 1, "2": 1.5} and set(whole["processes"]) == {"1", "2"}


@pytest.mark.parametrize("lacks", ["device", "library"])
def test_without_kernels_there_is_nothing_to_measure(monkeypatch, lacks):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: lacks == "library")
    monkeypatch.setattr(gpu.ops, "cuda_library_missing", "no compiler was found")
    with pytest.raises(SystemExit, match="needs a CUDA device|needs the CUDA library: no compiler was found"):
        gpu.require_gpu()


def test_the_checked_launches_are_all_there_are(monkeypatch):
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")  # which the module would set for good
    import sanitize

    products, quantizers = list(sanitize.forced_products()), list(sanitize.quantizers())
    assert {kernel for _, kernel, *_ in products} == set(gpu.KERNELS)
    split = {(kernel.name, splits) for _, kernel, splits, *_ in products}
    assert {(k.name, k.max_splits) for k in gpu.KERNELS} <= split
    ops = {str(op) for *_, op, _ in [*products, *quantizers, *sanitize.attentions()]}
    assert {name.partition(".")[2] for name in ops} >= {
        "linear_int8", "linear_int8_dynamic", "linear_int8_multi", "linear_int8_geglu", "conv2d_int8",
        "quantized_linear", "quantize",
        "quantize_per_token", "layer_norm_quantize", "geglu_quantize", "group_norm_quantize", "short_attention",
        "short_attention_quantize",
    }  # fmt: skip
    launches = list(range(8))
    parts = [sanitize.share_of(launches, f"{i}/3") for i in (1, 2, 3)]
    assert parts == [[0, 3, 6], [1, 4, 7], [2, 5]] and sanitize.share_of(launches, "1/1") == launches
    for wrong in ("0/3", "4/3", "1", "a/3", "1/0", ""):
        with pytest.raises(typer.BadParameter, match="a share is written as 1/3"):
            sanitize.share_of(launches, wrong)


# --- kernels chosen by the time of a step -----------------------------------------------------------------------------


def layer_flops(config: str, size: int, batch: int) -> dict[str, int]:
    """Of each layer of a floating UNet, from what goes through it."""
    model, found = find_model(config).build(torch.float32, torch.device("cpu")), {}

    def hook(name):
        return lambda layer, args, y: found.update({name: 2 * y.numel() * layer.weight[0].numel()})

    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            layer.register_forward_hook(hook(name))
    with torch.no_grad():
        model(**make_inputs(model, batch, size))
    return found


def test_products_of_a_compiled_step(tmp_path):
    torch._dynamo.reset()
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"_class_name": "UNet2DConditionModel", **TINY_CONFIG}))
    expected = layer_flops(str(config), 64, 2)
    with warm_step(str(config), "w4a8", 2, size=64, device="cpu") as (call, turns):
        compiled = dict(counters["stats"])
        before = [getattr(torch.ops.mixdq_ao, name).default for name in tune_step.OPERATORS]
        counts, others = tune_step.products(call)
        seen, names = [], Counter()

        def run(product, call):
            seen.append(product)
            with gpu.forced("some", 3) if product else contextlib.nullcontext():
                names[os.environ.get("MIXDQ_KERNEL")] += 1
                return call()

        plain = call()
        with tune_step.intercepted(run):
            assert torch.equal(call(), plain)
        assert counters["stats"] == compiled  # nothing was compiled again, nor left to eager
        assert before == [getattr(torch.ops.mixdq_ao, name).default for name in tune_step.OPERATORS]
    assert Counter(p for p in seen if p) == counts and names == {"some:3": counts.total(), None: others}
    # Shortcuts of what was concatenated have two groups of inputs, each with a product of its own.
    split = [name for name in expected if "up_blocks" in name and name.endswith("conv_shortcut")]
    assert others == len(split) and {p.bits for p in counts} == {4}
    found = sum(count * 2 * p.m * p.n * p.k for p, count in counts.items())
    assert found == sum(flops for name, flops in expected.items() if name not in split)
    assert any(p.geglu for p in counts) and any(p.taps == 9 for p in counts)


def test_products_of_calls():
    codes, weight = torch.empty(2, 8, 32, dtype=torch.int8), torch.empty(6, 4, 32, dtype=torch.int8)
    whole = list(weight)
    alpha = list(torch.empty(6, 1, 4))
    rest = (alpha, [None] * 6)

    def multi(qdata, bits=(8,) * 6, groups=(32,)):
        return tune_step._multi(codes, qdata, alpha, *rest, list(bits), list(groups), torch.float16)

    assert multi(whole) == (16, 24, 32, 1, 8, False)
    assert multi(whole[::-1]) is multi(whole, (8, 8, 8, 8, 8, 4)) is multi(whole, groups=(16, 16)) is None
    image, window = torch.empty(2, 16, 9, 8, dtype=torch.int8), torch.empty(5, 8, 3, 3, dtype=torch.uint8)
    conv = (image, window, None, None, None, (2, 1), (1, 0), (1, 2))
    assert tune_step._conv(*conv, 4, [16], torch.float16) == (2 * 5 * 4, 5, 9 * 16, 9, 4, False)
    assert tune_step._conv(*conv, 4, [8, 8], torch.float16) is None


def test_what_is_tried_in_a_step(tmp_path):
    product = tune_step.Product(256, 1280, 1280, 1, 8)
    every = tune_step.options(product, True, {})
    alone = tune.candidates(Linear(256, 1280, 1280), 8, True)
    assert every == [c for c in alone if c[0].startswith("sm90")] and len(every) > 20
    assert all(name.startswith("sm80") for name, _ in tune_step.options(product, False, {}))
    row = dict(zip(("m", "n", "k", "taps", "bits"), product, strict=False))
    microseconds = [{"sm90_64x80:1": 4.0, "sm90_64x64:1": 5.0, "sm90_128x64:2": 5.5}, {"sm90_64x160:1": 3.0}]
    path = tmp_path / "tune.json"
    path.write_text(json.dumps({"rows": [{**row, "microseconds": microseconds}]}))
    near = tune_step.near_the_best(path)
    assert set(tune_step.options(product, True, near)[:2]) == {("sm90_64x80", 1), ("sm90_64x160", 1)}
    assert tune_step.options(product, True, near)[2:] == [("sm90_64x64", 1)]
    other = product._replace(m=300)
    assert tune_step.options(other, True, near) == tune_step.options(other, True, {})
    geglu = tune_step.options(tune_step.Product(256, 10240, 1280, 1, 4, True), True, near)
    assert {"packed" in name for name, _ in geglu} == {True, False} and all(n.endswith("_geglu") for n, _ in geglu)
    assert tune_step.options(tune_step.Product(1024, 320, 36, 9, 8), True, {}) == []  # 4 channels: only `direct`


def test_steps_are_recorded_with_their_kernels(monkeypatch):
    """On a stand-in for CUDA: what is launched in a capture has been launched before."""
    monkeypatch.delenv("MIXDQ_KERNEL", raising=False)
    capturing, seen, times = [], [], []

    class Graph:
        def capture_begin(self, pool):
            assert pool == "pool" and not capturing
            capturing.append(self)

        def capture_end(self):
            capturing.clear()

    def operator(xq, *args, residual):
        seen.append((bool(capturing), len(xq), os.environ.get("MIXDQ_KERNEL")))
        if os.environ.get("MIXDQ_KERNEL") == "fails:1" and capturing:
            raise RuntimeError("fails")

    def replays(graph, repeats, warmup):
        times.append(repeats)
        return Times.of([6.0])

    for name, stand_in in (
        ("Stream", object), ("CUDAGraph", Graph), ("graph_pool_handle", lambda: "pool"),
        ("stream", contextlib.nullcontext), ("synchronize", lambda: None),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(tune_step, "time_replays", replays)
    monkeypatch.setattr(torch.ops.mixdq_ao.linear_int8, "default", operator)
    weight = torch.empty(4, 8, dtype=torch.int8)

    def call():
        for rows in (3, 5):
            codes = torch.empty(rows, 8, dtype=torch.int8)
            torch.ops.mixdq_ao.linear_int8.default(codes, weight, None, None, None, 8, [8], torch.half, residual=None)

    timer, product = tune_step.Timer(call), tune_step.Product(5, 4, 8, 1, 8)
    own, forced = [(False, 3, None), (False, 5, None)], [(False, 3, None), (False, 5, "sm90_64x64:2")]
    for choices, warm in (({}, 2 * own), ({product: ("sm90_64x64", 2)}, forced), ({product: ("sm90_64x64", 2)}, [])):
        seen.clear()
        assert isinstance(timer.record(choices), Graph)
        assert seen == [*warm, *((True, *of[1:]) for of in (forced if choices else own))]
    with pytest.raises(RuntimeError, match="fails"):
        timer.record({product: ("fails", 1)})
    assert not capturing and "MIXDQ_KERNEL" not in os.environ
    assert torch.ops.mixdq_ao.linear_int8.default is operator
    assert (timer.ms(None), timer.ms(None), times) == (6, 6, [3, 10, 10])


FEW, MANY = tune_step.Product(256, 640, 640, 1, 8), tune_step.Product(256, 1280, 1280, 1, 8)
GEGLU = tune_step.Product(256, 10240, 1280, 1, 8, True)
A, B, C = ("sm90_64x80", 1), ("sm90_64x64", 1), ("sm90_128x64", 2)


class FakeTimer:
    """A step of 10 ms, and what each choice adds; a choice may cost more beside another. Drifts, and holds little."""

    def __init__(self, adds, together=None, noise=0.0):
        self.adds, self.together, self.noise = adds, together or {}, noise
        self.held, self.measured, self.most = [], 0, 0

    def record(self, choices):
        if ("fails", 1) in choices.values():
            raise RuntimeError("no such kernel\nmore")
        graph = [sum(self.adds[item] for item in choices.items()) + self.together.get(frozenset(choices.items()), 0)]
        self.held.append(graph)
        self.most = max(self.most, len(self.held))
        return graph

    def ms(self, graph):
        assert any(graph is held for held in self.held)
        self.measured += 1
        return 10 + graph[0] + self.noise * ((self.measured * 7) % 5 - 2)

    def drop(self, graph):
        self.held = [held for held in self.held if held is not graph]


def test_the_descent_finds_the_best_of_all(capsys):
    adds = {(MANY, A): -0.3, (MANY, B): -0.25, (MANY, C): 1.0, (FEW, A): -0.1, (FEW, B): 0.1, (GEGLU, C): 0.1}
    # With what is best for FEW, B is better for MANY: found in the second round.
    timer = FakeTimer(adds, {frozenset(((MANY, A), (FEW, A))): 0.08}, noise=0.001)
    todo = {MANY: [C, A, B, ("fails", 1)], FEW: [B, A], GEGLU: [C]}
    descent = tune_step.Descent(todo, timer)
    reports = []
    assert descent.run(lambda: True, lambda product, before: reports.append((product, before)))
    assert descent.choices == {MANY: B, FEW: A} and descent.after_ms == pytest.approx(9.65, abs=0.01)
    assert [p for p, _ in reports] == 3 * [MANY, FEW, GEGLU]
    assert [before for p, before in reports if p is MANY] == [None, A, B]
    assert timer.most <= 3 and len(timer.held) == 2
    descent.compare()
    assert (descent.before_ms, descent.after_ms) == (pytest.approx(10, abs=0.01), pytest.approx(9.65, abs=0.01))
    assert "256 x 1280 -> 1280, int8, fails:1: no such kernel" in capsys.readouterr().out


def test_the_librarys_own_choice_comes_back():
    timer = FakeTimer({(MANY, A): -0.1, (FEW, B): -0.5}, {frozenset(((MANY, A), (FEW, B))): 0.2})
    descent = tune_step.Descent({MANY: [A], FEW: [B]}, timer)
    assert descent.run(lambda: True, lambda *_: None) and descent.choices == {FEW: B}


@pytest.mark.parametrize("adds", [0.0, -0.001, 0.02])
def test_what_may_be_noise_changes_nothing(adds):
    timer = FakeTimer({(MANY, A): adds}, noise=0.002)
    descent = tune_step.Descent({MANY: [A]}, timer)
    assert descent.run(lambda: True, lambda *_: None) and not descent.choices and timer.measured < 20


def tune_with(monkeypatch, tmp_path, timer, seconds=100.0):
    """Its JSON file and its table."""
    monkeypatch.delenv("MIXDQ_KERNEL", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    step = contextlib.nullcontext((None, SimpleNamespace(alone=contextlib.nullcontext)))
    counts = Counter({MANY: 198, FEW: 2, GEGLU: 60, tune_step.Product(64, 320, 36, 9, 8): 1})
    for name, stand_in in (
        ("require_gpu", lambda: None),
        ("environment", lambda: {"gpu": "none"}),
        ("warm_step", lambda *args, **options: step),
        ("products", lambda call: (counts, 3)),
        ("options", lambda product, *_: {MANY: [A, B], FEW: [A], GEGLU: [C]}.get(product, [])),
        ("Timer", lambda call: timer),
    ):
        monkeypatch.setattr(tune_step, name, stand_in)
    table, out = tmp_path / "table.inc", tmp_path / "out.json"
    tune_step.main(table=table, out=out, seconds=seconds)
    return json.loads(out.read_text()), tune.read_table(table)


def test_a_step_writes_its_table(monkeypatch, tmp_path, capsys):
    other = (90, (4096, 320, 2880, 9, 8))
    tune.write_table(tmp_path / "table.inc", {other: ("sm90_128x160", 1), (90, MANY[:5]): C, (90, FEW[:5]): C})
    in_force = tmp_path / "in_force.inc"
    tune.write_table(in_force, {(90, MANY[:5]): C})
    monkeypatch.setenv("MIXDQ_TUNING_TABLE", str(in_force))
    adds = {(MANY, A): -0.3, (MANY, B): -0.4, (FEW, A): 0.1, (GEGLU, C): -0.05}
    found, table = tune_with(monkeypatch, tmp_path, FakeTimer(adds))
    assert table == {other: ("sm90_128x160", 1), (90, MANY[:5]): B, (90, FEW[:5]): C}
    rows = {row["n"]: row for row in found.pop("rows")}
    assert found == {
        "gpu": "none", "size": 512, "batch": 1, "variant": "w8a8", "before_ms": 10, "after_ms": 9.55,
        "ended": "nothing gains any more",
    }  # fmt: skip
    assert rows[1280] == {
        **MANY._asdict(), "launches": 198, "before": "sm90_128x64:2", "after": "sm90_64x64:1", "gain_us": 400,
    }  # fmt: skip
    assert (rows[640]["after"], rows[10240]["after"]) == ("own choice", "sm90_128x64:2")
    assert_expected_inline(
        capsys.readouterr().out.replace(str(tmp_path), "."),
        """\
512 px, batch 1, w8a8: 261 launches of 3 shapes; 4 calls are left as they are
10.000 ms with the table in force
1/3: 256 x 1280 -> 1280, int8, 198 launches: own choice -> sm90_64x64:1, 9.600 ms
2/3: 256 x 1280 -> 10240, int8, GEGLU, 60 launches: own choice -> sm90_128x64:2, 9.550 ms
3/3: 256 x 640 -> 640, int8, 2 launches: own choice stays, 9.550 ms
1/3, round 2: 256 x 1280 -> 1280, int8, 198 launches: sm90_64x64:1 stays, 9.550 ms
2/3, round 2: 256 x 1280 -> 10240, int8, GEGLU, 60 launches: sm90_128x64:2 stays, 9.550 ms
3/3, round 2: 256 x 640 -> 640, int8, 2 launches: own choice stays, 9.550 ms
10.000 -> 9.550 ms; 2 choices in ./table.inc
not in the table: 256 x 1280 -> 10240, int8, GEGLU: sm90_128x64:2
""",
    )


def test_a_new_table_begins_with_the_one_in_force(monkeypatch, tmp_path):
    monkeypatch.delenv("MIXDQ_TUNING_TABLE", raising=False)
    adds = {(MANY, A): 0.3, (MANY, B): 0.4, (FEW, A): 0.1, (GEGLU, C): 0.05}
    found, table = tune_with(monkeypatch, tmp_path, FakeTimer(adds))
    assert table == tune.read_table(tune.TABLE) and found["before_ms"] == found["after_ms"] == 10


def test_a_stopped_run_has_written_what_it_found(monkeypatch, tmp_path, capsys):
    class Stopping(FakeTimer):
        def record(self, choices):
            if FEW in choices:
                raise KeyboardInterrupt
            return super().record(choices)

    adds = {(MANY, A): 0.3, (MANY, B): -0.4, (GEGLU, C): 0.05}
    with pytest.raises(KeyboardInterrupt):
        tune_with(monkeypatch, tmp_path, Stopping(adds))
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["ended"] == "running" and found["after_ms"] == 9.6
    assert tune.read_table(tmp_path / "table.inc")[90, MANY[:5]] == B
    found, table = tune_with(monkeypatch, tmp_path, FakeTimer({}), seconds=0.0)
    assert found["ended"] == "out of time" and table[90, MANY[:5]] == B
    assert "1 of 3 shapes were looked at" in capsys.readouterr().out


# --- all of them in one command ---------------------------------------------------------------------------------------


def python_step(name: str, *programs: str, seconds: float = 30, together: bool = False) -> run_all.Step:
    return run_all.Step(name, "", seconds, [[sys.executable, "-c", program] for program in programs], together)


def run_steps(out: Path, *steps: run_all.Step, seconds: float = 60) -> dict[str, run_all.Ended]:
    ended = run_all.run_all(steps, out, seconds, {"gpu": "none"}, Console(quiet=True))
    assert json.loads((out / "steps.json").read_text())["gpu"] == "none"
    return {e.name: e for e in ended}


def test_a_step_that_fails_or_hangs_does_not_stop_the_others(tmp_path):
    hanging = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    began = time.monotonic()
    ended = run_steps(
        tmp_path,
        python_step("fails", "print('why'); raise SystemExit(3)"),
        python_step("hangs", hanging, "print('next')", seconds=1),
        python_step("works", "print('one\\ntwo')"),
    )
    assert time.monotonic() - began < 30
    assert {name: e.how for name, e in ended.items()} == {"fails": "failed", "hangs": "out of time", "works": "ok"}
    assert (ended["fails"].last, ended["works"].last) == ("why", "two")
    log = (tmp_path / "log.txt").read_text()
    assert "why\n[fails: exit code 3]" in log and "[hangs: out of time]" in log and "one\ntwo\n[works: exit" in log


def test_a_program_that_is_not_installed_is_named(tmp_path):
    ended = run_steps(tmp_path, run_all.Step("check", "", 30, [["surely-not-installed"]]))["check"]
    assert (ended.how, ended.last) == ("failed", "surely-not-installed is not installed")


def test_steps_without_time_are_left_out(tmp_path):
    ended = run_steps(tmp_path, python_step("a", "pass"), python_step("b", "pass"), seconds=0)
    assert {name: e.how for name, e in ended.items()} == {"a": "left out", "b": "left out"}


def test_commands_of_a_step_may_run_together(tmp_path):
    # Each waits for the other's file.
    program = (
        "import pathlib, time\npathlib.Path({0!r}).touch()\nwhile not pathlib.Path({1!r}).exists(): time.sleep(0.01)"
    )
    files = [str(tmp_path / name) for name in "ab"]
    programs = program.format(*files), program.format(*reversed(files))
    assert run_steps(tmp_path, python_step("both", *programs, together=True))["both"].how == "ok"


def test_steps_use_the_table_that_was_tuned(tmp_path):
    table = tmp_path / run_all.TABLE
    show = "import os; print(os.environ.get('MIXDQ_TUNING_TABLE'))"
    ended = run_steps(
        tmp_path,
        python_step("before", show),
        python_step("tune", f"open({str(table)!r}, 'w')"),
        python_step("after", show),
        python_step("again", show),
    )
    assert [ended[name].last for name in ("before", "after", "again")] == ["None", str(table), str(table)]


def test_all_steps_are_commands_of_the_repository(tmp_path):
    plan = tmp_path / "plan.yaml"
    plan.write_text("conv_in: 8\n")
    found = run_all.steps(tmp_path, 2, tmp_path / "scratch", plan)
    assert len({step.name for step in found}) == len(found)
    for step in found:
        for command in step.commands:
            paths = [
                a.partition("::")[0].removeprefix("--deselect=") for a in command if a.endswith(".py") or "::" in a
            ]
            assert all((run_all.ROOT / path).exists() for path in paths) and (paths or "mixdq_ao" in command)
    benches = [command for step in found for command in step.commands if "bench" in command]
    assert len(benches) == 7
    for command in benches:
        arguments = command[command.index("bench") + 1 :]
        names = next(a for a in arguments if a.startswith("--variants=")).partition("=")[2].split(",")
        assert [v.asked for v in parse_variants(names, torch.float16, str(plan))] == names
        parameters = get_command(cli.app).commands["bench"].params
        known = {option for p in parameters for option in p.opts + p.secondary_opts}
        assert {a.partition("=")[0] for a in arguments if a.startswith("--")} <= known


# --- goals ------------------------------------------------------------------------------------------------------------


def measured(variant: str, batch: int = 1, ms: float = 10.0, **values) -> Row:
    return Row(variant, batch, "now", latency=Times(ms, ms, ms, ms), **values)


def of(*rows: Row) -> Results:
    settings = Settings("sdxl", 512, "fp16", "cuda", None, None, True, 20, 3, True, 0)
    return Results(settings, {}, "fp16-compiled", list(rows))


def goals(folder: Path) -> dict[str, claims.Claim]:
    return {c.what: c for c in claims.claims(folder)}


def test_goals_of_which_nothing_was_measured(tmp_path):
    found = goals(tmp_path)
    assert len(found) > 20 and {c.holds for c in found.values()} == {None}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("kernels.json", "{}"),
        ("kernels.json", "[]"),
        ("kernels.json", '{"cases": {"512 px, batch 1": {"sums": {"all": {}}, "layers": []}}}'),
        ("kernels.json", '{"cases": {'),
        ("sensitivity.json", '{"processes": {"1": {"cheap": {"estimated_s": {}}}}, "layers_per_s": {}}'),
        ("bench_cold.json", "{}"),
        ("eager.json", '{"layers": {}}'),
    ],
)
def test_goals_of_files_that_no_benchmark_wrote(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit, match=rf"error: .*{name}.*must be"):
        claims.main(tmp_path)


def test_goals_and_what_was_measured(tmp_path):
    rows = [
        measured("fp16", call_ms=30.0, static=5000 * 2**20, activation=100 * 2**20),
        measured("fp16-compiled", ms=9.0, activation=50 * 2**20),
        measured("w8a8", ms=5.0, static=2400 * 2**20, activation=60 * 2**20),
        Row("w4a8", 1, "now", error="no memory"),
    ]
    of(*rows).write(tmp_path / "bench_512px_batch1.json")
    of(measured("fp16-compiled", compile_s=60.0), measured("w8a8", compile_s=80.0)).write(tmp_path / "bench_cold.json")
    of(measured("w8a8", compile_s=40.0)).write(tmp_path / "bench_warm.json")
    of(measured("w8a8-eager", ms=11.0)).write(tmp_path / "bench_sm80.json")
    layer = {"kind": "linear", "count": 2, "us": {"fp16": 20.0, "w8a8": 10.0, "w4a8": 16.0}}
    slow = {"kind": "conv", "count": 1, "us": {"fp16": 20.0, "w8a8": 25.0}}
    case = {"layers": [layer, slow], "sums": kernels.sums([layer, slow])}
    (tmp_path / "kernels.json").write_text(json.dumps({"cases": {"512 px, batch 1": case}}))
    (tmp_path / "eager.json").write_text(
        json.dumps({"layers": {}, "unet": {"fp16": 60.0, "W8A8": 50.0, "ratio": 1.25}})
    )
    single = {"cheap": {"estimated_s": {"32": 60.0, "512": 600.0}}}
    scaling = {"processes": {"1": single}, "layers_per_s": {"1": 2.0, "2": 3.0}}
    (tmp_path / "sensitivity.json").write_text(json.dumps(scaling))
    columns = [column.cells for column in claims.table([c for c in claims.claims(tmp_path) if c.measured]).columns]
    found = [", ".join(cells) for cells in zip(*columns, strict=True)]
    assert_expected_inline(
        "\n".join(found),
        """\
linear layers, W8A8, over fp16, 512 px, batch 1, >= 1.45 x, 2 x, yes
conv layers, W8A8, over fp16, 512 px, batch 1, >= 2 x, 0.8 x, no
the slowest layer of all, W8A8, over fp16, >= 1 x, 0.8 x, no
all layers, time of W4A8 over W8A8, 512 px, batch 1, <= 1.15 x, 1.16 x, no
UNet w8a8 over compiled fp16, 512 px, batch 1, >= 1.5 x, 1.8 x, yes
UNet W8A8 plain eager, kernels of older GPUs, <= 12 ms, 11 ms, yes
static memory of W8A8, <= 2,500 MiB, 2,400 MiB, yes
peak memory of W8A8, of fp16's, 512 px, batch 1, <= 0.51 x, 0.482 x, yes
activation memory of W8A8, of compiled fp16's, <= 1 x, 1.2 x, no
compile time of W8A8, of fp16's, <= 1.5 x, 1.33 x, yes
warm start of W8A8, of its compile time, <= 0.333 x, 0.5 x, no
UNet W8A8 eager without a graph, over fp16, 512 px, batch 1, >= 1 x, 1.25 x, yes
sensitivity of SDXL's 794 layers, predicted, 512 prompts, <= 60 min, 10 min, yes
the same on two GPUs, layers a second, >= 1.8 x, 1.5 x, no""",
    )


def test_who_takes_turns_is_compared_with_its_neighbour():
    """Each round by itself, since the next one may find another host; and nobody begins each time."""
    begun, hosts = [], iter([1.0, 1.0, 3.0, 3.0, 2.0, 2.5])

    def call(name: str, ms: float) -> float:
        begun.append(name)
        return ms * next(hosts)

    calls = {name: lambda n=name, ms=ms: call(n, ms) for name, ms in ((eager.FLOAT, 6.0), (eager.OURS, 5.0))}
    # Ratios of 1.2, 1.2 and, where the second call of a round found a slower host, 1.5.
    ratios = {"ratio": pytest.approx(1.2), "quartiles": [pytest.approx(1.2), pytest.approx(1.35)]}
    assert eager.in_turn(calls, 3) == {eager.FLOAT: 15.0, eager.OURS: 10.0} | ratios
    assert begun == [eager.OURS, eager.FLOAT, eager.FLOAT, eager.OURS, eager.OURS, eager.FLOAT]


def test_a_layer_that_is_called_in_turn():
    for x, bos in ((torch.randn(1, 5, 32), True), (torch.randn(1, 5, 32), False)):
        layer = torch.nn.Linear(32, 16).requires_grad_(False)
        ours = eager.quantized(layer, x[0, 0] if bos else None)
        assert type(layer.weight) is not type(ours.weight) and (ours.weight.bos_output is not None) == bos
        torch.testing.assert_close(ours(x), layer(x), atol=0.1, rtol=0.1)


def test_the_table_of_eager_calls(capsys):
    layer = {eager.FLOAT: 20.04, eager.OURS: 19.0, "ratio": 1.0512, "quartiles": [1.046, 1.051]}
    unet = {eager.FLOAT: 65.56, eager.OURS: 64.77, "ratio": 1.012, "quartiles": [0.987, 1.031]}
    eager.show(Console(width=90), {"layers": {"linear, 256 x 1280 -> 1280": layer}, "unet": unet})
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if "x (" in line]
    assert_expected_inline(
        "\n".join(lines),
        """\
│ linear, 256 x 1280 -> 1280 │ 20.0 us │ 19.0 us │ 1.05x (1.05 to 1.05) │
│ SDXL's UNet, 512 px        │ 65.6 ms │ 64.8 ms │ 1.01x (0.99 to 1.03) │""",
    )


def test_the_committed_results_can_be_read():
    assert goals(claims.RESULTS)


def test_a_replay_adds_up(tmp_path):
    """Two kernels that overlap, a pause, a memset, then the first again: own times and the pause are the whole."""
    matmul = "void mixdq::(anonymous namespace)::matmul<mixdq::Config<64, 80>, (mixdq::Float)1>(mixdq::Params)"
    events = [
        {"cat": "kernel", "name": matmul, "ts": 100.0, "dur": 8.0, "args": {"grid": [66, 2, 1]}},
        {"cat": "kernel", "name": "quantize(float*)", "ts": 106.0, "dur": 4.0, "args": {"grid": [10, 1, 1]}},
        {"cat": "kernel", "name": "inside(float*)", "ts": 107.0, "dur": 1.0, "args": {"grid": [1, 1, 1]}},
        {"cat": "gpu_memset", "name": "Memset (Device)", "ts": 112.0, "dur": 1.0, "args": {}},
        {"cat": "kernel", "name": matmul, "ts": 113.0, "dur": 7.0, "args": {"grid": [33, 1, 1]}},
        {"cat": "cpu_op", "name": "aten::add", "ts": 90.0, "dur": 50.0},
    ]
    path = tmp_path / "w8a8.graph.json.gz"
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": events[::-1]}, file)
    found, took, idle = replay.add_up(replay.read_events(path))
    assert (took, idle) == (20.0, 2.0) and sum(k.own for k in found) + idle == took
    console = Console(width=120, record=True, file=StringIO())
    console.print(replay.show(replay.by_name(found), took, idle, most=2))
    console.print(replay.show(found, took, idle, most=40))
    text = "\n".join(line.rstrip() for line in console.export_text().splitlines())
    assert_expected_inline(
        text,
        """\
                                    0.020 ms, 5 launches, nothing ran for 0.002 ms
┏━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━┳━━━━━━━━┳━━━━━━━━━━┳━━━━━━━━┳━━━━━━━━┳━━━━━━━━━━━━━┳━━━━━━━━━┓
┃ kernel                                                ┃ blocks ┃ launches ┃ own ms ┃ of all ┃ own us each ┃ us each ┃
┡━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━╇━━━━━━━━━━╇━━━━━━━━╇━━━━━━━━╇━━━━━━━━━━━━━╇━━━━━━━━━┩
│ mixdq::matmul<mixdq::Config<64, 80>, (mixdq::Float)1> │        │        2 │  0.015 │ 75.0 % │        7.50 │    7.50 │
│ quantize                                              │        │        1 │  0.002 │ 10.0 % │        2.00 │    4.00 │
│ 2 more                                                │        │        2 │  0.001 │  5.0 % │             │         │
└───────────────────────────────────────────────────────┴────────┴──────────┴────────┴────────┴─────────────┴─────────┘
                                    0.020 ms, 5 launches, nothing ran for 0.002 ms
┏━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━┳━━━━━━━━┳━━━━━━━━━━┳━━━━━━━━┳━━━━━━━━┳━━━━━━━━━━━━━┳━━━━━━━━━┓
┃ kernel                                                ┃ blocks ┃ launches ┃ own ms ┃ of all ┃ own us each ┃ us each ┃
┡━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━╇━━━━━━━━━━╇━━━━━━━━╇━━━━━━━━╇━━━━━━━━━━━━━╇━━━━━━━━━┩
│ mixdq::matmul<mixdq::Config<64, 80>, (mixdq::Float)1> │    132 │        1 │  0.008 │ 40.0 % │        8.00 │    8.00 │
│ mixdq::matmul<mixdq::Config<64, 80>, (mixdq::Float)1> │     33 │        1 │  0.007 │ 35.0 % │        7.00 │    7.00 │
│ quantize                                              │     10 │        1 │  0.002 │ 10.0 % │        2.00 │    4.00 │
│ Memset                                                │        │        1 │  0.001 │  5.0 % │        1.00 │    1.00 │
│ inside                                                │      1 │        1 │  0.000 │  0.0 % │        0.00 │    1.00 │
└───────────────────────────────────────────────────────┴────────┴──────────┴────────┴────────┴─────────────┴─────────┘""",
    )
    for content in (b"", b"{}", gzip.compress(b"[]"), gzip.compress(b"{")[:-4]):
        path.write_bytes(content)
        with pytest.raises(MixDQError, match=r"w8a8.graph.json.gz: cannot be read as a trace"):
            replay.read_events(path)
