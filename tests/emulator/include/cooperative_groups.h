#pragma once

namespace emulator {
void sync_cluster();
void* of_rank(void* data, unsigned rank);
}  // namespace emulator

namespace cooperative_groups {

struct Cluster {
  void sync() const { emulator::sync_cluster(); }
  void barrier_arrive() const {}
  void barrier_wait() const { emulator::sync_cluster(); }
  template <class T>
  T* map_shared_rank(T* data, unsigned rank) const {
    return static_cast<T*>(emulator::of_rank(data, rank));
  }
};
inline Cluster this_cluster() { return {}; }

}  // namespace cooperative_groups
