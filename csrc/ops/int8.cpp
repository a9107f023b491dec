// The operators that multiply codes. Schemas and what they mean are in mixdq_ao/ops.py.
#include "ops/floats.h"
#include "ops/multiply.h"
#include "ops/operands.h"

namespace mixdq {
namespace {

Tensor linear_int8_op(const Tensor& xq, const Tensor& qdata, const Tensor& alpha, const Tensor& beta,
                      const OptionalTensor& bias, int64_t bits, const Ints& groups, ScalarType out_dtype,
                      const OptionalTensor& residual) {
  Call call("linear_int8", xq);
  View view;
  Matmul p = row_problem(code_rows(call, xq, &view), bits);
  check_groups(call, groups, p.x.channels, bits);
  p.weights[0] = static_weight(call, qdata, alpha, beta, bias, groups, bits);
  Float type = call.float_type(out_dtype);
  Tensor out = call.empty_rows(view, p.n(), dtype_of(type));
  View v = call.look(out, "the output");
  set_out(p, v, type, p.n());
  add_row_residual(call, p, residual, v);
  multiply(call, p, groups);
  return out;
}

Weight dynamic_weight(Call& call, const Tensor& qdata, const Tensor& scale, const Tensor& weight_sum,
                      const OptionalTensor& bias, const Ints& groups, int64_t bits) {
  Weight w = stored_weight(call, qdata, groups, bits, 2, nullptr);
  const int64_t count = int64_t(groups.size()) * w.n;
  w.alpha = call.floats(scale, "scale", count);
  w.weight_sum = static_cast<const int32_t*>(call.values(weight_sum, "weight_sum", count, dtypes().int32).data);
  w.bias = call.float_vector(bias, "bias", w.n, &w.bias_type);
  return w;
}

Tensor linear_int8_dynamic_op(const Tensor& xq, const Tensor& x_scale, const Tensor& x_zero_point, const Tensor& qdata,
                              const Tensor& scale, const Tensor& weight_sum, const OptionalTensor& bias, int64_t bits,
                              const Ints& groups, ScalarType out_dtype) {
  Call call("linear_int8_dynamic", xq);
  View view;
  Matmul p = row_problem(code_rows(call, xq, &view), bits);
  check_groups(call, groups, p.x.channels, bits);
  p.weights[0] = dynamic_weight(call, qdata, scale, weight_sum, bias, groups, bits);
  const int64_t count = int64_t(groups.size());
  p.row_scale = call.floats(x_scale, "x_scale", p.m() * count);
  p.row_zero_point = call.floats(x_zero_point, "x_zero_point", p.m() * count);
  p.row_stride = count;
  Float type = call.float_type(out_dtype);
  Tensor out = call.empty_rows(view, p.n(), dtype_of(type));
  set_out(p, call.look(out, "the output"), type, p.n());
  multiply(call, p, groups);
  return out;
}

// In one kernel where there is one for it, else by way of the floating outputs.
Tensor linear_int8_geglu_op(const Tensor& xq, const Tensor& qdata, const Tensor& alpha, const Tensor& beta,
                            const OptionalTensor& bias, int64_t bits, const Ints& groups, ScalarType dtype,
                            const Tensor& act_scale, const Tensor& act_zero_point, int64_t act_bits) {
  Call call("linear_int8_geglu", xq);
  View view;
  Matmul p = row_problem(code_rows(call, xq, &view), bits);
  check_groups(call, groups, p.x.channels, bits);
  p.weights[0] = static_weight(call, qdata, alpha, beta, bias, groups, bits);
  const Float type = call.float_type(dtype);
  const int64_t m = p.m(), n = p.n();
  STD_TORCH_CHECK(n % 2 == 0, call.op(), ": needs an even number of outputs; found ", n);
  const Codes codes = static_codes(call, act_scale, act_zero_point, act_bits, {n / 2}, n / 2);
  Tensor out = call.empty_rows(view, n / 2, dtypes().int8);
  const View v = call.look(out, "the output");
  Matmul fused = p;
  fused.geglu = {codes.scale, codes.zero_point, codes.bits};
  set_out(fused, v, type, n / 2);
  if (v.numel() == 0 || (groups.size() == 1 && try_to_multiply(call, fused))) return out;
  Floats wide;
  wide.data = p.out = call.scratch(m * n * bytes_of(type));
  wide.type = p.out_type = type;
  wide.stride[2] = p.out_stride = wide.size[3] = n;
  wide.size[2] = m;
  multiply(call, p, groups);
  call.check(geglu_quantize(wide, codes, static_cast<int8_t*>(v.data), call.on()), "GEGLU");
  return out;
}

// Whether b begins where a ends in everything, so that the two are one weight of more rows.
bool continues(const Weight& a, const Weight& b, int64_t row_bytes) {
  if (static_cast<const char*>(a.data) + a.n * row_bytes != b.data) return false;
  if (a.alpha + a.n != b.alpha || a.beta + a.n != b.beta || !a.bias != !b.bias) return false;
  if (!a.bias) return true;
  return a.bias_type == b.bias_type && static_cast<const char*>(a.bias) + a.n * bytes_of(a.bias_type) == b.bias;
}

Tensor linear_int8_multi_op(const Tensor& xq, const std::vector<Tensor>& qdata, const std::vector<Tensor>& alpha,
                            const std::vector<Tensor>& beta, const std::vector<OptionalTensor>& bias,
                            const Ints& bits, const Ints& groups, ScalarType out_dtype) {
  Call call("linear_int8_multi", xq);
  size_t count = qdata.size();
  STD_TORCH_CHECK(count > 0 && alpha.size() == count && beta.size() == count && bias.size() == count &&
                      bits.size() == count,
                  call.op(), ": needs one qdata, alpha, beta, bias and bits for each of one or more weights");
  View view;
  Image x = code_rows(call, xq, &view);
  std::vector<Weight> weights;
  Ints weight_bits;
  int64_t n = 0;
  for (size_t i = 0; i < count; ++i) {
    check_groups(call, groups, x.channels, bits[i]);
    Weight w = static_weight(call, qdata[i], alpha[i], beta[i], bias[i], groups, bits[i]);
    n += w.n;
    bool one = !weights.empty() && groups.size() == 1 && weight_bits.back() == bits[i] &&
               continues(weights.back(), w, packed_size(x.channels, bits[i]));
    if (one) {
      weights.back().n += w.n;
    } else {
      weights.push_back(w);
      weight_bits.push_back(bits[i]);
    }
  }
  Float type = call.float_type(out_dtype);
  Tensor out = call.empty_rows(view, n, dtype_of(type));
  auto* column = static_cast<char*>(out.data_ptr());
  for (size_t first = 0; first < weights.size();) {
    Matmul p = row_problem(x, weight_bits[first]);
    p.weight_count = 0;
    for (size_t i = first; i < weights.size() && p.weight_count < kMaxWeights && weight_bits[i] == p.bits; ++i) {
      p.weights[p.weight_count++] = weights[i];
    }
    p.out = column;
    p.out_type = type;
    p.out_stride = n;
    multiply(call, p, groups);
    column += p.n() * bytes_of(type);
    first += p.weight_count;
  }
  return out;
}

Tensor conv2d_int8_op(const Tensor& xq, const Tensor& qdata, const Tensor& alpha, const Tensor& beta,
                      const OptionalTensor& bias, const Ints& stride, const Ints& padding, const Ints& dilation,
                      int64_t bits, const Ints& groups, ScalarType out_dtype, const OptionalTensor& residual) {
  Call call("conv2d_int8", xq);
  STD_TORCH_CHECK(padding.size() == 2, call.op(), ": padding must be a pair");
  Matmul p;
  OptionalTensor padded;
  if (padding[0] || padding[1]) {
    int64_t pad[4] = {padding[1], padding[1], padding[0], padding[0]};
    padded = torch::stable::pad(xq, {pad, 4});
  }
  p.x = code_image(call, padded ? *padded : xq);
  p.bits = int(bits);
  check_groups(call, groups, p.x.channels, bits);
  p.weights[0] = static_weight(call, qdata, alpha, beta, bias, groups, bits, 4, &p.window);
  set_window(call, p, stride, dilation);
  return convolve(call, p, groups, call.float_type(out_dtype), residual);
}

// One kernel that quantizes and multiplies, and knows the first token as well. In a graph a kernel for each takes less time,
// and nobody waits for their launches.
bool multiply_floats(Call& call, const Floats& x, const Codes& codes, const Bos& bos, const Matmul& whole) {
  const bool spaced = x.size[0] == 1 && x.size[1] == 1 && x.stride[3] == 1 && x.stride[2] >= x.channels();
  if (codes.groups > 1 || x.type == Float::f32 || !spaced || call.is_captured()) return false;
  Matmul p = whole;
  set_rows(p, dense_image(static_cast<const int8_t*>(x.data), 1, 1, x.rows(), x.channels()));
  p.x.stride_w = x.stride[2];
  p.x_type = x.type;
  p.quantizer = {codes.scale, codes.zero_point, codes.bits};
  if (bos.output) p.bos = bos;
  return try_to_multiply(call, p);
}

Tensor quantized_linear_op(const Tensor& x, const Tensor& act_scale, const Tensor& act_zero_point, int64_t act_bits,
                           const Tensor& qdata, const Tensor& alpha, const Tensor& beta, const OptionalTensor& bias,
                           int64_t bits, const Ints& groups, const OptionalTensor& bos_input,
                           const OptionalTensor& bos_output) {
  Call call("quantized_linear", x);
  View view;
  Floats f = float_rows(call, x, &view);
  Codes codes = static_codes(call, act_scale, act_zero_point, act_bits, groups, f.channels());
  check_groups(call, groups, f.channels(), bits);
  const Weight w = static_weight(call, qdata, alpha, beta, bias, groups, bits);
  const Bos bos = bos_of(call, bos_input, bos_output, view, w.n);
  Tensor out = call.empty_rows(view, w.n, dtype_of(f.type));
  if (f.rows() == 0 || w.n == 0) return out;
  Matmul p;
  p.bits = int(bits);
  p.weights[0] = w;
  set_out(p, call.look(out, "the output"), f.type, w.n);
  if (multiply_floats(call, f, codes, bos, p)) return out;
  auto* xq = static_cast<int8_t*>(call.scratch(f.rows() * f.channels()));
  call.check(quantize(f, codes, Pad{}, xq, call.on()), "the quantizer");
  set_rows(p, dense_image(xq, 1, 1, f.rows(), f.channels()));
  multiply(call, p, groups);
  write_bos(call, f, bos, p.out, f.type, w.n);
  return out;
}

Tensor quantized_linear_dynamic_op(const Tensor& x, int64_t act_bits, const Tensor& qdata, const Tensor& scale,
                                   const Tensor& weight_sum, const OptionalTensor& bias, int64_t bits,
                                   const Ints& groups, const OptionalTensor& bos_input,
                                   const OptionalTensor& bos_output) {
  Call call("quantized_linear_dynamic", x);
  View view;
  Floats f = float_rows(call, x, &view);
  Codes codes;
  set_groups(call, codes, act_bits, groups, f.channels());
  check_groups(call, groups, f.channels(), bits);
  Weight w = dynamic_weight(call, qdata, scale, weight_sum, bias, groups, bits);
  const Bos bos = bos_of(call, bos_input, bos_output, view, w.n);
  Tensor out = call.empty_rows(view, w.n, dtype_of(f.type));
  if (f.rows() == 0 || w.n == 0) return out;
  auto* xq = static_cast<int8_t*>(call.scratch(f.rows() * f.channels()));
  const int64_t ranges = f.rows() * codes.groups;
  auto* x_scale = static_cast<float*>(call.scratch(ranges * 2 * sizeof(float)));
  call.check(quantize_per_token(f, codes, xq, x_scale, x_scale + ranges, call.on()), "the quantizer");
  Matmul p = row_problem(dense_image(xq, 1, 1, f.rows(), f.channels()), bits);
  p.weights[0] = w;
  p.row_scale = x_scale, p.row_zero_point = x_scale + ranges;
  p.row_stride = codes.groups;
  set_out(p, call.look(out, "the output"), f.type, w.n);
  multiply(call, p, groups);
  write_bos(call, f, bos, p.out, f.type, w.n);
  return out;
}

Tensor quantized_conv2d_op(const Tensor& x, const Tensor& act_scale, const Tensor& act_zero_point, int64_t act_bits,
                           const Tensor& qdata, const Tensor& alpha, const Tensor& beta, const OptionalTensor& bias,
                           const Ints& stride, const Ints& pad, const Ints& dilation, int64_t bits,
                           const Ints& groups) {
  Call call("quantized_conv2d", x);
  Pad border = checked_pad(call, pad);
  Floats f = float_image(call, x);
  Codes codes = static_codes(call, act_scale, act_zero_point, act_bits, groups, f.channels());
  check_groups(call, groups, f.channels(), bits);
  int64_t height = f.size[1] + border.top + border.bottom, width = f.size[2] + border.left + border.right;
  int64_t bytes = f.size[0] * height * width * f.channels();
  auto* xq = static_cast<int8_t*>(call.scratch(bytes));
  if (bytes) call.check(quantize(f, codes, border, xq, call.on()), "the quantizer");
  Matmul p;
  p.x = dense_image(xq, f.size[0], height, width, f.channels());
  p.bits = int(bits);
  p.weights[0] = static_weight(call, qdata, alpha, beta, bias, groups, bits, 4, &p.window);
  set_window(call, p, stride, dilation);
  return convolve(call, p, groups, f.type, std::nullopt);
}

STABLE_TORCH_LIBRARY_IMPL(mixdq_ao, CUDA, m) {
  m.impl("linear_int8", TORCH_BOX(&linear_int8_op));
  m.impl("linear_int8_geglu", TORCH_BOX(&linear_int8_geglu_op));
  m.impl("linear_int8_dynamic", TORCH_BOX(&linear_int8_dynamic_op));
  m.impl("linear_int8_multi", TORCH_BOX(&linear_int8_multi_op));
  m.impl("conv2d_int8", TORCH_BOX(&conv2d_int8_op));
  m.impl("quantized_linear", TORCH_BOX(&quantized_linear_op));
  m.impl("quantized_linear_dynamic", TORCH_BOX(&quantized_linear_dynamic_op));
  m.impl("quantized_conv2d", TORCH_BOX(&quantized_conv2d_op));
}

}  // namespace
}  // namespace mixdq
