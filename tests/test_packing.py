import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import array, assert_same, code_range

from mixdq_ao.bits import WEIGHT_BITS, WIDTHS
from mixdq_ao.packing import pack, packed_channels, unpack

groups = st.lists(st.integers(1, 17), min_size=1, max_size=3)
kernels = st.sampled_from([(), (1, 1), (3, 3), (2, 5)])


def codes_of(bits, shape, seed=0):
    low, high = code_range(bits)
    g = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, shape, dtype=torch.int8, generator=g)


@given(st.sampled_from(WEIGHT_BITS), st.integers(1, 5), groups, kernels, st.integers(0, 2**31))
def test_unpack_inverts_pack(bits, out, input_groups, kernel, seed):
    codes = codes_of(bits, (out, sum(input_groups), *kernel), seed)
    stored = pack(codes, bits, input_groups)
    assert stored.dtype == getattr(torch, WIDTHS[bits].storage)
    assert tuple(stored.shape) == (out, packed_channels(bits, input_groups), *kernel)
    assert_same(unpack(stored, bits, input_groups), codes)


@given(st.sampled_from([4, 2]), groups, st.integers(0, 2**31))
def test_bytes_are_little_end_first_and_groups_start_on_a_byte(bits, input_groups, seed):
    """The layout that files and kernels rely on, spelled out with Python integers."""
    codes = codes_of(bits, (3, sum(input_groups)), seed)
    per = 8 // bits
    expected = []
    for row in array(codes).astype(int).tolist():
        packed, start = [], 0
        for size in input_groups:
            part = row[start : start + size]
            part += [0] * (-len(part) % per)
            for i in range(0, len(part), per):
                packed.append(sum((c % 2**bits) << (bits * j) for j, c in enumerate(part[i : i + per])))
            start += size
        expected.append(packed)
    assert_same(pack(codes, bits, input_groups), np.array(expected, np.uint8))


@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_every_code_survives(bits):
    low, high = code_range(bits)
    codes = torch.arange(low, high + 1, dtype=torch.int8).expand(2, -1)
    assert_same(unpack(pack(codes, bits, [codes.shape[1]]), bits, [codes.shape[1]]), codes)


@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_convolutions_are_stored_channels_last_and_unpacked_so(bits):
    codes = codes_of(bits, (5, 12, 3, 3))
    stored = pack(codes, bits, [8, 4])
    assert stored.permute(0, 2, 3, 1).is_contiguous()
    assert unpack(stored, bits, [8, 4]).permute(0, 2, 3, 1).is_contiguous()


def test_eight_bits_are_not_copied():
    stored = pack(codes_of(8, (4, 6)), 8, [6])
    assert unpack(stored, 8, [6]) is stored


@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_stored_bytes(bits):
    stored = pack(codes_of(bits, (320, 640)), bits, [640])
    assert stored.untyped_storage().nbytes() == 320 * 640 * bits // 8


@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_meta(bits):
    codes = torch.empty(5, 12, 3, 3, dtype=torch.int8, device="meta")
    assert unpack(pack(codes, bits, [12]), bits, [12]).shape == codes.shape
