// GEGLU, the same wherever it is computed.
#pragma once
#include "codes.cuh"

namespace mixdq {

__device__ __forceinline__ float gelu(float g) { return 0.5f * g * (1.f + erff(g * 0.70710678118654752f)); }

template <class T>
__device__ __forceinline__ uint2 geglu_codes(const Raw<T>& value, const Raw<T>& gate, const Encoder& e) {
  float f[kVector], g[kVector];
  value.get(f);
  gate.get(g);
#pragma unroll
  for (int k = 0; k < kVector; ++k) f[k] *= gelu(g[k]);
  return encode(f, e);
}

}  // namespace mixdq
