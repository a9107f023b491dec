"""Hashes that tell whether what is on disk was made of the same things."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import EulerDiscreteScheduler, LCMScheduler
from pipelines import FakePipeline
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig
from torchao.quantization import quantize_ as torchao_quantize_

from mixdq_ao import MixDQTensor
from mixdq_ao.fingerprints import fingerprint, fingerprints


def layer(**options) -> nn.Module:
    torch.manual_seed(0)
    module = nn.Linear(8, 4)
    if options:
        module.weight = nn.Parameter(MixDQTensor.from_float(module.weight, **options), requires_grad=False)
    return module


def test_what_a_layer_computes_with_is_told_apart():
    ways = [{}, *({"bits": bits, "act_bits": act} for bits in (8, 4) for act in (8, 4, None))]
    ways += [
        {"bits": 8, "act_bits": 8, "act_scale": torch.tensor([s]), "act_zero_point": torch.zeros(1)} for s in (1, 2)
    ]
    found = [fingerprint(layer(**way)) for way in ways]
    assert len(set(found)) == len(ways) and found == [fingerprint(layer(**way)) for way in ways]
    assert fingerprint(layer().bfloat16()) not in found


def test_the_tensors_of_others():
    modules = [nn.Sequential(nn.Linear(64, 64)) for _ in range(2)]
    for module in modules:
        torchao_quantize_(module, Int8WeightOnlyConfig())
    assert fingerprint(modules[0]) != fingerprint(modules[1])
    assert fingerprint(modules[0]) == fingerprint(modules[0])
    assert fingerprint(modules[0].to("meta")) != fingerprint(nn.Linear(64, 64).to("meta"))


def pipeline(seed: int = 0, **changes):
    pipe = FakePipeline(seed)
    parts = {"scheduler": EulerDiscreteScheduler(), "text_encoder": layer(), "tokenizer": None}
    pipe.components = {"unet": pipe.unet, **parts, **changes}
    return pipe


@pytest.mark.parametrize(
    "changes, different",
    [
        ({}, set()),
        ({"seed": 1}, {"unet"}),
        ({"scheduler": LCMScheduler()}, {"pipeline"}),
        ({"scheduler": EulerDiscreteScheduler(timestep_spacing="trailing")}, {"pipeline"}),
        ({"text_encoder": layer(bits=8)}, {"pipeline"}),
    ],
)
def test_every_part_of_a_pipeline_counts(changes, different):
    before, after = fingerprints(pipeline()), fingerprints(pipeline(**changes))
    assert {key for key in before if before[key] != after[key]} == different


def test_where_a_part_comes_from_does_not_count():
    one, two = (SimpleNamespace(config={"sample_size": 8, "_name_or_path": place}) for place in "ab")
    assert fingerprints(pipeline(scheduler=one)) == fingerprints(pipeline(scheduler=two))
