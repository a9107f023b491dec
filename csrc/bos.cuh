// Whether a token is the known one.
#pragma once
#include "bos.h"
#include "norm.cuh"

namespace mixdq {

// How far a token is from the known one, over the channels that a thread has seen.
struct Distance {
  static constexpr float kTolerance = 0x1p-6f;  // BOS_TOLERANCE in mixdq_ao/ops.py

  float largest = 0.f, farthest = 0.f;  // fmaxf passes over a NaN
  float odd = 0.f;                      // 1 if a distance was none

  __device__ __forceinline__ void add(float token, float known) {
    const float d = fabsf(token - known);
    largest = fmaxf(largest, fabsf(known)), farthest = fmaxf(farthest, d);
    if (d != d) odd = 1.f;
  }
  // Eight channels from `at` on.
  __device__ __forceinline__ void add(const void* token, Float type, const Bos& bos, int at) {
    RawWeights a, b;
    a.load(token, type, at), b.load(bos.input, bos.input_type, at);
    float x[kVector], known[kVector];
    a.get(token, type, 0.f, x), b.get(bos.input, bos.input_type, 0.f, known);
#pragma unroll
    for (int i = 0; i < kVector; ++i) add(x[i], known[i]);
  }
  // `most`: the largest that any of the threads has.
  template <class F>
  __device__ __forceinline__ bool is_near(F most) const {
    const float limit = kTolerance * most(largest);
    return most(odd) == 0.f && most(farthest) <= limit;
  }
};

}  // namespace mixdq
