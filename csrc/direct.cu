// int8 matrix product and convolution without demands: any channels, strides and alignment. By k flattened to (tap,
// channel), so that few channels, as of the first layer of a UNet, waste nothing. Long reductions by dp4a; short ones,
// whose time goes into the output, by tensor cores from registers alone.
#include "cute/arch/mma_sm80.hpp"
#include "matmuls.h"
#include "tile.cuh"

namespace mixdq {
namespace {

constexpr int kTile = 64;      // rows and columns of a block
constexpr int kThreads = 256;  // each sums 4 x 4 outputs
constexpr int kWords = 16;     // words of k that are in shared memory at once

// Where codes lie; made by the host, so that threads divide by multiplying.
struct Gather {
  int channels, k;
  Divider by_channels, by_width;
  int64_t tap_h, tap_w;

  explicit Gather(const Matmul& p)
      : channels(p.x.channels),
        k(p.k()),
        by_channels(p.x.channels),
        by_width(p.window.s),
        tap_h(p.window.dilation_h * p.x.stride_h),
        tap_w(p.window.dilation_w * p.x.stride_w) {}

  // What lies between the first code of a window and that at a place of k.
  __device__ __forceinline__ int64_t offset(int place) const {
    uint32_t channel, column, line = by_width.divide(by_channels.divide(place, channel), column);
    return line * tap_h + column * tap_w + channel;
  }

  // Four codes from place `first` of k on, zeros past its end. By words: they lie side by side, aligned.
  template <bool Words>
  __device__ __forceinline__ int codes(const int8_t* pixel, int first) const {
    if constexpr (Words) return *reinterpret_cast<const int*>(pixel + offset(first));
    unsigned word = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (first + j < k) word |= unsigned(uint8_t(pixel[offset(first + j)])) << 8 * j;
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
__global__ void __launch_bounds__(kThreads, 3)
    direct_kernel(const __grid_constant__ Matmul p, const __grid_constant__ Gather gather, int64_t m) {
  // By words of k, so that a thread reads the codes of four rows or columns at once.
  __shared__ __align__(16) int x[kWords][kTile], w[kWords][kTile];

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

// Short reductions: a warp keeps the weights of 64 columns in registers, as mma.sync takes them, and multiplies 16 rows
// after 16 rows. Each lane loads its operand of x by itself, that of the next rows while it finishes these: nothing of
// x goes through shared memory, and no warp waits for another.
constexpr int kShortThreads = 128, kShortRows = kShortThreads / 32 * 16;
constexpr int kStepCodes = 32;  // of k, in one instruction

// How codes come and results leave: words and vectors, bytes and vectors, bytes and single values.
enum class Moves { words, bytes, values };

// Blocks on a multiprocessor.
template <Moves How, int Steps>
constexpr int kShortBlocks = How == Moves::words && Steps == 2 ? 4 : 3;

// Where the rows of the product begin in the input, both of fewer than 2^31; made by the host.
struct Pixels {
  Divider by_width, by_height, by_residual_rows;
  uint32_t image, line, pixel;

  explicit Pixels(const Matmul& p)
      : by_width(p.out_w),
        by_height(p.out_h),
        by_residual_rows(p.residual_rows),
        image(uint32_t(p.x.stride_n)),
        line(uint32_t(p.window.stride_h * p.x.stride_h)),
        pixel(uint32_t(p.window.stride_w * p.x.stride_w)) {}

  __device__ __forceinline__ uint32_t offset(uint32_t row) const {
    uint32_t w, h, n = by_height.divide(by_width.divide(row, w), h);
    return n * image + h * line + w * pixel;
  }
};

// Steps: instructions that a reduction takes.
template <Moves How, int Steps>
__global__ void __launch_bounds__(kShortThreads, kShortBlocks<How, Steps>)
    short_kernel(const __grid_constant__ Matmul p, const __grid_constant__ Gather gather,
                 const __grid_constant__ Pixels pixels, uint32_t m) {
  constexpr int kLaneWords = 2 * Steps, kBlocks = kTile / 8;
  constexpr bool kWords = How == Moves::words, kVectors = How != Moves::values;
  __shared__ __align__(16) float alpha[kTile], offset[kTile];
  __shared__ __align__(16) int weight_sum[kTile];
  __shared__ __align__(16) uint32_t places[Steps * kStepCodes];  // of k: where in the window they lie
  static_assert(Steps * kStepCodes <= kShortThreads);
  int lane = threadIdx.x % 32, words = (gather.k + 3) / 4;
  Columns columns = find_columns(p, blockIdx.y, kTile);
  const Weight& weight = p.weights[columns.weight];

  // Lane 4g+t has words 4i+t: of column g of each block of 8, and of rows g and g+8. Of a block's sums it gets columns
  // 2t and 2t+1. Which columns of the weight make a block is ours to say: four blocks' sums lie side by side.
  uint32_t w[kBlocks][kLaneWords] = {};
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
    int n = columns.n + b / 4 * 32 + lane / 8 * 8 + b % 4 * 2 + lane / 4 % 2;
    const int8_t* row = static_cast<const int8_t*>(weight.data) + int64_t(min(n, weight.n - 1)) * gather.k;
#pragma unroll
    for (int i = 0; i < kLaneWords; ++i) {
      int word = i * 4 + lane % 4;
      if (word < words) w[b][i] = gather.weights<kWords>(row, word * 4);
    }
  }
  // Past the end of k weights are zeros, so that it does not matter which codes meet them: the first ones.
  int place = threadIdx.x;
  if (place < Steps * kStepCodes) places[place] = place < gather.k ? uint32_t(gather.offset(place)) : 0;
  int my_n = columns.n + int(threadIdx.x);
  bool has_channel = threadIdx.x < kTile && my_n < weight.n;
  if (has_channel) prefetch_epilogue(weight, my_n);
  __syncthreads();

  uint32_t x[2][kLaneWords] = {};  // of rows g and g+8
  auto load = [&](uint32_t row) {
    uint32_t start = pixels.offset(min(row + lane % 16, m - 1));  // each lane finds one, for four lanes
    const int8_t* pixel[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      pixel[half] = p.x.data + __shfl_sync(0xFFFFFFFFu, start, lane / 4 + half * 8);
    }
#pragma unroll
    for (int i = 0; i < kLaneWords; ++i) {
      if (!kWords && i * 4 >= words) continue;  // for words it would cost more than it saves
      uint4 at = *reinterpret_cast<const uint4*>(&places[(i * 4 + lane % 4) * 4]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int8_t* from = pixel[half];
        if constexpr (kWords) {
          x[half][i] = *reinterpret_cast<const uint32_t*>(from + at.x);
        } else {
          uint32_t low = uint8_t(from[at.x]) | uint8_t(from[at.y]) << 8;
          x[half][i] = low | uint8_t(from[at.z]) << 16 | uint32_t(uint8_t(from[at.w])) << 24;
        }
      }
    }
  };

  wait_for_previous();
  let_next_start();
  uint32_t row = blockIdx.x * kShortRows + threadIdx.x / 32 * 16;
  load(row);
  if (has_channel) {
    // The kernel ahead writes no weights, but it may write these: a dynamic convolution computes them for its input.
    ChannelEpilogue channel = channel_epilogue(weight, my_n);
    alpha[threadIdx.x] = channel.alpha, offset[threadIdx.x] = channel.offset;
    weight_sum[threadIdx.x] = channel.weight_sum;
  }
  __syncthreads();

#pragma unroll 1
  for (; row < m; row += gridDim.x * kShortRows) {
#pragma unroll
    for (int run = 0; run < kTile / 32; ++run) {
      uint32_t sums[4][4] = {};
#pragma unroll
      for (int i = 0; i < kLaneWords; i += 2) {
#pragma unroll
        for (int b = 0; b < 4; ++b) {
          uint32_t(&d)[4] = sums[b], (&of)[kLaneWords] = w[run * 4 + b];
          cute::SM80_16x8x32_S32S8S8S32_TN::fma(d[0], d[1], d[2], d[3], x[0][i], x[1][i], x[0][i + 1], x[1][i + 1],
                                                of[i], of[i + 1], d[0], d[1], d[2], d[3]);
        }
      }
      if (run == kTile / 32 - 1) load(row + gridDim.x * kShortRows);
      int within = run * 32 + lane % 4 * 8, count = min(8, weight.n - (columns.n + within));
      if (count <= 0) continue;
      int64_t column = columns.start + columns.n + within;
      float alphas[8], offsets[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) alphas[j] = alpha[within + j], offsets[j] = offset[within + j];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t at = row + lane / 4 + half * 8;
        if (at >= m) break;
        float v[8], residual[8];
        if (p.residual) {
          load_residual(p, pixels.by_residual_rows.divide(at) * p.residual_stride + column, count, kVectors, residual);
        }
        RowEpilogue of_row = row_epilogue(p, at);
        auto finish = [&](bool dynamic) {
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            int sum = int(sums[j / 2][half * 2 + j % 2]);
            ChannelEpilogue channel = {alphas[j], offsets[j], dynamic ? weight_sum[within + j] : 0};
            v[j] = apply_epilogue(sum, channel, dynamic, of_row.scale, of_row.zero_point);
          }
        };
        p.row_scale ? finish(true) : finish(false);  // one branch instead of eight
        if (p.residual) {
#pragma unroll
          for (int j = 0; j < 8; ++j) v[j] += residual[j];
        }
        store_out(p, at, column, count, kVectors, v);
      }
    }
  }
}

template <Moves How, int Steps>
cudaError_t run_short(const Matmul& p, const Gather& gather, const Stream& on) {
  int64_t m = p.m(), tiles_m = ceil_div(m, kShortRows), tiles_n = column_tiles(p, kTile);
  // All blocks are there at once, so each gets as many tiles as any other.
  int64_t turns = ceil_div(tiles_m * tiles_n, int64_t(on.sm_count) * kShortBlocks<How, Steps>);
  Grid grid = {dim3(unsigned(ceil_div(tiles_m, turns)), unsigned(tiles_n)), dim3(kShortThreads)};
  return launch(short_kernel<How, Steps>, grid, on, p, gather, Pixels(p), uint32_t(m));
}

bool is_short(const Matmul& p, const Gather& gather, int arch) {
  const Image& x = p.x;
  int64_t input = (x.batch - 1) * x.stride_n + (x.height - 1) * x.stride_h + (x.width - 1) * x.stride_w + x.channels;
  return arch >= 80 && gather.k <= 3 * kStepCodes && p.m() <= INT32_MAX && input <= INT32_MAX;
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
  Gather gather(p);
  bool words = by_words(p);
  if (is_short(p, gather, on.arch)) {
    bool vectors = moves_as_vectors<8>(p, 0);
    for (int i = 0; i < p.weight_count; ++i) vectors = vectors && p.weights[i].n % 8 == 0;
    if (!vectors) return run_short<Moves::values, 3>(p, gather, on);
    if (!words) return run_short<Moves::bytes, 3>(p, gather, on);
    if (gather.k > 2 * kStepCodes) return run_short<Moves::words, 3>(p, gather, on);
    return run_short<Moves::words, 2>(p, gather, on);
  }
  Grid grid = {dim3(unsigned(tiles_m), unsigned(tiles_n)), dim3(kThreads)};
  return launch(words ? direct_kernel<true> : direct_kernel<false>, grid, on, p, gather, m);
}

}  // namespace mixdq
