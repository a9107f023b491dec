// Entry point of the attention kernel: exact, softmax(scale * q k^T) v with float32 scores, softmax and sums.
#pragma once
#include "quantize.h"

namespace mixdq {

constexpr int kHeadChannels = 64;  // of q, k, v and out

// [batch, heads, tokens, channels], float16 or bfloat16. Strides of the first three in elements: multiples of 8, and of
// 4 those of the output; addresses are multiples of as many bytes as those elements have. Where codes have a scale, the
// output is int8, of one group: the codes of what would be written else, with strides and an address that are multiples
// of 8.
struct Attention {
  const void *q = nullptr, *k = nullptr, *v = nullptr;
  void* out = nullptr;
  Float type = Float::f16;
  int batch = 1, heads = 1, queries = 1, keys = 1;
  int64_t q_stride[3] = {}, k_stride[3] = {}, v_stride[3] = {}, out_stride[3] = {};
  float scale = 1;  // positive
  Codes codes;
};

cudaError_t attention(const Attention& p, const Stream& on);

}  // namespace mixdq
