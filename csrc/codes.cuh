// What the quantizers share: from floats to codes, eight at a time, and where the values of an output pixel lie.
#pragma once
#include <cmath>
#include "device.cuh"
#include "quantize.h"

namespace mixdq {

constexpr int kVector = 8;  // elements that a thread handles at once: 16 bytes of half precision, 8 bytes of codes

constexpr int64_t kIndexLimit = int64_t(1) << 31;

// Output pixels (or rows) in the order of the output, and where their values lie in the input.
struct Pixels {
  Divider width, height;  // of the output
  int in_width = 0, in_height = 0, left = 0, top = 0;
  int64_t stride_n = 0, stride_h = 0, stride_w = 0;

  Pixels() = default;
  Pixels(const Floats& x, const Pad& pad)
      : width(x.size[2] + pad.left + pad.right), height(x.size[1] + pad.top + pad.bottom), in_width(int(x.size[2])),
        in_height(int(x.size[1])), left(pad.left), top(pad.top), stride_n(x.stride[0]), stride_h(x.stride[1]),
        stride_w(x.stride[2]) {}

  // -1 in the border.
  __device__ int64_t offset(uint32_t pixel) const {
    uint32_t column, line;
    uint32_t image = height.divide(width.divide(pixel, column), line);
    uint32_t w = column - left, h = line - top;  // wraps around before the first
    if (w >= uint32_t(in_width) || h >= uint32_t(in_height)) return -1;
    return image * stride_n + h * stride_h + w * stride_w;
  }
};

// The one definition of a code; NaN and what overflows included.
struct Encoder {
  static constexpr float kShift = 12582912.f;  // 1.5 * 2^23: added to a number, it leaves a whole one in the lowest bits

  float scale, zero_point, low, high;
  float reciprocal;          // NaN where encode() must divide
  float shifted_zero_point;  // NaN where it is no whole number

  __device__ Encoder(float scale, float zero_point, int bits) : scale(scale), zero_point(zero_point) {
    low = bits == 8 ? -128.f : -8.f;
    high = -low - 1.f;
    const float none = __int_as_float(0x7fffffff);
    reciprocal = scale >= 0x1p-64f && scale <= 0x1p64f ? __frcp_rn(scale) : none;
    shifted_zero_point = zero_point + kShift;
    if (shifted_zero_point - kShift != zero_point) shifted_zero_point = none;
  }

  // In the lowest byte. Clamping to whole numbers before rounding equals clamping after it; adding the shift rounds
  // half to even.
  __device__ uint32_t round(float quotient) const {
    float v = fminf(fmaxf(__fadd_rn(quotient, zero_point), low), high);
    return __float_as_uint(__fadd_rn(v, kShift));
  }

  __device__ uint32_t code(float x) const {
    float q = __fdiv_rn(x, scale);
    return round(q == q ? q : 0.f);
  }

  __device__ uint32_t border() const { return round(0.f); }

  // x / scale, correctly rounded wherever that can change a code. With the rounded reciprocal the first estimate is
  // within 1.5 units of its last place, the second is faithful, and Markstein's theorem makes the third exact: the
  // remainders are exact as long as nothing underflows, which with this range of scales it can only do below 2^-30,
  // where the quotient is too small to count. Not finite where the quotient is not or nearly so.
  __device__ float quotient(float x) const {
    float q = __fmul_rn(x, reciprocal);
    q = __fmaf_rn(__fmaf_rn(-q, scale, x), reciprocal, q);
    return __fmaf_rn(__fmaf_rn(-q, scale, x), reciprocal, q);
  }
};

__device__ __forceinline__ uint32_t pack(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

__device__ __forceinline__ uint2 pack(const uint32_t (&c)[kVector]) {
  return {pack(c[0], c[1], c[2], c[3]), pack(c[4], c[5], c[6], c[7])};
}

// Whatever the values are; takes several times as long.
__device__ __forceinline__ uint2 encode_any(const float (&f)[kVector], const Encoder& e) {
  uint32_t c[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) c[i] = e.code(f[i]);
  return pack(c);
}

// `odd` becomes NaN where a quotient is not finite, and the codes are none.
__device__ __forceinline__ uint2 encode_finite(const float (&f)[kVector], const Encoder& e, float& odd) {
  uint32_t c[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    float q = e.quotient(f[i]);
    odd = __fmaf_rn(q, 0.f, odd);
    c[i] = e.round(q);
  }
  return pack(c);
}

__device__ __forceinline__ uint2 encode(const float (&f)[kVector], const Encoder& e) {
  float odd = 0.f;
  const uint2 codes = encode_finite(f, e, odd);
  return odd == odd ? codes : encode_any(f, e);
}

// The same of values that were rounded on their way here: the quotient is off by a unit of its last place at most, as
// such a value may be. Takes half the instructions: zero point and rounding are one addition.
__device__ __forceinline__ uint2 encode_rounded(const float (&f)[kVector], const Encoder& e) {
  uint32_t c[kVector];
  float odd = 0.f;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    float v = __fmaf_rn(f[i], e.reciprocal, e.shifted_zero_point);
    odd = __fmaf_rn(v, 0.f, odd);
    c[i] = __float_as_uint(fminf(fmaxf(v, e.low + Encoder::kShift), e.high + Encoder::kShift));
  }
  return odd == odd ? pack(c) : encode_any(f, e);
}

__device__ __forceinline__ int group_of(const Codes& codes, int channel) {
  int group = 0, end = 0;
#pragma unroll
  for (int i = 0; i + 1 < kMaxGroups; ++i) {
    end += codes.group_channels[i];
    if (i + 1 < codes.groups && channel >= end) group = i + 1;
  }
  return group;
}

__device__ __forceinline__ Encoder encoder(const Codes& codes, int group) {
  return Encoder(codes.scale[group], codes.zero_point[group], codes.bits);
}

// Before the wait for the kernel ahead.
__device__ __forceinline__ void prefetch(const Codes& codes) {
  if (blockIdx.x || threadIdx.x) return;
  prefetch(codes.scale);
  prefetch(codes.zero_point);
}

__device__ __forceinline__ Encoder encoder_of_channel(const Codes& codes, int channel) {
  return encoder(codes, codes.groups > 1 ? group_of(codes, channel) : 0);
}

// Eight values as they lie in memory.
template <class T>
struct Raw {
  uint4 part[sizeof(T) / 2];

  __device__ void load(const T* p) {
#pragma unroll
    for (int i = 0; i < int(sizeof(T) / 2); ++i) part[i] = reinterpret_cast<const uint4*>(p)[i];
  }
  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < int(sizeof(T) / 2); ++i) part[i] = uint4{0, 0, 0, 0};
  }
  __device__ void get(float (&f)[kVector]) const {
    uint32_t w[sizeof(T) * 2];
#pragma unroll
    for (int i = 0; i < int(sizeof(T) / 2); ++i) {
      w[4 * i] = part[i].x, w[4 * i + 1] = part[i].y, w[4 * i + 2] = part[i].z, w[4 * i + 3] = part[i].w;
    }
    widen(w, f, T{});
  }

 private:
  static __device__ void widen(const uint32_t* w, float (&f)[kVector], __half) {
#pragma unroll
    for (int i = 0; i < kVector / 2; ++i) {
      float2 v = __half22float2(*reinterpret_cast<const __half2*>(w + i));
      f[2 * i] = v.x, f[2 * i + 1] = v.y;
    }
  }
  static __device__ void widen(const uint32_t* w, float (&f)[kVector], __nv_bfloat16) {
#pragma unroll
    for (int i = 0; i < kVector / 2; ++i) {
      f[2 * i] = __uint_as_float(w[i] << 16), f[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u);
    }
  }
  static __device__ void widen(const uint32_t* w, float (&f)[kVector], float) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) f[i] = __uint_as_float(w[i]);
  }
};

// A thread's vectors of a row, every `step`-th from `first` on; zeros past the row's end.
template <class T, int kVectors>
__device__ __forceinline__ void load_row(Raw<T> (&raw)[kVectors], const T* x, int first, int step, int vectors) {
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    int v = first + j * step;
    if (v < vectors) {
      raw[j].load(x + v * kVector);
    } else {
      raw[j].clear();
    }
  }
}

// Sums over a warp, or over a block of whole warps; every thread gets the result. `shared` holds a value per warp.
template <int kLanes = 32, class V, class Op>
__device__ __forceinline__ V reduce_lanes(V v, Op op) {
#pragma unroll
  for (int o = kLanes / 2; o > 0; o /= 2) v = op(v, __shfl_xor_sync(~0u, v, o));
  return v;
}

template <class Op>
__device__ __forceinline__ float reduce_block(float v, float* shared, Op op) {
  v = reduce_lanes(v, op);
  __syncthreads();  // an earlier reduction may still be read
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
  __syncthreads();
  v = shared[0];
  for (int i = 1; i < int(blockDim.x / 32); ++i) v = op(v, shared[i]);
  return v;
}

struct Add {
  __device__ float operator()(float a, float b) const { return a + b; }
};
struct Least {
  __device__ float operator()(float a, float b) const { return fminf(a, b); }
};
struct Most {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Call f with a value of the type.
template <class F>
cudaError_t with_type(Float type, F f) {
  if (type == Float::f16) return f(__half{});
  if (type == Float::bf16) return f(__nv_bfloat16{});
  return f(float{});
}

inline bool aligned(const void* p, int bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// Whether vectors of eight channels can be loaded from x, and none straddles two groups.
inline bool vectors_fit(const Floats& x, const Codes& codes) {
  int step = x.type == Float::f32 ? 4 : 8;  // elements of 16 bytes
  bool fit = (x.stride[3] == 1 || x.size[3] == 1) && x.size[3] % kVector == 0 && aligned(x.data, 16);
  for (int i = 0; i < 3; ++i) fit = fit && (x.size[i] == 1 || x.stride[i] % step == 0);
  for (int i = 0; i + 1 < codes.groups; ++i) fit = fit && codes.group_channels[i] % kVector == 0;
  return fit;
}

inline bool empty(const Floats& x) { return x.rows() == 0 || x.size[3] == 0; }

inline int round_up(int n, int step) { return (n + step - 1) / step * step; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A team of threads shares a row of at most kVectors vectors each: a warp where there are rows enough for many warps,
// else a block, which is done with its row sooner.
struct Team {
  bool warp;
  int vectors;  // per thread: 3 or 5 of a warp, 1 or 4 of a block
  Grid grid;

  Team(int64_t rows, int row_vectors, const Stream& on) {
    warp = row_vectors <= 5 * 32 && rows >= int64_t(16) * on.sm_count;
    if (warp) {
      vectors = row_vectors <= 3 * 32 ? 3 : 5;
      grid = {dim3(unsigned(ceil_div(rows, 4))), dim3(128)};
    } else {
      vectors = row_vectors <= 512 ? 1 : 4;
      grid = {dim3(unsigned(rows)), dim3(round_up(int(ceil_div(row_vectors, vectors)), 32))};
    }
  }
};
constexpr int kTeamChannels = 4 * 512 * kVector;

}  // namespace mixdq
