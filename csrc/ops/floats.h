// What operators with a floating input take: its layout, static parameters, padding, norms, a known first token.
#pragma once
#include "bos.h"
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

// x [..., tokens, channels] has the sizes of `view`; where it has no tokens, nothing is known.
Bos bos_of(Call& call, const OptionalTensor& input, const OptionalTensor& output, const View& x, int64_t columns);

// Over out [rows, columns], which is dense. Nothing is launched where no output is known.
void write_bos(Call& call, const Floats& x, const Bos& bos, void* out, Float type, int64_t columns);

}  // namespace mixdq
