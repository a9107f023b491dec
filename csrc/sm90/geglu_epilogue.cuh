// From the sums of a tile of values and gates to codes.
#pragma once
#include <type_traits>
#include "geglu.cuh"
#include "sm90/epilogue.cuh"

namespace mixdq::sm90 {

// The arithmetic is long, and would not stay in the instruction cache if it were written out for each register. So 16-bit
// values of kPart columns and their gates go to shared memory, from where a loop takes eight of each at a time.

// Where 16 bytes of a row lie: rows alternate, so that eight of them take all banks.
__device__ __forceinline__ int part_place(int row, int piece) {
  return row * kPartPitch + ((piece ^ (row >> 1 & 3)) << 4);
}

// The values of a part that begins at `column` of the tile, or its gates.
template <class C, Float kType>
__device__ __forceinline__ void stage_part(const Params& p, const Columns<C>& columns, const Sums<C>& sums, int column,
                                           int piece, uint8_t* buffer) {
  const int lane = threadIdx.x % 32;
  // The row that this lane names of stmatrix's four matrices, as for 16-bit outputs.
  const int my_row = WarpTile<C>::row(lane % 8, 0, lane / 8 % 2);
  ChannelEpilogue channels[2][2];
  columns.pair(column + lane % 4 * 2, false, channels[0]);
  columns.pair(column + 8 + lane % 4 * 2, false, channels[1]);
#pragma unroll
  for (int i = 0; i < C::kBlocksM; ++i) {
    uint32_t out[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const auto* sum = &sums[i][(column / 8 + e / 2) * 4 + e % 2 * 2];
      const auto& c = channels[e / 2];
      out[e] = pack2(kType, finish<C>(p, sum[0], c[0], false, {}), finish<C>(p, sum[1], c[1], false, {}));
    }
    uint8_t* to = buffer + part_place(my_row, piece + lane / 16) + i * 8 * kPartPitch;
    cute::SM90_U32x4_STSM_N::copy(out[0], out[1], out[2], out[3], *reinterpret_cast<cute::uint128_t*>(to));
  }
}

template <class C, Float kType>
__device__ __forceinline__ void write_geglu(const Params& p, const Tile& t, const WarpTile<C>& at,
                                            const Columns<C>& columns, Sums<C>& sums, const Encoder& encoder,
                                            Staging<C>& staging) {
  using T = std::conditional_t<kType == Float::f16, __half, __nv_bfloat16>;
  uint8_t* codes = staging.next(0);
  uint8_t* part = codes + C::kWarpRows * C::kTileOut;
#pragma unroll 1
  for (int first = 0; first < C::kTileOut; first += kPart) {
    fence_sums<C>(sums);  // or all would become floats ahead of the loop, for which there are no registers
    __syncwarp();         // all have read the part before
#pragma unroll
    for (int c = 0; c < C::kTileOut; c += kPart) {
      if (c != first) continue;  // registers have no index
      stage_part<C, kType>(p, columns, sums, c, 0, part);
      stage_part<C, kType>(p, columns, sums, C::kTileOut + c, 2, part);
    }
    __syncwarp();
#pragma unroll 1
    for (int r = 0; r < C::kWarpRows; r += 16) {
      const int row = r + at.lane / 16 * 8 + at.lane % 8, piece = at.lane / 8 % 2;
      Raw<T> value, gate;
      value.load(reinterpret_cast<const T*>(part + part_place(row, piece)));
      gate.load(reinterpret_cast<const T*>(part + part_place(row, piece + 2)));
      *reinterpret_cast<uint2*>(codes + row * C::kTileOut + first + piece * 8) = geglu_codes(value, gate, encoder);
    }
  }
  staging.send(p, t, at, 0, C::kTileOut);
}

}  // namespace mixdq::sm90
