// int8 matrix product and convolution for sm_80 and later: mma.sync, fed by cp.async through several stages.
//
// Each block computes one tile of the output. A stage holds 64 channels of one tap of the window for every row and
// column of the tile; channels past the last are filled with zeros, so that a stage never crosses taps. Rows past the
// end read the last row instead and are not written.
//
// The warps of a block may form groups, each with stages of its own: every group multiplies a part of the reduction for
// the whole tile, and the parts are added in the end. That gives a small tile many warps, which hide each other's
// waiting, with large tiles of their own, which read shared memory less often.
#pragma once
#include <atomic>
#include "cutlass/arch/barrier.h"
#include "matmuls.h"
#include "sm80/epilogue.cuh"

namespace mixdq::sm80 {

constexpr int kRaster = 8;  // tile rows that are walked together, so that their inputs stay in the L2 cache

// The tile of a block: where it begins.
struct alignas(16) Tile {
  uint32_t row;
  Columns columns;
};

template <int TileM, int TileN, int WarpM, int WarpN, int Groups, int Stages, int BlocksPerSm>
struct Config {
  static constexpr int kTileM = TileM, kTileN = TileN, kWarpM = WarpM, kWarpN = WarpN, kGroups = Groups;
  static constexpr int kStages = Stages, kBlocksPerSm = BlocksPerSm;
  static constexpr int kWarpsN = TileN / WarpN;
  static constexpr int kGroupWarps = TileM / WarpM * kWarpsN;
  static constexpr int kGroupThreads = 32 * kGroupWarps, kThreads = Groups * kGroupThreads;
  static constexpr int kXBytes = TileM * kTileK, kStageBytes = (TileM + TileN) * kTileK;
  static constexpr int kRun = WarpN % 32 == 0 ? 8 : 4;  // columns side by side that a lane has in its registers
  // Operands of how many instructions there is room for beside the sums and 40 registers for all else.
  static constexpr int kRegisters = 65536 / (kThreads * BlocksPerSm) < 255 ? 65536 / (kThreads * BlocksPerSm) : 255;
  static constexpr int kBuffers = WarpM * WarpN / 32 + 2 * (WarpM + WarpN) / 4 + 40 <= kRegisters ? 2 : 1;
  static constexpr int kGroupBytes = Stages * kStageBytes, kVectorsAt = Groups * kGroupBytes;
  static constexpr int kTileAt = kVectorsAt + int(sizeof(Vectors<TileN>)), kSharedBytes = kTileAt + int(sizeof(Tile));
  static constexpr int kStagingBytes = 16 * WarpN * 4;  // of a warp
  static_assert(kSharedBytes <= 99 * 1024, "sm_86 and sm_89 have no more");
  static_assert((Groups - 1) * TileM * TileN * 4 <= kVectorsAt && kThreads / 32 * kStagingBytes <= kVectorsAt);
  static_assert(WarpM / 16 % Groups == 0, "each group finishes as many rows");
};

// Which tile a block computes.
struct Raster {
  Divider band_blocks, rows, last_rows;  // rows of tiles in a band, and in the last one
  uint32_t bands;

  Raster(int64_t tiles_m, int64_t tiles_n)
      : band_blocks(kRaster * tiles_n), rows(kRaster), last_rows((tiles_m - 1) % kRaster + 1),
        bands(uint32_t(ceil_div(tiles_m, kRaster))) {}

  template <class C>
  __device__ __forceinline__ Tile tile(const Matmul& p, uint32_t block) const {
    uint32_t in_band, in_column, band = band_blocks.divide(block, in_band);
    uint32_t column = (band + 1 < bands ? rows : last_rows).divide(in_band, in_column);
    return {(band * kRaster + in_column) * C::kTileM, find_columns(p, column, C::kTileN)};
  }
};

template <class C>
__device__ __forceinline__ void sync_group(int group) {
  if constexpr (C::kGroups == 1) {
    __syncthreads();
  } else if constexpr (C::kGroupThreads == 32) {
    __syncwarp();
  } else {
#pragma unroll  // with a number that the compiler knows a barrier is faster: 4 % for 64x64
    for (int i = 0; i < C::kGroups; ++i) {
      if (group == i) cutlass::arch::NamedBarrier::sync(C::kGroupThreads, i);
    }
  }
}

// From the sums of all warps to the output.
template <class C>
__device__ __forceinline__ void finish(const Matmul& p, const Route& route, const Tile& tile, Sums<C>& sums, int group,
                                       int8_t* shared) {
  if constexpr (C::kGroups > 1) sums.reduce(group, shared);
  constexpr int kOwn = Sums<C>::kOwn;
  const Rows<C>(&own)[kOwn] = reinterpret_cast<const Rows<C>(&)[kOwn]>(sums.rows);
  const Vectors<C::kTileN>& vectors = *reinterpret_cast<const Vectors<C::kTileN>*>(shared + C::kVectorsAt);
  const Columns columns = tile.columns;
  const int warp = threadIdx.x / 32 % C::kGroupWarps, n = p.weights[columns.weight].n;
  const int warp_m = warp / C::kWarpsN * C::kWarpM + group * kOwn * 16, warp_n = warp % C::kWarpsN * C::kWarpN;
  const Place at = {tile.row + warp_m, route.rows, columns.start + columns.n + warp_n, warp_n, n - (columns.n + warp_n),
                    route.residual_rows};
  if (n % C::kRun == 0 && moves_as_vectors<C::kRun>(p, columns.start)) {
    write_vectors<C>(p, at, own, vectors);
  } else {
    __syncthreads();  // all have read the others' sums
    write_values<C>(p, at, own, vectors, reinterpret_cast<int*>(shared + threadIdx.x / 32 * C::kStagingBytes));
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocksPerSm)
    multiply(const __grid_constant__ Matmul p, const __grid_constant__ Route route, const __grid_constant__ Raster raster) {
  extern __shared__ __align__(128) int8_t shared[];
  Vectors<C::kTileN>& vectors = *reinterpret_cast<Vectors<C::kTileN>*>(shared + C::kVectorsAt);
  const int group = C::kGroups == 1 ? 0 : threadIdx.x / C::kGroupThreads, warp = threadIdx.x / 32 % C::kGroupWarps;
  int8_t* const stages = shared + group * C::kGroupBytes;

  const uint32_t m = route.rows;
  const Tile tile = raster.tile<C>(p, blockIdx.x);
  const Columns& columns = tile.columns;
  const Weight& weight = p.weights[columns.weight];
  const int8_t* weights = static_cast<const int8_t*>(weight.data);

  // The group's part of the reduction.
  const int part = (route.stages + C::kGroups - 1) / C::kGroups, begin = group * part;
  int left = min(part, route.stages - begin);  // stages
  Walk walk(route, begin);

  TileCopy<C::kTileN, C::kGroupThreads, C::kRun> copy_w;
  uint32_t weight_row = uint32_t(p.window.r * p.window.s) * route.weight_tap;
#pragma unroll
  for (int i = 0; i < copy_w.kCopies; ++i) {
    copy_w.source[i] = uint32_t(min(columns.n + copy_w.row(i), weight.n - 1)) * weight_row + copy_w.piece();
  }
  TileCopy<C::kTileM, C::kGroupThreads, 2> copy_x;
#pragma unroll
  for (int i = 0; i < copy_x.kCopies; ++i) {
    copy_x.source[i] = route.first_pixel(min(tile.row + copy_x.row(i), m - 1)) + copy_x.piece();
  }
  // Registers are scarce until the sums are there: what is needed afterwards waits in shared memory.
  Tile* const kept = reinterpret_cast<Tile*>(shared + C::kTileAt);
  if (threadIdx.x == 0) *kept = tile;
  auto inside = [&](const Walk& at, int ahead) {
    return at.channel + copy_x.piece() * 16 < route.channels && ahead < left;
  };

  // No kernel ahead writes weights, so the first of them may come while it still runs. The epilogue's vectors it may
  // write, since those of a dynamic convolution are computed with its input's range: they come to the L2 cache only.
  Walk early = walk;
  if (threadIdx.x < C::kTileN && columns.n + int(threadIdx.x) < weight.n) {
    prefetch_epilogue(weight, columns.n + int(threadIdx.x));
  }
#pragma unroll
  for (int s = 0; s < C::kStages - 1; ++s) {
    copy_w.copy(weights, early.w, inside(early, s), stages + s * C::kStageBytes + C::kXBytes);
    early.advance(route);
  }
  wait_for_previous();
  let_next_start();
#pragma unroll
  for (int s = 0; s < C::kStages - 1; ++s) {
    copy_x.copy(p.x.data, walk.x, inside(walk, s), stages + s * C::kStageBytes);
    walk.advance(route);
    cute::cp_async_fence();
  }
#pragma unroll
  for (int i = 0; i < C::kTileN; i += C::kThreads) {
    int within = int(threadIdx.x) + i, n = columns.n + within;
    if (within < C::kTileN && n < weight.n) vectors.put(within, channel_epilogue(weight, n));
  }

  const int warp_m = warp / C::kWarpsN * C::kWarpM, warp_n = warp % C::kWarpsN * C::kWarpN;
  const int x_at = Fragments<C>::x_at(warp_m), w_at = Fragments<C>::w_at(warp_n);
  Sums<C> sums;
  Fragments<C> fragments[C::kBuffers];
  Fragments<C>&first = fragments[0], &second = fragments[C::kBuffers - 1];  // of a stage's halves
  cute::cp_async_wait<C::kStages - 2>();
  sync_group<C>(group);
  int at_stage = 0;  // byte of the stage that is read; all warps have read the one before it, which is filled again
  if (C::kBuffers == 2) first.load(stages, x_at, w_at, 0);
  // A group with fewer stages than the others multiplies zeros meanwhile: racecheck follows the barriers of a block only
  // if all its warps have been at as many.
#pragma unroll 1
  for (int step = 0; step < part; ++step, --left) {
    const int8_t* stage = stages + at_stage;
    C::kBuffers == 2 ? second.load(stage, x_at, w_at, 1) : first.load(stage, x_at, w_at, 0);
    bool more = inside(walk, C::kStages - 1);
    int8_t* fill = stages + (at_stage == 0 ? C::kGroupBytes : at_stage) - C::kStageBytes;
    copy_x.copy(p.x.data, walk.x, more, fill);
    copy_w.copy(weights, walk.w, more, fill + C::kXBytes);
    walk.advance(route);
    cute::cp_async_fence();
    sums.add(first);
    if (C::kBuffers == 1) {
      second.load(stage, x_at, w_at, 1);
      sums.add(second);
    }
    at_stage = at_stage == C::kGroupBytes - C::kStageBytes ? 0 : at_stage + C::kStageBytes;
    cute::cp_async_wait<C::kStages - 2>();
    sync_group<C>(group);
    if (C::kBuffers == 2) {
      // After the last step this reads what nobody uses.
      first.load(stages + at_stage, x_at, w_at, 0);
      sums.add(second);
    }
  }
  cute::cp_async_wait<0>();
  __syncthreads();  // nothing is on its way, and all vectors are there

  finish(p, route, *kept, sums, group, shared);
}

template <class C>
cudaError_t run(const Matmul& p, int splits, const Stream& on) {
  int64_t m = p.m(), tiles_m = ceil_div(m, C::kTileM), tiles_n = column_tiles(p, C::kTileN);
  if (splits != 1 || p.bits != 8 || p.k() <= 0 || m > INT32_MAX || (tiles_m + kRaster) * tiles_n > INT32_MAX) {
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
  return launch(multiply<C>, grid, on, p, Route(p), Raster(tiles_m, tiles_n));
}

}  // namespace mixdq::sm80
