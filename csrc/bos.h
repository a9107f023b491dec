// A text's first token, whose output is known.
#pragma once
#include "quantize.h"

namespace mixdq {

// Where the first row of a sample is bos.input, but for rounding, that row of out [rows, columns] becomes bos.output.
cudaError_t write_bos_rows(const Floats& x, const Bos& bos, void* out, Float type, int64_t columns, const Stream& on);

}  // namespace mixdq
