// Entry points of the attention kernels: exact, softmax(scale * q k^T) v with float32 scores, softmax and sums.
#pragma once
#include "quantize.h"

namespace mixdq {

constexpr int kHeadChannels = 64;  // of q, k, v and out

// [batch, heads, tokens, channels], float16 or bfloat16. Strides of the first three in elements: multiples of 8;
// addresses are multiples of 16 bytes. Where codes have a scale, the output is int8, of one group: the codes of what
// would be written else, with an address that is a multiple of 8.
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

// The kernel that the above calls for at most so many keys, SDXL's text being 77: a multiple of 16. `wanted` may fix
// its shape, as few:blocks:warps, blocks being those of one head.
constexpr int kFewKeys = 80;
cudaError_t attention_few_keys(const Attention& p, const char* wanted, const Stream& on);

}  // namespace mixdq
