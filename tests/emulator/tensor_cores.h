// The instructions of tensor_cores.cpp, for the headers in include/.
#pragma once
#include <cstdint>

namespace emulator {

// A [16, 32] times b [8, 32] transposed, int8, added to this lane's four sums.
void multiply_16x8x32(const uint32_t (&a)[4], const uint32_t (&b)[2], uint32_t (&sums)[4]);

enum Operands { kInt8, kHalf, kBfloat16 };

// The same of [16, 16] and [8, 16], 16-bit floats.
void multiply_16x8x16(Operands type, const uint32_t (&a)[4], const uint32_t (&b)[2], float (&sums)[4]);

// Four matrices of 8 rows of 16 bytes, or transposed ones of 8 by 8 values of 16 bits; lane i has the address of row i % 8
// of matrix i / 8.
void load_matrices(const void* row, bool transposed, uint32_t* (&to)[4]);

// The other way round, as stmatrix writes them; not transposed.
void store_matrices(const void* row, const uint32_t (&from)[4]);

// wgmma: [64, 32 bytes] times [n, 32 bytes] transposed, done at some time until its group is waited for.
void multiply_warpgroup(Operands type, int n, uint64_t a, uint64_t b, void* sums, bool add);
void commit_multiplies();
void wait_for_multiplies(int open_groups);

}  // namespace emulator
