// Entry points of the quantizers: floating activations to int8 codes, alone or fused with what comes before them.
//
// code = clamp(rint(x / scale + zero_point)); a NaN becomes the zero point. Everything rounds half to even in float32,
// and the division is a true one, so that codes equal those of the CPU operators bit for bit.
#pragma once
#include "kernels.h"

namespace mixdq {

// A floating tensor of four dimensions, any strides (in elements): [d0, d1, d2, channels] of rows, or an image as
// [batch, height, width, channels], whatever its memory format.
struct Floats {
  const void* data = nullptr;
  Float type = Float::f16;
  int64_t size[4] = {1, 1, 1, 1};
  int64_t stride[4] = {0, 0, 0, 1};

  int64_t rows() const { return size[0] * size[1] * size[2]; }
  int channels() const { return int(size[3]); }
};

constexpr int kMaxGroups = 4;

// Static parameters: float32 on the device, one of each for every group of input channels.
struct Codes {
  const float* scale = nullptr;
  const float* zero_point = nullptr;
  int bits = 8;  // 8 or 4; the codes are int8 either way
  int groups = 1;
  int group_channels[kMaxGroups] = {0, 0, 0, 0};
};

struct Pad {
  int left = 0, right = 0, top = 0, bottom = 0;
};

struct Norm {
  const void* weight = nullptr;  // [channels] or null
  const void* bias = nullptr;    // [channels] or null
  Float type = Float::f16;       // of both
  float eps = 1e-5f;
};

// out [batch, height + pad, width + pad, channels], dense; the border holds the zero point.
cudaError_t quantize(const Floats& x, const Codes& codes, const Pad& pad, int8_t* out, const Stream& on);

// Each row and group of channels gets its own range, which includes 0: scale = (max - min) / (2^bits - 1), or 1 where
// that is 0; zero_point = rint(-min / scale) + qmin. scale and zero_point are [rows, groups]; only codes.bits and the
// groups are read.
cudaError_t quantize_per_token(const Floats& x, const Codes& codes, int8_t* out, float* scale, float* zero_point,
                               const Stream& on);

// LayerNorm over the channels (at most 16,384) in float32, then quantize.
cudaError_t layer_norm_quantize(const Floats& x, const Norm& norm, const Codes& codes, int8_t* out, const Stream& on);

// x [rows, 2 f]: value * gelu(gate) with value = x[:, :f], gate = x[:, f:] and the exact (erf) gelu, then quantize.
cudaError_t geglu_quantize(const Floats& x, const Codes& codes, int8_t* out, const Stream& on);

// GroupNorm over groups of channels of each image, SiLU where asked, then quantize with padding. `workspace` holds
// group_norm_workspace() bytes, of any content.
int64_t group_norm_workspace(const Floats& x, int norm_groups, const Stream& on);
cudaError_t group_norm_quantize(const Floats& x, int norm_groups, const Norm& norm, bool silu, const Codes& codes,
                                const Pad& pad, int8_t* out, void* workspace, const Stream& on);

}  // namespace mixdq
