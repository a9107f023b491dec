#include "sm80/matmul.cuh"

namespace mixdq {

cudaError_t sm80_128x80(const Matmul& p, int splits, const Stream& on) {
  return sm80::run<sm80::Config<128, 80, 64, 80, 2, 3, 2>>(p, splits, on);
}

}  // namespace mixdq
