// LayerNorm, then quantize.
#include "norm.cuh"

namespace mixdq {
namespace {

constexpr int kThreads = 256;

template <class T, int kVectors, bool kWarp>
__global__ void __launch_bounds__(kWarp ? 128 : 512)
    layer_norm_rows(const T* x, Pixels pixels, uint32_t rows, int vectors, Norm norm, Codes codes, int8_t* out) {
  __shared__ float4 shared[16];  // of each warp: count, mean, squared deviations
  prefetch(norm, codes, vectors * kVector);
  wait_for_previous();
  let_next_start();
  uint32_t row = kWarp ? blockIdx.x * 4 + threadIdx.x / 32 : blockIdx.x;
  int first = kWarp ? threadIdx.x % 32 : threadIdx.x, step = kWarp ? 32 : blockDim.x;
  if (row >= rows) return;
  x += pixels.offset(row);
  Raw<T> raw[kVectors];
  load_row(raw, x, first, step, vectors);
  // Where a thread has a single vector, few warps run, and the weights are best under way while the row is summed.
  constexpr bool kEarly = kVectors == 1;
  NormWeights weights;
  if (kEarly && first < vectors) weights.load(norm, first * kVector);
  Encoder e = encoder(codes, 0);

  // The pivot is a mean of eight, of the first lane, which always has a vector.
  Sums sums;
  float f[kVector];
  raw[0].get(f);
  float pivot = ((f[0] + f[1]) + (f[2] + f[3])) + ((f[4] + f[5]) + (f[6] + f[7]));
  pivot = __shfl_sync(~0u, pivot * (1.f / kVector), 0);
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    if (first + j * step >= vectors) break;
    raw[j].get(f);
    sums.add(f, pivot);
  }
  sums.first = reduce_lanes(sums.first, Add());
  sums.second = reduce_lanes(sums.second, Add());
  int counted = kWarp ? vectors : 0;  // by this warp
#pragma unroll
  for (int j = 0; j < kVectors && !kWarp; ++j) {
    counted += min(max(vectors - (int(threadIdx.x / 32 * 32) + j * step), 0), 32);
  }
  sums.count = float(counted * kVector);
  float2 moments = sums.moments(pivot);
  if (!kWarp) {
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = make_float4(sums.count, moments.x, moments.y, 0.f);
    __syncthreads();
    sums = Sums();
    pivot = shared[0].y;
    for (int i = 0; i < int(blockDim.x / 32); ++i) sums.add(shared[i].x, shared[i].y, shared[i].z, pivot);
    moments = sums.moments(pivot);
  }
  float mean = moments.x, rstd = rsqrtf(__fdividef(moments.y, sums.count) + norm.eps);

  uint2* to = reinterpret_cast<uint2*>(out) + int64_t(row) * vectors;
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    int v = first + j * step;
    if (v >= vectors) break;
    if (!kEarly) weights.load(norm, v * kVector);
    if (codes.groups > 1) e = encoder(codes, group_of(codes, v * kVector));
    float weight[kVector], bias[kVector];
    raw[j].get(f);
    weights.get(norm, weight, bias);
#pragma unroll
    for (int i = 0; i < kVector; ++i) f[i] = (f[i] - mean) * rstd * weight[i] + bias[i];
    to[v] = encode_rounded(f, e);
  }
}

// Any layout: a block reads its row three times.
__global__ void __launch_bounds__(kThreads) layer_norm_any(Floats x, Norm norm, Codes codes, int8_t* out) {
  __shared__ float shared[kThreads / 32];
  prefetch(norm, codes, int(x.size[3]));
  wait_for_previous();
  let_next_start();
  int64_t row = blockIdx.x, line = row / x.size[2], image = line / x.size[1];
  int64_t at = image * x.stride[0] + (line - image * x.size[1]) * x.stride[1] + (row - line * x.size[2]) * x.stride[2];
  int channels = int(x.size[3]);
  float sum = 0.f, squares = 0.f;
  for (int c = threadIdx.x; c < channels; c += kThreads) sum += load_float(x.data, x.type, at + c * x.stride[3]);
  float mean = reduce_block(sum, shared, Add()) / float(channels);
  for (int c = threadIdx.x; c < channels; c += kThreads) {
    float d = load_float(x.data, x.type, at + c * x.stride[3]) - mean;
    squares += d * d;
  }
  float rstd = rsqrtf(reduce_block(squares, shared, Add()) / float(channels) + norm.eps);
  for (int c = threadIdx.x; c < channels; c += kThreads) {
    float f = (load_float(x.data, x.type, at + c * x.stride[3]) - mean) * rstd;
    f = f * weight_of(norm.weight, norm.type, c, 1.f) + weight_of(norm.bias, norm.type, c, 0.f);
    out[row * channels + c] = int8_t(encoder_of_channel(codes, c).code(f));
  }
}

}  // namespace

cudaError_t layer_norm_quantize(const Floats& x, const Norm& norm, const Codes& codes, int8_t* out, const Stream& on) {
  if (empty(x)) return cudaSuccess;
  if (x.rows() >= kIndexLimit) return cudaErrorInvalidValue;
  if (!vectors_fit(x, codes) || !weights_fit(norm) || !aligned(out, 8) || x.channels() > kTeamChannels) {
    return launch(layer_norm_any, Grid{dim3(unsigned(x.rows())), dim3(kThreads)}, on, x, norm, codes, out);
  }
  return with_type(x.type, [&](auto t) {
    using T = decltype(t);
    int vectors = x.channels() / kVector;
    Team team(x.rows(), vectors, on);
    auto kernel = team.warp ? (team.vectors == 3 ? layer_norm_rows<T, 3, true> : layer_norm_rows<T, 5, true>)
                            : (team.vectors == 1 ? layer_norm_rows<T, 1, false> : layer_norm_rows<T, 4, false>);
    return launch(kernel, team.grid, on, static_cast<const T*>(x.data), Pixels(x, Pad()), uint32_t(x.rows()), vectors,
                  norm, codes, out);
  });
}

}  // namespace mixdq
