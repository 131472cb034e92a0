"""Rounding to 8-bit floats (e4m3) on the device."""

import triton
import triton.language as tl

LARGEST = tl.constexpr(448.0)
SMALLEST_NORMAL = tl.constexpr(0.015625)
SHIFT = tl.constexpr(1572864.0)  # 1.5 * 2^20: a sum with so many times a power of two keeps 3 bits behind its first


@triton.jit
def to_e4m3(values):
    """The nearest e4m3 to each value, the largest for what lies beyond it (smolvlm.precision.to_e4m3).

    Values are rounded before the conversion, which then has nothing left to round: that of Triton's interpreter rounds
    wrongly.
    """
    values = tl.clamp(values.to(tl.float32), -LARGEST, LARGEST)
    power = (values.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)  # of two, at most |value|
    coarse = tl.maximum(power, SMALLEST_NORMAL) * SHIFT
    return ((values + coarse) - coarse).to(tl.float8e4nv)
