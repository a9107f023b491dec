// A warp's share of the product: operands by ldmatrix, mma.sync, and the sum of what groups of warps found.
#pragma once
#include "cute/arch/copy_sm75.hpp"
#include "cute/arch/mma_sm80.hpp"
#include "sm80/load.cuh"

namespace mixdq::sm80 {

// Operands of one instruction's depth, 32 bytes of k, for all of a warp's tile.
//
// Fragments hand each lane two neighboring columns of every block of 8. Which columns of the weight make a block is ours
// to say: with every kRun-th pair of columns in a block, the lane's pairs of kRun / 2 blocks lie side by side.
template <class C>
struct Fragments {
  uint32_t x[C::kWarpM / 16][4];
  uint32_t w[C::kWarpN / 16][4];  // two blocks of 8 columns: k 0-15 and 16-31 of the first, then of the second

  // Row of ldmatrix that this lane names: of x, rows 0-7 and 8-15 and then the second 16 bytes of both; of w, 16 bytes
  // after 16 bytes of the columns of one block, then of the next.
  __device__ static int x_at(int warp_row) {
    int lane = threadIdx.x % 32;
    return swizzled<2>(warp_row + lane % 16, lane / 16);
  }
  __device__ static int w_at(int warp_column) {
    int lane = threadIdx.x % 32;
    return swizzled<C::kRun>(warp_column + lane % 8 / 2 * C::kRun + lane / 16 * 2 + lane % 2, lane / 8 % 2);
  }

  // `half` of the stage's 64 bytes flips one bit of the swizzled piece.
  __device__ __forceinline__ void load(const int8_t* stage, int x_at, int w_at, int half) {
#pragma unroll
    for (int j = 0; j < C::kWarpN / 16; ++j) {
      constexpr int kPairs = C::kRun / 4;  // of blocks, whose columns mingle
      read(stage + C::kXBytes + (w_at ^ half * 32) + (j / kPairs * kPairs * 16 + j % kPairs * 4) * kTileK, w[j]);
    }
#pragma unroll
    for (int i = 0; i < C::kWarpM / 16; ++i) {
      read(stage + (x_at ^ half * 32) + i * 16 * kTileK, x[i]);
    }
  }

  __device__ static __forceinline__ void read(const int8_t* at, uint32_t (&to)[4]) {
    cute::SM75_U32x4_LDSM_N::copy(*reinterpret_cast<const cute::uint128_t*>(at), to[0], to[1], to[2], to[3]);
  }
};

// Of 16 rows: a lane 4g+t has columns of rows g and g+8.
template <class C>
struct Rows {
  uint32_t v[C::kWarpN / 8][4] = {};

  // The lane's j-th column of the c-th run, in row g or (lower) g+8.
  __device__ __forceinline__ int sum(int c, int j, bool lower) const {
    return int(v[c * (C::kRun / 2) + j / 2][lower * 2 + j % 2]);
  }
};

template <class C>
struct Sums {
  static constexpr int kOwn = C::kWarpM / 16 / C::kGroups;  // of the warp's blocks of 16 rows, after reduce()
  Rows<C> rows[C::kWarpM / 16];

  __device__ __forceinline__ void add(const Fragments<C>& f) {
#pragma unroll
    for (int i = 0; i < C::kWarpM / 16; ++i) {
#pragma unroll
      for (int j = 0; j < C::kWarpN / 8; ++j) {
        uint32_t(&d)[4] = rows[i].v[j];
        const uint32_t* w = &f.w[j / 2][j % 2 * 2];
        cute::SM80_16x8x32_S32S8S8S32_TN::fma(d[0], d[1], d[2], d[3], f.x[i][0], f.x[i][1], f.x[i][2], f.x[i][3],
                                              w[0], w[1], d[0], d[1], d[2], d[3]);
      }
    }
  }

  // Adds what the groups found, each a part of the reduction. Group g keeps the g-th part of the rows, as its first ones.
  __device__ __forceinline__ void reduce(int group, int8_t* shared) {
    constexpr int kVectors = kOwn * (C::kWarpN / 8);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % C::kGroupWarps;
    auto slot = [&](int part, int other) {
      int at = (part * (C::kGroups - 1) + other) * C::kGroupWarps + warp;
      return reinterpret_cast<uint4*>(shared) + at * kVectors * 32 + lane;
    };
    Rows<C> own[kOwn];
#pragma unroll
    for (int part = 0; part < C::kGroups; ++part) {
      uint4* to = slot(part, (group - part + C::kGroups - 1) % C::kGroups);
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const Rows<C>& from = rows[part * kOwn + i];
        if (part == group) own[i] = from;
#pragma unroll
        for (int j = 0; j < C::kWarpN / 8; ++j) {
          const uint32_t* v = from.v[j];
          if (part != group) to[(i * (C::kWarpN / 8) + j) * 32] = make_uint4(v[0], v[1], v[2], v[3]);
        }
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
#pragma unroll
      for (int j = 0; j < C::kWarpN / 8; ++j) {
        uint32_t(&v)[4] = own[i].v[j];
#pragma unroll
        for (int other = 0; other < C::kGroups - 1; ++other) {
          uint4 more = slot(group, other)[(i * (C::kWarpN / 8) + j) * 32];
          v[0] += more.x, v[1] += more.y, v[2] += more.z, v[3] += more.w;
        }
      }
      rows[i] = own[i];
    }
  }
};

}  // namespace mixdq::sm80
