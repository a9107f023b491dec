import pytest

from mixdq_ao.bits import ACT_BITS, FLOAT_BITS, WEIGHT_BITS, WIDTHS, act_width, width
from mixdq_ao.errors import PlanError


@pytest.mark.parametrize(
    ("bits", "low", "high", "storage"), [(8, -128, 127, "int8"), (4, -8, 7, "uint8"), (2, -2, 1, "uint8")]
)
def test_row(bits, low, high, storage):
    w = width(bits)
    assert (w.bits, w.qmin, w.qmax, w.storage) == (bits, low, high, storage)
    assert w.values_per_byte * bits == 8


def test_every_width_has_a_row_and_floating_is_none_of_them():
    assert set(WEIGHT_BITS) == set(WIDTHS) == {8, 4, 2}
    assert set(ACT_BITS) < set(WEIGHT_BITS)
    assert FLOAT_BITS not in WIDTHS


@pytest.mark.parametrize(
    ("bits", "count", "size"), [(8, 5, 5), (4, 1, 1), (4, 4, 2), (4, 5, 3), (2, 4, 1), (2, 5, 2), (2, 0, 0)]
)
def test_packed_size_rounds_up(bits, count, size):
    assert width(bits).packed_size(count) == size


@pytest.mark.parametrize("bits", [0, 1, 3, 16, -8, "8", None, True, 8.5])
def test_unknown_weight_width_is_named(bits):
    with pytest.raises(PlanError, match=rf"weight bits must be one of \(8, 4, 2\); found {bits!r}"):
        width(bits)


@pytest.mark.parametrize("bits", [2, 16, True, None])
def test_unknown_activation_width_is_named(bits):
    with pytest.raises(PlanError, match=rf"activation bits must be one of \(8, 4\); found {bits!r}"):
        act_width(bits)
