#include "sm80/matmul.cuh"

namespace mixdq {

cudaError_t sm80_128x128(const Matmul& p, int splits, const Stream& on) {
  return sm80::run<sm80::Config<128, 128, 64, 64, 1, 4, 2>>(p, splits, on);
}

}  // namespace mixdq
