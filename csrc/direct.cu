// int8 matrix product and convolution without demands: any channels, strides and alignment. By dp4a over k flattened
// to (tap, channel), so that few channels, as of the first layer of a UNet, waste nothing.
#include "matmuls.h"
#include "tile.cuh"

namespace mixdq {
namespace {

constexpr int kTile = 64;      // rows and columns of a block
constexpr int kThreads = 256;  // each sums 4 x 4 outputs
constexpr int kWords = 16;     // words of k that are in shared memory at once

struct Gather {
  int channels, width, k;
  int64_t tap_h, tap_w;

  __device__ explicit Gather(const Matmul& p)
      : channels(p.x.channels),
        width(p.window.s),
        k(p.window.r * p.window.s * p.x.channels),
        tap_h(p.window.dilation_h * p.x.stride_h),
        tap_w(p.window.dilation_w * p.x.stride_w) {}

  __device__ __forceinline__ int64_t tap_offset(int tap) const {
    int r = unsigned(tap) / unsigned(width);
    return r * tap_h + (tap - r * width) * tap_w;
  }

  // Four codes from place `first` of k on, zeros past its end. By words: they lie side by side, aligned.
  template <bool Words>
  __device__ __forceinline__ int codes(const int8_t* pixel, int first) const {
    int tap = unsigned(first) / unsigned(channels), channel = first - tap * channels;
    if constexpr (Words) return *reinterpret_cast<const int*>(pixel + tap_offset(tap) + channel);
    unsigned word = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (first + j >= k) break;
      word |= unsigned(uint8_t(pixel[tap_offset(tap) + channel])) << 8 * j;
      if (++channel == channels) channel = 0, ++tap;
    }
    return int(word);
  }

  template <bool Words>
  __device__ __forceinline__ int weights(const int8_t* row, int first) const {
    if constexpr (Words) return *reinterpret_cast<const int*>(row + first);
    unsigned word = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (first + j < k) word |= unsigned(uint8_t(row[first + j])) << 8 * j;
    }
    return int(word);
  }
};

template <bool Words>
__global__ void __launch_bounds__(kThreads, 3) direct_kernel(const __grid_constant__ Matmul p, int64_t m) {
  // By words of k, so that a thread reads the codes of four rows or columns at once.
  __shared__ __align__(16) int x[kWords][kTile], w[kWords][kTile];

  Gather gather(p);
  int64_t row0 = int64_t(blockIdx.x) * kTile;
  Columns columns = find_columns(p, blockIdx.y, kTile);
  const Weight& weight = p.weights[columns.weight];

  // Threads next to each other load rows next to each other: of the narrow images this kernel is for, neighbors in
  // memory.
  int load_row = threadIdx.x % kTile, load_word = threadIdx.x / kTile;
  constexpr int kLoadStep = kThreads / kTile, kLoads = kWords / kLoadStep;
  int64_t row = row0 + load_row;
  const int8_t* pixel = first_pixel(p, row < m ? row : m - 1);
  int64_t n = min(columns.n + load_row, weight.n - 1);
  const int8_t* weight_row = static_cast<const int8_t*>(weight.data) + n * gather.k;

  int across = threadIdx.x % 16 * 4, down = threadIdx.x / 16 * 4;
  int count = min(4, weight.n - (columns.n + across));
  ChannelEpilogue channel[4] = {};

  int sums[4][4] = {};
  int words = (gather.k + 3) / 4;
  for (int begin = 0; begin < words; begin += kWords) {
    if (begin > 0) __syncthreads();  // until all have read the words before
    int here = min(kWords, words - begin);
    int loaded[kLoads] = {};
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      int word = load_word + i * kLoadStep;
      if (word < here) loaded[i] = gather.weights<Words>(weight_row, (begin + word) * 4);
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) w[load_word + i * kLoadStep][load_row] = loaded[i];
    if (begin == 0) {
      wait_for_previous();
      let_next_start();
      // The kernel ahead writes no weights, but it may write these: a dynamic convolution computes them for its input.
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (j < count) channel[j] = channel_epilogue(weight, columns.n + across + j);
      }
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      int word = load_word + i * kLoadStep;
      if (word < here) loaded[i] = gather.codes<Words>(pixel, (begin + word) * 4);
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) x[load_word + i * kLoadStep][load_row] = loaded[i];
    __syncthreads();
#pragma unroll 4
    for (int i = 0; i < here; ++i) {
      int4 a = *reinterpret_cast<const int4*>(&x[i][down]), b = *reinterpret_cast<const int4*>(&w[i][across]);
      int of_rows[4] = {a.x, a.y, a.z, a.w}, of_columns[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int c = 0; c < 4; ++c) sums[r][c] = __dp4a(of_rows[r], of_columns[c], sums[r][c]);
      }
    }
  }

  if (count <= 0) return;
  int64_t column = columns.start + columns.n + across;
  bool vectors = count == 4 && moves_as_vectors<4>(p, column);
  float v[4][4];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    if (row0 + down + r < m) load_residual(p, residual_row(p, row0 + down + r) + column, count, vectors, v[r]);
  }
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    int64_t at = row0 + down + r;
    if (at >= m) return;
    RowEpilogue of_row = row_epilogue(p, at);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      v[r][c] += apply_epilogue(sums[r][c], channel[c], p.row_scale, of_row.scale, of_row.zero_point);
    }
    store_out(p, at, column, count, vectors, v[r]);
  }
}

// Whether four codes of one tap, and of a weight, can be loaded as one word.
bool by_words(const Matmul& p) {
  uint64_t bits = reinterpret_cast<uint64_t>(p.x.data) | p.x.channels | p.x.stride_w;
  bits |= p.x.stride_h | p.x.stride_n;
  for (int i = 0; i < p.weight_count; ++i) bits |= reinterpret_cast<uint64_t>(p.weights[i].data);
  return bits % 4 == 0;
}

}  // namespace

cudaError_t direct(const Matmul& p, int splits, const Stream& on) {
  int64_t m = p.m(), tiles_m = ceil_div(m, kTile), tiles_n = column_tiles(p, kTile);
  bool gaps = p.pitch() != p.packed_channels();
  if (splits != 1 || p.bits != 8 || gaps || p.k() <= 0 || tiles_m > INT32_MAX || tiles_n > 65535) {
    return cudaErrorInvalidValue;
  }
  if (m == 0 || tiles_n == 0) return cudaSuccess;
  Grid grid = {dim3(unsigned(tiles_m), unsigned(tiles_n)), dim3(kThreads)};
  return launch(by_words(p) ? direct_kernel<true> : direct_kernel<false>, grid, on, p, m);
}

}  // namespace mixdq
