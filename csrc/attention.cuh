// What both attention kernels share: products of 16-bit floats by mma.sync, ldmatrix, and where a head lies.
#pragma once
#include <type_traits>
#include "attention.h"
#include "codes.cuh"
#include "cute/arch/copy_sm75.hpp"
#include "cute/arch/copy_sm80.hpp"
#include "cute/arch/mma_sm80.hpp"

namespace mixdq {

constexpr int kC = kHeadChannels;
constexpr int kRows = 16;  // of a warp
// Rows lie 16 bytes further apart than they are long, so that eight of them are in different banks for ldmatrix.
constexpr int kPitch = kC + 8;

template <class T>
using Multiply = std::conditional_t<std::is_same_v<T, __half>, cute::SM80_16x8x16_F32F16F16F32_TN,
                                    cute::SM80_16x8x16_F32BF16BF16F32_TN>;

template <class T>
__device__ __forceinline__ void multiply(const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (&d)[4]) {
  Multiply<T>::fma(d[0], d[1], d[2], d[3], a[0], a[1], a[2], a[3], b0, b1, d[0], d[1], d[2], d[3]);
}

// What a lane adds to the address of 16 rows to read 16 of their columns: rows 0-7 and then 8-15, and those again 16
// bytes further on.
__device__ __forceinline__ int place_of_lane() {
  int lane = threadIdx.x % 32;
  return lane % 16 * kPitch + lane / 16 * 8;
}

template <class Load, class T>
__device__ __forceinline__ void read(const T* at, uint32_t (&to)[4]) {
  Load::copy(*reinterpret_cast<const cute::uint128_t*>(at), to[0], to[1], to[2], to[3]);
}

template <class T>
__device__ __forceinline__ uint32_t pair(float a, float b) {
  if constexpr (std::is_same_v<T, __half>) {
    __half2 v = __floats2half2_rn(a, b);
    return reinterpret_cast<const uint32_t&>(v);
  } else {
    __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
    return reinterpret_cast<const uint32_t&>(v);
  }
}

template <class T>
__device__ __forceinline__ T* head(T* data, const int64_t (&stride)[3]) {
  return data + blockIdx.z * stride[0] + blockIdx.y * stride[1];
}

}  // namespace mixdq
