#include "sm80/matmul.cuh"

namespace mixdq {

cudaError_t sm80_64x16(const Matmul& p, int splits, const Stream& on) {
  return sm80::run<sm80::Config<64, 16, 16, 16, 8, 4>>(p, splits, on);
}

}  // namespace mixdq
