// GEGLU, then quantize.
#include "geglu.cuh"

namespace mixdq {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads)
    geglu_vectors(const T* x, Pixels pixels, Divider vectors, uint32_t total, Codes codes, int8_t* out) {
  prefetch(codes);
  wait_for_previous();
  let_next_start();
  uint32_t i = blockIdx.x * kThreads + threadIdx.x, v;
  if (i >= total) return;
  const T* from = x + pixels.offset(vectors.divide(i, v)) + v * kVector;
  Raw<T> value, gate;
  value.load(from);
  gate.load(from + vectors.divisor * kVector);
  Encoder e = encoder_of_channel(codes, int(v) * kVector);
  reinterpret_cast<uint2*>(out)[i] = geglu_codes(value, gate, e);
}

__global__ void __launch_bounds__(kThreads) geglu_any(Floats x, Codes codes, int64_t total, int8_t* out) {
  wait_for_previous();
  let_next_start();
  int64_t half = x.size[3] / 2, step = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < total; i += step) {
    int64_t row = i / half, c = i - row * half, line = row / x.size[2], image = line / x.size[1];
    int64_t at = image * x.stride[0] + (line - image * x.size[1]) * x.stride[1] +
                 (row - line * x.size[2]) * x.stride[2] + c * x.stride[3];
    float f = load_float(x.data, x.type, at) * gelu(load_float(x.data, x.type, at + half * x.stride[3]));
    out[i] = int8_t(encoder_of_channel(codes, int(c)).code(f));
  }
}

}  // namespace

cudaError_t geglu_quantize(const Floats& x, const Codes& codes, int8_t* out, const Stream& on) {
  int64_t half = x.size[3] / 2, total = x.rows() * half;
  if (total == 0) return cudaSuccess;
  int64_t vectors = total / kVector;
  if (half % kVector != 0 || !vectors_fit(x, codes) || !aligned(out, 8) || vectors >= kIndexLimit - kThreads) {
    int64_t blocks = ceil_div(total, kThreads), most = int64_t(on.sm_count) * 32;
    Grid grid{dim3(unsigned(blocks < most ? blocks : most)), dim3(kThreads)};
    return launch(geglu_any, grid, on, x, codes, total, out);
  }
  return with_type(x.type, [&](auto t) {
    using T = decltype(t);
    Grid grid{dim3(unsigned(ceil_div(vectors, kThreads))), dim3(kThreads)};
    return launch(geglu_vectors<T>, grid, on, static_cast<const T*>(x.data), Pixels(x, Pad()),
                  Divider(half / kVector), uint32_t(vectors), codes, out);
  });
}

}  // namespace mixdq
