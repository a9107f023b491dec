// The output of a text's first token, where it is known, in the kernel that has its input as floats.
#pragma once
#include "bos.cuh"
#include "sm90/epilogue.cuh"

namespace mixdq::sm90 {

// Over what this warp has written by ordinary stores of the one row of its that may begin a sample.
template <class C>
__device__ __forceinline__ void write_known_token(const Params& p, const Tile& t, const WarpTile<C>& at) {
  const Bos& bos = p.bos;
  const int row = (at.row0 + bos.sample_rows - 1) / bos.sample_rows * bos.sample_rows;
  if (row >= min(at.row0 + C::kWarpRows, p.m)) return;
  if (bos.input) {
    Distance distance;
    const void* token = static_cast<const uint16_t*>(p.x) + row * p.x_stride;
#pragma unroll 4
    for (int c = at.lane * kVector; c < p.channels; c += 32 * kVector) distance.add(token, p.x_type, bos, c);
    if (!distance.is_near([](float v) { return reduce_lanes(v, Most()); })) return;
  }
  __syncwarp();  // the row is written
  for (int c = at.lane; c < min(C::kTileN, at.columns); c += 32) {
    store_float(p.out, p.out_type, row * p.out_stride + at.column + c, load_float(bos.output, bos.output_type, t.n0 + c));
  }
}

}  // namespace mixdq::sm90
