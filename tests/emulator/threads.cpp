// Fibers, barriers and the order in which things happen.
#include <sys/mman.h>

#include <numeric>
#include <stdexcept>

#include "dependence.h"
#include "machine.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {

uint8_t* shared;
std::vector<Fiber> fibers;
std::vector<Block> blocks;
int current = -1;
size_t shared_bytes;
std::mt19937 random_bits(1);
bool late_copies, late_multiplies;

namespace {

constexpr size_t kPage = 4096, kStack = 64 << 10;

struct Ended {};

jmp_buf scheduler;
const std::function<void()>* body;
std::vector<int> runnable, at_cluster_barrier;
std::string failure;
bool skewed;  // some warps run much further than others
int until_new_priorities;

void switch_to_scheduler() {
  if (!_setjmp(me().place)) _longjmp(scheduler, 1);
}

std::string where_everybody_waits() {
  std::map<std::string, int> threads;
  for (const Fiber& f : fibers) {
    if (!f.ended) ++threads["block " + std::to_string(f.block) + " warp " + std::to_string(f.thread / 32) + " at " + f.at];
  }
  std::string text;
  for (const auto& [place, count] : threads) text += "\n  " + place + ": " + std::to_string(count) + " threads";
  return text;
}

// Threads that have ended count as arrived.
void release_block(Block& block) {
  if (!block.at_barrier.empty() && int(block.at_barrier.size()) == block.alive) wake(block.at_barrier);
}

void fiber_main() {
  try {
    (*body)();
    require(me().stores.empty() && me().store_groups.empty(), "a thread ends while a copy from shared memory may still read");
  } catch (const Ended&) {
  }
  me().ended = true;
  Block& block = my_block();
  if (--block.alive == 0) {
    // Nobody of the cluster may look here any more.
    std::memset(block.memory, 0xA5, block.bytes);
    block.barriers.clear();
  } else {
    release_block(block);
  }
  switch_to_scheduler();
}

void prepare(Block& block, unsigned index, int threads) {
  uint8_t *memory = block.memory, *end = block.shared;
  const size_t bytes = block.bytes;
  block = Block();
  block.memory = memory, block.shared = end, block.bytes = bytes;
  block.index = index;
  block.alive = threads;
  block.warps.resize((threads + 31) / 32);
  for (Warp& warp : block.warps) warp.priority = int(random_bits() % 8);
  uint32_t state = random_bits();
  for (size_t i = 0; i < bytes; ++i) memory[i] = uint8_t((state = state * 1664525 + 1013904223) >> 24);
  block.async_view.assign(memory, memory + bytes);
}

void prepare(Fiber& fiber, char* stack, int block, int thread) {
  fiber = Fiber();
  fiber.block = block, fiber.thread = thread;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = stack;
  fiber.start.uc_stack.ss_size = kStack;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, fiber_main, 0);
}

void new_priorities() {
  until_new_priorities = 200 + int(random_bits() % 20000);
  int of_group[8];
  for (int& p : of_group) p = int(random_bits() % 8) * 8;
  const int apart = random_bits() % 4 ? 1 : 32;  // how far the blocks of a cluster may come apart
  for (Block& block : blocks) {
    const int more = int(random_bits() % 4) * apart;
    for (size_t i = 0; i < block.warps.size(); ++i) {
      block.warps[i].priority = of_group[i / 4 % 8] + int(random_bits() % 6) + more;
    }
  }
}

int take_runnable() {
  auto priority = [](size_t i) {
    const Fiber& f = fibers[runnable[i]];
    return blocks[f.block].warps[f.thread / 32].priority;
  };
  size_t at = random_bits() % runnable.size();
  if (skewed) {
    if (--until_new_priorities < 0) new_priorities();
    for (int tries = 0; tries < 8; ++tries) {
      size_t other = random_bits() % runnable.size();
      if (priority(other) > priority(at)) at = other;
    }
  }
  int fiber = runnable[at];
  runnable[at] = runnable.back();
  runnable.pop_back();
  return fiber;
}

void resume(int fiber) {
  current = fiber;
  Fiber& f = fibers[fiber];
  threadIdx = {unsigned(f.thread), 0, 0};
  const unsigned index = blocks[f.block].index;
  blockIdx = {index % gridDim.x, index / gridDim.x % gridDim.y, index / gridDim.x / gridDim.y};
  shared = blocks[f.block].shared;
  if (!_setjmp(scheduler)) {
    if (f.begun) _longjmp(f.place, 1);
    f.begun = true;
    setcontext(&f.start);
  }
  current = -1;
  if (!failure.empty()) throw std::runtime_error("emulator: " + failure);
}

void check_all_is_done() {
  require(!copies_under_way(), "copies are under way at the end of a block");
  for (Block& block : blocks) {
    for (const NamedBarrier& named : block.named) require(!named.arrived, "threads have arrived at a named barrier for good");
    for (const Warp& warp : block.warps) require(warp.queue.empty(), "wgmma is under way at the end of a block");
  }
}

void run_cluster(unsigned first, int threads, const std::vector<char*>& stacks) {
  runnable.clear();
  at_cluster_barrier.clear();
  forget_copies();
  begin_cluster();
  for (size_t rank = 0; rank < blocks.size(); ++rank) {
    prepare(blocks[rank], first + unsigned(rank), threads);
    for (int thread = 0; thread < threads; ++thread) {
      int i = int(rank) * threads + thread;
      prepare(fibers[i], stacks[i], int(rank), thread);
      runnable.push_back(i);
    }
  }
  auto alive = [] { return std::any_of(blocks.begin(), blocks.end(), [](const Block& b) { return b.alive > 0; }); };
  while (alive()) {
    if (runnable.empty()) {
      if ((!copies_under_way() || random_bits() % 2) && end_kernel_ahead()) continue;
      if (!copies_under_way()) fail("deadlock:" + where_everybody_waits());
      finish_some_copy();
      continue;
    }
    if (!late_copies && copies_under_way() && random_bits() % 64 == 0) finish_some_copy();
    if (!late_multiplies && random_bits() % 16 == 0) finish_some_multiply();
    resume(take_runnable());
  }
  end_cluster();
  check_all_is_done();
}

// Memory of the blocks, each ending at a page that cannot be touched.
struct SharedMemory {
  explicit SharedMemory(size_t bytes) {
    const size_t pages = (bytes + kPage - 1) / kPage + 1;  // one more: what lies below is not shared memory
    for (Block& block : blocks) {
      block.bytes = pages * kPage;
      void* all = mmap(nullptr, block.bytes + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (all == MAP_FAILED) throw std::bad_alloc();
      block.memory = static_cast<uint8_t*>(all) + kPage;
      mprotect(block.memory, block.bytes, PROT_READ | PROT_WRITE);
      block.shared = block.memory + block.bytes - bytes;
    }
  }
  ~SharedMemory() {
    for (Block& block : blocks) munmap(block.memory - kPage, block.bytes + 2 * kPage);
  }
};

char* stack_of(size_t i) {
  static std::vector<char*> stacks;
  while (stacks.size() <= i) {
    void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack == MAP_FAILED) throw std::bad_alloc();
    stacks.push_back(static_cast<char*>(stack));
  }
  return stacks[i];
}

}  // namespace

void fail(const std::string& what) {
  if (current < 0) throw std::runtime_error("emulator: " + what);
  failure = what + " (block " + std::to_string(my_block().index) + ", thread " + std::to_string(me().thread) + ")";
  throw Ended();
}

void make_runnable(int fiber) { runnable.push_back(fiber); }

void wake(std::vector<int>& waiting) {
  for (int fiber : waiting) make_runnable(fiber);
  waiting.clear();
}

void wait_until_woken(const std::string& at) {
  me().at = at;
  switch_to_scheduler();
}

void sync_block() {
  my_block().at_barrier.push_back(current);
  release_block(my_block());
  wait_until_woken("__syncthreads");
}

void sync_warp() {
  Warp& warp = my_warp();
  warp.at_barrier.push_back(current);
  if (warp.at_barrier.size() == 32) wake(warp.at_barrier);
  wait_until_woken("a warp's barrier");
}

void sync_cluster() {
  at_cluster_barrier.push_back(current);
  if (at_cluster_barrier.size() == fibers.size()) wake(at_cluster_barrier);
  wait_until_woken("a cluster's barrier");
}

void* of_rank(void* data, unsigned rank) {
  require(in_shared(my_block(), data, 1) && rank < blocks.size(), "map_shared_rank");
  return blocks[rank].shared + (static_cast<uint8_t*>(data) - my_block().shared);
}

void named_barrier(unsigned threads, unsigned id, bool wait) {
  require(id < 16 && threads % 32 == 0, "arguments of a named barrier");
  NamedBarrier& named = my_block().named[id];
  require(!named.arrived || named.threads == threads, "a named barrier with different counts of threads");
  named.threads = threads;
  ++named.arrived;
  require(named.arrived <= threads, "too many threads at a named barrier");
  if (wait) named.waiting.push_back(current);
  if (named.arrived == threads) {
    named.arrived = 0;
    wake(named.waiting);
  }
  if (wait) wait_until_woken("named barrier " + std::to_string(id));
}

Lanes& exchange(const void* mine, size_t bytes) {
  Lanes& lanes = my_warp().lanes;
  std::memcpy(lanes.words[me().thread % 32], mine, bytes);
  sync_warp();
  return lanes;
}

void end_exchange() { sync_warp(); }

bool in_shared(const Block& block, const void* data, size_t bytes) {
  const auto* p = static_cast<const uint8_t*>(data);
  return p >= block.shared && p + bytes <= block.shared + shared_bytes;
}

uint32_t shared_address(const void* data) {
  const auto* p = static_cast<const uint8_t*>(data);
  require(p >= my_block().memory && p < my_block().memory + my_block().bytes, "this is not shared memory");
  return uint32_t(p - my_block().memory);
}

void run(dim3 grid, dim3 block, size_t bytes, int cluster, bool dependent, const std::function<void()>& kernel) {
  current = -1;
  require(bytes <= size_t(kMaxSharedBytes), "too much shared memory");
  require(bytes % 16 == 0, "shared memory is not in multiples of 16 bytes");
  require(block.x >= 1 && block.x <= 1024 && block.y == 1 && block.z == 1, "threads of a block");
  require(grid.x >= 1 && grid.y >= 1 && grid.z >= 1 && grid.y < 65536 && grid.z < 65536, "blocks of a grid");
  require(cluster >= 1 && cluster <= 8 && grid.x % cluster == 0, "blocks of a cluster");
  body = &kernel;
  gridDim = grid, blockDim = block;
  shared_bytes = bytes;
  failure.clear();
  const unsigned mode = random_bits();
  late_copies = mode & 1, late_multiplies = mode & 2, skewed = mode & 4;
  until_new_priorities = 0;

  blocks.assign(cluster, {});
  fibers.assign(size_t(cluster) * block.x, {});
  SharedMemory memory(bytes);
  std::vector<char*> stacks;
  for (size_t i = 0; i < fibers.size(); ++i) stacks.push_back(stack_of(i));
  std::vector<unsigned> order(size_t(grid.x) * grid.y * grid.z / cluster);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), random_bits);
  begin_launch(dependent);
  for (unsigned first : order) run_cluster(first * cluster, int(block.x), stacks);
  end_launch();
}

}  // namespace emulator

// The same number gives the same order of everything.
extern "C" void emulator_seed(unsigned seed) { emulator::random_bits.seed(seed); }
