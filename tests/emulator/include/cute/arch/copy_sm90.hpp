#pragma once
#include "copy_sm75.hpp"

namespace cute {

struct SM90_U32x4_STSM_N {
  static void copy(uint32_t a, uint32_t b, uint32_t c, uint32_t d, uint128_t& row) {
    emulator::store_matrices(&row, {a, b, c, d});
  }
};

}  // namespace cute
