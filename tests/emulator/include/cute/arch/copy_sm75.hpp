#pragma once
#include "tensor_cores.h"

namespace cute {

struct uint128_t {
  uint64_t low, high;
};

struct SM75_U32x4_LDSM_N {
  static void copy(const uint128_t& row, uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d) {
    uint32_t* to[4] = {&a, &b, &c, &d};
    emulator::load_matrices(&row, false, to);
  }
};

struct SM75_U16x8_LDSM_T {
  static void copy(const uint128_t& row, uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d) {
    uint32_t* to[4] = {&a, &b, &c, &d};
    emulator::load_matrices(&row, true, to);
  }
};

}  // namespace cute
