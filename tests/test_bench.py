"""The benchmark: which variants there are, what a row says, and that nothing measured is ever lost."""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from expecttest import assert_expected_inline
from original import TINY_CONFIG
from typer.testing import CliRunner

from mixdq_ao import MixDQConfig, MixDQError, MixDQTensor, families, quantize_
from mixdq_ao.bench import Results, Row, inputs, models, results, run, run_bench, table, timing, tracing, variants
from mixdq_ao.bench.plot import write_plot
from mixdq_ao.bench.timing import Times
from mixdq_ao.bench.turns import Turns, within
from mixdq_ao.cli import app
from mixdq_ao.files import write_text
from mixdq_ao.plan import BitPlan
from mixdq_ao.summary import MIB

SIZE, CPU = 64, torch.device("cpu")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The config.json of a UNet of SDXL's kind with 80 thousand weights."""
    path = tmp_path_factory.mktemp("unet") / "config.json"
    path.write_text(json.dumps({"_class_name": "UNet2DConditionModel", **TINY_CONFIG}))
    return str(path)


def bench(config, names, **options):
    return run_bench(config, size=SIZE, variants=names, repeats=2, warmup=1, progress=False, **options)


@pytest.fixture(scope="module")
def measured(config):
    names = ["float", "w8a8-eager", "w4a8-eager", "w8a16-eager", "torchao-int8-weight-eager"]
    return bench(config, names, batches=[2, 1])


# --- what is measured -------------------------------------------------------------------------------------------------


def test_rows_come_in_order_and_hold_numbers(measured):
    names = ["fp32", "w8a8-eager", "w4a8-eager", "w8a16-eager", "torchao-int8-weight-eager"]
    assert [(r.variant, r.batch) for r in measured.rows] == [(name, b) for name in names for b in (1, 2)]
    for r in measured.rows:
        assert r.error == ""
        assert 0 < r.latency.min <= r.latency.p10 <= r.latency.median <= r.latency.p90
        assert r.activation > 0 and r.peak == r.static + r.activation
        assert r.compile_s is None and r.held is None and r.call_ms is None


def test_memory_and_agreement_are_those_of_the_widths(measured):
    def of(name):
        return measured.row(name, 1)

    assert of("fp32").same and of("fp32").sqnr is None and not of("w8a8-eager").same
    assert of("w8a16-eager").sqnr > of("w8a8-eager").sqnr > of("w4a8-eager").sqnr > 5
    assert of("fp32").static > 2.5 * of("w8a8-eager").static > 3 * of("w4a8-eager").static
    assert of("fp32").static == measured.row("fp32", 2).static


def test_compiled_variants_are_the_baseline(config, monkeypatch):
    compiled = []

    def fast(model, **options):
        compiled.append(options)
        return torch.compile(model, backend="eager")

    monkeypatch.setattr(variants, "_torch_compile", fast)
    monkeypatch.setattr(variants.compiling, "compile", fast)
    found = bench(config, ["fp32", "float-compiled", "w8a8"])
    assert [r.variant for r in found.rows] == ["fp32", "fp32-compiled", "w8a8"] and not any(r.error for r in found.rows)
    base, ours = found.row("fp32-compiled", 1), found.row("w8a8", 1)
    assert found.speedup(base) == 1 and base.compile_s > 0
    assert found.speedup(ours) == pytest.approx(base.latency.median / ours.latency.median)
    # Whoever measures captures the graph, in the same way for all.
    assert compiled == [{}, {"cuda_graphs": False, "cache": True, "progress": False}]


def test_a_variant_that_fails_is_a_row_with_the_reason(config, monkeypatch):
    def broken(model, prepared):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore words")

    monkeypatch.setitem(variants._TORCHAO, "torchao-int8", broken)
    found = bench(config, ["torchao-int8-eager", "float"], batches=[1])
    failed, fine = found.rows
    assert failed.error == "OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB." and not fine.error
    assert failed.latency is None and failed.peak is None and found.speedup(failed) is None


def test_a_batch_that_fits_only_quantized_has_nothing_to_be_compared_with(config, monkeypatch):
    real = run.make_inputs

    def too_large(model, batch, *rest):
        if batch == 2 and not any(isinstance(p, MixDQTensor) for p in model.parameters()):
            raise torch.OutOfMemoryError("out of memory")
        return real(model, batch, *rest)

    monkeypatch.setattr(run, "CALIBRATION_BATCH", 1)
    monkeypatch.setattr(run, "make_inputs", too_large)
    found = bench(config, ["float", "w8a8-eager"], batches=[1, 2])
    assert [bool(r.error) for r in found.rows] == [False, True, False, False]
    assert found.row("w8a8-eager", 1).sqnr > 10 and found.row("w8a8-eager", 2).sqnr is None


def test_variants_in_processes_of_their_own(config, tmp_path, capfd):
    names, out = ["float", "w8a8-eager", "w8a8-dynamic-eager"], tmp_path / "bench.json"
    found = run_bench(config, size=SIZE, variants=names, batches=[1, 2], repeats=2, warmup=1, jobs=3, out=out)
    assert [(r.variant, r.batch, r.error) for r in found.rows] == [
        (name, batch, "") for name in ("fp32", *names[1:]) for batch in (1, 2)
    ]
    assert len({r.run for r in found.rows}) == 1 and Results.read(out) == found
    assert found.row("w8a8-eager", 2).sqnr > 10 and found.row("fp32", 1).same
    assert capfd.readouterr().err.count(" ms\n") == 6


SLOW_RUN = """
import os, signal, sys, time
from mixdq_ao.bench import run

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

def measure(*args):
    os.write(1, b"at work\\n")  # whole, whatever another process writes
    time.sleep(1000)

run._Bench._variant = measure
if __name__ == "__main__":
    names = ["float", "w8a8-eager", "w4a8-eager", "w2a8-eager"]
    run.run_bench(sys.argv[1], size=64, variants=names, jobs=2, progress=False)
"""


@pytest.mark.parametrize("ending", ["SIGKILL", "SIGINT"])
def test_processes_end_with_the_run_that_started_them(config, tmp_path, ending):
    """A pool alone would leave them behind, or do all that was submitted first."""
    script = tmp_path / "slow.py"
    script.write_text(SLOW_RUN)
    command = [sys.executable, str(script), config]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True, text=True) as process:
        try:
            assert process.stdout.readline() == "at work\n"
            process.send_signal(getattr(signal, ending))
            printed, _ = process.communicate(timeout=60)  # until the last process has closed its output
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert printed.count("at work") < 2


def test_a_variant_that_compiles_for_too_long_is_a_row_that_says_so(config, monkeypatch):
    monkeypatch.setattr(variants, "_torch_compile", lambda model: lambda **inputs: time.sleep(60))
    slow, fine = bench(config, ["float-compiled", "float"], compile_limit=0.5).rows
    assert slow.error == "TimeoutError: not compiled within 0.5 s" and not fine.error
    with pytest.raises(MixDQError, match="jobs must be at least 1"):
        bench(config, ["float"], jobs=0)


def test_who_measures_is_alone(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    done = []

    def work(hold, name):
        with hold:
            done.append(name)

    with Turns(CPU).together(), Turns(CPU).together():
        measuring = threading.Thread(target=work, args=(Turns(CPU).alone(), "measured"))
        measuring.start()
        measuring.join(0.2)
        assert not done
    measuring.join()
    with Turns(CPU).alone():
        compiling = threading.Thread(target=work, args=(Turns(CPU).together(), "compiled"))
        compiling.start()
        compiling.join(0.2)
        assert done == ["measured"]
    compiling.join()
    with within(None, "done"), within(60, "done"):
        pass
    assert done == ["measured", "compiled"]


def test_torchao_takes_layers_with_rows_enough(config):
    model = models.find_model(config).build(torch.float32, CPU)
    names = [n for n, m in families.layers_of(model).items() if isinstance(m, torch.nn.Linear)]
    prepared = variants.Prepared(rows={n: 64 if "attn" in n else 1 for n in names})
    (variant,) = variants.parse_variants(["torchao-int8"], torch.float32)
    variant.quantize(model, prepared)
    layers = families.layers_of(model)
    changed = {n for n in names if type(layers[n].weight.data) is not torch.Tensor}
    assert changed == {n for n in names if "attn" in n and not layers[n].in_features % 16}


def test_a_plan_is_one_more_variant(config, tmp_path):
    model = models.find_model(config, 1).build(torch.float32, CPU)
    names = list(families.layers_of(model))
    plan = BitPlan({name: 4 if i % 2 else 8 for i, name in enumerate([*names, "of.a.layer.that.was.left.out"])})
    plan.write(tmp_path / "mixed_6.00.json")
    found = bench(config, ["plan"], plan=tmp_path / "mixed_6.00.json", compile=False, layers=1)
    assert [(r.variant, r.error) for r in found.rows] == [("mixed_6.00-eager", "")]
    strict = bench(config, ["plan"], plan=tmp_path / "mixed_6.00.json", compile=False)
    assert "of.a.layer.that.was.left.out" in strict.rows[0].error


def test_a_plan_is_measured_beside_the_variants_that_are_named(config, tmp_path):
    plan = tmp_path / "all_8.json"
    BitPlan.uniform(families.layers_of(models.find_model(config).build(torch.float32, CPU)), 8).write(plan)
    found = bench(config, ["float"], plan=plan, compile=False)
    assert [(r.variant, r.error) for r in found.rows] == [("fp32", ""), ("all_8-eager", "")]
    assert variants.with_plan(["plan-eager", "w8a8"]) == ["plan-eager", "w8a8"]


def test_an_output_with_nan_is_not_one_that_is_unknown_or_the_same(config, tmp_path, monkeypatch, capfd):
    def broken(model, prepared):
        model.conv_out.bias.data[0] = float("nan")

    monkeypatch.setitem(variants._TORCHAO, "torchao-int8", broken)
    out = tmp_path / "bench.json"
    run_bench(config, size=SIZE, variants=["float", "torchao-int8-eager"], repeats=2, warmup=1, out=out)
    found = Results.read(out)
    fine, row = found.rows
    assert fine.same and not fine.nonfinite
    assert row.nonfinite and not row.same and row.sqnr is None and not row.error
    _, header, cells, lines = table(found)
    assert [c[header.index("SQNR dB")] for c in cells] == ["same", "NaN"]
    assert lines == ["torchao-int8-eager, batch 1: its output holds NaN or infinity"]
    assert "ms, its output holds NaN or infinity\n" in capfd.readouterr().err


def test_agreement():
    one, infinite = torch.ones(2), torch.tensor([1.0, float("inf")])
    assert results.agreement(one, one) == {"sqnr": None, "same": True, "nonfinite": False}
    assert results.agreement(one, 1.1 * one)["sqnr"] == pytest.approx(20, abs=1e-3)
    unknown = {"sqnr": None, "same": False, "nonfinite": False}
    assert results.agreement(None, one) == results.agreement(infinite, one) == unknown
    for reference in (None, one, infinite):
        assert results.agreement(reference, infinite) == {**unknown, "nonfinite": True}


def test_a_floating_output_with_nan_is_noted_once(config, tmp_path, monkeypatch):
    real = models._random

    def broken(*args):
        def build(dtype, device):
            model = real(*args)(dtype, device)
            model.conv_out.bias.data[0] = float("nan")
            return model

        return build

    monkeypatch.setattr(models, "_random", broken)
    out = tmp_path / "bench.json"
    bench(config, ["float"], out=out)
    found = bench(config, ["float", "float-compiled"], out=out, resume=True, compile_limit=0.001)
    assert found.notes == ["batch 1: the floating output holds NaN or infinity, so nothing can be compared with it"]
    assert found.rows[0].nonfinite and not found.rows[0].same


# --- names ------------------------------------------------------------------------------------------------------------


def names_of(names, dtype=torch.float16, **options):
    return [v.name for v in variants.parse_variants(names, dtype, **options)]


def test_names_of_variants():
    assert names_of(["float", "fp16", "fp16-compiled", "float-max-autotune"]) == [
        "fp16", "fp16-compiled", "fp16-max-autotune"]  # fmt: skip
    assert names_of(["w8a8", "w8a8-eager", "w4a8-dynamic"]) == ["w8a8", "w8a8-eager", "w4a8-dynamic"]
    assert names_of(["w8a8", "w8a8-eager", "w8a8-no-inductor"], compile=False) == ["w8a8-eager"]
    assert names_of(["w4a8-no-inductor", "w8a16-no-inductor"]) == ["w4a8-no-inductor", "w8a16-no-inductor"]
    gpu = variants.default_names(torch.device("cuda"), compile=True, plan=True)
    assert gpu == ["float", "float-compiled", "torchao-int8", "torchao-fp8", "w8a8", "w4a8", "w8a16", "w4a16", "plan"]
    assert variants.default_names(CPU, compile=False, plan=False)[:3] == ["float", "torchao-int8", "w8a8"]


@pytest.mark.parametrize("compile", [True, False])
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["w3a8"], "a variant is one of .*; found 'w3a8'"),
        (["torchao-int8-no-inductor"], "a variant is one of .*; found 'torchao-int8-no-inductor'"),
        (["w8a8-no-inductor-eager"], "a variant is one of .*; found 'w8a8-no-inductor-eager'"),
        (["float-no-inductor"], "a variant is one of .*; found 'float-no-inductor'"),
        (["plan-no-inductor"], "the variant 'plan' needs --plan"),
        (["bf16-compiled"], "bf16-compiled: this run computes in fp16; give --dtype bf16"),
        (["plan"], "needs --plan"),
        ([], "nothing to measure"),
    ],
)
def test_names_that_mean_nothing(names, message, compile):
    with pytest.raises(MixDQError, match=message):
        variants.parse_variants(names, torch.float16, compile=compile)


@pytest.mark.parametrize(("name", "kind", "bits"), [("w4a8", "static", 4), ("w8a8-dynamic", "dynamic", 8),
                                                    ("w2a16", "none", 2)])  # fmt: skip
def test_our_variants_quantize_every_layer(config, name, kind, bits):
    source = models.find_model(config)
    model = source.build(torch.float32, CPU)
    with torch.no_grad(), run.observe(model) as recorder:
        model(**inputs.make_inputs(model, 2, SIZE))
    (variant,) = variants.parse_variants([name], torch.float32)
    variant.quantize(model, variants.Prepared(recorder.params()))
    weights = [m.weight for m in families.layers_of(model).values()]
    assert all(isinstance(w, MixDQTensor) and (w.bits, w.activation) == (bits, kind) for w in weights)


# --- models and inputs ------------------------------------------------------------------------------------------------


def test_random_weights_are_the_same_each_time_and_leave_the_seed_alone(config):
    source = models.find_model(config, layers=1)
    before = torch.random.get_rng_state()
    first, second = (source.build(torch.bfloat16, CPU) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(first.conv_in.weight, second.conv_in.weight) and first.dtype == torch.bfloat16


def test_sdxl_is_the_true_architecture():
    model = models.find_model("sdxl").build(torch.float16, torch.device("meta"))
    assert sum(p.numel() for p in model.parameters()) == 2_567_463_684
    shallow = models.find_model("sdxl", layers=2).build(torch.float16, torch.device("meta"))
    assert shallow.config.transformer_layers_per_block == [1, 2, 2]


def test_stored_models(tmp_path):
    tiny = models.find_model("tiny-sdxl")
    assert tiny.latent_scale == 4
    unet = tiny.build(torch.float32, CPU)
    unet.save_pretrained(tmp_path / "unet")
    folder = models.find_model(str(tmp_path / "unet"))
    again = folder.build(torch.float32, CPU)
    assert folder.latent_scale == 8 and torch.equal(unet.conv_in.weight, again.conv_in.weight)
    quantize_(unet, MixDQConfig())
    unet.save_pretrained(tmp_path / "quantized")
    with pytest.raises(MixDQError, match="is quantized already. Give the floating model"):
        models.find_model(str(tmp_path / "quantized"))
    with pytest.raises(MixDQError, match="tiny-sdxl has weights for all"):
        models.find_model("tiny-sdxl", layers=1)
    (tmp_path / "other").mkdir()
    with pytest.raises(MixDQError, match="no diffusers pipeline or UNet"):
        models.find_model(str(tmp_path / "other"))
    (tmp_path / "flux/transformer").mkdir(parents=True)
    (tmp_path / "flux/transformer/config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    with pytest.raises(MixDQError, match="found 'FluxTransformer2DModel', which can be quantized"):
        models.find_model(str(tmp_path / "flux"))
    (tmp_path / "other/config.json").write_text('{"_class_name": "Autoencoder"}')
    with pytest.raises(MixDQError, match="found 'Autoencoder'"):
        models.find_model(str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("changed", "layers", "message"),
    [
        ({"_class_name": "Autoencoder"}, None, "bad.json: a UNet of diffusers can be measured .*; found 'Autoencoder'"),
        ({"_class_name": "FluxTransformer2DModel"}, None, "found 'FluxTransformer2DModel', which can be"),
        ({"transformer_layers_per_block": "2"}, 1, "bad.json: 'transformer_layers_per_block' must be a .*; found '2'"),
        ({"transformer_layers_per_block": [1, None]}, 1, "must be a number or a list of numbers; found None"),
        ({"transformer_layers_per_block": "2"}, None, "bad.json: diffusers makes no UNet2DConditionModel of this"),
        ({"down_block_types": ["NoBlock"]}, None, "bad.json: diffusers makes no UNet2DConditionModel of this"),
    ],
)
def test_configurations_that_are_no_model(config, tmp_path, changed, layers, message):
    with open(config) as file:
        content = json.load(file)
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({**content, **changed}))
    with pytest.raises(MixDQError, match=message):
        models.find_model(str(path), layers).build(torch.float32, CPU)


def test_layers_are_left_out_of_every_block():
    deep = {"transformer_layers_per_block": [1, 4], "reverse_transformer_layers_per_block": [[4, 1], 2], "other": 9}
    shallow = {
        "transformer_layers_per_block": [1, 2],
        "reverse_transformer_layers_per_block": [[2, 1], 2],
        "other": 9,
    }
    assert models._with_layers("deep", deep, 2) == shallow
    assert models._with_layers("deep", deep, None) == deep and models._with_layers("flat", {}, 1) == {}


def test_dtypes_are_given_under_the_name_that_diffusers_knows(tmp_path, monkeypatch, caplog):
    import diffusers

    from mixdq_ao import pipelines

    pipelines.load_pipeline("tiny-sdxl").save_pretrained(tmp_path)
    caplog.clear()
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*torch_dtype")
        assert pipelines.load_pipeline(tmp_path, dtype=torch.bfloat16).unet.dtype == torch.bfloat16
        assert models.find_model(str(tmp_path)).build(torch.bfloat16, CPU).dtype == torch.bfloat16
    assert "dtype" not in caplog.text
    for version, name in (
        ("0.35.2", "torch_dtype"),
        ("0.39.0", "torch_dtype"),
        ("0.40.0", "dtype"),
        ("1.0.0", "dtype"),
    ):
        monkeypatch.setattr(diffusers, "__version__", version)
        assert pipelines.in_dtype(torch.float16) == {name: torch.float16}


def test_inputs_fit_unets_with_and_without_conditions(config):
    from diffusers import UNet2DConditionModel, UNet2DModel

    small = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    plain = UNet2DConditionModel(
        **small, cross_attention_dim=8, attention_head_dim=4, num_class_embeds=3,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    projected = UNet2DConditionModel(
        **small, cross_attention_dim=8, attention_head_dim=4, encoder_hid_dim=5, encoder_hid_dim_type="text_proj",
        class_embed_type="projection", projection_class_embeddings_input_dim=6, time_cond_proj_dim=3,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unconditional = UNet2DModel(**small, **blocks)
    for model in (plain, projected, unconditional, models.find_model(config).build(torch.float32, CPU)):
        kwargs = inputs.make_inputs(model, 2, SIZE, channels_last=True)
        with torch.no_grad(), run.observe(model) as recorder:
            output = model(**kwargs)[0]
        recorder.params()  # raises for layers that nothing entered
        assert output.shape == kwargs["sample"].shape and output.isfinite().all()


def test_pictures_do_not_depend_on_the_batch_and_start_with_one_token(config):
    model = models.find_model(config).build(torch.float32, CPU)
    one, three = (inputs.make_inputs(model, b, SIZE, seed=4) for b in (1, 3))
    for name in ("sample", "encoder_hidden_states"):
        assert torch.equal(one[name], three[name][:1]) and not torch.equal(three[name][0], three[name][1])
    tokens = three["encoder_hidden_states"]
    assert torch.equal(tokens[0, 0], tokens[2, 0]) and not torch.equal(tokens[0, 1], tokens[2, 1])


def test_conditions_that_are_not_known(config):
    model = models.find_model(config).build(torch.float32, CPU)
    model.register_to_config(addition_embed_type="image")
    with pytest.raises(MixDQError, match="addition_embed_type is 'image'"):
        inputs.make_inputs(model, 1, SIZE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"device": "tpu"}, "device must be cpu"),
        ({"batches": [0]}, "batch must be at least 1"),
        ({"memory_snapshot": "m.pickle"}, "CUDA's allocator"),
        ({"compile_limit": 0.0}, "compile_limit must be a positive number of seconds; found 0.0"),
        ({"compile_limit": -1.0}, "compile_limit must be a positive number"),
        ({"compile_limit": float("nan")}, "compile_limit must be a positive number"),
        ({"compile_limit": 1e300}, "compile_limit must be a positive number"),
        ({"resume": True}, "give that file as out"),
    ],
)
def test_arguments_that_cannot_be_followed(config, options, message):
    with pytest.raises(MixDQError, match=message):
        bench(config, ["float"], **options)
    with pytest.raises(MixDQError, match="nothing to measure"):
        bench(config, [])
    with pytest.raises(MixDQError, match="multiple of 8"):
        run_bench(config, size=60)


# --- files ------------------------------------------------------------------------------------------------------------


def test_what_is_measured_is_kept_when_stopped(config, tmp_path, monkeypatch):
    out = tmp_path / "bench.json"
    real = run._Bench._variant

    def stopped(self, variant, *rest):
        if variant.name == "w8a8-eager":
            raise KeyboardInterrupt
        return real(self, variant, *rest)

    monkeypatch.setattr(run._Bench, "_variant", stopped)
    with pytest.raises(KeyboardInterrupt):
        bench(config, ["float", "w8a8-eager"], out=out)
    (kept,) = Results.read(out).rows
    monkeypatch.setattr(run._Bench, "_variant", real)
    found = bench(config, ["w8a8-eager", "float"], out=out, resume=True)
    assert [r.variant for r in found.rows] == ["w8a8-eager", "fp32"] and found.rows[1] == kept
    assert Results.read(out) == found
    with pytest.raises(MixDQError, match=r"other settings or on another machine \(repeats differ\)"):
        run_bench(config, size=SIZE, repeats=3, warmup=1, out=out, resume=True)
    write_text(out, '{"format": "mixdq_ao.bench", "format_version": 1, "rows": []}')
    with pytest.raises(MixDQError, match="must be what mixdq-ao bench writes"):
        bench(config, ["float"], out=out, resume=True)


def test_rows_are_those_of_the_files_contents(config, tmp_path):
    """A configuration and a plan may be edited between two runs."""
    model, plan, out = tmp_path / "config.json", tmp_path / "plan.json", tmp_path / "bench.json"
    model.write_text(text := Path(config).read_text())
    BitPlan({"conv_in": 8, "conv_out": 8}).write(plan)

    def again(names=("float",)):
        return bench(str(model), names, plan=plan, compile=False, out=out, resume=True)

    assert [r.error == "" for r in again().rows] == [True, False]  # it names too few layers
    assert again().rows[0].run
    BitPlan({"conv_in": 4, "conv_out": 8}).write(plan)
    with pytest.raises(MixDQError, match=r"on another machine \(plan's bits differ\)"):
        again()
    model.write_text(text.replace('"layers_per_block": 1', '"layers_per_block": 2'))
    with pytest.raises(MixDQError, match=r"on another machine \(model's configuration, plan's bits differ\)"):
        again()


def test_profile_writes_traces_and_calls_the_tools_that_are_there(config, tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(tracing.shutil, "which", lambda tool: tool if tool == "nsys" else None)
    monkeypatch.setattr(tracing, "call_tool", lambda command: called.append(command) or "no permission")
    plan = BitPlan.uniform(families.layers_of(models.find_model(config).build(torch.float32, torch.device("meta"))), 8)
    plan.write(tmp_path / "all_8.json")
    found = bench(config, ["plan-eager"], plan=tmp_path / "all_8.json", profile=tmp_path / "traces")
    assert (tmp_path / "traces/all_8-eager.json.gz").stat().st_size > 1000
    (command,) = called
    assert command[:2] == ["nsys", "profile"]
    assert found.notes == [f"nsys of all_8-eager: failed (no permission): {' '.join(command)}"]
    # What nsys starts is this command again, for one step.
    step = command[command.index(sys.executable) :]
    assert step[1:5] == ["-m", "mixdq_ao", "bench", config] and step[-1] == tracing.STEP_ONLY
    result = CliRunner().invoke(app, step[3:], catch_exceptions=False)
    assert result.exit_code == 0 and result.stdout == ""


def test_calls_of_tools(tmp_path):
    assert tracing.call_tool([sys.executable, "-c", ""]) == ""
    assert tracing.call_tool([sys.executable, "-c", "import sys; sys.exit('not allowed')"]) == "not allowed"
    assert "absent" in tracing.call_tool([str(tmp_path / "absent")])
    assert tracing.for_variant(tmp_path / "memory.pickle", "w8a8") == tmp_path / "memory.w8a8.pickle"


# --- what is shown ----------------------------------------------------------------------------------------------------


def made_up() -> Results:
    settings = results.Settings("sdxl", 512, "fp16", "cuda", None, None, True, 20, 3, True, 0)
    found = Results(settings, {"GPU 0": "NVIDIA H200"}, "fp16-compiled")

    def row(name, batch, ms, static, sqnr, **more):
        times = Times(ms, 0.98 * ms, 0.99 * ms, 1.03 * ms)
        return Row(name, batch, "then", "", times, 1.5 * ms, int(static * MIB), 220 * MIB * batch, None, sqnr, **more)

    for batch in (1, 4, 8):
        found.rows += [
            row("fp16", batch, 30.0 * batch**0.8, 4897, None, same=True),
            row("fp16-compiled", batch, 22.0 * batch**0.8, 4897, 61.3, compile_s=70.25),
            row("torchao-int8", batch, 19.5 * batch**0.8, 2990, 24.0, compile_s=85.0),
            row("w8a8", batch, 12.25 * batch**0.8, 2473, 23.5, compile_s=64.0),
            row("w4a8", batch, 12.75 * batch**0.8, 1261, 12.0, compile_s=66.0),
        ]
        found.rows.append(Row("torchao-fp8", batch, "then", "AssertionError: needs compute capability 8.9"))
    found.notes = ["nsys of w8a8: done: nsys profile ..."]
    return found


def test_table_of_made_up_results():
    found = made_up()
    found.rows = [r for r in found.rows if r.batch == 4 or r.variant == "w8a8"]
    found.rows[0] = replace(found.rows[0], run="before")
    title, header, rows, lines = table(found)
    text = "\n".join([title, *(" | ".join(cells) for cells in [header, *rows]), *lines])
    assert_expected_inline(
        text,
        """\
sdxl, 512 px, fp16, on cuda: median of 20 CUDA graph replays
 | batch | ms | p10 - p90 | over fp16-compiled | call ms | static | activation | peak MiB | SQNR dB | compile s
w8a8 | 1 | 12.25 | 12.13 - 12.62 | - | 18.38 | 2473.0 | 220.0 | 2693.0 | 23.5 | 64.0
fp16 | 4 | 90.94 | 90.03 - 93.67 | 0.73x | 136.41 | 4897.0 | 880.0 | 5777.0 | same | -
fp16-compiled | 4 | 66.69 | 66.02 - 68.69 | 1.00x | 100.04 | 4897.0 | 880.0 | 5777.0 | 61.3 | 70.2
torchao-int8 | 4 | 59.11 | 58.52 - 60.89 | 1.13x | 88.67 | 2990.0 | 880.0 | 3870.0 | 24.0 | 85.0
w8a8 | 4 | 37.14 | 36.76 - 38.25 | 1.80x | 55.70 | 2473.0 | 880.0 | 3353.0 | 23.5 | 64.0
w4a8 | 4 | 38.65 | 38.26 - 39.81 | 1.73x | 57.98 | 1261.0 | 880.0 | 2141.0 | 12.0 | 66.0
torchao-fp8 | 4 | - | - | - | - | - | - | - | - | -
w8a8 | 8 | 64.66 | 64.01 - 66.60 | - | 96.98 | 2473.0 | 1760.0 | 4233.0 | 23.5 | 64.0
torchao-fp8, batch 4: AssertionError: needs compute capability 8.9
Rows come from several runs: ratios between them are less certain than within one.
nsys of w8a8: done: nsys profile ...""",
    )


def test_plot_of_made_up_results(tmp_path, monkeypatch):
    from matplotlib.axes import Axes
    from PIL import Image

    found, drawn, plot = made_up(), [], Axes.plot
    found.rows.sort(key=lambda r: r.batch == 4, reverse=True)  # as a run with --resume leaves them
    monkeypatch.setattr(Axes, "plot", lambda self, x, *rest, **more: drawn.append(x) or plot(self, x, *rest, **more))
    write_plot(found, tmp_path / "bench.png")
    assert drawn == [[1, 4, 8]] * 5
    wide = Image.open(tmp_path / "bench.png").size[0]
    found.rows = [r for r in found.rows if r.batch == 1]
    write_plot(found, tmp_path / "one.png")
    assert Image.open(tmp_path / "one.png").size[0] < wide
    found.rows = [r for r in found.rows if r.error]
    with pytest.raises(MixDQError, match="nothing was measured"):
        write_plot(found, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_times_are_quantiles():
    times = Times.of([float(v) for v in range(1, 12)])
    assert times == Times(6.0, 1.0, 2.0, 10.0) and Times.of([3.0]) == Times(3.0, 3.0, 3.0, 3.0)
    ticks = []
    timing.time_calls(lambda: None, 3, CPU, ticks.append)
    assert ticks == [1, 2, 3]


# --- the command ------------------------------------------------------------------------------------------------------


def test_command_writes_prints_and_does_not_replace_unasked(config, tmp_path):
    out, plot = tmp_path / "bench.json", tmp_path / "bench.png"
    command = [
        "bench",
        config,
        "--size",
        str(SIZE),
        "--batch",
        "1",
        "--batch",
        "2",
        "--repeats",
        "2",
        "--device",
        "cpu",
    ]
    command += ["--variants", "float, w8a8", "--no-compile", "--out", str(out), "--plot", str(plot)]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "w8a8-eager" in result.stdout and "over fp32-compiled" in result.stdout
    assert plot.stat().st_size > 10_000 and len(json.loads(out.read_text())["rows"]) == 4
    with pytest.raises(MixDQError, match="--resume to go on from it, or --force"):
        CliRunner().invoke(app, command, catch_exceptions=False)
    again = CliRunner().invoke(app, [*command, "--resume", "--json"], catch_exceptions=False)
    assert json.loads(again.stdout) == json.loads(out.read_text())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plot", "bench.foo"], "bench.foo: a plot is a file of one of these suffixes: .*png"),
        (["--plot", "folder.png"], "folder.png: cannot be written, for it is a folder"),
        (["--plot", "file/bench.png"], "file: cannot be a folder"),
        (["--out", "folder.png", "--force"], "folder.png: cannot be written, for it is a folder"),
        (["--out", "folder.png"], "folder.png: cannot be written, for it is a folder"),
        (["--out", "file/bench.json"], "file: cannot be a folder"),
        (["--profile", "file"], "file: cannot be a folder"),
        (["--out", "a.png", "--plot", "../here/a.png"], "the plot would replace the results"),
        (["--resume"], "give that file as out"),
        (["--resume", "--force", "--out", "a.json"], "give one of the two"),
        (["--variants", ","], "nothing to measure"),
        (["--variants", ",", "--plan", "plan.json"], "nothing to measure"),
        (["--variants", "w8a8", "--plan", "w8a8.json"], "w8a8.json: the rows of this plan would be called 'w8a8'"),
        (["--seed", str(2**63)], "seed must be a number of 32 bits; found 9223372036854775808"),
    ],
)
def test_command_refuses_before_it_measures(config, tmp_path, monkeypatch, options, message):
    here = tmp_path / "here"
    (here / "folder.png").mkdir(parents=True)
    (here / "file").touch()
    for name in ("plan.json", "w8a8.json"):
        BitPlan({"conv_in": 8}).write(here / name)
    monkeypatch.chdir(here)
    monkeypatch.setattr(run._Bench, "run", lambda *args: pytest.fail("measured"))
    with pytest.raises(MixDQError, match=message):
        CliRunner().invoke(app, ["bench", config, "--size", str(SIZE), *options], catch_exceptions=False)


def short_run(config: str) -> list[str]:
    return ["bench", config, "--size", str(SIZE), "--device", "cpu", "--repeats", "2"]


def test_command_makes_folders_and_prints_before_it_plots(config, tmp_path, monkeypatch):
    out, plot = tmp_path / "none/bench.json", tmp_path / "of these/bench.svg"
    command = [*short_run(config), "--out", str(out), "--plot", str(plot)]

    def no_disk(*args):
        raise MixDQError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("mixdq_ao.bench.write_plot", no_disk)
        result = CliRunner().invoke(app, [*command, "--variants", "float"])
    assert "fp32" in result.stdout and str(result.exception) == "no space left"
    result = CliRunner().invoke(app, [*command, "--variants", "float", "--resume"], catch_exceptions=False)
    assert result.exit_code == 0 and "<svg" in plot.read_text() and len(Results.read(out).rows) == 1


@pytest.mark.parametrize("json_too", [False, True])
def test_command_fails_when_every_variant_does(config, tmp_path, monkeypatch, json_too):
    def broken(model, prepared):
        raise RuntimeError("not here")

    monkeypatch.setitem(variants._TORCHAO, "torchao-int8", broken)
    command = [*short_run(config), "--plot", str(tmp_path / "a.png")]
    command += ["--json"] if json_too else []
    result = CliRunner().invoke(app, [*command, "--variants", "torchao-int8"], catch_exceptions=False)
    assert result.exit_code == 1 and "RuntimeError: not here" in result.stdout
    assert "nothing was measured, so" in result.stderr and not (tmp_path / "a.png").exists()
    result = CliRunner().invoke(app, [*command, "--variants", "torchao-int8,float"], catch_exceptions=False)
    assert result.exit_code == 0 and (tmp_path / "a.png").exists()


def test_nothing_heavy_is_imported_before_it_is_needed():
    code = "import sys, mixdq_ao.bench; print([m for m in ('matplotlib', 'diffusers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_graphs_are_replayed_and_weights_are_held_once(config, tmp_path):
    found = bench(config, ["float", "w8a8-eager"], device="cuda", memory_snapshot=tmp_path / "memory.pickle")
    for r in found.rows:
        assert r.error == "" and r.latency.median < r.call_ms
        assert r.static <= r.held < 1.2 * r.static + 16 * MIB
        assert (tmp_path / f"memory.{r.variant}.pickle").stat().st_size > 1000
