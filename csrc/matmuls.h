// The matmul kernels that need no Hopper instructions.
#pragma once
#include "kernels.h"

namespace mixdq {

// Tensor cores by mma.sync, named by tile rows x tile columns: channels, strides and pointers in multiples of 16.
cudaError_t sm80_128x160(const Matmul&, int splits, const Stream&);
cudaError_t sm80_128x128(const Matmul&, int splits, const Stream&);
cudaError_t sm80_128x80(const Matmul&, int splits, const Stream&);
cudaError_t sm80_64x64(const Matmul&, int splits, const Stream&);
cudaError_t sm80_64x32(const Matmul&, int splits, const Stream&);
cudaError_t sm80_128x16(const Matmul&, int splits, const Stream&);

// Any problem with weights of 8 bits.
cudaError_t direct(const Matmul&, int splits, const Stream&);

// At most 16 rows at equal distances, weights as they are stored: 16-byte rows and channels in multiples of 16 bytes.
cudaError_t few_rows(const Matmul&, int splits, const Stream&);

}  // namespace mixdq
