// The instructions of copies.cpp, for the headers in include/.
#pragma once
#include <cstdint>
#include <vector>

namespace emulator {

void init_barrier(uint64_t* barrier, uint32_t count);
void arrive(uint64_t* barrier, uint32_t expected_bytes);
void arrive_at(uint64_t* barrier, unsigned rank);  // of another block of the cluster
void wait_for_phase(uint64_t* barrier, uint32_t parity);

// What a warp's lanes wrote to shared memory, and now have all fenced, can be seen by wgmma. What others wrote shows then,
// too, which it would not on a GPU.
void fence_async();

// The copy of one box to shared memory; complete at some time, when it counts its bytes at the barrier.
void bulk_copy(const void* map, uint64_t* barrier, void* to, std::vector<int> at, bool im2col, unsigned offset_w,
               unsigned offset_h);

// The same to the blocks of the cluster whose bits are set, at each of which it counts.
void bulk_copy_to_all(const void* map, uint64_t* barrier, unsigned blocks, void* to, std::vector<int> at);

// The copy of one box from shared memory, as far as the tensor goes; done when the thread has waited for its group.
void bulk_store(const void* map, const void* from, int x, int y);
void commit_stores();
void wait_for_stores(int open_groups);

// So many bytes, or zeros; there when the thread has waited for its group.
void copy_async(const void* from, void* to, int bytes, bool valid);
void commit_copies();
void wait_for_copies(int open_groups);

}  // namespace emulator
