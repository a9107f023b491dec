// What the quantizers take: floating tensors, static parameters, padding, norms.
#pragma once
#include "ops/call.h"
#include "quantize.h"

namespace mixdq {

Floats float_rows(Call& call, const Tensor& x, View* view = nullptr);

Floats float_image(const Call& call, const Tensor& x);

void set_groups(const Call& call, Codes& codes, int64_t bits, const Ints& groups, int64_t channels);

Codes static_codes(Call& call, const Tensor& scale, const Tensor& zero_point, int64_t bits, const Ints& groups,
                   int64_t channels);

Pad checked_pad(const Call& call, const Ints& pad);

Norm norm_of(Call& call, const OptionalTensor& weight, const OptionalTensor& bias, double eps, int64_t channels);

}  // namespace mixdq
