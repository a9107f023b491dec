#pragma once
#include "copies.h"

namespace emulator {
void named_barrier(unsigned threads, unsigned id, bool wait);
}

namespace cutlass::arch {

struct ClusterBarrier {
  static void init(uint64_t* barrier, uint32_t count) { emulator::init_barrier(barrier, count); }
  static void arrive(uint64_t* barrier) { emulator::arrive(barrier, 0); }
  static void arrive(uint64_t* barrier, uint32_t rank, uint32_t) { emulator::arrive_at(barrier, rank); }
  static void wait(uint64_t* barrier, uint32_t parity) { emulator::wait_for_phase(barrier, parity); }
};
struct ClusterTransactionBarrier : ClusterBarrier {
  static void arrive_and_expect_tx(uint64_t* barrier, uint32_t bytes) { emulator::arrive(barrier, bytes); }
};
struct NamedBarrier {  // CUTLASS keeps the first eight for itself
  static void sync(uint32_t threads, uint32_t id) { emulator::named_barrier(threads, id + 8, true); }
  static void arrive(uint32_t threads, uint32_t id) { emulator::named_barrier(threads, id + 8, false); }
};
inline void fence_barrier_init() {}
inline void fence_view_async_shared() { emulator::fence_async(); }

}  // namespace cutlass::arch
