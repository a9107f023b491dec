// The warpgroups that multiply: sums of a tile, in registers.
#pragma once
#include "sm90/pipeline.cuh"
#include "sm90/wgmma.cuh"

namespace mixdq::sm90 {

template <class C>
using Sums = typename C::Math::Sum[C::kBlocksM][C::kTileN / 2];

template <class C>
__device__ __forceinline__ void fence_sums(Sums<C>& sums) {
#pragma unroll
  for (int i = 0; i < C::kBlocksM; ++i) {
#pragma unroll
    for (int j = 0; j < C::kTileN / 2; ++j) cute::warpgroup_fence_operand(sums[i][j]);
  }
}

// Two blocks of 64 rows take eight rows each in turn. A warp, which has 16 rows of each block, so has 32 rows of the tile
// that follow one another, and its outputs leave in one piece.
template <class C, int kBytes>
__device__ __forceinline__ uint64_t input_descriptor(const uint8_t* tile) {
  return tile_descriptor<kBytes>(cute::cast_smem_ptr_to_uint(tile), C::kBlocksM);
}

// Of a sharing kernel to all blocks of the cluster, whose copies write into this one.
template <class C>
__device__ __forceinline__ void release(const Shared<C>& sm, int stage, int blocks) {
  const int lane = threadIdx.x % 32;
  if constexpr (C::kSharing) {
    if (lane < blocks) EmptyBarrier::arrive(sm.empty(stage), lane, 1);
  } else {
    if (lane == 0) EmptyBarrier::arrive(sm.empty(stage));
  }
}

__device__ __forceinline__ void sync_group(int group) { cutlass::arch::NamedBarrier::sync(kGroup, 1 + group); }

// Ping-pong: a group begins to multiply when the other one has seen the last stage of its own tile. A stage's barrier
// tells only whether its uses so far are even or odd, so nobody may wait for a use while the one before is outstanding.
__device__ __forceinline__ void await_turn(int group) { cutlass::arch::NamedBarrier::sync(2 * kGroup, 3 + group); }
__device__ __forceinline__ void pass_turn(int group) { cutlass::arch::NamedBarrier::arrive(2 * kGroup, 3 + group); }

// One step: a stage whose rows have kBytes.
template <class C, int kBytes>
__device__ __forceinline__ void multiply_stage(const Shared<C>& sm, const Turn<C>& turn, int row0, Sums<C>& sums,
                                               bool first) {
  FullBarrier::wait(sm.full(turn.stage), turn.phase);
  uint64_t a = input_descriptor<C, kBytes>(sm.input(turn.stage) + row0 * kBytes);
  uint64_t b = tile_descriptor<kBytes>(cute::cast_smem_ptr_to_uint(sm.weight(turn.stage)), 1);
  fence_sums<C>(sums);
  cute::warpgroup_arrive();
#pragma unroll
  for (int s = 0; s < kBytes / kStepBytes; ++s) {
#pragma unroll
    for (int i = 0; i < C::kBlocksM; ++i) {
      wgmma<typename C::Math, C::kTileN>(a + i * kBytes / 2 + s * (kStepBytes / 16), b + s * (kStepBytes / 16), sums[i],
                                         !first || s > 0);
    }
  }
  cute::warpgroup_commit_batch();
  fence_sums<C>(sums);
  cute::warpgroup_wait<1>();
}

// The sums of one tile, or of this block's share of them: first the steps of whole rows, then the tails. Then it is the
// turn of group `next`, if there is one. `blocks`: of the cluster, in a sharing kernel.
template <class C>
__device__ __forceinline__ void multiply(const Shared<C>& sm, Turn<C>& turn, const Reduction& r, int row0, Sums<C>& sums,
                                         int blocks = 1, int next = -1) {
  // A block that shares its only tile may end before the others: what nobody waits for is not told them.
  constexpr bool kMayEnd = C::kSharing && C::kOneTile;
  const int released = kMayEnd ? r.count - C::kStages : r.count;
  int before = 0, k = 0;
  auto end_step = [&] {
    if (k > 0 && k <= released) release(sm, before, blocks);
    before = turn.stage;
    turn.step();
  };
  for (; k < r.whole; ++k) {
    multiply_stage<C, kRowBytes>(sm, turn, row0, sums, k == 0);
    end_step();
  }
  if constexpr (C::kTails) {
    for (; k < r.count; ++k) {
      multiply_stage<C, kTailBytes>(sm, turn, row0, sums, k == 0);
      end_step();
    }
  }
  if (next >= 0) pass_turn(next);
  cute::warpgroup_wait<0>();
  fence_sums<C>(sums);
  if (!kMayEnd) release(sm, before, blocks);
}

}  // namespace mixdq::sm90
