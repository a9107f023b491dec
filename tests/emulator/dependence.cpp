// Programmatic dependent launch. What the kernel ahead writes cannot be seen until somebody has waited for it, which
// ends when nobody can go on without; and nothing may be written there before.
#include "dependence.h"

#include "machine.h"

namespace emulator {
namespace {

constexpr uint8_t kUnseen = 0xA5;
constexpr ptrdiff_t kGap = 64;  // bytes between two changes that are told as one

struct Region {
  uint8_t* data;
  std::vector<uint8_t> content;
};

std::vector<Region> ahead;     // what the kernel ahead wrote
std::vector<Region> before;    // memory as it was before this launch
bool overlapping;              // this launch began before the kernel ahead ended
bool hidden;                   // now
std::vector<int> waiting;

void show() {
  for (Region& r : ahead) std::copy(r.content.begin(), r.content.end(), r.data);
  hidden = false;
}

}  // namespace

void begin_launch(bool dependent) {
  overlapping = dependent && !ahead.empty() && random_bits() % 4 != 0;
  before.clear();
  for (auto [data, bytes] : device_memory()) before.push_back({data, {data, data + bytes}});
}

void begin_cluster() {
  waiting.clear();
  hidden = overlapping;
  if (!hidden) return;
  for (Region& r : ahead) {  // blocks that ran before this one may have changed it
    std::copy(r.data, r.data + r.content.size(), r.content.begin());
    std::fill(r.data, r.data + r.content.size(), kUnseen);
  }
}

void end_cluster() {
  if (hidden) show();
}

void end_launch() {
  ahead.clear();
  for (const Region& r : before) {
    const uint8_t *old = r.content.data(), *end = r.data + r.content.size();
    uint8_t *first = nullptr, *last = nullptr;  // of a run of changes
    auto add = [&] {
      if (first) ahead.push_back({first, {first, last + 1}});
    };
    for (uint8_t* p = r.data; p < end; ++p, ++old) {
      if (*p == *old) continue;
      if (!first || p - last > kGap) {
        add();
        first = p;
      }
      last = p;
    }
    add();
  }
}

bool end_kernel_ahead() {
  if (!hidden) return false;
  for (const Region& r : ahead) {
    const bool untouched = std::all_of(r.data, r.data + r.content.size(), [](uint8_t byte) { return byte == kUnseen; });
    require(untouched, "a kernel writes what the one ahead of it writes, without waiting for it");
  }
  show();
  wake(waiting);
  return true;
}

void wait_for_previous() {
  me().waited = true;
  if (!hidden) return;
  waiting.push_back(current);
  wait_until_woken("griddepcontrol.wait");
}

void let_next_start() { require(me().waited, "griddepcontrol.launch_dependents comes before the kernel's own wait"); }

void forget_kernel_ahead() { ahead.clear(); }

}  // namespace emulator

extern "C" {

// A new operator: nothing is known of what the stream did before.
void emulator_begin() { emulator::forget_kernel_ahead(); }

// The kernel ahead of the operator's first one wrote this.
void emulator_written_ahead(uint8_t* data, int64_t bytes) { emulator::ahead.push_back({data, {data, data + bytes}}); }

}  // extern "C"
