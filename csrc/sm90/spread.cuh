// The warps that spread packed codes over the bytes or floats that wgmma reads.
#pragma once
#include "sm90/halves.cuh"
#include "sm90/pipeline.cuh"

namespace mixdq::sm90 {

// Eight 4-bit codes to bytes, in order, each in the high half.
__device__ __forceinline__ uint2 spread4(uint32_t v) {
  uint32_t even = (v << 4) & 0xF0F0F0F0u, odd = v & 0xF0F0F0F0u;
  return {__byte_perm(even, odd, 0x5140), __byte_perm(even, odd, 0x7362)};
}

// Four bytes of 2-bit codes to sixteen bytes, in order, each in the highest two bits.
__device__ __forceinline__ uint4 spread2(uint32_t v) {
  uint32_t a = (v << 6) & 0xC0C0C0C0u, b = (v << 4) & 0xC0C0C0C0u, c = (v << 2) & 0xC0C0C0C0u, d = v & 0xC0C0C0C0u;
  uint32_t ab_low = __byte_perm(a, b, 0x5140), ab_high = __byte_perm(a, b, 0x7362);
  uint32_t cd_low = __byte_perm(c, d, 0x5140), cd_high = __byte_perm(c, d, 0x7362);
  return {__byte_perm(ab_low, cd_low, 0x5410), __byte_perm(ab_low, cd_low, 0x7632),
          __byte_perm(ab_high, cd_high, 0x5410), __byte_perm(ab_high, cd_high, 0x7632)};
}

// Eight int8 codes to 16-bit floats, exactly.
__device__ __forceinline__ uint4 widen(Float type, uint2 codes) {
  uint32_t words[2] = {codes.x ^ 0x80808080u, codes.y ^ 0x80808080u}, out[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    // 2^23 + (code + 128) as a float has the code in its lowest byte.
    uint32_t a = __byte_perm(words[i / 2], 0x4B000000u, i % 2 ? 0x7652 : 0x7650);
    uint32_t b = __byte_perm(words[i / 2], 0x4B000000u, i % 2 ? 0x7653 : 0x7651);
    out[i] = pack2(type, __uint_as_float(a) - 8388736.f, __uint_as_float(b) - 8388736.f);
  }
  return {out[0], out[1], out[2], out[3]};
}

// The codes that 16 bytes of a row of the tile hold, from their stored form. `piece` counts such places.
template <class C>
__device__ __forceinline__ uint4 spread_piece(const Params& p, const uint8_t* from, int piece) {
  if constexpr (C::Math::kBytes == 1) {
    if (p.shift == 4) {
      uint2 v = reinterpret_cast<const uint2*>(from)[piece];
      uint2 low = spread4(v.x), high = spread4(v.y);
      return {low.x, low.y, high.x, high.y};
    }
    return spread2(reinterpret_cast<const uint32_t*>(from)[piece]);
  } else {
    uint2 codes;
    if (p.shift == 0) {
      codes = reinterpret_cast<const uint2*>(from)[piece];
    } else if (p.shift == 4) {
      codes = spread4(reinterpret_cast<const uint32_t*>(from)[piece]);
    } else {
      uint4 v = spread2(reinterpret_cast<const uint16_t*>(from)[piece]);
      codes = {v.x, v.y};
    }
    return widen(std::is_same_v<typename C::Math, Half> ? Float::f16 : Float::bf16, codes);
  }
}

// Three warps: stored codes of each stage to the swizzled tile that wgmma reads.
template <class C>
__device__ void spread(const Params& p, const Shared<C>& sm, int first, int stride, int tiles, Reduction r) {
  constexpr int kWorkers = 96, kPieces = C::kTileN * (kRowBytes / 16);
  const int worker = threadIdx.x - 32;
  Turn<C> turn;
  for (int index = first; index < tiles; index += stride) {
    for (int i = 0; i < r.count; ++i, turn.step()) {
      FullBarrier::wait(sm.packed_full(turn.stage), turn.phase);
      const uint8_t* from = sm.packed(turn.stage);
      uint8_t* to = sm.weight(turn.stage);
      for (int piece = worker; piece < kPieces; piece += kWorkers) {
        int row = piece / 8, place = (piece % 8) ^ (row % 8);
        *reinterpret_cast<uint4*>(to + row * kRowBytes + place * 16) = spread_piece<C>(p, from, piece);
      }
      cutlass::arch::fence_view_async_shared();
      __syncwarp();
      if (threadIdx.x % 32 == 0) FullBarrier::arrive(sm.full(turn.stage));
    }
  }
}

}  // namespace mixdq::sm90
