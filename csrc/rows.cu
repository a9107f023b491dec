// Linear layers of at most 16 rows, and 1x1 convolutions of so few pixels, whose time goes into reading the weights:
// each warp computes one or two output channels for all rows, with dp4a, from weights of 8, 4 or 2 bits as they are
// stored.
//
// A packed byte holds 8 / bits codes. Those at one place within their bytes form a plane; the rows of x lie in shared
// memory by planes too, so that one word of weights, shifted and masked, meets one word of x. The mask leaves each code
// in the high bits of its byte, which multiplies the sum by 16 or 64; the final shift takes that out, exactly.
#include "matmuls.h"
#include "tile.cuh"

namespace mixdq {
namespace {

constexpr int kMaxRows = 16;
constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kChunk = 16 * kThreads;  // codes of each row that are in shared memory at once; 16 for each thread

template <int Bits, int Rows>
struct Config {
  static constexpr int kPlanes = 8 / Bits;
  static constexpr int kPlaneBytes = kChunk / kPlanes;
  static constexpr int kDepth = kPlaneBytes / (32 * 16);   // vectors of 16 bytes that a lane reads for each chunk
  static constexpr int kChannels = Rows >= 8 ? 2 : 1;      // of a warp: two halve the reads of x
  static constexpr int kShift = 8 - Bits;
  static constexpr int kSharedBytes = Rows * kChunk;
};

// The codes of a plane, each in the high bits of its byte.
template <int Bits>
__device__ __forceinline__ int codes_of(unsigned word, int plane) {
  constexpr unsigned kMask = Bits == 8 ? 0xFFFFFFFFu : Bits == 4 ? 0xF0F0F0F0u : 0xC0C0C0C0u;
  return int((word << (8 - Bits - Bits * plane)) & kMask);
}

// Puts 16 codes of a row of x into their planes; `place` counts such groups of 16.
template <int Bits>
__device__ __forceinline__ void spread(uint4 codes, int8_t* row, int place) {
  constexpr int kPlaneBytes = Config<Bits, 1>::kPlaneBytes;
  if constexpr (Bits == 8) {
    *reinterpret_cast<uint4*>(row + place * 16) = codes;
  } else if constexpr (Bits == 4) {
    uint2 even = {__byte_perm(codes.x, codes.y, 0x6420), __byte_perm(codes.z, codes.w, 0x6420)};
    uint2 odd = {__byte_perm(codes.x, codes.y, 0x7531), __byte_perm(codes.z, codes.w, 0x7531)};
    *reinterpret_cast<uint2*>(row + place * 8) = even;
    *reinterpret_cast<uint2*>(row + kPlaneBytes + place * 8) = odd;
  } else {
    unsigned even_low = __byte_perm(codes.x, codes.y, 0x6420), even_high = __byte_perm(codes.z, codes.w, 0x6420);
    unsigned odd_low = __byte_perm(codes.x, codes.y, 0x7531), odd_high = __byte_perm(codes.z, codes.w, 0x7531);
    unsigned planes[4] = {__byte_perm(even_low, even_high, 0x6420), __byte_perm(odd_low, odd_high, 0x6420),
                          __byte_perm(even_low, even_high, 0x7531), __byte_perm(odd_low, odd_high, 0x7531)};
#pragma unroll
    for (int i = 0; i < 4; ++i) *reinterpret_cast<unsigned*>(row + i * kPlaneBytes + place * 4) = planes[i];
  }
}

__device__ __forceinline__ int dot(int sum, const int (&a)[4], uint4 b) {
  sum = __dp4a(a[0], int(b.x), sum);
  sum = __dp4a(a[1], int(b.y), sum);
  sum = __dp4a(a[2], int(b.z), sum);
  return __dp4a(a[3], int(b.w), sum);
}

// Rows: at least m.
template <int Bits, int Rows>
__global__ void __launch_bounds__(kThreads) rows_kernel(const __grid_constant__ Matmul p, int m) {
  using C = Config<Bits, Rows>;
  static_assert(C::kChannels * Rows <= 32, "each lane finishes one output");
  extern __shared__ __align__(16) int8_t shared[];  // [Rows][kPlanes][kPlaneBytes]

  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Columns columns = find_columns(p, int(blockIdx.x) * kWarps + warp, C::kChannels);
  const Weight& weight = p.weights[columns.weight];
  int channels = p.x.channels, units = channels / C::kPlanes / 16;  // vectors of a row of weights

  const uint4* source[C::kChannels];
#pragma unroll
  for (int c = 0; c < C::kChannels; ++c) {
    int64_t n = min(columns.n + c, weight.n - 1);
    source[c] = static_cast<const uint4*>(weight.data) + n * (p.weight_pitch / 16);
  }
  auto load = [&](int c, int unit) { return unit < units ? source[c][unit] : uint4{}; };

  // No kernel ahead writes weights, so they come while it still runs. Not by __ldg(): the compiler moves that below the
  // wait.
  uint4 ahead[C::kChannels][C::kDepth];
#pragma unroll
  for (int j = 0; j < C::kDepth; ++j) {
#pragma unroll
    for (int c = 0; c < C::kChannels; ++c) ahead[c][j] = load(c, j * 32 + lane);
  }
  // The output that this lane finishes.
  int my_row = lane % Rows, my_n = columns.n + lane / Rows;
  bool mine = lane / Rows < C::kChannels && my_row < m && my_n < weight.n;

  wait_for_previous();
  let_next_start();
  ChannelEpilogue channel = {};  // the kernel ahead may have computed these, for a dynamic convolution
  RowEpilogue of_row;
  float residual = 0.f;
  if (mine) {
    channel = channel_epilogue(weight, my_n);
    of_row = row_epilogue(p, my_row);
    if (p.residual) {
      residual = load_float(p.residual, p.residual_type, residual_row(p, my_row) + columns.start + my_n);
    }
  }

  int sums[C::kChannels][Rows] = {};
  constexpr int kUnits = C::kDepth * 32;  // of a chunk
  for (int begin = 0; begin < units; begin += kUnits) {
    if (begin > 0) __syncthreads();  // until all have read the chunk before
    int64_t k = int64_t(begin) * C::kPlanes * 16 + threadIdx.x * 16;
    if (k < channels) {
      constexpr int kBatch = Rows < 4 ? Rows : 4;  // loads on their way together
#pragma unroll
      for (int first = 0; first < Rows; first += kBatch) {
        uint4 codes[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          if (first + i < m) codes[i] = *reinterpret_cast<const uint4*>(p.x.data + (first + i) * p.x.stride_w + k);
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          if (first + i < m) spread<Bits>(codes[i], shared + (first + i) * kChunk, threadIdx.x);
        }
      }
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < C::kDepth; ++j) {
      if (begin + j * 32 >= units) break;
      uint4 now[C::kChannels];
#pragma unroll
      for (int c = 0; c < C::kChannels; ++c) {
        // Past the last vector these are zeros, so that it does not matter what lies in shared memory there.
        now[c] = ahead[c][j];
        ahead[c][j] = load(c, begin + kUnits + j * 32 + lane);
      }
#pragma unroll
      for (int plane = 0; plane < C::kPlanes; ++plane) {
        int codes[C::kChannels][4];
#pragma unroll
        for (int c = 0; c < C::kChannels; ++c) {
          codes[c][0] = codes_of<Bits>(now[c].x, plane);
          codes[c][1] = codes_of<Bits>(now[c].y, plane);
          codes[c][2] = codes_of<Bits>(now[c].z, plane);
          codes[c][3] = codes_of<Bits>(now[c].w, plane);
        }
#pragma unroll
        for (int i = 0; i < Rows; ++i) {
          const int8_t* at = shared + i * kChunk + plane * C::kPlaneBytes + (j * 32 + lane) * 16;
          uint4 x = *reinterpret_cast<const uint4*>(at);
#pragma unroll
          for (int c = 0; c < C::kChannels; ++c) sums[c][i] = dot(sums[c][i], codes[c], x);
        }
      }
    }
  }

  int sum = 0;
#pragma unroll
  for (int c = 0; c < C::kChannels; ++c) {
#pragma unroll
    for (int i = 0; i < Rows; ++i) {
      int whole = __reduce_add_sync(0xFFFFFFFFu, sums[c][i]);
      if (lane == c * Rows + i) sum = whole >> C::kShift;
    }
  }
  if (!mine) return;
  float v = apply_epilogue(sum, channel, p.row_scale, of_row.scale, of_row.zero_point) + residual;
  store_float(p.out, p.out_type, my_row * p.out_stride + columns.start + my_n, v);
}

template <int Bits, int Rows>
cudaError_t run(const Matmul& p, const Stream& on) {
  using C = Config<Bits, Rows>;
  int64_t blocks = ceil_div(column_tiles(p, C::kChannels), kWarps);
  if (blocks == 0) return cudaSuccess;
  Grid grid = {dim3(unsigned(blocks)), dim3(kThreads), C::kSharedBytes};
  Matmul given = p;
  given.weight_pitch = p.pitch();
  return launch(rows_kernel<Bits, Rows>, grid, on, given, int(p.m()));
}

template <int Bits>
cudaError_t run_bits(const Matmul& p, const Stream& on) {
  if (p.m() <= 1) return run<Bits, 1>(p, on);
  if (p.m() <= 2) return run<Bits, 2>(p, on);
  if (p.m() <= 4) return run<Bits, 4>(p, on);
  if (p.m() <= 8) return run<Bits, 8>(p, on);
  return run<Bits, 16>(p, on);
}

}  // namespace

cudaError_t few_rows(const Matmul& p, int splits, const Stream& on) {
  if (splits != 1 || !p.is_rows() || p.m() > kMaxRows) return cudaErrorInvalidValue;
  if (p.m() == 0) return cudaSuccess;
  if (p.bits == 8) return run_bits<8>(p, on);
  if (p.bits == 4) return run_bits<4>(p, on);
  if (p.bits == 2) return run_bits<2>(p, on);
  return cudaErrorInvalidValue;
}

}  // namespace mixdq
