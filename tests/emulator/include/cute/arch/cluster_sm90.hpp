#pragma once
#include "cooperative_groups.h"

namespace cute {

inline bool elect_one_sync() { return threadIdx.x % 32 == 0; }
inline void cluster_arrive_relaxed() {}
inline void cluster_wait() { emulator::sync_cluster(); }

}  // namespace cute
