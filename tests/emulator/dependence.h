// Kernels that begin before the one ahead of them has ended.
#pragma once
#include <cstdint>
#include <utility>
#include <vector>

namespace emulator {

void begin_launch(bool dependent);
void begin_cluster();
void end_cluster();
void end_launch();
void forget_kernel_ahead();

// Whether there was one that had not ended.
bool end_kernel_ahead();

// Memory that kernels may write.
std::vector<std::pair<uint8_t*, int64_t>> device_memory();

}  // namespace emulator
