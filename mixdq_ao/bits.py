"""The width table: what a bit width means. Everything else asks it.

This file imports nothing but the errors, so that ``setup.py`` can read the table too.
"""

from dataclasses import dataclass

from mixdq_ao.errors import PlanError


@dataclass(frozen=True)
class Width:
    """One integer width: ``values_per_byte`` codes share a byte, the first one in the lowest bits."""

    bits: int
    values_per_byte: int

    @property
    def qmin(self) -> int:
        return -(2 ** (self.bits - 1))

    @property
    def qmax(self) -> int:
        return 2 ** (self.bits - 1) - 1

    @property
    def storage(self) -> str:
        """Name of the torch dtype that holds the codes: int8, or packed uint8."""
        return "int8" if self.values_per_byte == 1 else "uint8"

    def packed_size(self, count: int) -> int:
        """Bytes that ``count`` codes take."""
        return -(-count // self.values_per_byte)


WIDTHS = {w.bits: w for w in (Width(8, 1), Width(4, 2), Width(2, 4))}
WEIGHT_BITS = tuple(WIDTHS)
ACT_BITS = (8, 4)  # activations of either width are stored in int8
FLOAT_BITS = 16  # in a plan: leave the layer floating
# What of a layer is quantized, and to which widths, the lowest first.
KINDS = {"weight": tuple(sorted(WEIGHT_BITS)), "act": tuple(sorted(ACT_BITS))}


def width(bits: int, what: str = "weight") -> Width:
    """The row of ``bits``. Raises ``PlanError`` for a width that does not exist."""
    if isinstance(bits, bool) or bits not in WIDTHS:
        raise PlanError(f"{what} bits must be one of {WEIGHT_BITS}; found {bits!r}")
    return WIDTHS[bits]


def act_width(bits: int) -> Width:
    """The row of ``bits`` for an activation. Raises ``PlanError`` for a width activations do not have."""
    if isinstance(bits, bool) or bits not in ACT_BITS:
        raise PlanError(f"activation bits must be one of {ACT_BITS}; found {bits!r}")
    return WIDTHS[bits]
