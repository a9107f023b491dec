// What the parts of the emulator share: the fibers, blocks and warps of the launch that runs now.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <deque>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "cuda_on_cpu.h"

namespace emulator {

constexpr int kMaxSharedBytes = 232448;  // of a block, on sm_90

// A warp's share of a wgmma instruction: complete once all lanes have issued it, done at some time from then on.
struct WarpMultiply {
  int n;
  bool add;
  int type;
  uint64_t a, b;
  void* sums[32] = {};
  int lanes = 0;
};

struct Warp {
  std::deque<WarpMultiply> queue;
  long done = 0;  // instructions that left the queue
  Lanes lanes;
  std::vector<int> waiting;      // fibers, for the queue
  std::vector<int> at_barrier;   // fibers, at sync_warp()
  int priority = 0;
  int fenced_lanes = 0;
};

struct AsyncCopy {
  const void* from;
  void* to;
  int bytes;
  bool valid;
};

struct BulkStore {
  const void* map;
  uint32_t from;  // shared address
  int x, y;
};

struct Fiber {
  ucontext_t start;
  jmp_buf place;  // once begun; ucontext's own switch asks the kernel for signal masks, which takes ten times as long
  int block = 0, thread = 0;
  bool begun = false, ended = false;
  bool waited = false;  // for the kernel ahead
  std::string at;  // what it waits for, to tell of a deadlock
  long issued = 0;                                // wgmma instructions
  std::deque<long> groups;                        // instructions issued when each open group was committed
  std::vector<AsyncCopy> copies;                  // cp.async, not committed
  std::deque<std::vector<AsyncCopy>> copy_groups;
  std::vector<BulkStore> stores;                  // from shared memory, not committed
  std::deque<std::vector<BulkStore>> store_groups;
};

struct Barrier {  // mbarrier
  uint32_t count, pending;
  int64_t bytes = 0;
  uint32_t phase = 0;
  uint64_t content;  // what its memory holds, to see that nobody writes there
  std::vector<int> waiting;
};

struct NamedBarrier {
  unsigned threads = 0, arrived = 0;
  std::vector<int> waiting;
};

struct Block {
  unsigned index = 0;
  uint8_t *memory = nullptr, *shared = nullptr;  // pages between two that cannot be touched; their end is `shared`
  size_t bytes = 0;
  std::vector<uint8_t> async_view;  // the same memory as bulk copies and wgmma see it: a thread's writes only past a fence
  int alive = 0;
  std::vector<int> at_barrier;
  std::map<uint64_t*, Barrier> barriers;
  NamedBarrier named[16];
  std::vector<Warp> warps;
};

extern std::vector<Fiber> fibers;
extern std::vector<Block> blocks;  // those that run at once
extern int current;                // fiber, or -1
extern size_t shared_bytes;
extern std::mt19937 random_bits;

// How freely asynchronous work completes in this launch.
extern bool late_copies, late_multiplies;

inline Fiber& me() { return fibers[current]; }
inline Block& my_block() { return blocks[me().block]; }
inline Warp& my_warp() { return my_block().warps[me().thread / 32]; }

// Ends the launch with an exception of that text.
[[noreturn]] void fail(const std::string& what);
inline void require(bool holds, const char* what) {
  if (!holds) fail(what);
}

void make_runnable(int fiber);
void wake(std::vector<int>& waiting);
// Runs others until somebody makes this fiber runnable.
void wait_until_woken(const std::string& at);

// Work that is under way without a thread: bulk copies, tensor instructions.
bool copies_under_way();
void finish_some_copy();
void forget_copies();
void finish_some_multiply();

// The same place in the shared memory of another block of the cluster.
void* of_rank(void* data, unsigned rank);

bool in_shared(const Block& block, const void* data, size_t bytes);
// Offset from the block's memory: what stands for an address in shared memory.
uint32_t shared_address(const void* data);

}  // namespace emulator
