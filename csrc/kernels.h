// Entry points of the compiled kernels. Each launches on the given stream, allocates nothing, waits for nothing, and
// returns what cudaGetLastError says of the launch.
#pragma once
#include <cuda_runtime_api.h>
#include "problem.h"

namespace mixdq {

struct Stream {
  cudaStream_t stream = nullptr;
  int device = 0;
  int sm_count = 0;
  int arch = 0;            // 90 for compute capability 9.0
  bool dependent = false;  // may start before the kernel ahead of it in the stream has ended (arch >= 90)
};

using MatmulFn = cudaError_t (*)(const Matmul&, int splits, const Stream&);

// The function of the kernel at that place of the catalogue; null where this build lacks its architecture.
MatmulFn matmul_function(int kernel);

// The floating weight: code * scale[n], rounded once to the type. Codes [n, taps, packed channels] with `pitch` bytes from
// one tap to the next; out [n, taps, channels] with `out_pitch` elements from one tap to the next.
cudaError_t dequantize_weight(const void* codes, int64_t pitch, const float* scale, void* out, Float type,
                              int64_t out_pitch, int64_t n, int taps, int channels, int bits, const Stream&);

// 4 or 2 bit codes [rows, packed] to int8 [rows, channels]; rows = n * taps.
cudaError_t unpack_weight(const void* packed, int8_t* out, int64_t rows, int channels, int bits, const Stream&);

}  // namespace mixdq
