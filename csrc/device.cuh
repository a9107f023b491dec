// Helpers that every kernel file shares: launching, programmatic dependent launch, conversions.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include "kernels.h"

namespace mixdq {

// Programmatic dependent launch: a kernel may begin while the one ahead of it drains. Nothing that an earlier kernel
// wrote may be read, and nothing that it reads may be written, before wait_for_previous(). A kernel says
// let_next_start() only after its own wait, so that at most the kernel directly ahead is still running.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Brings parameters near while the kernel ahead may still write them: to the L2 cache, where everybody sees that. A step's
// weights have driven them out of it since they were last read.
__device__ __forceinline__ void prefetch(const void* at) {
#ifdef __CUDA_ARCH__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
#endif
}

struct Grid {
  dim3 blocks, threads;
  int shared_bytes = 0;
  int cluster = 1;  // blocks of a cluster, along x
};

// Launch a kernel; arguments must have exactly the parameter types.
template <class... Args>
cudaError_t launch(void (*kernel)(Args...), const Grid& grid, const Stream& on, Args... args) {
  cudaLaunchAttribute attributes[2];
  unsigned count = 0;
  if (on.dependent && on.arch >= 90) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (grid.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = grid.cluster;
    attributes[count].val.clusterDim.y = 1;
    attributes[count++].val.clusterDim.z = 1;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid.blocks;
  config.blockDim = grid.threads;
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = on.stream;
  config.attrs = attributes;
  config.numAttrs = count;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

// Division of numbers below 2^31 by one that the host knows: a multiplication and a shift.
struct Divider {
  uint32_t divisor = 1, multiplier = 1, shift = 0;

  Divider() = default;
  explicit Divider(int64_t d) : divisor(uint32_t(d)) {
    while ((uint64_t(1) << shift) < divisor) ++shift;
    multiplier = uint32_t((uint64_t(1) << 32) * ((uint64_t(1) << shift) - divisor) / divisor + 1);
  }
  __device__ uint32_t divide(uint32_t n) const { return (__umulhi(n, multiplier) + n) >> shift; }
  __device__ uint32_t divide(uint32_t n, uint32_t& rest) const {
    uint32_t q = divide(n);
    rest = n - q * divisor;
    return q;
  }
};

template <class T>
__device__ __forceinline__ float to_float(T v) {
  return float(v);
}

template <class T>
__device__ __forceinline__ T from_float(float v) {
  return T(v);
}

// exp2f() of the default options takes care of results that are denormal, which are 0 here.
__device__ __forceinline__ float exp2_fast(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// One value of a run-time float type.
__device__ __forceinline__ float load_float(const void* data, Float type, int64_t i) {
  if (type == Float::f16) return __half2float(static_cast<const __half*>(data)[i]);
  if (type == Float::bf16) return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
  return static_cast<const float*>(data)[i];
}

// The same in two halves, of which only the second one needs the number to have arrived.
__device__ __forceinline__ uint32_t load_bits(const void* data, Float type, int64_t i) {
  return type == Float::f32 ? static_cast<const uint32_t*>(data)[i] : static_cast<const uint16_t*>(data)[i];
}

__device__ __forceinline__ float float_of_bits(uint32_t bits, Float type) {
  if (type == Float::f16) return __half2float(__ushort_as_half(uint16_t(bits)));
  return __uint_as_float(type == Float::bf16 ? bits << 16 : bits);
}

__device__ __forceinline__ void store_float(void* data, Float type, int64_t i, float v) {
  if (type == Float::f16) {
    static_cast<__half*>(data)[i] = __float2half_rn(v);
  } else if (type == Float::bf16) {
    static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(v);
  } else {
    static_cast<float*>(data)[i] = v;
  }
}

// What does not depend on the row: the epilogue of one output channel of weight w.
struct ChannelEpilogue {
  float alpha, offset;
  int weight_sum;
};

__device__ __forceinline__ ChannelEpilogue channel_epilogue(const Weight& w, int n) {
  // The bias last: it is converted as soon as it is there, and the others are on their way meanwhile.
  ChannelEpilogue c = {w.alpha[n], w.beta ? w.beta[n] : 0.f, w.weight_sum ? w.weight_sum[n] : 0};
  if (w.bias) c.offset += load_float(w.bias, w.bias_type, n);
  return c;
}

// Brings the epilogue of a channel near.
__device__ __forceinline__ void prefetch_epilogue(const Weight& w, int n) {
  prefetch(w.alpha + n);
  if (w.beta) prefetch(w.beta + n);
  if (w.bias) prefetch(static_cast<const char*>(w.bias) + n * (w.bias_type == Float::f32 ? 4 : 2));
}

// The epilogue in float32, before the residual; row_scale and row_zero_point only count where the problem is dynamic.
__device__ __forceinline__ float apply_epilogue(int acc, const ChannelEpilogue& c, bool dynamic, float row_scale,
                                                int row_zero_point) {
  if (dynamic) return float(acc - row_zero_point * c.weight_sum) * row_scale * c.alpha + c.offset;
  return fmaf(float(acc), c.alpha, c.offset);
}

}  // namespace mixdq
