// What the kernels outside sm90/ share: where a tile's columns and a row's pixel lie, and how results leave.
#pragma once
#include "device.cuh"

namespace mixdq {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Tiles of that width that cover the columns; no tile crosses from one weight to the next.
inline int64_t column_tiles(const Matmul& p, int width) {
  int64_t tiles = 0;
  for (int i = 0; i < p.weight_count; ++i) tiles += ceil_div(p.weights[i].n, width);
  return tiles;
}

struct Columns {
  int weight;     // which one
  int n;          // first column of the tile within the weight; past its end only where `tile` was past the last one
  int64_t start;  // column of out where the weight begins
};

__device__ __forceinline__ Columns find_columns(const Matmul& p, int tile, int width) {
  Columns at = {0, 0, 0};
  for (; at.weight < p.weight_count - 1; ++at.weight) {
    int tiles = (p.weights[at.weight].n + width - 1) / width;
    if (tile < tiles) break;
    tile -= tiles;
    at.start += p.weights[at.weight].n;
  }
  at.n = tile * width;
  return at;
}

// First code that the window covers for a row of the product.
__device__ __forceinline__ const int8_t* first_pixel(const Matmul& p, int64_t row) {
  unsigned per_image = unsigned(p.out_h) * unsigned(p.out_w);
  // The narrow division is several times faster.
  int64_t image = row >> 32 ? row / per_image : unsigned(row) / per_image;
  unsigned pixel = unsigned(row - image * per_image);
  unsigned h = pixel / unsigned(p.out_w), w = pixel - h * unsigned(p.out_w);
  return p.x.data + image * p.x.stride_n + int64_t(h) * p.window.stride_h * p.x.stride_h +
         int64_t(w) * p.window.stride_w * p.x.stride_w;
}

__host__ __device__ __forceinline__ bool aligned(const void* data, int64_t row_stride, int64_t column, Float type,
                                                 int count) {
  int size = type == Float::f32 ? 4 : 2;
  int bytes = count * size < 16 ? count * size : 16;
  return ((reinterpret_cast<uint64_t>(data) + column * size) | uint64_t(row_stride * size)) % bytes == 0;
}

// Whether V values from that column on can move as vectors, in every row of the output and of the residual.
template <int V>
__host__ __device__ __forceinline__ bool moves_as_vectors(const Matmul& p, int64_t column) {
  return aligned(p.out, p.out_stride, column, p.out_type, V) &&
         (!p.residual || aligned(p.residual, p.residual_stride, column, p.residual_type, V));
}

template <int Bytes>
struct VectorOf;
template <>
struct VectorOf<8> {
  using Type = uint2;
};
template <>
struct VectorOf<16> {
  using Type = uint4;
};

template <class T, int V>
union Halves {  // V values of a 16-bit type, as one vector
  typename VectorOf<V * 2>::Type vector;
  T value[V];
  __device__ Halves() {}
};

// Where the residual of a row begins.
__device__ __forceinline__ int64_t residual_row(const Matmul& p, int64_t row) {
  return (p.residual_rows == 1 ? row : row / p.residual_rows) * p.residual_stride;
}

// `count` values of the residual from place `at` on, or zeros where there is none.
template <int V>
__device__ __forceinline__ void load_residual(const Matmul& p, int64_t at, int count, bool vectors, float (&v)[V]) {
#pragma unroll
  for (int j = 0; j < V; ++j) v[j] = 0.f;
  if (!p.residual) return;
  if (!vectors) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (j < count) v[j] = load_float(p.residual, p.residual_type, at + j);
    }
  } else if (p.residual_type == Float::f32) {
#pragma unroll
    for (int j = 0; j < V; j += 4) {
      float4 four = *reinterpret_cast<const float4*>(static_cast<const float*>(p.residual) + at + j);
      v[j] = four.x, v[j + 1] = four.y, v[j + 2] = four.z, v[j + 3] = four.w;
    }
  } else {
    Halves<uint16_t, V> raw;
    const uint16_t* from = static_cast<const uint16_t*>(p.residual) + at;
    raw.vector = *reinterpret_cast<const typename VectorOf<V * 2>::Type*>(from);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      v[j] = p.residual_type == Float::f16 ? __half2float(__ushort_as_half(raw.value[j]))
                                           : __bfloat162float(__ushort_as_bfloat16(raw.value[j]));
    }
  }
}

__device__ __forceinline__ uint32_t two_halves(Float type, float low, float high) {
  if (type == Float::f16) {
    __half2 two = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(two);
  }
  __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(two);
}

// Rounds and writes `count` values; as one or two vectors where that is possible, then count is V. Of an assignment nvcc
// would make a store for each word where the words come from several branches; __stwb is one store.
template <int V>
__device__ __forceinline__ void store_out(const Matmul& p, int64_t row, int64_t column, int count, bool vectors,
                                          const float (&v)[V]) {
  int64_t at = row * p.out_stride + column;
  if (!vectors) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (j < count) store_float(p.out, p.out_type, at + j, v[j]);
    }
  } else if (p.out_type == Float::f32) {
#pragma unroll
    for (int j = 0; j < V; j += 4) {
      __stwb(reinterpret_cast<float4*>(static_cast<float*>(p.out) + at + j),
             make_float4(v[j], v[j + 1], v[j + 2], v[j + 3]));
    }
  } else {
    uint32_t words[V / 2];
#pragma unroll
    for (int j = 0; j < V / 2; ++j) words[j] = two_halves(p.out_type, v[2 * j], v[2 * j + 1]);
    uint16_t* to = static_cast<uint16_t*>(p.out) + at;
    if constexpr (V == 8) {
      __stwb(reinterpret_cast<uint4*>(to), make_uint4(words[0], words[1], words[2], words[3]));
    } else {
      __stwb(reinterpret_cast<uint2*>(to), make_uint2(words[0], words[1]));
    }
  }
}

// The part of the epilogue that belongs to a row.
struct RowEpilogue {
  float scale = 1.f;
  int zero_point = 0;
};

__device__ __forceinline__ RowEpilogue row_epilogue(const Matmul& p, int64_t row) {
  if (!p.row_scale) return {};
  return {p.row_scale[row * p.row_stride], int(p.row_zero_point[row * p.row_stride])};
}

}  // namespace mixdq
