#pragma once
#include "copies.h"
#include "cute/arch/util.hpp"

namespace cute {

namespace TMA {
enum class CacheHintSm90 : uint64_t { EVICT_NORMAL };
}
struct TmaDescriptor {
  char bytes[128];
};
inline void prefetch_tma_descriptor(const TmaDescriptor*) {}

struct SM90_TMA_LOAD_2D {
  static void copy(const void* map, uint64_t* barrier, uint64_t, void* to, int x, int y) {
    emulator::bulk_copy(map, barrier, to, {x, y}, false, 0, 0);
  }
};
struct SM90_TMA_LOAD_3D {
  struct PREFETCH {
    static void copy(const void*, int, int, int) {}
  };
  static void copy(const void* map, uint64_t* barrier, uint64_t, void* to, int x, int y, int z) {
    emulator::bulk_copy(map, barrier, to, {x, y, z}, false, 0, 0);
  }
};
struct SM90_TMA_LOAD_MULTICAST_3D {
  static void copy(const void* map, uint64_t* barrier, uint16_t blocks, uint64_t, void* to, int x, int y, int z) {
    emulator::bulk_copy_to_all(map, barrier, blocks, to, {x, y, z});
  }
};
struct SM90_TMA_LOAD_IM2COL_4D {
  static void copy(const void* map, uint64_t* barrier, void* to, int c, int w, int h, int n, uint16_t offset_w,
                   uint16_t offset_h) {
    emulator::bulk_copy(map, barrier, to, {c, w, h, n}, true, offset_w, offset_h);
  }
};

struct SM90_TMA_STORE_2D {
  static void copy(const void* map, const void* from, int x, int y) { emulator::bulk_store(map, from, x, y); }
};
inline void tma_store_arrive() { emulator::commit_stores(); }
template <int N>
void tma_store_wait() {
  emulator::wait_for_stores(N);
}

}  // namespace cute
