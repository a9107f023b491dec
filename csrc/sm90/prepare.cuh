// What the warps that prepare an operand share: they make of what was copied what wgmma reads, in the swizzle of its tiles.
#pragma once
#include "sm90/pipeline.cuh"

namespace mixdq::sm90 {

// Calls f(stage) for every `every`-th step from `first` on, whose stages one warp prepares, or a share of each.
template <class C, class F>
__device__ __forceinline__ void prepare(const Shared<C>& sm, int first, int every, int steps, F f) {
  Turn<C> turn;
  turn.next(first);
  for (int i = first; i < steps; i += every, turn.next(every)) {
    // Copies may arrive in another order than they were asked for, and a barrier tells only whether its uses are even or
    // odd: first the stage's use before has to be over, which another warp may have prepared.
    EmptyBarrier::wait(sm.empty(turn.stage), turn.phase ^ 1);
    FullBarrier::wait(sm.raw_full(turn.stage), turn.phase);
    f(turn.stage);
    cutlass::arch::fence_view_async_shared();
    if constexpr (C::kQuantizes) {
      // One arrives for all warps: as many arrivals as they have threads would take longer than what they do.
      cutlass::arch::NamedBarrier::sync(32 * C::kPreparers, 2);
      if (threadIdx.x == 32) FullBarrier::arrive(sm.full(turn.stage));
    } else {
      __syncwarp();
      FullBarrier::arrive(sm.full(turn.stage));  // each lane: racecheck does not see that one arrives for its warp
    }
  }
}

}  // namespace mixdq::sm90
