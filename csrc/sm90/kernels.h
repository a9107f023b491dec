// The instances of matmul.cuh, one file each: tile rows x tile columns.
#pragma once
#include "../kernels.h"

namespace mixdq {

#define MIXDQ_SM90_KERNELS(X)                                                                              \
  X(sm90_128x160) X(sm90_128x128) X(sm90_64x160) X(sm90_256x128) X(sm90_64x80) X(sm90_128x64) X(sm90_64x64) \
  X(sm90_128x16) X(sm90_128x128_split) X(sm90_128x160_split)                                               \
  X(sm90_64x64_sharing) X(sm90_64x160_sharing) X(sm90_128x160_pairs)                                       \
  X(sm90_128x160_packed) X(sm90_64x160_packed) X(sm90_64x80_packed) X(sm90_128x64_packed)                  \
  X(sm90_128x160_geglu) X(sm90_64x160_geglu)                                                               \
  X(sm90_128x160_packed_geglu) X(sm90_64x160_packed_geglu)                                                 \
  X(sm90_128x128_floating) X(sm90_64x80_floating) X(sm90_64x80_quantizing)

#define MIXDQ_DECLARE(NAME) cudaError_t NAME(const Matmul&, int splits, const Stream&);
MIXDQ_SM90_KERNELS(MIXDQ_DECLARE)
#undef MIXDQ_DECLARE

}  // namespace mixdq
