#pragma once
#define CUTLASS_ARCH_MMA_SM90A_ENABLED 1

namespace cutlass {

inline int canonical_warp_idx_sync() { return int(threadIdx.x / 32); }

}  // namespace cutlass
