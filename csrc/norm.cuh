// What the norms share: sums, and weights and biases, whose type is known when they are loaded.
#pragma once
#include "codes.cuh"

namespace mixdq {

// Sums about a pivot: a value, or the mean of some, of those that are summed, so that little cancels.
struct Sums {
  float count = 0.f, first = 0.f, second = 0.f;

  __device__ void add(const float (&f)[kVector], float pivot) {  // all but the count
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      float d = f[i] - pivot;
      first += d;
      second += d * d;
    }
  }
  // n values of that mean, and the sum of their squared deviations from it.
  __device__ void add(float n, float mean, float deviations, float pivot) {
    float d = mean - pivot;
    count += n;
    first += n * d;
    second += n * d * d + deviations;
  }
  __device__ void reduce(int lanes) {
    for (int o = lanes / 2; o > 0; o /= 2) {
      count += __shfl_xor_sync(~0u, count, o);
      first += __shfl_xor_sync(~0u, first, o);
      second += __shfl_xor_sync(~0u, second, o);
    }
  }
  // Mean, and squared deviations from it.
  __device__ float2 moments(float pivot) const {
    float shift = __fdividef(first, count);
    return {pivot + shift, fmaxf(second - first * shift, 0.f)};
  }
};

// Eight values of a vector, as they lie in memory. They are converted apart from being loaded: a conversion in the branch of
// its type would make all that is loaded after it wait.
struct RawWeights {
  uint4 part[2];

  __device__ __forceinline__ void load(const void* data, Float type, int channel) {
    if (!data) return;
    auto* from = static_cast<const char*>(data) + int64_t(channel) * (type == Float::f32 ? 4 : 2);
    part[0] = *reinterpret_cast<const uint4*>(from);
    if (type == Float::f32) part[1] = reinterpret_cast<const uint4*>(from)[1];
  }
  // All `otherwise` where there is no data.
  __device__ __forceinline__ void get(const void* data, Float type, float otherwise, float (&f)[kVector]) const {
    if (!data) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) f[i] = otherwise;
    } else if (type == Float::f16) {
      Raw<__half>{{part[0]}}.get(f);
    } else if (type == Float::bf16) {
      Raw<__nv_bfloat16>{{part[0]}}.get(f);
    } else {
      Raw<float>{{part[0], part[1]}}.get(f);
    }
  }
};

// Both of a norm.
struct NormWeights {
  RawWeights weight, bias;

  __device__ __forceinline__ void load(const Norm& norm, int channel) {
    weight.load(norm.weight, norm.type, channel);
    bias.load(norm.bias, norm.type, channel);
  }
  __device__ __forceinline__ void get(const Norm& norm, float (&w)[kVector], float (&b)[kVector]) const {
    weight.get(norm.weight, norm.type, 1.f, w);
    bias.get(norm.bias, norm.type, 0.f, b);
  }
};

// Before the wait for the kernel ahead.
__device__ __forceinline__ void prefetch(const Norm& norm, const Codes& codes, int channels) {
  constexpr int kLine = 32;  // channels of 128 bytes, of float32 at least
  prefetch(codes);
  if (blockIdx.x) return;
  const int bytes = norm.type == Float::f32 ? 4 : 2;
  for (int c = threadIdx.x * kLine; c < channels; c += blockDim.x * kLine) {
    if (norm.weight) prefetch(static_cast<const char*>(norm.weight) + c * bytes);
    if (norm.bias) prefetch(static_cast<const char*>(norm.bias) + c * bytes);
  }
}

__device__ __forceinline__ float weight_of(const void* data, Float type, int channel, float otherwise) {
  return data ? load_float(data, type, channel) : otherwise;
}

inline bool weights_fit(const Norm& norm) { return aligned(norm.weight, 16) && aligned(norm.bias, 16); }

}  // namespace mixdq
