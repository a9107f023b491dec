// The exact GELU, the same wherever it is computed.
#pragma once
#include <cuda_runtime.h>

namespace mixdq {

__device__ __forceinline__ float gelu(float g) { return 0.5f * g * (1.f + erff(g * 0.70710678118654752f)); }

}  // namespace mixdq
