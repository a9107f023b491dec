// The output of a text's first token, where it is known. A block for each sample.
#include "bos.cuh"

namespace mixdq {
namespace {

constexpr int kThreads = 256;

// Where the first token of the sample that begins with that row lies.
__device__ __forceinline__ int64_t first_token(const Floats& x, int64_t row) {
  int64_t line = row / x.size[2], image = line / x.size[1];
  return image * x.stride[0] + (line - image * x.size[1]) * x.stride[1] + (row - line * x.size[2]) * x.stride[2];
}

// Each thread has eight channels of both tokens and eight columns, all asked for at once: nearly all of a launch's time is
// waiting for memory.
__global__ void __launch_bounds__(kThreads)
    bos_row_vectors(Floats x, Bos bos, void* out, Float type, int columns) {
  __shared__ float shared[kThreads / 32];
  wait_for_previous();
  let_next_start();
  const int64_t row = int64_t(blockIdx.x) * bos.sample_rows;
  const int at = threadIdx.x * kVector;
  const bool has_channels = bos.input && at < x.size[3];
  RawWeights token, known, output;
  if (has_channels) {
    const int size = x.type == Float::f32 ? 4 : 2;
    token.load(static_cast<const char*>(x.data) + first_token(x, row) * size, x.type, at);
    known.load(bos.input, bos.input_type, at);
  }
  if (at < columns) output.load(bos.output, bos.output_type, at);
  if (bos.input) {
    float a[kVector] = {}, b[kVector] = {};
    if (has_channels) {
      token.get(x.data, x.type, 0.f, a);
      known.get(bos.input, bos.input_type, 0.f, b);
    }
    Distance distance;
#pragma unroll
    for (int i = 0; i < kVector; ++i) distance.add(a[i], b[i]);
    if (!distance.is_near([&](float v) { return reduce_block(v, shared, Most()); })) return;
  }
  if (at >= columns) return;
  float f[kVector];
  output.get(bos.output, bos.output_type, 0.f, f);
#pragma unroll
  for (int i = 0; i < kVector; ++i) store_float(out, type, row * columns + at + i, f[i]);
}

// Whatever that cannot read.
__global__ void __launch_bounds__(kThreads)
    bos_row(Floats x, Bos bos, void* out, Float type, int64_t columns) {
  __shared__ float shared[kThreads / 32];
  wait_for_previous();
  let_next_start();
  int64_t row = int64_t(blockIdx.x) * bos.sample_rows;
  if (bos.input) {
    int64_t first = first_token(x, row);
    Distance distance;
    for (int c = threadIdx.x; c < x.size[3]; c += kThreads) {
      distance.add(load_float(x.data, x.type, first + c * x.stride[3]), load_float(bos.input, bos.input_type, c));
    }
    if (!distance.is_near([&](float v) { return reduce_block(v, shared, Most()); })) return;
  }
  for (int64_t n = threadIdx.x; n < columns; n += kThreads) {
    store_float(out, type, row * columns + n, load_float(bos.output, bos.output_type, n));
  }
}

}  // namespace

cudaError_t write_bos_rows(const Floats& x, const Bos& bos, void* out, Float type, int64_t columns, const Stream& on) {
  if (x.rows() == 0 || columns == 0) return cudaSuccess;
  int64_t samples = x.rows() / bos.sample_rows;
  if (samples > INT32_MAX) return cudaErrorInvalidValue;
  Grid grid{dim3(unsigned(samples)), dim3(kThreads)};
  constexpr int64_t kMost = kThreads * kVector;
  bool fits = x.size[3] <= kMost && columns <= kMost && columns % kVector == 0 && vectors_fit(x, Codes()) &&
              aligned(bos.input, 16) && aligned(bos.output, 16);
  if (fits) return launch(bos_row_vectors, grid, on, x, bos, out, type, int(columns));
  return launch(bos_row, grid, on, x, bos, out, type, columns);
}

}  // namespace mixdq
