// A text's first token, whose output is known.
#pragma once
#include "quantize.h"

namespace mixdq {

struct Bos {
  const void* input = nullptr;  // [channels]; null: every first token is it
  Float input_type = Float::f16;
  const void* output = nullptr;  // [columns]; null: nothing is known
  Float output_type = Float::f16;
};

// A sample is `sample_rows` rows of x, one after another. Where its first one is bos.input, but for rounding, that row of
// out [rows, columns] becomes bos.output.
cudaError_t write_bos_rows(const Floats& x, int64_t sample_rows, const Bos& bos, void* out, Float type, int64_t columns,
                           const Stream& on);

}  // namespace mixdq
