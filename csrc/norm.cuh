// Weight and bias of a norm, and other vectors whose type is known when they are loaded.
#pragma once
#include "codes.cuh"

namespace mixdq {

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

__device__ __forceinline__ float weight_of(const void* data, Float type, int channel, float otherwise) {
  return data ? load_float(data, type, channel) : otherwise;
}

inline bool weights_fit(const Norm& norm) { return aligned(norm.weight, 16) && aligned(norm.bias, 16); }

}  // namespace mixdq
