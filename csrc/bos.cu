// The output of a text's first token, where it is known. A block for each sample.
#include "bos.h"
#include "codes.cuh"

namespace mixdq {
namespace {

constexpr int kThreads = 256;
constexpr float kTolerance = 0x1p-6f;  // BOS_TOLERANCE in mixdq_ao/ops.py

__global__ void __launch_bounds__(kThreads)
    bos_row(Floats x, int64_t sample_rows, Bos bos, void* out, Float type, int64_t columns) {
  __shared__ float shared[kThreads / 32];
  wait_for_previous();
  let_next_start();
  int64_t row = blockIdx.x * sample_rows;
  if (bos.input) {
    int64_t line = row / x.size[2], image = line / x.size[1];
    int64_t first = image * x.stride[0] + (line - image * x.size[1]) * x.stride[1] +
                    (row - line * x.size[2]) * x.stride[2];
    float largest = 0.f;  // fmaxf passes over a NaN, which nothing is near to anyway
    for (int c = threadIdx.x; c < x.size[3]; c += kThreads) {
      largest = fmaxf(largest, fabsf(load_float(bos.input, bos.input_type, c)));
    }
    float limit = kTolerance * reduce_block(largest, shared, Most()), near = 1.f;
    for (int c = threadIdx.x; c < x.size[3]; c += kThreads) {
      float distance = load_float(x.data, x.type, first + c * x.stride[3]) - load_float(bos.input, bos.input_type, c);
      if (!(fabsf(distance) <= limit)) near = 0.f;
    }
    if (reduce_block(near, shared, Least()) == 0.f) return;
  }
  for (int64_t n = threadIdx.x; n < columns; n += kThreads) {
    store_float(out, type, row * columns + n, load_float(bos.output, bos.output_type, n));
  }
}

}  // namespace

cudaError_t write_bos_rows(const Floats& x, int64_t sample_rows, const Bos& bos, void* out, Float type, int64_t columns,
                           const Stream& on) {
  if (x.rows() == 0 || columns == 0) return cudaSuccess;
  int64_t samples = x.rows() / sample_rows;
  if (samples > INT32_MAX) return cudaErrorInvalidValue;
  Grid grid{dim3(unsigned(samples)), dim3(kThreads)};
  return launch(bos_row, grid, on, x, sample_rows, bos, out, type, columns);
}

}  // namespace mixdq
