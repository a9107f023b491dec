"""The table and the JSON of ``summary``, and what is counted as bytes."""

import json

import torch
from expecttest import assert_expected_inline
from models import tiny_sdxl_unet
from torch import nn

from mixdq_ao import MixDQConfig, QuantParams, quantize_, summary
from mixdq_ao.checkpoint import LayerParams
from mixdq_ao.families import layers_of, split_points
from mixdq_ao.summary import format_table, storage_bytes


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3)
        self.text = nn.Linear(32, 64)
        self.half = nn.Linear(16, 6, bias=False).half()
        self.kept = nn.Linear(8, 8)
        self.out = nn.Linear(16, 256)
        self.register_buffer("steps", torch.zeros(100))


def params() -> QuantParams:
    act = {8: torch.tensor([0.1])}, {8: torch.tensor([3.0])}
    return QuantParams(
        {
            "conv": LayerParams({4: torch.ones(1, 8)}, *act),
            "text": LayerParams({8: torch.ones(1, 64)}, *act, torch.ones(32), torch.ones(64)),
            "half": LayerParams({2: torch.ones(1, 6)}),
            "out": LayerParams({8: torch.ones(1, 256)}, {4: torch.tensor([0.1])}, {4: torch.tensor([3.0])}),
        }
    )


def quantized_net() -> Net:
    model = Net()
    quantize_(
        model,
        MixDQConfig(
            params(),
            weight_bits={"conv": 4, "text": 8, "half": 2, "kept": 8, "out": 8},
            act_bits={"conv": 8, "text": 8, "half": None, "out": 4, "kept": 8},
            protect=["kept"],
        ),
    )
    return model


def test_table():
    assert_expected_inline(
        str(summary(quantized_net())),
        """\
layer  kind    shape    weight        activation   computes  kernel              reason                        KiB
------------------------------------------------------------------------------------------------------------------
conv   conv2d  8x4x3x3  int4          int8 static  int8      torch._int_mm       static int8 activations       0.2
text   linear  64x32    int8          int8 static  int8      torch._int_mm       static int8 activations, BOS  3.1
half   linear  6x16     int2          float        float16   torch, dequantized  weight-only                   0.0
kept   linear  8x8      32-bit float  float        float32   torch               protected                     0.2
out    linear  256x16   int8          int4 static  int8      torch._int_mm       static int4 activations       7.0
5 layers: 2 with 8-bit weights, 1 with 4-bit weights, 1 with 2-bit weights, 1 with 32-bit weights
0.0 MiB in all: 0.0 MiB quantized, 0.0 MiB floating""",
    )


def test_table_of_a_floating_model():
    assert_expected_inline(
        str(summary(Net().half())),
        """\
layer  kind    shape    weight        activation  computes  kernel  reason         KiB
--------------------------------------------------------------------------------------
conv   conv2d  8x4x3x3  16-bit float  float       float16   torch   not quantized  0.6
text   linear  64x32    16-bit float  float       float16   torch   not quantized  4.0
half   linear  6x16     16-bit float  float       float16   torch   not quantized  0.2
kept   linear  8x8      16-bit float  float       float16   torch   not quantized  0.1
out    linear  256x16   16-bit float  float       float16   torch   not quantized  8.0
5 layers: 5 with 16-bit weights
0.0 MiB in all: 0.0 MiB quantized, 0.0 MiB floating""",
    )


def test_json():
    result = json.loads(summary(quantized_net()).to_json())
    result["layers"] = result["layers"][:1] + result["layers"][3:4]
    assert_expected_inline(
        json.dumps(result, indent=1),
        """\
{
 "layers": [
  {
   "name": "conv",
   "kind": "conv2d",
   "shape": [
    8,
    4,
    3,
    3
   ],
   "quantized": true,
   "weight_bits": 4,
   "act_bits": 8,
   "activation": "static",
   "computes": "int8",
   "kernel": "torch._int_mm",
   "reason": "static int8 activations",
   "bytes": 248
  },
  {
   "name": "kept",
   "kind": "linear",
   "shape": [
    8,
    8
   ],
   "quantized": false,
   "weight_bits": 32,
   "act_bits": null,
   "activation": "none",
   "computes": "float32",
   "kernel": "torch",
   "reason": "protected",
   "bytes": 256
  }
 ],
 "quantized_bytes": 10680,
 "floating_bytes": 2000,
 "total_bytes": 12680
}""",
    )


def test_split_shortcuts_in_the_table():
    unet = tiny_sdxl_unet()
    quantize_(unet, MixDQConfig())
    reasons = {row.name: row.reason for row in summary(unet).rows if "input groups" in row.reason}
    assert reasons.keys() == split_points(unet).keys()
    assert reasons["up_blocks.0.resnets.2.conv_shortcut"] == "dynamic int8 activations, input groups [64, 64]"


def test_table_of_a_saved_model(tmp_path):
    model = quantized_net()
    torch.save(model, tmp_path / "model.pt")
    assert str(summary(torch.load(tmp_path / "model.pt", weights_only=False))) == str(summary(model))


def test_totals_count_real_storages():
    model = quantized_net()
    s = summary(model)
    inner = {"conv": 8 * 2 * 9, "text": 64 * 32, "half": 6 * 4, "out": 256 * 16}
    assert [r.name for r in s.rows] == list(layers_of(model))
    scales = {"conv": 8, "text": 64, "half": 6, "out": 256}
    for row in s.rows:
        if row.quantized:
            # codes, scale, and for static layers alpha, beta, activation scale and zero point; for BOS both vectors
            floats = scales[row.name] * (1 if row.act_bits is None else 3) + (0 if row.act_bits is None else 2)
            floats += (32 + 64) if row.name == "text" else 0
            assert row.bytes == inner[row.name] + 4 * floats, row.name
    assert s.quantized_bytes == sum(r.bytes for r in s.rows if r.quantized)
    biases = 4 * (8 + 64 + 8 + 256)
    assert s.floating_bytes == 4 * 8 * 8 + biases + 4 * 100
    assert s.total_bytes == s.quantized_bytes + s.floating_bytes


def test_shared_storages_count_once():
    a = torch.zeros(10)
    assert storage_bytes([a, a, a[2:5], a.view(2, 5)]) == 40
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert summary(model).total_bytes == 64


def test_a_model_on_the_meta_device():
    model = Net().to("meta")
    quantize_(model, MixDQConfig(weight_bits=4))
    assert summary(model).quantized_bytes < summary(Net()).total_bytes


def test_format_table():
    table = format_table(("name", "note", "n"), [("a", "", "1"), ("long name", "x", "100")])
    assert_expected_inline(
        table,
        """\
name       note    n
--------------------
a                  1
long name  x     100""",
    )
