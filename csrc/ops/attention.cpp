// The operators of the attention kernel. What they compute is said in mixdq_ao/attention.py.
#include "attention.h"

#include "ops/floats.h"

namespace mixdq {
namespace {

// Strides of batch, heads and tokens; what is not walked has none.
void set_strides(const Call& call, const View& v, const char* name, int64_t (&stride)[3]) {
  constexpr int64_t kMultiple = 8;
  STD_TORCH_CHECK(v.stride[3] == 1, call.op(), ": the channels of ", name, " must lie side by side");
  bool fits = reinterpret_cast<uintptr_t>(v.data) % (2 * kMultiple) == 0;
  for (int i = 0; i < 3; ++i) {
    stride[i] = v.size[i] == 1 ? 0 : v.stride[i];
    fits &= stride[i] % kMultiple == 0;
  }
  STD_TORCH_CHECK(fits, call.op(), ": each row of ", name, " must begin at a multiple of ", 2 * kMultiple, " bytes");
}

// All but the output.
Attention problem(const Call& call, const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
  View views[3] = {call.look(q, "q"), call.look(k, "k"), call.look(v, "v")};
  const View &vq = views[0], &vk = views[1], &vv = views[2];
  for (const View& view : views) {
    bool fits = view.dims == 4 && view.dtype == vq.dtype && view.size[0] == vq.size[0] && view.size[1] == vq.size[1] &&
                view.size[2] == (&view == &vq ? vq : vk).size[2] && view.size[3] == kHeadChannels;
    STD_TORCH_CHECK(fits, call.op(), ": q, k and v must be [batch, heads, tokens, ", kHeadChannels, "] of one dtype");
  }
  STD_TORCH_CHECK(vq.size[0] < 65536 && vq.size[1] < 65536 && vq.size[2] <= INT32_MAX && vk.size[2] <= INT32_MAX,
                  call.op(), ": too many images, heads or tokens");
  STD_TORCH_CHECK(vk.size[2] > 0 && scale > 0, call.op(), ": needs a key, and a scale above 0");
  Attention p;
  p.type = call.float_type(vq.dtype, "q");
  STD_TORCH_CHECK(p.type != Float::f32, call.op(), ": q, k and v must be float16 or bfloat16");
  p.batch = int(vq.size[0]), p.heads = int(vq.size[1]), p.queries = int(vq.size[2]), p.keys = int(vk.size[2]);
  p.scale = float(scale);
  p.q = vq.data, p.k = vk.data, p.v = vv.data;
  if (vq.numel() == 0) return p;
  set_strides(call, vq, "q", p.q_stride);
  set_strides(call, vk, "k", p.k_stride);
  set_strides(call, vv, "v", p.v_stride);
  return p;
}

Tensor short_attention_op(const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
  Call call("short_attention", q);
  Attention p = problem(call, q, k, v, scale);
  Tensor out = torch::stable::empty_like(q);
  View o = call.look(out, "the output");
  if (o.numel() == 0) return out;
  p.out = o.data;
  set_strides(call, o, "the output", p.out_stride);
  call.check(attention(p, call.on()), "the kernel");
  return out;
}

Tensor short_attention_quantize_op(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                                   const Tensor& act_scale, const Tensor& act_zero_point, int64_t bits) {
  Call call("short_attention_quantize", q);
  Attention p = problem(call, q, k, v, scale);
  int64_t channels = int64_t(p.heads) * kHeadChannels;
  p.codes = static_codes(call, act_scale, act_zero_point, bits, {channels}, channels);
  int64_t size[3] = {p.batch, p.queries, channels}, stride[3] = {p.queries * channels, channels, 1};
  Tensor out = call.empty(size, stride, 3, dtypes().int8);
  View o = call.look(out, "the output");
  if (o.numel() == 0) return out;
  p.out = o.data;
  p.out_stride[0] = stride[0], p.out_stride[1] = kHeadChannels, p.out_stride[2] = channels;
  call.check(attention(p, call.on()), "the kernel");
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(mixdq_ao, CUDA, m) {
  m.impl("short_attention", TORCH_BOX(&short_attention_op));
  m.impl("short_attention_quantize", TORCH_BOX(&short_attention_quantize_op));
}

}  // namespace
}  // namespace mixdq
