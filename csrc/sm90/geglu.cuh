// From the sums of a tile of values and gates to codes.
#pragma once
#include "codes.cuh"
#include "gelu.cuh"
#include "sm90/epilogue.cuh"

namespace mixdq::sm90 {

// A thread has the gate of each of its values: both halves of the tile lie in its registers in the same way.
template <class C, Float kType>
__device__ __forceinline__ void write_geglu(const Params& p, const Tile& t, const WarpTile<C>& at,
                                            const Columns<C>& columns, const Sums<C>& sums, const Encoder& encoder,
                                            Staging<C>& staging) {
  constexpr int kEach = C::kBlocksM * 4;  // codes of a thread in eight columns
  uint8_t* buffer = staging.next(0);
#pragma unroll
  for (int c0 = 0; c0 < C::kTileOut; c0 += 8) {
    const int c = c0 + at.lane % 4 * 2;
    ChannelEpilogue value[2], gate[2];
    columns.pair(c, false, value);
    columns.pair(C::kTileOut + c, false, gate);
    float y[kEach];
#pragma unroll
    for (int e = 0; e < kEach; e += 2) {
      const auto* v = &sums[e / 4][c0 / 2 + e % 4];
      const auto* g = v + C::kTileOut / 2;
      float2 a = rounded(kType, finish<C>(p, v[0], value[0], false, {}), finish<C>(p, v[1], value[1], false, {}));
      float2 b = rounded(kType, finish<C>(p, g[0], gate[0], false, {}), finish<C>(p, g[1], gate[1], false, {}));
      y[e] = a.x * gelu(b.x), y[e + 1] = a.y * gelu(b.y);
    }
    uint32_t codes[kEach];
    encode(y, encoder, codes);
#pragma unroll
    for (int e = 0; e < kEach; e += 2) {
      uint8_t* row = buffer + WarpTile<C>::row(at.lane / 4, e / 4, e / 2 % 2) * C::kTileOut;
      *reinterpret_cast<uint16_t*>(row + c) = uint16_t(__byte_perm(codes[e], codes[e + 1], 0x0040));
    }
  }
  staging.send(p, t, at, buffer, t.n0);
}

}  // namespace mixdq::sm90
