// The operators that multiply floats. Schemas and what they mean are in mixdq_ao/ops.py.
#include <array>

#include "ops/floats.h"
#include "ops/multiply.h"
#include "ops/operands.h"

namespace mixdq {
namespace {

// The floating weight [out, in, ...], channels-last for a convolution, as torch's own operators take it.
Tensor dequantized(Call& call, const Matmul& p, int64_t dims, const Ints& groups, Float type) {
  const Weight& w = p.weights[0];
  const int64_t channels = p.x.channels, r = p.window.r, s = p.window.s;
  const int64_t size[4] = {w.n, channels, r, s}, stride[4] = {r * s * channels, 1, s * channels, channels};
  Tensor out = call.empty(size, stride, dims, dtype_of(type));
  int64_t stored = 0;
  for (int64_t g : groups) stored += packed_size(g, p.bits);
  const auto* codes = static_cast<const char*>(w.data);
  auto* to = static_cast<char*>(call.look(out, "the weight").data);
  for (size_t g = 0; g < groups.size(); ++g) {
    call.check(dequantize_weight(codes, stored, w.alpha + g * w.n, to, type, channels, w.n, p.taps(), int(groups[g]),
                                 p.bits, call.on()),
               "dequantizing the weight");
    codes += packed_size(groups[g], p.bits);
    to += groups[g] * bytes_of(type);
  }
  return out;
}

// Whether one of our kernels multiplies every group of channels of a floating input.
bool multiplies_floats(const Call& call, const Matmul& whole, const Ints& groups) {
  if (whole.x_type == Float::f32) return false;
  Matmul p = whole;
  for (int64_t g : groups) p.weight_pitch += packed_size(g, p.bits);
  for (int64_t g : groups) {
    p.x.channels = int(g);
    if (!is_multiplied(call, p)) return false;
    p.x.data += g * p.element_bytes();
    p.weights[0].data = static_cast<const char*>(p.weights[0].data) + packed_size(g, p.bits);
  }
  return true;
}

// The problem but for its input and output.
void set_floating(Call& call, Matmul& p, Float type, const Tensor& qdata, const Tensor& scale,
                  const OptionalTensor& bias, const Ints& groups, int64_t bits, int64_t dims) {
  check_groups(call, groups, p.x.channels, bits);
  p.bits = int(bits), p.floating = true, p.x_type = type;
  Weight& w = p.weights[0];
  w = stored_weight(call, qdata, groups, bits, dims, &p.window);
  w.alpha = call.floats(scale, "scale", int64_t(groups.size()) * w.n);
  w.bias = call.float_vector(bias, "bias", w.n, &w.bias_type);
}

OptionalTensor bias_like(const OptionalTensor& bias, const Tensor& x) {
  return bias ? OptionalTensor(torch::stable::to(*bias, x.scalar_type())) : bias;
}

Tensor linear_weight_only_op(const Tensor& x, const Tensor& qdata, const Tensor& scale, const OptionalTensor& bias,
                             int64_t bits, const Ints& groups, const OptionalTensor& bos_input,
                             const OptionalTensor& bos_output) {
  Call call("linear_weight_only", x);
  Tensor rows = call.look(x, "the input").dense() ? x : torch::stable::contiguous(x);
  View v;
  const Floats f = float_rows(call, rows, &v);
  Matmul p = row_problem(dense_image(static_cast<const int8_t*>(v.data), 1, 1, f.rows(), f.channels()), bits);
  set_floating(call, p, f.type, qdata, scale, bias, groups, bits, 2);
  const Bos bos = bos_of(call, bos_input, bos_output, v, p.n());
  if (p.m() == 0 || p.n() == 0 || multiplies_floats(call, p, groups)) {
    Tensor out = call.empty_rows(v, p.n(), v.dtype);
    set_out(p, call.look(out, "the output"), f.type, p.n());
    multiply(call, p, groups);
    write_bos(call, f, bos, p.out, f.type, p.n());
    return out;
  }
  std::array<StableIValue, 3> stack{torch::stable::detail::from(rows),
                                    torch::stable::detail::from(dequantized(call, p, 2, groups, f.type)),
                                    torch::stable::detail::from(bias_like(bias, x))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  Tensor out = torch::stable::contiguous(torch::stable::detail::to<Tensor>(stack[0]));
  write_bos(call, f, bos, call.look(out, "the output").data, f.type, p.n());
  return out;
}

Tensor conv2d_weight_only_op(const Tensor& x, const Tensor& qdata, const Tensor& scale, const OptionalTensor& bias,
                             const Ints& stride, const Ints& pad, const Ints& dilation, int64_t bits,
                             const Ints& groups) {
  Call call("conv2d_weight_only", x);
  STD_TORCH_CHECK(call.look(x, "the input").dims == 4, call.op(), ": the input must be [batch, channels, height, width]");
  const Pad border = checked_pad(call, pad);
  const bool padded = border.left || border.right || border.top || border.bottom;
  Tensor image = padded ? torch::stable::pad(x, {pad.data(), pad.size()}) : x;
  image = torch::stable::contiguous(image, MemoryFormat::ChannelsLast);
  View v = call.keep(image, "the input");
  const Float type = call.float_type(v.dtype, "the input");
  Matmul p;
  p.x = dense_image(static_cast<const int8_t*>(v.data), v.size[0], v.size[2], v.size[3], v.size[1]);
  set_floating(call, p, type, qdata, scale, bias, groups, bits, 4);
  set_window(call, p, stride, dilation);
  if (p.m() == 0 || p.n() == 0 || multiplies_floats(call, p, groups)) {
    return convolve(call, p, groups, type, std::nullopt);
  }
  std::array<StableIValue, 7> stack{torch::stable::detail::from(image),
                                    torch::stable::detail::from(dequantized(call, p, 4, groups, type)),
                                    torch::stable::detail::from(bias_like(bias, x)),
                                    torch::stable::detail::from(stride),
                                    torch::stable::detail::from(Ints{0, 0}),
                                    torch::stable::detail::from(dilation),
                                    torch::stable::detail::from(int64_t(1))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::conv2d", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::contiguous(torch::stable::detail::to<Tensor>(stack[0]), MemoryFormat::ChannelsLast);
}

STABLE_TORCH_LIBRARY_IMPL(mixdq_ao, CUDA, m) {
  m.impl("linear_weight_only", TORCH_BOX(&linear_weight_only_op));
  m.impl("conv2d_weight_only", TORCH_BOX(&conv2d_weight_only_op));
}

}  // namespace
}  // namespace mixdq
