#pragma once

namespace cutlass::arch {

template <int N>
void warpgroup_reg_alloc() {}
template <int N>
void warpgroup_reg_dealloc() {}

}  // namespace cutlass::arch
