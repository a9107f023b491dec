#include "ops/operands.h"

namespace mixdq {
namespace {

bool unaligned(const View& v, const int64_t* stride, int count) {
  bool off = reinterpret_cast<uintptr_t>(v.data) % 16 != 0;
  for (int i = 0; i < count; ++i) off |= stride[i] % 16 != 0;
  return off;
}

void check_codes(const Call& call, const View& v) {
  STD_TORCH_CHECK(v.dtype == dtypes().int8, call.op(), ": the quantized input must be int8");
}

// The distances between pixels of [batch, channels, height, width], those of dense memory where a size is 1.
void pixel_strides(const View& v, int64_t stride[3]) {
  stride[2] = v.size[3] == 1 ? v.size[1] : v.stride[3];
  stride[1] = v.size[2] == 1 ? stride[2] * v.size[3] : v.stride[2];
  stride[0] = v.size[0] == 1 ? stride[1] * v.size[2] : v.stride[0];
}

bool channels_last(const View& v, const int64_t stride[3]) {
  return (v.size[1] == 1 || v.stride[1] == 1) && stride[2] >= v.size[1] && stride[1] > 0 && stride[0] > 0;
}

void set_residual(const Call& call, Matmul& p, const View& v, int64_t stride) {
  p.residual = v.data;
  p.residual_type = call.float_type(v.dtype, "residual");
  p.residual_stride = stride;
}

void check_residual(const Call& call, const View& v, const View& out) {
  bool same = v.dims == out.dims;
  for (int64_t i = 0; same && i < v.dims; ++i) same = v.size[i] == out.size[i];
  STD_TORCH_CHECK(same, call.op(), ": residual must have the shape of the output");
}

int output_size(const Call& call, int64_t size, int64_t kernel, int64_t stride, int64_t dilation) {
  int64_t span = dilation * (kernel - 1) + 1;
  STD_TORCH_CHECK(stride > 0 && dilation > 0 && size >= span, call.op(), ": a window of ", span, " does not fit ", size,
                  " padded pixels, or stride ", stride, " or dilation ", dilation, " is not positive");
  return int((size - span) / stride + 1);
}

}  // namespace

Image code_rows(Call& call, const Tensor& xq, View* view) {
  View v = call.look(xq, "the quantized input");
  check_codes(call, v);
  STD_TORCH_CHECK(v.dims >= 1, call.op(), ": the quantized input must have at least one dimension");
  *view = v;
  int64_t channels = v.size[v.dims - 1];
  Rows rows = merged_rows(v);
  bool overlap = false;
  for (int i = 0; i < 3; ++i) overlap |= rows.size[i] > 1 && rows.stride[i] < channels;
  if (!rows.fits || rows.channel_stride != 1 || overlap || (channels % 16 == 0 && unaligned(v, rows.stride, 3))) {
    v = call.keep(torch::stable::contiguous(xq), "the quantized input");
    rows = merged_rows(v);
  }
  Image x;
  x.data = static_cast<const int8_t*>(v.data);
  x.batch = int(rows.size[0]), x.height = int(rows.size[1]), x.width = int(rows.size[2]), x.channels = int(channels);
  x.stride_n = rows.stride[0], x.stride_h = rows.stride[1], x.stride_w = rows.stride[2];
  return x;
}

Image code_image(Call& call, const Tensor& xq) {
  View v = call.look(xq, "the quantized input");
  check_codes(call, v);
  STD_TORCH_CHECK(v.dims == 4, call.op(), ": the quantized input must be [batch, channels, height, width]; found ",
                  v.dims, " dimensions");
  int64_t stride[3];
  pixel_strides(v, stride);
  if (!channels_last(v, stride) || (v.size[1] % 16 == 0 && unaligned(v, stride, 3))) {
    v = call.keep(torch::stable::contiguous(xq, MemoryFormat::ChannelsLast), "the quantized input");
    pixel_strides(v, stride);
  }
  Image x;
  x.data = static_cast<const int8_t*>(v.data);
  x.batch = int(v.size[0]), x.height = int(v.size[2]), x.width = int(v.size[3]), x.channels = int(v.size[1]);
  x.stride_n = stride[0], x.stride_h = stride[1], x.stride_w = stride[2];
  return x;
}

Image dense_image(const int8_t* data, int64_t batch, int64_t height, int64_t width, int64_t channels) {
  Image x;
  x.data = data;
  x.batch = int(batch), x.height = int(height), x.width = int(width), x.channels = int(channels);
  x.stride_w = channels, x.stride_h = width * channels, x.stride_n = height * width * channels;
  return x;
}

void check_groups(const Call& call, const Ints& groups, int64_t channels, int64_t bits) {
  STD_TORCH_CHECK(bits == 8 || bits == 4 || bits == 2, call.op(), ": weight bits must be 8, 4 or 2; found ", bits);
  int64_t sum = 0;
  for (int64_t g : groups) sum += g;
  STD_TORCH_CHECK(!groups.empty() && sum == channels, call.op(), ": input_groups add up to ", sum,
                  "; the input has ", channels, " channels");
}

Weight stored_weight(Call& call, const Tensor& qdata, const Ints& groups, int64_t bits, int64_t dims, Window* window) {
  View v = call.look(qdata, "the weight");
  STD_TORCH_CHECK(v.dtype == (bits == 8 ? dtypes().int8 : dtypes().uint8), call.op(), ": a weight of ", bits,
                  " bits must be ", bits == 8 ? "int8" : "uint8");
  int64_t packed = 0;
  for (int64_t g : groups) packed += packed_size(g, bits);
  STD_TORCH_CHECK(v.dims == dims && v.size[1] == packed, call.op(), ": the weight must have ", dims,
                  " dimensions and ", packed, " stored input channels");
  if (dims == 2) {
    if (!v.dense()) v = call.keep_copied_weight(torch::stable::contiguous(qdata));
  } else {
    int64_t stride[3];
    pixel_strides(v, stride);
    bool dense = (packed == 1 || v.stride[1] == 1) && stride[2] == packed && stride[1] == packed * v.size[3] &&
                 stride[0] == packed * v.size[3] * v.size[2];
    if (!dense) v = call.keep_copied_weight(torch::stable::contiguous(qdata, MemoryFormat::ChannelsLast));
    window->r = int(v.size[2]), window->s = int(v.size[3]);
  }
  Weight w;
  w.data = v.data;
  w.n = int(v.size[0]);
  return w;
}

Weight static_weight(Call& call, const Tensor& qdata, const Tensor& alpha, const Tensor& beta,
                     const OptionalTensor& bias, const Ints& groups, int64_t bits, int64_t dims,
                     Window* window) {
  Weight w = stored_weight(call, qdata, groups, bits, dims, window);
  w.alpha = call.floats(alpha, "alpha", int64_t(groups.size()) * w.n);
  w.beta = call.floats(beta, "beta", w.n);
  w.bias = call.float_vector(bias, "bias", w.n, &w.bias_type);
  return w;
}

void set_out(Matmul& p, const View& out, Float type, int64_t columns) {
  p.out = out.data;
  p.out_type = type;
  p.out_stride = columns;
}

void add_row_residual(Call& call, Matmul& p, const OptionalTensor& residual, const View& out) {
  if (!residual) return;
  const Tensor& t = *residual;
  View v = call.keep(t, "residual");
  check_residual(call, v, out);
  Rows rows = merged_rows(v);
  if (!rows.equally_spaced() || rows.channel_stride != 1) {
    v = call.keep(torch::stable::contiguous(t), "residual");
    rows = merged_rows(v);
  }
  set_residual(call, p, v, rows.stride[2]);
}

void add_image_residual(Call& call, Matmul& p, const OptionalTensor& residual, const View& out) {
  if (!residual) return;
  const Tensor& t = *residual;
  View v = call.keep(t, "residual");
  bool one_row = v.dims == 4 && v.size[2] * v.size[3] == 1;
  one_row = one_row && v.size[0] == out.size[0] && v.size[1] == out.size[1];
  if (!one_row) check_residual(call, v, out);
  int64_t stride[3];
  pixel_strides(v, stride);
  bool spaced = stride[1] == stride[2] * v.size[3] && stride[0] == stride[1] * v.size[2];
  if (!channels_last(v, stride) || !(spaced || one_row)) {
    v = call.keep(torch::stable::contiguous(t, MemoryFormat::ChannelsLast), "residual");
    pixel_strides(v, stride);
  }
  set_residual(call, p, v, one_row ? stride[0] : stride[2]);
  if (one_row) p.residual_rows = p.out_h * p.out_w;
}

void set_rows(Matmul& p, const Image& x) {
  p.x = x;
  p.out_h = x.height, p.out_w = x.width;
}

Matmul row_problem(const Image& x, int64_t bits) {
  Matmul p;
  set_rows(p, x);
  p.bits = int(bits);
  return p;
}

void set_window(const Call& call, Matmul& p, const Ints& stride, const Ints& dilation) {
  STD_TORCH_CHECK(stride.size() == 2 && dilation.size() == 2, call.op(), ": stride and dilation must be pairs");
  Window& w = p.window;
  w.stride_h = int(stride[0]), w.stride_w = int(stride[1]);
  w.dilation_h = int(dilation[0]), w.dilation_w = int(dilation[1]);
  p.out_h = output_size(call, p.x.height, w.r, stride[0], dilation[0]);
  p.out_w = output_size(call, p.x.width, w.s, stride[1], dilation[1]);
}

}  // namespace mixdq
