// Tensor core instructions of one warpgroup: a [64, 32 bytes] times b [n, 32 bytes] transposed, sums in registers.
#pragma once
#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED 1  // widths 80 and 160, which divide SDXL's channel counts
#include <cstdint>
#include <utility>
#include "cute/arch/mma_sm90_gmma.hpp"

namespace mixdq::sm90 {

// What is multiplied. Codes by codes with int32 sums; or, where activations stay floating, 16-bit floats by codes that
// were widened to such floats, with float32 sums.
struct Int8 {
  using Sum = uint32_t;
  static constexpr int kBytes = 1;
};
struct Half {
  using Sum = float;
  static constexpr int kBytes = 2;
};
struct Bfloat16 {
  using Sum = float;
  static constexpr int kBytes = 2;
};

template <class Math, int N>
struct Wgmma;

#define MIXDQ_WGMMA(N)                                                                                       \
  template <>                                                                                                \
  struct Wgmma<Int8, N> {                                                                                    \
    using Instruction = cute::SM90::GMMA::MMA_64x##N##x32_S32S8S8_SS_TN;                                      \
  };                                                                                                         \
  template <>                                                                                                \
  struct Wgmma<Half, N> {                                                                                    \
    using Instruction =                                                                                      \
        cute::SM90::GMMA::MMA_64x##N##x16_F32F16F16_SS<cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::K>; \
  };                                                                                                         \
  template <>                                                                                                \
  struct Wgmma<Bfloat16, N> {                                                                                \
    using Instruction =                                                                                      \
        cute::SM90::GMMA::MMA_64x##N##x16_F32BF16BF16_SS<cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::K>; \
  };
MIXDQ_WGMMA(16)
MIXDQ_WGMMA(64)
MIXDQ_WGMMA(80)
MIXDQ_WGMMA(128)
MIXDQ_WGMMA(160)
#undef MIXDQ_WGMMA

template <class Math, int N, size_t... I>
__device__ __forceinline__ void wgmma(uint64_t a, uint64_t b, typename Math::Sum (&sums)[N / 2], bool add,
                                      std::index_sequence<I...>) {
  using cute::SM90::GMMA::ScaleOut;
  Wgmma<Math, N>::Instruction::fma(a, b, sums[I]..., add ? ScaleOut::One : ScaleOut::Zero);
}

// sums (+)= a * b^T for the tiles that the descriptors name; asynchronous until the warpgroup waits.
template <class Math, int N>
__device__ __forceinline__ void wgmma(uint64_t a, uint64_t b, typename Math::Sum (&sums)[N / 2], bool add) {
  wgmma<Math, N>(a, b, sums, add, std::make_index_sequence<N / 2>{});
}

// Descriptor of a tile in shared memory: rows of 128 bytes in the 128-byte swizzle, or of 64 bytes in the 64-byte swizzle.
// Eight rows follow one another; the next eight that the instruction takes come `every` eights later. The next 32 bytes of
// a row are +2, the next eight rows + kBytes / 2 (in units of 16 bytes).
template <int kBytes>
__device__ __forceinline__ uint64_t tile_descriptor(uint32_t shared_address, int every) {
  static_assert(kBytes == 128 || kBytes == 64);
  constexpr uint64_t kSwizzle = kBytes == 128 ? 1 : 2;
  return uint64_t((shared_address & 0x3FFFF) >> 4) | uint64_t(1) << 16 | uint64_t(every * kBytes / 2) << 32 |
         kSwizzle << 62;
}

}  // namespace mixdq::sm90
