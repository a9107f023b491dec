"""Memory of a forward pass."""

import torch
from torch import nn

from mixdq_ao.memory import measure_memory

KIB = 1024


class TwoAlive(nn.Module):
    """At most two of its activations live at once."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 256, bias=False)

    def forward(self, x):
        y = self.linear(x)
        z = y + 1
        del y
        return z.relu_()


def test_counts_parameters_and_the_most_that_was_alive():
    model, x = TwoAlive(), torch.randn(128, 64)
    with torch.no_grad():
        memory = measure_memory(model, lambda: model(x))
    assert memory.static == 64 * 256 * 4
    activation = 128 * 256 * 4
    assert 2 * activation <= memory.activation < 2 * activation + 8 * KIB
    assert memory.peak == memory.static + memory.activation
    assert memory.mib() == tuple(n / 2**20 for n in (memory.static, memory.activation, memory.peak))


def test_tied_weights_count_once():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    assert measure_memory(model, lambda: model(torch.ones(1, 8))).static == 8 * 8 * 4
