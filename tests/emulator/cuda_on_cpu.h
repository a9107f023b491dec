// CUDA's language for a host compiler, included ahead of every file of csrc: threads are fibers of one thread, which run
// in random order until they wait for each other. Instructions of the GPU are in include/, under CUTLASS's names.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#undef __shared__
#undef __align__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static  // one block runs at a time, but for clusters, whose kernels have dynamic shared memory alone
#define __align__(n) __attribute__((aligned(n)))

using std::max;
using std::min;

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace emulator {

// Dynamic shared memory of the running block.
extern uint8_t* shared;

// Runs the kernel to its end. `cluster` blocks run at once, one after another otherwise. A dependent one may begin before
// the kernel ahead has ended.
void run(dim3 grid, dim3 block, size_t shared_bytes, int cluster, bool dependent, const std::function<void()>& kernel);

void sync_block();
void sync_warp();
void wait_for_previous();
void let_next_start();

// Every lane gives 32 bytes at most and gets everybody's, until end_exchange().
struct Lanes {
  uint32_t words[32][8];
};
Lanes& exchange(const void* mine, size_t bytes);
void end_exchange();

}  // namespace emulator

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  int cluster = 1;
  bool dependent = false;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& a = config->attrs[i];
    if (a.id == cudaLaunchAttributeClusterDimension) cluster = int(a.val.clusterDim.x);
    if (a.id == cudaLaunchAttributeProgrammaticStreamSerialization) {
      dependent = a.val.programmaticStreamSerializationAllowed != 0;
    }
  }
  emulator::run(config->gridDim, config->blockDim, config->dynamicSmemBytes, cluster, dependent,
                [&] { kernel(arguments...); });
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

inline void __syncthreads() { emulator::sync_block(); }
inline void __syncwarp() { emulator::sync_warp(); }

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  static_assert(sizeof(T) == 4);
  T other;
  std::memcpy(&other, emulator::exchange(&value, 4).words[lane & 31], 4);
  emulator::end_exchange();
  return other;
}

template <class T>
T __shfl_xor_sync(unsigned all, T value, int lanes) {
  return __shfl_sync(all, value, int(threadIdx.x) ^ lanes);
}

inline int __reduce_add_sync(unsigned, int value) {
  emulator::Lanes& all = emulator::exchange(&value, 4);
  uint32_t sum = 0;
  for (auto& words : all.words) sum += words[0];
  emulator::end_exchange();
  return int(sum);
}

inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) c += int8_t(a >> 8 * i) * int8_t(b >> 8 * i);
  return c;
}

inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t both = uint64_t(y) << 32 | x;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= uint32_t(both >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
  return result;
}

template <class T>
void __stwb(T* to, T value) {
  *to = value;
}
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }

template <class To, class From>
To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline uint32_t __float_as_uint(float v) { return same_bits<uint32_t>(v); }
inline float __uint_as_float(uint32_t v) { return same_bits<float>(v); }
inline float __int_as_float(int v) { return same_bits<float>(v); }

// The compiler's options keep it from contracting these.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.f / a; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
// The GPU's are a few units in the last place off.
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float a) { return 1.f / std::sqrt(a); }
#undef __expf
#define __expf expf
