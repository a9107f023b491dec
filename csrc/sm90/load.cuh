// The threads that load tiles by TMA: one for each operand, since one alone issues copies more slowly than small tiles are
// multiplied; where other warps prepare what was copied, one for both.
#pragma once
#include "cute/arch/cluster_sm90.hpp"
#include "cute/arch/copy_sm90_tma.hpp"
#include "sm90/encode.cuh"
#include "sm90/pipeline.cuh"
#include "sm90/spread.cuh"

namespace mixdq::sm90 {

// A step of the reduction: a block of the channels of one tap, or the tail of one tap's. Counted on, since there is no
// time to divide.
struct Step {
  bool tail;
  int block, tap, r, s;
  __device__ Step(const Params& p, int k) : tail(k >= p.whole_steps) {
    tap = tail ? k - p.whole_steps : k / p.channel_blocks;
    block = tail ? p.channel_blocks : k % p.channel_blocks;
    r = tap / p.kernel_s, s = tap % p.kernel_s;
  }
  __device__ __forceinline__ void next(const Params& p) {
    if (!tail && ++block < p.channel_blocks) return;
    if (++tap == p.taps && !tail) {
      tail = true, tap = r = s = 0;
      return;
    }
    block = tail ? p.channel_blocks : 0;
    if (++s == p.kernel_s) s = 0, ++r;
  }
};

template <class C>
__device__ __forceinline__ int row_bytes(const Step& step) {
  return C::kTails && step.tail ? kTailBytes : kRowBytes;
}

template <class C>
__device__ __forceinline__ const CUtensorMap* weight_map_of(const Params& p, const Tile& t, const Step& step) {
  return C::kTails && step.tail ? &p.weight_tail : &p.weight_maps[t.weight];
}

// The pixel of the input where the window of a tile's first output begins.
struct Origin {
  int image = 0, y = 0, x = 0;
  __device__ Origin(const Params& p, int m0) {
    if (p.rows) return;
    image = m0 / p.out_hw;
    int pixel = m0 - image * p.out_hw;
    y = pixel / p.out_w * p.stride_h, x = pixel % p.out_w * p.stride_w;
  }
};

template <class C>
__device__ __forceinline__ void load_weight(const Params& p, const Shared<C>& sm, int stage, const Tile& t,
                                            const Step& step) {
  constexpr uint64_t kKeep = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
  const CUtensorMap* map = weight_map_of<C>(p, t, step);
  if constexpr (C::packed) {
    FullBarrier::arrive_and_expect_tx(sm.raw_full(stage), C::kTileN * p.packed_tile);
    cute::SM90_TMA_LOAD_3D::copy(map, sm.raw_full(stage), kKeep, sm.raw(stage), step.block * p.packed_tile,
                                 step.tap, t.n0);
    if (C::kGeglu) {
      cute::SM90_TMA_LOAD_3D::copy(map, sm.raw_full(stage), kKeep, sm.raw(stage) + C::kTileOut * p.packed_tile,
                                   step.block * p.packed_tile, step.tap, p.weights[t.weight].n / 2 + t.n0);
    }
  } else {
    const int row = row_bytes<C>(step);
    FullBarrier::arrive_and_expect_tx(sm.full(stage), C::kTileN * row);
    if (C::kSharing && p.splits > 1) {  // each block of the cluster brings its share of the rows to all of them
      const int rank = blockIdx.x % p.splits, rows = C::kTileN / p.splits;
      cute::SM90_TMA_LOAD_MULTICAST_3D::copy(map, sm.full(stage), uint16_t((1 << p.splits) - 1), kKeep,
                                             sm.weight(stage) + rank * rows * row, step.block * kRowBytes,
                                             step.tap, t.n0 + rank * rows);
      return;
    }
    cute::SM90_TMA_LOAD_3D::copy(map, sm.full(stage), kKeep, sm.weight(stage), step.block * kRowBytes, step.tap, t.n0);
    if (C::kGeglu) {
      cute::SM90_TMA_LOAD_3D::copy(map, sm.full(stage), kKeep, sm.weight(stage) + C::kTileOut * row,
                                   step.block * kRowBytes, step.tap, p.weights[t.weight].n / 2 + t.n0);
    }
  }
}

template <class C>
__device__ __forceinline__ void load_input(const Params& p, const Shared<C>& sm, int stage, int m0, const Origin& from,
                                           const Step& step) {
  constexpr uint64_t kKeep = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
  if constexpr (C::kQuantizes) {
    FullBarrier::arrive_and_expect_tx(sm.raw_full(stage), C::kRawBytes);
    cute::SM90_TMA_LOAD_2D::copy(&p.input, sm.raw_full(stage), kKeep, sm.raw(stage), step.block * 2 * kRowBytes, m0);
    return;
  }
  const CUtensorMap* map = C::kTails && step.tail ? &p.input_tail : &p.input;
  FullBarrier::arrive_and_expect_tx(sm.full(stage), C::kTileM * row_bytes<C>(step));
  if (p.rows) {
    cute::SM90_TMA_LOAD_2D::copy(map, sm.full(stage), kKeep, sm.input(stage), step.block * kRowBytes, m0);
    return;
  }
  auto dy = uint16_t(step.r * p.dilation_h), dx = uint16_t(step.s * p.dilation_w);
  cute::SM90_TMA_LOAD_IM2COL_4D::copy(map, sm.full(stage), sm.input(stage), step.block * kRowBytes, from.x, from.y,
                                      from.image, dx, dy);
}

// Brings what comes after the stages of the first tile's weights to the L2 cache, as much again: of more, the copies that
// are needed first would wait in line behind them. Tiles of the same columns share that.
template <class C>
__device__ __forceinline__ void prefetch_weights(const Params& p, const Tile& t, Step step, int count) {
  const int width = C::packed ? p.packed_tile : kRowBytes, mine = t.m0 / C::kTileM;
  for (int i = 0; i < count; ++i, step.next(p)) {
    if (!C::kSharing && i % p.tiles_m != mine) continue;  // boxes of those that share are parts of the tile
    const int share = C::kSharing ? blockIdx.x % p.splits * C::kTileN / p.splits : 0;
    const CUtensorMap* map = weight_map_of<C>(p, t, step);
    cute::SM90_TMA_LOAD_3D::PREFETCH::copy(map, step.block * width, step.tap, t.n0 + share);
    if (C::kGeglu) {
      cute::SM90_TMA_LOAD_3D::PREFETCH::copy(map, step.block * width, step.tap, p.weights[t.weight].n / 2 + t.n0);
    }
  }
}

// One thread, of one operand or of both. Weights come while the kernel ahead still runs, as far as there are stages.
template <class C, bool kWeights, bool kInputs>
__device__ void produce(const Params& p, const Shared<C>& sm, int first, int stride, int tiles, Reduction r) {
  Tile t = locate<C>(p, first);
  const Step begin(p, r.begin);
  int early = 0;
  if (kWeights) {
    Step step = begin;
    for (; early < min(C::kStages, r.count); ++early, step.next(p)) load_weight(p, sm, early, t, step);
    prefetch_weights<C>(p, t, step, min(C::kStages, r.count - early));
  }
  if (kInputs) {
    for (const CUtensorMap* map : {&p.input, &p.out_maps[t.weight], &p.input_tail, &p.weight_tail}) {
      if (map == &p.input_tail && p.whole_steps == p.steps) break;
      cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(map));
    }
    wait_for_previous();
    let_next_start();  // its weights may come while this one multiplies
  }
  Turn<C> turn;
  for (int index = first; index < tiles; index += stride) {
    t = locate<C>(p, index);
    // A cluster's last tiles may lie past the last row: they read what others read, and write nothing.
    const int m0 = C::kSharing ? min(t.m0, (p.m - 1) / C::kTileM * C::kTileM) : t.m0;
    const Origin from(p, m0);
    Step step = begin;
    for (int i = 0; i < r.count; ++i, turn.step(), step.next(p)) {
      if (early > 0) {
        --early;
      } else {
        EmptyBarrier::wait(sm.empty(turn.stage), turn.phase ^ 1);  // passes at once for the first use of a stage
        if (kWeights) load_weight(p, sm, turn.stage, t, step);
      }
      if (kInputs) load_input(p, sm, turn.stage, m0, from, step);
    }
  }
  if (kWeights && C::kSharing && !C::kOneTile) {  // the others' last releases arrive here: this block must not be gone
    for (int i = 0; i < C::kStages; ++i, turn.step()) EmptyBarrier::wait(sm.empty(turn.stage), turn.phase ^ 1);
  }
}

// The warps that load, and those that prepare what was loaded.
template <class C>
__device__ __forceinline__ void feed(const Params& p, const Shared<C>& sm, int warp, int first, int stride, int tiles,
                                     Reduction r) {
  if (warp == 0) {
    if (cute::elect_one_sync()) produce<C, true, C::kPrepares>(p, sm, first, stride, tiles, r);
  } else if constexpr (C::kQuantizes) {
    encode_input(p, sm, warp - 1, r.count);
  } else if constexpr (C::packed) {
    if (first < tiles) spread(p, sm, warp - 1, (tiles - first + stride - 1) / stride * r.count);
  } else if (warp == 1) {
    if (cute::elect_one_sync()) produce<C, false, true>(p, sm, first, stride, tiles, r);
  }
}

}  // namespace mixdq::sm90
