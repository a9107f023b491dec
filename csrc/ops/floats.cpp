#include "ops/floats.h"

namespace mixdq {

Floats float_rows(Call& call, const Tensor& x, View* view) {
  View v = call.look(x, "the input");
  STD_TORCH_CHECK(v.dims >= 1, call.op(), ": the input must have at least one dimension");
  if (view) *view = v;
  Rows rows = merged_rows(v);
  if (!rows.fits) {
    v = call.keep(torch::stable::contiguous(x), "the input");
    rows = merged_rows(v);
  }
  Floats f;
  f.data = v.data;
  f.type = call.float_type(v.dtype, "the input");
  for (int i = 0; i < 3; ++i) f.size[i] = rows.size[i], f.stride[i] = rows.stride[i];
  f.size[3] = v.size[v.dims - 1];
  f.stride[3] = rows.channel_stride;
  return f;
}

Floats float_image(const Call& call, const Tensor& x) {
  View v = call.look(x, "the input");
  STD_TORCH_CHECK(v.dims == 4, call.op(), ": the input must be [batch, channels, height, width]; found ", v.dims,
                  " dimensions");
  Floats f;
  f.data = v.data;
  f.type = call.float_type(v.dtype, "the input");
  const int order[4] = {0, 2, 3, 1};
  for (int i = 0; i < 4; ++i) f.size[i] = v.size[order[i]], f.stride[i] = v.stride[order[i]];
  return f;
}

void set_groups(const Call& call, Codes& codes, int64_t bits, const Ints& groups, int64_t channels) {
  STD_TORCH_CHECK(bits == 8 || bits == 4, call.op(), ": activation bits must be 8 or 4; found ", bits);
  STD_TORCH_CHECK(!groups.empty() && groups.size() <= size_t(kMaxGroups), call.op(), ": takes 1 to ", kMaxGroups,
                  " input groups on CUDA; found ", groups.size());
  codes.bits = int(bits);
  codes.groups = int(groups.size());
  int64_t sum = 0;
  for (size_t g = 0; g < groups.size(); ++g) sum += codes.group_channels[g] = int(groups[g]);
  STD_TORCH_CHECK(sum == channels, call.op(), ": input_groups add up to ", sum, "; the input has ", channels,
                  " channels");
}

Codes static_codes(Call& call, const Tensor& scale, const Tensor& zero_point, int64_t bits, const Ints& groups,
                   int64_t channels) {
  Codes codes;
  set_groups(call, codes, bits, groups, channels);
  codes.scale = call.floats(scale, "scale", codes.groups);
  codes.zero_point = call.floats(zero_point, "zero_point", codes.groups);
  return codes;
}

Pad checked_pad(const Call& call, const Ints& pad) {
  STD_TORCH_CHECK(pad.size() == 4, call.op(), ": pad must be left, right, top, bottom; found ", pad.size(), " values");
  for (int64_t p : pad) STD_TORCH_CHECK(p >= 0, call.op(), ": pad must not be negative; found ", p);
  return {int(pad[0]), int(pad[1]), int(pad[2]), int(pad[3])};
}

Norm norm_of(Call& call, const OptionalTensor& weight, const OptionalTensor& bias, double eps, int64_t channels) {
  Norm norm;
  Float bias_type = norm.type;
  norm.weight = call.float_vector(weight, "weight", channels, &norm.type);
  norm.bias = call.float_vector(bias, "bias", channels, &bias_type);
  STD_TORCH_CHECK(!norm.weight || !norm.bias || norm.type == bias_type, call.op(),
                  ": weight and bias must have one dtype");
  if (!norm.weight) norm.type = bias_type;
  norm.eps = float(eps);
  return norm;
}

Bos bos_of(Call& call, const OptionalTensor& input, const OptionalTensor& output, const View& x, int64_t columns) {
  Bos bos;
  bos.input = call.float_vector(input, "bos_input", x.size[x.dims - 1], &bos.input_type);
  bos.output = call.float_vector(output, "bos_output", columns, &bos.output_type);
  if (x.dims < 2) return {};
  STD_TORCH_CHECK(x.size[x.dims - 2] <= INT32_MAX, call.op(), ": a sample has fewer than 2^31 tokens");
  bos.sample_rows = int(x.size[x.dims - 2]);
  return bos;
}

void write_bos(Call& call, const Floats& x, const Bos& bos, void* out, Float type, int64_t columns) {
  if (!bos.output) return;
  call.check(write_bos_rows(x, bos, out, type, columns, call.on()), "the known first row");
}

}  // namespace mixdq
