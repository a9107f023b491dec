// What is to be computed and with which kernel, in plain C++: no torch, no CUDA.
//
// Every layer is one form: a window slides over an int8 image in NHWC, and each output pixel is a row of a matrix product
// with the weight. A linear layer over rows [m, k] is the 1x1 window over the image [1, 1, m, k].
#pragma once
#include <cstdint>
#include <string>

namespace mixdq {

enum class Float : int { f32, f16, bf16 };

// Codes, or floats, [batch, height, width, channels]; strides in elements, the channel stride is 1.
struct Image {
  const int8_t* data = nullptr;
  int batch = 1, height = 1, width = 1, channels = 1;
  int64_t stride_n = 0, stride_h = 0, stride_w = 0;
};

// No padding: the quantizer pads with the code of zero, so that the product needs no correction at the border.
struct Window {
  int r = 1, s = 1;
  int stride_h = 1, stride_w = 1;
  int dilation_h = 1, dilation_w = 1;
};

// A weight [n, r, s, channels] in its stored form, contiguous, and the vectors of its epilogue, each [n] or null.
struct Weight {
  const void* data = nullptr;
  int n = 0;
  const float* alpha = nullptr;        // static activations: act_scale * scale; dynamic or floating ones: scale
  const float* beta = nullptr;         // static only: the share of the zero point
  const void* bias = nullptr;
  Float bias_type = Float::f32;
  const int32_t* weight_sum = nullptr; // dynamic only: sum of the codes of each row
};

// A static quantizer that is part of the kernel which multiplies, if it has a scale.
struct Quantizer {
  const float* scale = nullptr;
  const float* zero_point = nullptr;
  int bits = 8;

  explicit operator bool() const { return scale; }
};

// A text's first token, whose output is known. A sample is `sample_rows` rows, one after another.
struct Bos {
  const void* input = nullptr;  // [channels]; null: every first token is it
  Float input_type = Float::f16;
  const void* output = nullptr;  // [columns]; null: nothing is known
  Float output_type = Float::f16;
  int sample_rows = 1;
};

constexpr int kMaxWeights = 4;

// out[m, n] = round(epilogue(sum_k x[m, k] * w[n, k]) + residual[m, n]), int32 sums, float32 epilogue, one rounding.
//   static:  acc * alpha[n] + (beta[n] + bias[n])
//   floating: acc * alpha[n] + bias[n], with float32 sums
//   dynamic: (acc - row_zero_point[m] * weight_sum[n]) * row_scale[m] * alpha[n] + bias[n]
// Several weights share the input; their outputs lie side by side, so out has sum(n) columns.
struct Matmul {
  Image x;
  Window window;
  int out_h = 1, out_w = 1;
  bool floating = false;       // weight-only: x holds floats of x_type, 16 bits each, instead of codes
  Quantizer quantizer;         // x holds such floats, which become codes in the kernel
  Float x_type = Float::f16;
  Bos bos;                     // with a quantizer only
  int bits = 8;  // of the weights: 8, 4 or 2
  Weight weights[kMaxWeights];
  int weight_count = 1;
  int64_t weight_pitch = 0;  // bytes from one tap of a weight to the next where other channels lie between; 0: none do
  const float* row_scale = nullptr;       // not null: dynamic
  const float* row_zero_point = nullptr;  // whole numbers
  int64_t row_stride = 1;                 // of both, in elements
  const void* residual = nullptr;
  Float residual_type = Float::f16;
  int64_t residual_stride = 0;            // elements from one row to the next
  int residual_rows = 1;                  // rows of the output that share a row of the residual: one for each image
  void* out = nullptr;
  Float out_type = Float::f16;
  int64_t out_stride = 0;                 // elements from one row to the next
  // Of one static weight without a residual, whose outputs are values and then as many gates: they are rounded to out_type
  // and become value * gelu(gate), then int8 codes as geglu_quantize() makes them. out is [m, n / 2] then.
  Quantizer geglu;

  int64_t m() const { return int64_t(x.batch) * out_h * out_w; }
  int n() const {
    int sum = 0;
    for (int i = 0; i < weight_count; ++i) sum += weights[i].n;
    return sum;
  }
  int taps() const { return window.r * window.s; }
  int k() const { return taps() * x.channels; }
  int element_bytes() const { return floating ? 2 : 1; }         // of what is multiplied
  int x_bytes() const { return floating || quantizer ? 2 : 1; }  // of what x holds
  // Bytes of a weight for one tap: the stored form packs the channels of each tap on their own.
  int packed_channels() const { return (x.channels * bits + 7) / 8; }
  int64_t pitch() const { return weight_pitch ? weight_pitch : packed_channels(); }
  // Rows at equal distances, with nothing left out: what needs no window arithmetic.
  bool is_rows() const {
    bool dense_h = x.height == 1 || x.stride_h == x.stride_w * x.width;
    bool dense_n = x.batch == 1 || x.stride_n == x.stride_w * x.width * x.height;
    return taps() == 1 && window.stride_h == 1 && window.stride_w == 1 && dense_h && dense_n;
  }
  std::string str() const;
};

// One compiled kernel. The catalogue lists them all; a Choice names one by its place there.
struct Kernel {
  const char* name;
  const char* family;  // "sm90", "sm80" or "any"
  int tile_m, tile_n;
  int math_groups;     // warpgroups that multiply; 0 where that means nothing
  int max_splits;      // parts that the reduction can be split into, each in a block of one cluster; or see sharing
  bool packed;         // reads 4 and 2 bit weights as they are stored; others get them unpacked first
  bool floating = false;  // multiplies floating activations, with weights of any width as they are stored
  bool sharing = false;   // splits are tiles of the same columns instead, in the blocks of a cluster that share weights
  bool geglu = false;     // ends with GEGLU and quantization, which no other kernel does
  bool quantizes = false; // begins with quantization, which no other kernel does
};

struct Choice {
  int kernel = -1;
  int splits = 1;
  bool tuned = false;  // from the table that the tuner wrote, else from the rule
};

}  // namespace mixdq
