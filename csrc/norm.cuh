// Weight and bias of a norm.
#pragma once
#include "codes.cuh"

namespace mixdq {

__device__ __forceinline__ void load_weights(const void* data, Float type, int channel, float otherwise,
                                             float (&f)[kVector]) {
  if (!data) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) f[i] = otherwise;
  } else if (type == Float::f16) {
    Raw<__half> raw;
    raw.load(static_cast<const __half*>(data) + channel);
    raw.get(f);
  } else if (type == Float::bf16) {
    Raw<__nv_bfloat16> raw;
    raw.load(static_cast<const __nv_bfloat16*>(data) + channel);
    raw.get(f);
  } else {
    Raw<float> raw;
    raw.load(static_cast<const float*>(data) + channel);
    raw.get(f);
  }
}

__device__ __forceinline__ float weight_of(const void* data, Float type, int channel, float otherwise) {
  return data ? load_float(data, type, channel) : otherwise;
}

inline bool weights_fit(const Norm& norm) { return aligned(norm.weight, 16) && aligned(norm.bias, 16); }

}  // namespace mixdq
