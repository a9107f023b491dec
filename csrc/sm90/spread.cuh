// The warps that spread packed codes over the bytes or floats that wgmma reads.
#pragma once
#include "sm90/halves.cuh"
#include "sm90/prepare.cuh"

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

// Of the stored codes that become 16 bytes of a row of the tile: bytes, and as a type that one load brings.
template <class C, int kBits>
struct Stored {
  static constexpr int kBytes = 16 / C::Math::kBytes * kBits / 8;
  using Type = std::conditional_t<kBytes == 8, uint2, std::conditional_t<kBytes == 4, uint32_t, uint16_t>>;
};

template <class C, int kBits>
__device__ __forceinline__ uint4 spread_piece(typename Stored<C, kBits>::Type v) {
  if constexpr (C::Math::kBytes == 1 && kBits == 4) {
    uint2 low = spread4(v.x), high = spread4(v.y);
    return {low.x, low.y, high.x, high.y};
  } else if constexpr (C::Math::kBytes == 1) {
    return spread2(v);
  } else {
    uint2 codes;
    if constexpr (kBits == 8) {
      codes = v;
    } else if constexpr (kBits == 4) {
      codes = spread4(v);
    } else {
      uint4 both = spread2(v);
      codes = {both.x, both.y};
    }
    return widen(std::is_same_v<typename C::Math, Half> ? Float::f16 : Float::bf16, codes);
  }
}

// One stage, by one warp. A lane's pieces are at fixed distances, in the tile as well, since 4 rows on only flip a bit of
// the swizzle; some are asked for before the first is used.
template <class C, int kBits>
__device__ __forceinline__ void spread_stage(const uint8_t* from, uint8_t* to) {
  using Type = typename Stored<C, kBits>::Type;
  constexpr int kRows = 4, kEach = C::kTileN / kRows, kAtOnce = 8;
  static_assert(C::kTileN % kRows == 0);
  const int lane = threadIdx.x % 32, row = lane / 8, place = lane % 8 ^ row;
  const Type* source = reinterpret_cast<const Type*>(from) + lane;
  uint8_t* even = to + row * kRowBytes + place * 16;
  uint8_t* odd = to + row * kRowBytes + (place ^ 4) * 16;
#pragma unroll
  for (int i0 = 0; i0 < kEach; i0 += kAtOnce) {
    Type v[kAtOnce];
#pragma unroll
    for (int i = i0; i < i0 + kAtOnce && i < kEach; ++i) v[i - i0] = source[i * 32];
#pragma unroll
    for (int i = i0; i < i0 + kAtOnce && i < kEach; ++i) {
      *reinterpret_cast<uint4*>((i % 2 ? odd : even) + i * kRows * kRowBytes) = spread_piece<C, kBits>(v[i - i0]);
    }
  }
}

// By one of the warps that do so, for all steps of all tiles. Each of them takes a stage in turn: with all of them at one
// stage, a step is as long as the waits at its barriers and for shared memory, one after the other.
template <class C>
__device__ __forceinline__ void spread(const Params& p, const Shared<C>& sm, int warp, int steps) {
  static_assert(C::kPreparers <= C::kStages, "nobody waits for a use of a stage while the one before is outstanding");
  auto spread_bits = [&](auto bits) {
    prepare(sm, warp, C::kPreparers, steps,
            [&](int stage) { spread_stage<C, bits.value>(sm.raw(stage), sm.weight(stage)); });
  };
  if constexpr (C::Math::kBytes == 2) {
    if (p.shift == 0) return spread_bits(std::integral_constant<int, 8>());
  }
  if (p.shift == 4) return spread_bits(std::integral_constant<int, 4>());
  spread_bits(std::integral_constant<int, 2>());
}

}  // namespace mixdq::sm90
