// Pairs of 16-bit floats.
#pragma once
#include "device.cuh"

namespace mixdq::sm90 {

__device__ __forceinline__ uint32_t pack2(Float type, float a, float b) {
  if (type == Float::f16) {
    __half2 v = __floats2half2_rn(a, b);
    return *reinterpret_cast<uint32_t*>(&v);
  }
  __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
  return *reinterpret_cast<uint32_t*>(&v);
}

__device__ __forceinline__ float2 unpack2(Float type, uint32_t v) {
  if (type == Float::f16) return __half22float2(*reinterpret_cast<__half2*>(&v));
  return __bfloat1622float2(*reinterpret_cast<__nv_bfloat162*>(&v));
}

}  // namespace mixdq::sm90
