"""The emulator finds what is wrong; what is right is tested with it in test_cuda_kernels."""

import re
from pathlib import Path

import emulated
import planted_mistakes
import pytest
import torch
from planted_mistakes import MISTAKES

NOTHING = emulated.why_not()


def test_shared_memory_is_given_by_the_emulator():
    line = "extern __shared__ __align__(16) int8_t shared[];  // a comment"
    assert emulated.on_a_host(line) == "int8_t* shared = reinterpret_cast<int8_t*>(emulator::shared);  // a comment"
    assert not [path for path, text in emulated.read_sources().items() if "extern __shared__" in text]


def test_copies_at_the_edge_of_memory_are_the_same_tensors():
    base = torch.arange(1000, dtype=torch.float16)
    args = (base[3:900:2], [base[900:].view(10, 10).T, None], 7, torch.empty(0), "text", (1, 2))
    copies = emulated.at_the_edge(args)
    assert torch.equal(copies[0], args[0]) and copies[0].stride() == args[0].stride()
    assert torch.equal(copies[1][0], args[1][0]) and copies[1][0].stride() == args[1][0].stride()
    assert copies[2:] == args[2:3] + copies[3:4] + args[4:] and copies[1][1] is None
    assert copies[1][0].data_ptr() - copies[0].data_ptr() == 2 * 897  # one memory, as before
    assert copies[0].data_ptr() != args[0].data_ptr()


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: m.what)
def test_mistakes_can_still_be_planted(mistake):
    text = emulated.read_sources()[Path(mistake.file)]
    planted = re.sub(mistake.right, mistake.wrong, text, count=1)
    assert planted != text


@pytest.mark.skipif(bool(NOTHING), reason=f"emulated CUDA kernels: {NOTHING}")
def test_a_planted_mistake_is_found(tmp_path):
    mistake = next(m for m in MISTAKES if m.what == "cp.async is waited for one group too late")
    assert planted_mistakes.is_found(mistake, tmp_path)
