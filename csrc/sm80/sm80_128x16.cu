#include "sm80/matmul.cuh"

namespace mixdq {

cudaError_t sm80_128x16(const Matmul& p, int splits, const Stream& on) {
  return sm80::run<sm80::Config<128, 16, 32, 16, 1, 6, 4>>(p, splits, on);
}

}  // namespace mixdq
