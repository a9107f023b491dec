#pragma once
#include "tensor_cores.h"

namespace cute {

struct SM80_16x8x32_S32S8S8S32_TN {
  static void fma(uint32_t& d0, uint32_t& d1, uint32_t& d2, uint32_t& d3, uint32_t a0, uint32_t a1, uint32_t a2,
                  uint32_t a3, uint32_t b0, uint32_t b1, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
    uint32_t sums[4] = {c0, c1, c2, c3};
    emulator::multiply_16x8x32({a0, a1, a2, a3}, {b0, b1}, sums);
    d0 = sums[0], d1 = sums[1], d2 = sums[2], d3 = sums[3];
  }
};

template <emulator::Operands Type>
struct Multiply16x8x16 {
  static void fma(float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                  uint32_t b0, uint32_t b1, float c0, float c1, float c2, float c3) {
    float sums[4] = {c0, c1, c2, c3};
    emulator::multiply_16x8x16(Type, {a0, a1, a2, a3}, {b0, b1}, sums);
    d0 = sums[0], d1 = sums[1], d2 = sums[2], d3 = sums[3];
  }
};
using SM80_16x8x16_F32F16F16F32_TN = Multiply16x8x16<emulator::kHalf>;
using SM80_16x8x16_F32BF16BF16F32_TN = Multiply16x8x16<emulator::kBfloat16>;

}  // namespace cute
