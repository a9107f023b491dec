// GEGLU, the same wherever it is computed.
#pragma once
#include "codes.cuh"

namespace mixdq {

// gelu(g) = g Phi(g) = max(g, 0) - |g| Phi(-|g|), where log2 Phi(-t) is nearly a parabola: here the polynomial of the fifth
// degree whose greatest error of t Phi(-t) is least (benchmarks/fit_gelu.py finds it, and both errors): within 6.4e-7 of
// gelu up to 13, where 0.5 g (1 + erff(g / sqrt(2))) is within 4.5e-7 and takes twice the instructions. From 13 on the tail
// is zero. A gate that is NaN or -infinity counts as 0, which gives the code of a NaN.
__device__ __forceinline__ float gelu(float g) {
  const float t = fminf(fabsf(g), 13.f);
  float log2 = -4.73294055e-4f;
  log2 = __fmaf_rn(log2, t, 7.08446160e-3f);
  log2 = __fmaf_rn(log2, t, -5.18271700e-2f);
  log2 = __fmaf_rn(log2, t, -4.59992643e-1f);
  log2 = __fmaf_rn(log2, t, -1.15078777f);
  log2 = __fmaf_rn(log2, t, -1.00003763f);
  return __fmaf_rn(-t, exp2_fast(log2), fmaxf(g, 0.f));
}

template <class T>
__device__ __forceinline__ uint2 geglu_codes(const Raw<T>& value, const Raw<T>& gate, const Encoder& e) {
  float f[kVector], g[kVector];
  value.get(f);
  gate.get(g);
#pragma unroll
  for (int k = 0; k < kVector; ++k) f[k] *= gelu(g[k]);
  return encode_rounded(f, e);
}

}  // namespace mixdq
