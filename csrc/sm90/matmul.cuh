// int8 matrix product and convolution for Hopper: TMA, wgmma, and either of two ways to use a multiprocessor.
//
// persistent: one block per multiprocessor walks over tiles. Two math warpgroups take turns (ping-pong: one multiplies
//   while the other writes its tile) or share a tile (cooperative).
// single: one tile per block, one or two blocks per multiprocessor. The reduction may be split over the blocks of a
//   cluster, which add their int32 sums through each other's shared memory: exact, and without scratch memory. Where
//   there are few small tiles for many multiprocessors, large ones in many parts read less of the L2 cache.
// sharing: one tile per block. The blocks of a cluster have tiles of the same columns, and each brings a share of the
//   weights to all of them: small problems are bound by what multiprocessors read of the L2 cache.
// pairs: persistent and ping-pong, and the blocks of a cluster share weights tile after tile.
//
// A warp for each operand loads it. Weights are loaded before the kernel ahead has ended, since no kernel writes them. A
// convolution differs from a linear layer only in the coordinates of the input's tiles.
//
// Packed weights pass through warps that spread the codes over bytes: each code lands in the high bits of its
// byte, so sums come out 16 or 64 times too large, within the range of int8 sums, and are shifted back exactly. Where
// activations are floats, those warps widen the codes of every width to floats; scales stay in the epilogue. Other floats
// become codes on their way, again for each tile, which takes longer than a quantizer by itself but saves its launch.
//
// GEGLU: half of a tile's columns are values, the other half their gates, which come from the second half of the weight.
#pragma once
#include <cstddef>
#include "cute/arch/cluster_sm90.hpp"
#include "cutlass/arch/reg_reconfig.h"
#include "cutlass/cutlass.h"
#include "sm90/epilogue.cuh"
#include "sm90/geglu_epilogue.cuh"
#include "sm90/kernels.h"
#include "sm90/known_token.cuh"
#include "sm90/load.cuh"
#include "sm90/tensor_map.h"

namespace mixdq::sm90 {

// Warps part by an index that the compiler knows to be one for all their threads: only then do the descriptors of wgmma
// stay in uniform registers, and TMA is issued without a loop over the threads that might ask for it.

template <class C>
__device__ __forceinline__ void start_barriers(const Params& p, const Shared<C>& sm) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < C::kStages; ++i) {
      // The copies of both operands, or for one those who prepare it: each lane of a warp, or one for all warps.
      FullBarrier::init(sm.full(i), C::packed ? 1 + 32 : 2);
      EmptyBarrier::init(sm.empty(i), (C::kPingPong ? 4 : C::kMathGroups * 4) * (C::kSharing ? p.splits : 1));
      if constexpr (C::kPrepares) FullBarrier::init(sm.raw_full(i), 1);
    }
    cutlass::arch::fence_barrier_init();
  }
  if (C::kSharing && p.splits > 1) {  // the others' copies arrive here
    cute::cluster_arrive_relaxed();
    cute::cluster_wait();
  }
  __syncthreads();
}

// Each launch begins with a cold cache of parameters: what the epilogue will want of them comes now, while the kernel
// ahead still runs.
__device__ __forceinline__ void warm_parameters(const Params& p) {
  constexpr int kLine = 64 / sizeof(int);
  const int* words = reinterpret_cast<const int*>(&p.weights);
  constexpr int kWords = (sizeof(Params) - offsetof(Params, weights)) / sizeof(int);
#pragma unroll
  for (int i = 0; i < kWords; i += kLine) asm volatile("" ::"r"(words[i]));
}

template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T first, second;
};

template <class C>
__device__ __forceinline__ void run_single(const Params& p, const Shared<C>& sm) {
  const int splits = C::kSharing ? 1 : p.splits;
  const int rank = blockIdx.x % splits, index = blockIdx.x / splits;
  const Reduction r(p, p.steps * rank / splits, p.steps * (rank + 1) / splits);
  const int thread = threadIdx.x % kGroup, warp = cutlass::canonical_warp_idx_sync();
  const Tile t = locate<C>(p, index);
  const int group = C::kMathGroups == 1 ? 0 : warp / (kGroup / 32) - C::kFeedGroups, row0 = group * C::kBlocksM * 64;
  const Columns<C> columns(sm.vectors(group));
  if (warp < C::kFeedWarps) {
    feed(p, sm, warp, index, 1, index + 1, r);
    __syncwarp();
    wait_for_previous();
  } else {
    warm_parameters(p);
    wait_for_previous();
    ColumnLoads<C> loads;
    loads.load(p.weights[t.weight], t.n0);
    const WarpTile<C> at(p, t, row0, warp % 4);
    EarlyResiduals<C> residuals;
    if (kEarlyResiduals<C> && p.bulk_out && p.residual && splits == 1) residuals.load(p, at, 0);
    Turn<C> turn;
    Sums<C> sums;
    multiply(sm, turn, r, row0, sums, p.splits);
    loads.store(columns, p.weights[t.weight].bias_type);
    cutlass::arch::NamedBarrier::sync(C::kMathGroups * kGroup, 1);  // and every warp is done with the stages
    if (splits == 1) {
      Staging<C> staging{sm.staging(warp - C::kFeedWarps)};
      write_tile<C>(p, t, at, columns, sums, residuals, staging);
      staging.finish();
      if (C::kQuantizes && p.bos.output) write_known_token<C>(p, t, at);
      return;
    }
    const int lane = thread % 32;
#pragma unroll
    for (int i = 0; i < C::kBlocksM; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int in_warp = WarpTile<C>::row(lane / 4, i, h);
        auto* row = sm.sums() + (row0 + thread / 32 * C::kWarpRows + in_warp) * C::kSumsRow + lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < C::kTileN / 8; ++j) {
          Pair<typename C::Math::Sum> pair = {sums[i][j * 4 + h * 2], sums[i][j * 4 + h * 2 + 1]};
          *reinterpret_cast<decltype(pair)*>(row + j * 8) = pair;
        }
      }
    }
  }
  if (splits == 1) return;
  cooperative_groups::this_cluster().sync();
  write_shared<C>(p, sm, t, rank);
  __syncwarp();  // others may still read this block's sums; what it wrote need not have arrived
  cute::cluster_arrive_relaxed();
  cute::cluster_wait();
}

template <class C>
__device__ __forceinline__ void run_persistent(const Params& p, const Shared<C>& sm) {
  const int tiles = p.tiles_m * p.tiles_n, stride = gridDim.x;
  const Reduction r(p, 0, p.steps);
  const int warp = cutlass::canonical_warp_idx_sync();
  if (warp < kGroup / 32) {
    cutlass::arch::warpgroup_reg_dealloc<40>();
    feed(p, sm, warp, blockIdx.x, stride, tiles, r);
    return;
  }
  cutlass::arch::warpgroup_reg_alloc<232>();
  warm_parameters(p);
  wait_for_previous();
  const int group = warp / (kGroup / 32) - 1;
  const int row0 = C::turns == Turns::cooperative ? group * C::kBlocksM * 64 : 0;
  const Columns<C> columns(sm.vectors(group));
  Staging<C> staging{sm.staging(warp - kGroup / 32)};
  const Encoder encoder = C::kGeglu ? Encoder(*p.geglu.scale, *p.geglu.zero_point, p.geglu.bits) : Encoder(1.f, 0.f, 8);
  Turn<C> turn;
  int mine = C::kPingPong ? group : 0;  // tiles until this group's next turn
  for (int index = blockIdx.x; index < tiles; index += stride) {
    if (C::kPingPong && mine-- != 0) {
      turn.next(r.count);
      continue;
    }
    if (C::kPingPong) mine = 1;
    const Tile t = locate<C>(p, index);
    ColumnLoads<C> loads;
    loads.load(p.weights[t.weight], t.n0);
    const WarpTile<C> at(p, t, row0, warp % 4);
    EarlyResiduals<C> residuals;
    if (kEarlyResiduals<C> && p.bulk_out && p.residual) residuals.load(p, at, 0);
    Sums<C> sums;
    if (C::kPingPong && index != int(blockIdx.x)) await_turn(group);
    const bool pass = C::kPingPong && index + stride < tiles;
    multiply(sm, turn, r, row0, sums, p.splits, pass ? 1 - group : -1);
    if (!C::kPingPong) sync_group(group);  // every warp is done with the columns of the tile before; else since its turn
    loads.store(columns, p.weights[t.weight].bias_type);
    sync_group(group);
    if constexpr (!C::kGeglu) {
      write_tile<C>(p, t, at, columns, sums, residuals, staging);
    } else if (p.out_type == Float::f16) {
      write_geglu<C, Float::f16>(p, t, at, columns, sums, encoder, staging);
    } else {
      write_geglu<C, Float::bf16>(p, t, at, columns, sums, encoder, staging);
    }
  }
  staging.finish();
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocksPerSm) matmul(const __grid_constant__ Params p) {
#ifdef CUTLASS_ARCH_MMA_SM90A_ENABLED
  extern __shared__ uint8_t raw[];
  const Shared<C> sm(raw);
  start_barriers(p, sm);
  if constexpr (C::kOneTile) {
    run_single<C>(p, sm);
  } else {
    run_persistent<C>(p, sm);
  }
#endif
}

template <class C>
cudaError_t run(const Matmul& problem, int splits, const Stream& on) {
  if (problem.bos.output) splits = 1;  // whoever writes a row knows all of it
  Params p = {};
  const int input_row = C::kQuantizes ? 2 * kRowBytes : kRowBytes;
  if (input_map(problem, C::kTileM, input_row, &p.input) != CUDA_SUCCESS) return cudaErrorInvalidValue;
  const int box_rows = C::kSharing ? C::kTileN / splits : C::kTileOut;
  int column = 0, out_align = 0;
  for (int i = 0; i < problem.weight_count; ++i) {
    const Weight& w = problem.weights[i];
    if (weight_map(problem, w, box_rows, kRowBytes, &p.weight_maps[i]) != CUDA_SUCCESS) return cudaErrorInvalidValue;
    p.weights[i] = w;
    p.column[i] = column;
    column += w.n;
    out_align |= column;
    p.tiles_n += (w.n + C::kTileN - 1) / C::kTileN;
    p.tile_end[i] = p.tiles_n;
  }
  p.m = int(problem.m());
  p.tiles_m = (p.m + C::kTileM - 1) / C::kTileM;
  const int beyond = problem.x.channels % C::kTileK;
  const bool tails = C::kTails && problem.weight_count == 1 && beyond > 0 && beyond <= kTailBytes;
  p.taps = problem.taps();
  p.channel_blocks = problem.x.channels / C::kTileK + (beyond > 0 && !tails);
  p.whole_steps = p.taps * p.channel_blocks;
  p.steps = p.whole_steps + (tails ? p.taps : 0);
  if (tails && (input_map(problem, C::kTileM, kTailBytes, &p.input_tail) != CUDA_SUCCESS ||
                weight_map(problem, problem.weights[0], box_rows, kTailBytes, &p.weight_tail) != CUDA_SUCCESS)) {
    return cudaErrorInvalidValue;
  }
  if (C::kSharing) {
    p.tiles_m = (p.tiles_m + splits - 1) / splits * splits;
  } else {
    if (splits > p.steps) splits = p.steps;  // every block multiplies something
  }
  p.band_tiles = Divider(kRaster * p.tiles_n), p.last_rows = Divider((p.tiles_m - 1) % kRaster + 1);
  p.splits = splits;
  p.packed_tile = C::kTileK * problem.bits / 8;
  p.shift = 8 - problem.bits;
  p.unscale = 1.f / float(1 << p.shift);
  p.rows = problem.is_rows();
  p.out_w = problem.out_w, p.out_hw = problem.out_h * problem.out_w;
  p.kernel_s = problem.window.s;
  p.stride_h = problem.window.stride_h, p.stride_w = problem.window.stride_w;
  p.dilation_h = problem.window.dilation_h, p.dilation_w = problem.window.dilation_w;
  p.row_scale = problem.row_scale, p.row_zero_point = problem.row_zero_point, p.row_stride = problem.row_stride;
  p.residual = problem.residual, p.residual_type = problem.residual_type, p.residual_stride = problem.residual_stride;
  p.residual_rows = problem.residual_rows;
  p.out = problem.out, p.out_type = problem.out_type, p.out_stride = problem.out_stride;
  p.geglu = problem.geglu;
  p.quantizer = problem.quantizer, p.bos = problem.bos;
  p.x = problem.x.data, p.x_type = problem.x_type, p.x_stride = problem.x.stride_w, p.channels = problem.x.channels;
  auto aligned = [&](const void* data, int64_t stride, Float type) {
    const int bytes = type == Float::f32 ? 4 : 2;
    return (reinterpret_cast<uintptr_t>(data) | uintptr_t(stride * bytes) | uintptr_t(out_align * bytes)) % 16 == 0;
  };
  p.out_aligned = aligned(p.out, p.out_stride, p.out_type);
  p.residual_aligned = aligned(p.residual, p.residual_stride, p.residual_type);
  // Bulk copies would arrive after what is written over them.
  p.bulk_out = !C::kGeglu && !p.bos.output && p.out_type != Float::f32 && p.out_aligned;
  if (p.residual) p.bulk_out &= p.residual_aligned && p.residual_type == p.out_type;
  for (int i = 0; p.bulk_out && i < problem.weight_count; ++i) {
    if (out_map(problem, p.column[i], p.weights[i], C::kWarpRows, C::kChunk, &p.out_maps[i]) != CUDA_SUCCESS) {
      return cudaErrorInvalidValue;
    }
  }
  if (C::kGeglu && codes_map(problem, C::kWarpRows, C::kTileOut, &p.out_maps[0]) != CUDA_SUCCESS) {
    return cudaErrorInvalidValue;
  }

  static bool ready[64] = {};  // by device; setting it twice does no harm
  if (!ready[on.device % 64]) {
    auto* kernel = reinterpret_cast<const void*>(&matmul<C>);
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kAloneBytes);
    if (error != cudaSuccess) return error;
    ready[on.device % 64] = true;
  }
  Grid grid;
  grid.threads = C::kThreads;
  grid.shared_bytes = C::kSharedBytes;
  const int tiles = p.tiles_m * p.tiles_n;
  grid.cluster = splits;
  if (C::kOneTile) {
    grid.blocks = C::kSharing ? tiles : tiles * splits;
    // Left to itself the GPU puts two blocks on a multiprocessor that the kernel ahead leaves early, while others idle.
    if (int(grid.blocks.x) <= on.sm_count) grid.shared_bytes = C::kAloneBytes;
  } else {
    const int most = on.sm_count / splits * splits;
    grid.blocks = tiles < most ? tiles : most;
  }
  return launch(matmul<C>, grid, on, p);
}

}  // namespace mixdq::sm90

// Defines the entry point NAME of one instance.
#define MIXDQ_SM90_INSTANCE(NAME, TILE_M, TILE_N, TURNS, PACKED)                                       \
  cudaError_t mixdq::NAME(const Matmul& problem, int splits, const Stream& on) {                       \
    using namespace mixdq::sm90;                                                                       \
    return run<Config<TILE_M, TILE_N, Turns::TURNS, PACKED>>(problem, splits, on);                     \
  }

// The same with GEGLU at the end.
#define MIXDQ_SM90_GEGLU_INSTANCE(NAME, TILE_M, TILE_N, TURNS, PACKED)                                 \
  cudaError_t mixdq::NAME(const Matmul& problem, int splits, const Stream& on) {                       \
    using namespace mixdq::sm90;                                                                       \
    return run<Config<TILE_M, TILE_N, Turns::TURNS, PACKED, Int8, true>>(problem, splits, on);         \
  }

// The same with quantization at the beginning.
#define MIXDQ_SM90_QUANTIZING_INSTANCE(NAME, TILE_M, TILE_N, TURNS)                                    \
  cudaError_t mixdq::NAME(const Matmul& problem, int splits, const Stream& on) {                       \
    using namespace mixdq::sm90;                                                                       \
    return run<Config<TILE_M, TILE_N, Turns::TURNS, false, Int8, false, true>>(problem, splits, on);   \
  }

// The same for floating activations: one instance for each type.
#define MIXDQ_SM90_FLOATING_INSTANCE(NAME, TILE_M, TILE_N, TURNS)                                      \
  cudaError_t mixdq::NAME(const Matmul& problem, int splits, const Stream& on) {                       \
    using namespace mixdq::sm90;                                                                       \
    if (problem.x_type == Float::f16) {                                                                \
      return run<Config<TILE_M, TILE_N, Turns::TURNS, true, Half>>(problem, splits, on);               \
    }                                                                                                  \
    return run<Config<TILE_M, TILE_N, Turns::TURNS, true, Bfloat16>>(problem, splits, on);             \
  }
