// What both attention kernels share: products of 16-bit floats by mma.sync, ldmatrix, and where a head lies.
#pragma once
#include <limits>
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
constexpr float kInfinity = std::numeric_limits<float>::infinity();

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

// Fragments of 16 rows; they and keys and values begin where place_of_lane() says.
template <class T>
__device__ __forceinline__ void read_queries(const T* rows, uint32_t (&q)[kC / 16][4]) {
#pragma unroll
  for (int i = 0; i < kC / 16; ++i) read<cute::SM75_U32x4_LDSM_N>(rows + i * 16, q[i]);
}

// A lane's scores of 8 kEights keys: of each eight 2t and 2t+1, for rows g and g+8 and lane 4g+t.
template <class T, int kEights>
__device__ __forceinline__ void multiply_keys(const uint32_t (&q)[kC / 16][4], const T* keys,
                                              float (&score)[kEights][4]) {
#pragma unroll
  for (int i = 0; i < kC / 16; ++i) {
#pragma unroll
    for (int j = 0; j < kEights / 2; ++j) {
      uint32_t k[4];
      read<cute::SM75_U32x4_LDSM_N>(keys + j * 16 * kPitch + i * 16, k);
      multiply<T>(q[i], k[0], k[2], score[2 * j]);
      multiply<T>(q[i], k[1], k[3], score[2 * j + 1]);
    }
  }
}

// Adds the products of 16 keys' probabilities with their values.
template <class T>
__device__ __forceinline__ void multiply_values(const uint32_t (&p)[4], const T* values, float (&out)[kC / 8][4]) {
#pragma unroll
  for (int i = 0; i < kC / 16; ++i) {
    uint32_t v[4];
    read<cute::SM75_U16x8_LDSM_T>(values + i * 16, v);
    multiply<T>(p, v[0], v[1], out[2 * i]);
    multiply<T>(p, v[2], v[3], out[2 * i + 1]);
  }
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
