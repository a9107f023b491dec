// The operators that make codes. Schemas and what they mean are in mixdq_ao/ops.py.
#include "ops/floats.h"

namespace mixdq {
namespace {

Tensor quantize_op(const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t bits, const Ints& groups,
                   const std::optional<Ints>& pad) {
  Call call("quantize", x);
  Pad border;
  Floats f;
  OptionalTensor out;
  if (pad) {
    border = checked_pad(call, *pad);
    f = float_image(call, x);
    out = call.empty_image(f.size[0], f.size[3], f.size[1] + border.top + border.bottom,
                           f.size[2] + border.left + border.right, dtypes().int8);
  } else {
    View v;
    f = float_rows(call, x, &v);
    out = call.empty_rows(v, f.size[3], dtypes().int8);
  }
  Codes codes = static_codes(call, scale, zero_point, bits, groups, f.channels());
  View v = call.look(*out, "the output");
  if (v.numel()) call.check(quantize(f, codes, border, static_cast<int8_t*>(v.data), call.on()), "the kernel");
  return *out;
}

std::tuple<Tensor, Tensor, Tensor> quantize_per_token_op(const Tensor& x, int64_t bits, const Ints& groups) {
  Call call("quantize_per_token", x);
  View v;
  Floats f = float_rows(call, x, &v);
  Codes codes;
  set_groups(call, codes, bits, groups, f.channels());
  Tensor out = call.empty_rows(v, f.size[3], dtypes().int8);
  Tensor scale = call.empty_rows(v, codes.groups, dtypes().f32);
  Tensor zero_point = call.empty_rows(v, codes.groups, dtypes().f32);
  if (f.rows()) {
    auto* to = static_cast<int8_t*>(out.data_ptr());
    auto *scales = static_cast<float*>(scale.data_ptr()), *zeros = static_cast<float*>(zero_point.data_ptr());
    call.check(quantize_per_token(f, codes, to, scales, zeros, call.on()), "the kernel");
  }
  return {out, scale, zero_point};
}

Tensor layer_norm_quantize_op(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                              const Tensor& scale, const Tensor& zero_point, int64_t bits, const Ints& groups) {
  Call call("layer_norm_quantize", x);
  View v;
  Floats f = float_rows(call, x, &v);
  STD_TORCH_CHECK(f.size[3] <= 16384, call.op(), ": takes up to 16384 channels; found ", f.size[3]);
  Norm norm = norm_of(call, weight, bias, eps, f.channels());
  Codes codes = static_codes(call, scale, zero_point, bits, groups, f.channels());
  Tensor out = call.empty_rows(v, f.size[3], dtypes().int8);
  if (f.rows() && f.channels()) {
    call.check(layer_norm_quantize(f, norm, codes, static_cast<int8_t*>(out.data_ptr()), call.on()), "the kernel");
  }
  return out;
}

Tensor geglu_quantize_op(const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t bits,
                         const Ints& groups) {
  Call call("geglu_quantize", x);
  View v;
  Floats f = float_rows(call, x, &v);
  STD_TORCH_CHECK(f.size[3] % 2 == 0, call.op(), ": needs an even number of channels; found ", f.size[3]);
  Codes codes = static_codes(call, scale, zero_point, bits, groups, f.size[3] / 2);
  Tensor out = call.empty_rows(v, f.size[3] / 2, dtypes().int8);
  if (f.rows() && f.channels()) {
    call.check(geglu_quantize(f, codes, static_cast<int8_t*>(out.data_ptr()), call.on()), "the kernel");
  }
  return out;
}

Tensor group_norm_quantize_op(const Tensor& x, int64_t num_groups, const OptionalTensor& weight,
                              const OptionalTensor& bias, double eps, bool silu, const Tensor& scale,
                              const Tensor& zero_point, int64_t bits, const Ints& groups,
                              const std::optional<Ints>& pad) {
  Call call("group_norm_quantize", x);
  Pad border = pad ? checked_pad(call, *pad) : Pad{};
  Floats f = float_image(call, x);
  STD_TORCH_CHECK(num_groups > 0 && f.size[3] % num_groups == 0, call.op(), ": ", f.size[3],
                  " channels do not divide into ", num_groups, " groups");
  Norm norm = norm_of(call, weight, bias, eps, f.channels());
  Codes codes = static_codes(call, scale, zero_point, bits, groups, f.channels());
  Tensor out = call.empty_image(f.size[0], f.size[3], f.size[1] + border.top + border.bottom,
                                f.size[2] + border.left + border.right, dtypes().int8);
  View v = call.look(out, "the output");
  if (v.numel()) {
    void* workspace = call.scratch(group_norm_workspace(f, int(num_groups), call.on()));
    call.check(group_norm_quantize(f, int(num_groups), norm, silu, codes, border, static_cast<int8_t*>(v.data),
                                   workspace, call.on()),
               "the kernel");
  }
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(mixdq_ao, CUDA, m) {
  m.impl("quantize", TORCH_BOX(&quantize_op));
  m.impl("quantize_per_token", TORCH_BOX(&quantize_per_token_op));
  m.impl("layer_norm_quantize", TORCH_BOX(&layer_norm_quantize_op));
  m.impl("geglu_quantize", TORCH_BOX(&geglu_quantize_op));
  m.impl("group_norm_quantize", TORCH_BOX(&group_norm_quantize_op));
}

}  // namespace
}  // namespace mixdq
