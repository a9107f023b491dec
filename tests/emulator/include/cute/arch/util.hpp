#pragma once
#include "machine.h"

namespace emulator {
uint32_t shared_address(const void* data);
}

namespace cute {

inline uint32_t cast_smem_ptr_to_uint(const void* data) { return emulator::shared_address(data); }

}  // namespace cute
