#include "sm80/matmul.cuh"

namespace mixdq {

cudaError_t sm80_64x32(const Matmul& p, int splits, const Stream& on) {
  return sm80::run<sm80::Config<64, 32, 64, 32, 4, 3, 2>>(p, splits, on);
}

}  // namespace mixdq
