// int8 matrix product and convolution for sm_80 and later: mma.sync, fed by cp.async through several stages.
//
// Each block computes one tile of the output. A stage holds 64 channels of one tap of the window for every row and
// column of the tile; channels past the last are filled with zeros, so that a stage never crosses taps. Rows past the
// end read the last row instead and are not written.
#pragma once
#include <atomic>
#include "cute/arch/copy_sm75.hpp"
#include "cute/arch/copy_sm80.hpp"
#include "cute/arch/mma_sm80.hpp"
#include "matmuls.h"
#include "tile.cuh"

namespace mixdq::sm80 {

constexpr int kTileK = 64;             // bytes of a row in one stage
constexpr int kPieces = kTileK / 16;   // of 16 bytes: what one copy moves
constexpr int kRaster = 8;             // tile rows that are walked together, so that their inputs stay in the L2 cache

template <int TileM, int TileN, int WarpM, int WarpN, int Stages, int BlocksPerSm>
struct Config {
  static constexpr int kTileM = TileM, kTileN = TileN, kWarpM = WarpM, kWarpN = WarpN, kStages = Stages;
  static constexpr int kBlocksPerSm = BlocksPerSm;
  static constexpr int kWarpsN = TileN / WarpN;
  static constexpr int kWarps = TileM / WarpM * kWarpsN;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kXBytes = TileM * kTileK, kStageBytes = (TileM + TileN) * kTileK;
  // After the last stage each warp puts its sums where the stages were. A pitch of 8 more than a multiple of 16 ints
  // keeps the rows that a fragment touches at once in different banks.
  static constexpr int kPitch = WarpN + 8;
  static constexpr int kWarpSums = WarpM * kPitch;
  static constexpr int kSumsBytes = kWarps * kWarpSums * 4;
  static constexpr int kVectorsAt = Stages * kStageBytes > kSumsBytes ? Stages * kStageBytes : kSumsBytes;
  static constexpr int kSharedBytes = kVectorsAt + TileN * int(sizeof(ChannelEpilogue));
  static_assert(kSharedBytes <= 99 * 1024, "sm_86 and sm_89 have no more");
  static_assert(TileN <= kThreads, "one thread loads the vectors of one column");
};

// Where a stage begins within a row: a tap of the window and a channel.
struct Walk {
  int channels, width;         // of the image, of the window
  int64_t next_tap, next_row;  // bytes from a tap to the next; what to add at the end of a row of taps
  int channel = 0, tap = 0;
  int64_t offset = 0;

  __device__ Walk(int channels, int width, int64_t next_tap, int64_t next_row)
      : channels(channels), width(width), next_tap(next_tap), next_row(next_row) {}

  __device__ __forceinline__ void advance() {
    channel += kTileK;
    offset += kTileK;
    if (channel < channels) return;
    offset += next_tap - channel;
    channel = 0;
    if (++tap == width) tap = 0, offset += next_row;
  }
};

// Byte of a piece in a tile of rows of 64 bytes. Eight rows one below the other lie in eight different groups of banks,
// which is what ldmatrix reads at once.
__device__ __forceinline__ int swizzled(int row, int piece) {
  return row * kTileK + ((piece ^ ((row >> 1) & (kPieces - 1))) * 16);
}

// Copies one tile of rows per stage: each thread the same piece of every kPass-th row.
template <int Rows, int Threads>
struct TileCopy {
  static constexpr int kPass = Threads / kPieces;
  static constexpr int kCopies = (Rows + kPass - 1) / kPass;
  static_assert(kPass % 8 == 0, "all rows of a thread are swizzled alike");
  const int8_t* source[kCopies];

  __device__ static int row(int i) { return int(threadIdx.x) / kPieces + i * kPass; }
  __device__ static int piece() { return int(threadIdx.x) % kPieces; }

  __device__ __forceinline__ void copy(const Walk& walk, int8_t* tile) const {
    bool inside = walk.channel + piece() * 16 < walk.channels;
    int8_t* to = tile + swizzled(row(0), piece());
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      if (Rows % kPass != 0 && row(i) >= Rows) break;
      cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<uint4>::copy(
          *reinterpret_cast<const uint4*>(source[i] + walk.offset),
          *reinterpret_cast<uint4*>(to + i * kPass * kTileK), inside);
    }
  }
};

// Operands of one instruction's depth, 32 bytes of k, for all of a warp's tile.
template <class C>
struct Fragments {
  uint32_t x[C::kWarpM / 16][4];
  uint32_t w[C::kWarpN / 16][4];  // two blocks of 8 columns: k 0-15 and 16-31 of the first, then of the second

  // x_at, w_at: this lane's first row of ldmatrix within the stage. `half` of the stage's 64 bytes flips one bit of the
  // swizzled piece.
  __device__ __forceinline__ void load(const int8_t* stage, int x_at, int w_at, int half) {
#pragma unroll
    for (int i = 0; i < C::kWarpM / 16; ++i) {
      read(stage + (x_at ^ half * 32) + i * 16 * kTileK, x[i]);
    }
#pragma unroll
    for (int j = 0; j < C::kWarpN / 16; ++j) {
      read(stage + C::kXBytes + (w_at ^ half * 32) + j * 16 * kTileK, w[j]);
    }
  }

  __device__ static __forceinline__ void read(const int8_t* at, uint32_t (&to)[4]) {
    cute::SM75_U32x4_LDSM_N::copy(*reinterpret_cast<const cute::uint128_t*>(at), to[0], to[1], to[2], to[3]);
  }
};

template <class C>
struct Sums {
  uint32_t v[C::kWarpM / 16][C::kWarpN / 8][4] = {};

  __device__ __forceinline__ void add(const Fragments<C>& f) {
#pragma unroll
    for (int i = 0; i < C::kWarpM / 16; ++i) {
#pragma unroll
      for (int j = 0; j < C::kWarpN / 8; ++j) {
        uint32_t(&d)[4] = v[i][j];
        const uint32_t* w = &f.w[j / 2][j % 2 * 2];
        cute::SM80_16x8x32_S32S8S8S32_TN::fma(d[0], d[1], d[2], d[3], f.x[i][0], f.x[i][1], f.x[i][2], f.x[i][3],
                                              w[0], w[1], d[0], d[1], d[2], d[3]);
      }
    }
  }

  // A fragment holds columns 2t, 2t+1 of rows g and g+8, for lane 4g+t.
  __device__ __forceinline__ void put(int* sums) const {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < C::kWarpM / 16; ++i) {
#pragma unroll
      for (int j = 0; j < C::kWarpN / 8; ++j) {
        int* at = sums + (i * 16 + g) * C::kPitch + j * 8 + t * 2;
        *reinterpret_cast<int2*>(at) = make_int2(int(v[i][j][0]), int(v[i][j][1]));
        *reinterpret_cast<int2*>(at + 8 * C::kPitch) = make_int2(int(v[i][j][2]), int(v[i][j][3]));
      }
    }
  }
};

// Eight sums side by side. Every other group of four lanes reads its second half first: the lanes that read at once
// lie 8 ints apart and would otherwise meet in the same banks.
__device__ __forceinline__ void read_eight(const int* sums, int (&v)[8]) {
  bool second = threadIdx.x & 4;
  int4 a = *reinterpret_cast<const int4*>(sums + (second ? 4 : 0));
  int4 b = *reinterpret_cast<const int4*>(sums + (second ? 0 : 4));
  int4 low = second ? b : a, high = second ? a : b;
  v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
  v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
}

// Writes a warp's tile, whose first output is (row, n) of the weight. Each lane keeps to eight columns.
template <class C>
__device__ __forceinline__ void write_tile(const Matmul& p, int64_t m, int64_t row, const Columns& columns, int n,
                                           const int* sums, const ChannelEpilogue* vectors) {
  constexpr int kAcross = C::kWarpN / 8;       // lanes beside each other in a row
  constexpr int kDown = 32 / kAcross;          // rows that the warp writes at once
  constexpr int kPasses = C::kWarpM / kDown;
  constexpr int kBatch = kPasses < 4 ? kPasses : 4;  // passes whose residual is on its way together
  int lane = threadIdx.x % 32, first = lane % kAcross * 8, down = lane / kAcross;
  int count = p.weights[columns.weight].n - (n + first);
  if (count <= 0) return;
  if (count > 8) count = 8;
  int64_t column = columns.start + n + first;
  bool vectors_out = count == 8 && moves_as_vectors<8>(p, column), dynamic = p.row_scale;
  ChannelEpilogue channel[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) channel[j] = vectors[first + j];
#pragma unroll 1
  for (int pass = 0; pass < kPasses; pass += kBatch) {
    float v[kBatch][8];
    RowEpilogue of_row[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      int64_t at = row + (pass + i) * kDown + down;
      if (at >= m) continue;
      of_row[i] = row_epilogue(p, at);
      load_residual(p, at, column, count, vectors_out, v[i]);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      int within = (pass + i) * kDown + down;
      if (row + within >= m) continue;
      int sum[8];
      read_eight(sums + within * C::kPitch + first, sum);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        v[i][j] += apply_epilogue(sum[j], channel[j], dynamic, of_row[i].scale, of_row[i].zero_point);
      }
      store_out(p, row + within, column, count, vectors_out, v[i]);
    }
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocksPerSm)
    multiply(const __grid_constant__ Matmul p, int64_t m, int tiles_m, int tiles_n) {
  extern __shared__ __align__(128) int8_t shared[];
  ChannelEpilogue* vectors = reinterpret_cast<ChannelEpilogue*>(shared + C::kVectorsAt);

  int band = blockIdx.x / (kRaster * tiles_n), in_band = blockIdx.x % (kRaster * tiles_n);
  int band_rows = min(kRaster, tiles_m - band * kRaster);
  int64_t row0 = int64_t(band * kRaster + in_band % band_rows) * C::kTileM;
  Columns columns = find_columns(p, in_band / band_rows, C::kTileN);
  const Weight& weight = p.weights[columns.weight];

  const Window& window = p.window;
  int channels = p.x.channels, taps = window.r * window.s;
  int steps = taps * ((channels + kTileK - 1) / kTileK);
  int64_t tap_w = window.dilation_w * p.x.stride_w, tap_h = window.dilation_h * p.x.stride_h;
  Walk walk_x(channels, window.s, tap_w, tap_h - window.s * tap_w), walk_w(channels, window.s, p.weight_pitch, 0);

  TileCopy<C::kTileN, C::kThreads> copy_w;
#pragma unroll
  for (int i = 0; i < copy_w.kCopies; ++i) {
    int64_t n = min(columns.n + copy_w.row(i), weight.n - 1);
    copy_w.source[i] = static_cast<const int8_t*>(weight.data) + n * taps * p.weight_pitch + copy_w.piece() * 16;
  }
  TileCopy<C::kTileM, C::kThreads> copy_x;
#pragma unroll
  for (int i = 0; i < copy_x.kCopies; ++i) {
    int64_t row = row0 + copy_x.row(i);
    copy_x.source[i] = first_pixel(p, row < m ? row : m - 1) + copy_x.piece() * 16;
  }

  // No kernel ahead writes weights, so the first of them may come while it still runs. The epilogue's vectors it may
  // write: those of a dynamic convolution are computed with its input's range.
#pragma unroll
  for (int s = 0; s < C::kStages - 1; ++s) {
    if (s < steps) copy_w.copy(walk_w, shared + s * C::kStageBytes + C::kXBytes);
    walk_w.advance();
  }
  wait_for_previous();
  let_next_start();
  ChannelEpilogue vector = {};
  int vector_n = columns.n + int(threadIdx.x);
  if (threadIdx.x < C::kTileN && vector_n < weight.n) vector = channel_epilogue(weight, vector_n);
#pragma unroll
  for (int s = 0; s < C::kStages - 1; ++s) {
    if (s < steps) copy_x.copy(walk_x, shared + s * C::kStageBytes);
    walk_x.advance();
    cute::cp_async_fence();
  }
  if (threadIdx.x < C::kTileN) vectors[threadIdx.x] = vector;

  // Row of ldmatrix that this lane names: of x, rows 0-7 and 8-15 and then the second 16 bytes of both; of w, 16 bytes
  // after 16 bytes of columns 0-7, then of 8-15.
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int warp_m = warp / C::kWarpsN * C::kWarpM, warp_n = warp % C::kWarpsN * C::kWarpN;
  int x_at = swizzled(warp_m + lane % 16, lane / 16);
  int w_at = swizzled(warp_n + lane % 8 + lane / 16 * 8, lane / 8 % 2);

  Sums<C> sums;
  Fragments<C> fragments[2];
  cute::cp_async_wait<C::kStages - 2>();
  __syncthreads();
  int slot = 0, fill = C::kStages - 1;  // the stage that is read, and the one that all warps have read
  fragments[0].load(shared, x_at, w_at, 0);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    fragments[1].load(shared + slot * C::kStageBytes, x_at, w_at, 1);
    if (step + C::kStages - 1 < steps) {
      int8_t* stage = shared + fill * C::kStageBytes;
      copy_x.copy(walk_x, stage);
      copy_w.copy(walk_w, stage + C::kXBytes);
      walk_x.advance();
      walk_w.advance();
    }
    cute::cp_async_fence();  // also where there is nothing left: the wait below counts groups
    sums.add(fragments[0]);
    fill = slot;
    slot = slot + 1 == C::kStages ? 0 : slot + 1;
    cute::cp_async_wait<C::kStages - 2>();
    __syncthreads();
    // After the last step this reads what nobody uses.
    fragments[0].load(shared + slot * C::kStageBytes, x_at, w_at, 0);
    sums.add(fragments[1]);
  }
  cute::cp_async_wait<0>();
  __syncthreads();

  int* warp_sums = reinterpret_cast<int*>(shared) + warp * C::kWarpSums;
  sums.put(warp_sums);
  __syncwarp();
  write_tile<C>(p, m, row0 + warp_m, columns, columns.n + warp_n, warp_sums, vectors + warp_n);
}

template <class C>
cudaError_t run(const Matmul& p, int splits, const Stream& on) {
  int64_t m = p.m(), tiles_m = ceil_div(m, C::kTileM), tiles_n = column_tiles(p, C::kTileN);
  if (splits != 1 || p.bits != 8 || p.k() <= 0 || tiles_m * tiles_n > INT32_MAX - kRaster * tiles_n) {
    return cudaErrorInvalidValue;
  }
  if (m == 0 || tiles_n == 0) return cudaSuccess;
  // More shared memory than 48 KiB has to be asked for, once on each device.
  static std::atomic<uint64_t> asked{0};
  uint64_t bit = on.device < 64 ? uint64_t(1) << on.device : 0;
  if (!(asked.load() & bit)) {
    cudaError_t error = cudaFuncSetAttribute(multiply<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes);
    if (error != cudaSuccess) return error;
    asked |= bit;
  }
  Grid grid = {dim3(unsigned(tiles_m * tiles_n)), dim3(C::kThreads), C::kSharedBytes};
  Matmul given = p;
  given.weight_pitch = p.pitch();
  return launch(multiply<C>, grid, on, given, m, int(tiles_m), int(tiles_n));
}

}  // namespace mixdq::sm80
