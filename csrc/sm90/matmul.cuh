// int8 matrix product and convolution for Hopper: TMA, wgmma, and either of two ways to use a multiprocessor.
//
// persistent: one block per multiprocessor walks over tiles. Two math warpgroups take turns (ping-pong: one multiplies
//   while the other writes its tile) or share a tile (cooperative).
// single: one tile per block, two blocks per multiprocessor, one math warpgroup. The reduction may be split over the
//   blocks of a cluster, which add their int32 sums through each other's shared memory: exact, and no scratch memory.
//
// One warp loads both operands. Weights are loaded before the kernel ahead has ended, since no kernel writes them. A
// convolution differs from a linear layer only in the coordinates of the input's tiles.
//
// Packed weights pass through three warps that spread the codes over bytes: each code lands in the high bits of its
// byte, so sums come out 16 or 64 times too large, within the range of int8 sums, and are shifted back exactly. Where
// activations are floats, those warps widen the codes of every width to floats; scales stay in the epilogue.
#pragma once
#include <cooperative_groups.h>
#include "cute/arch/cluster_sm90.hpp"
#include "cute/arch/copy_sm90_tma.hpp"
#include "cutlass/arch/barrier.h"
#include "cutlass/arch/reg_reconfig.h"
#include "cutlass/cutlass.h"
#include "device.cuh"
#include "sm90/kernels.h"
#include "sm90/tensor_map.h"
#include "sm90/wgmma.cuh"

namespace mixdq::sm90 {

using FullBarrier = cutlass::arch::ClusterTransactionBarrier;
using EmptyBarrier = cutlass::arch::ClusterBarrier;

constexpr int kStepBytes = 32;  // of a row, that one instruction multiplies
constexpr int kRaster = 16;     // tile rows that are walked together, so that their inputs stay in the L2 cache
constexpr int kGroup = 128;     // threads of a warpgroup

enum class Turns { single, ping_pong, cooperative };

template <int TileM, int TileN, Turns turns_, bool Packed, class Math_ = Int8>
struct Config {
  using Math = Math_;
  static constexpr int kTileM = TileM, kTileN = TileN;
  static constexpr Turns turns = turns_;
  static constexpr bool packed = Packed;
  static constexpr int kMathGroups = turns == Turns::single ? 1 : 2;
  static constexpr int kThreads = kGroup * (kMathGroups + 1);
  static constexpr int kBlocksPerSm = turns == Turns::single ? 2 : 1;
  // Rows of one math group, in blocks of the 64 that an instruction takes.
  static constexpr int kBlocksM = (turns == Turns::cooperative ? TileM / 2 : TileM) / 64;

  static constexpr int kTileK = kRowBytes / Math::kBytes;  // channels of a step of the reduction
  static constexpr int kInputBytes = TileM * kRowBytes;
  static constexpr int kWeightBytes = TileN * kRowBytes;
  static constexpr int kPackedBytes = Packed ? TileN * kRowBytes / 2 : 0;
  static constexpr int kStageBytes = kInputBytes + kWeightBytes + kPackedBytes;

  // Epilogue of the persistent kernels: each warp stages 16 rows of that many columns, padded against bank conflicts.
  static constexpr int kChunk = TileN <= 80 ? TileN : TileN / 2;
  static constexpr int kStagingRow = kChunk * 2 + 16;
  static constexpr int kStagingBytes = turns == Turns::single ? 0 : kMathGroups * 4 * 16 * kStagingRow;
  // Epilogue of the single kernels: the sums take the place of the stages.
  static constexpr int kSumsRow = TileN + 8;

  static constexpr int kVectorBytes = kMathGroups * TileN * 12;
  static constexpr int kBudget = turns == Turns::single ? 113 * 1024 : 227 * 1024;
  static constexpr int kFixedBytes = 1024 + kStagingBytes + kVectorBytes + 512;
  static constexpr int kFit = (kBudget - kFixedBytes) / kStageBytes;
  static constexpr int kStages = kFit < 8 ? kFit : 8;
  static constexpr int kSharedBytes = kFixedBytes + kStages * kStageBytes;
  static_assert(kStages >= 3 && 3 * kStages * 8 <= 512);
  static_assert(turns != Turns::single || TileM * kSumsRow * 4 <= kStages * kStageBytes);
};

struct Params {
  CUtensorMap input;
  CUtensorMap weight_maps[kMaxWeights];
  Weight weights[kMaxWeights];
  int tile_end[kMaxWeights];  // tiles along n up to and with that weight
  int column[kMaxWeights];    // of the output, where that weight begins
  int tiles_m, tiles_n, splits;
  int m;
  int k_tiles, channel_blocks;
  int packed_tile;                          // bytes of a channel block as it is stored
  int shift;                                // of sums of packed weights
  float unscale;                            // the same as a factor, for floating sums
  bool rows;
  int out_w, out_hw, kernel_s, stride_h, stride_w, dilation_h, dilation_w;
  const float* row_scale;
  const float* row_zero_point;
  int64_t row_stride;
  const void* residual;
  Float residual_type;
  int64_t residual_stride;
  int residual_rows;
  bool residual_aligned;
  void* out;
  Float out_type;
  int64_t out_stride;
  bool out_aligned;  // each weight's columns can be written in pieces of 16 bytes
};

struct Tile {
  int m0, weight, n0;
};

__device__ __forceinline__ uint32_t pack2(Float type, float a, float b) {
  if (type == Float::f16) {
    __half2 v = __floats2half2_rn(a, b);
    return *reinterpret_cast<uint32_t*>(&v);
  }
  __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
  return *reinterpret_cast<uint32_t*>(&v);
}

__device__ __forceinline__ float2 unpack2(Float type, uint32_t v) {
  if (type == Float::f16) return __half22float2(*reinterpret_cast<__half2*>(&v));
  return __bfloat1622float2(*reinterpret_cast<__nv_bfloat162*>(&v));
}

template <class C>
__device__ __forceinline__ Tile locate(const Params& p, int index) {
  int band = kRaster * p.tiles_n;
  int first = index / band * kRaster;
  int high = min(p.tiles_m - first, kRaster);
  int within = index % band;
  int tile_n = within / high, weight = 0, begin = 0;
  while (tile_n >= p.tile_end[weight]) begin = p.tile_end[weight++];
  return {(first + within % high) * C::kTileM, weight, (tile_n - begin) * C::kTileN};
}

// Where the pipeline stands: the stage, and which of its uses.
template <class C>
struct Turn {
  int stage = 0, phase = 0;
  __device__ __forceinline__ void next(int count = 1) {
    stage += count;
    phase ^= (stage / C::kStages) & 1;
    stage %= C::kStages;
  }
  __device__ __forceinline__ void step() {
    if (++stage == C::kStages) stage = 0, phase ^= 1;
  }
};

template <class C>
struct Shared {
  uint8_t* base;
  __device__ explicit Shared(uint8_t* raw) : base(raw + (-cute::cast_smem_ptr_to_uint(raw) & 1023)) {}
  __device__ uint8_t* input(int stage) const { return base + stage * C::kInputBytes; }
  __device__ uint8_t* weight(int stage) const { return base + C::kStages * C::kInputBytes + stage * C::kWeightBytes; }
  __device__ uint8_t* packed(int stage) const {
    return base + C::kStages * (C::kInputBytes + C::kWeightBytes) + stage * C::kPackedBytes;
  }
  __device__ uint8_t* staging(int warp) const {
    return base + C::kStages * C::kStageBytes + warp * 16 * C::kStagingRow;
  }
  __device__ float* vectors(int group) const {
    return reinterpret_cast<float*>(base + C::kStages * C::kStageBytes + C::kStagingBytes) + group * 3 * C::kTileN;
  }
  __device__ uint64_t* full(int stage) const {
    return reinterpret_cast<uint64_t*>(base + C::kStages * C::kStageBytes + C::kStagingBytes + C::kVectorBytes) + stage;
  }
  __device__ uint64_t* empty(int stage) const { return full(C::kStages + stage); }
  __device__ uint64_t* packed_full(int stage) const { return full(2 * C::kStages + stage); }
  __device__ auto* sums() const { return reinterpret_cast<typename C::Math::Sum*>(base); }
};

// --- loading ----------------------------------------------------------------------------------------------------------

struct Reduction {
  int begin, count;
};

// A step of it: a block of the channels of one tap. Counted on: one thread loads for all and has no time to divide.
struct Step {
  int block, tap, r, s;
  __device__ Step(const Params& p, int k)
      : block(k % p.channel_blocks), tap(k / p.channel_blocks), r(tap / p.kernel_s), s(tap % p.kernel_s) {}
  __device__ __forceinline__ void next(const Params& p) {
    if (++block < p.channel_blocks) return;
    block = 0, ++tap;
    if (++s == p.kernel_s) s = 0, ++r;
  }
};

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
  const void* map = &p.weight_maps[t.weight];
  if constexpr (C::packed) {
    FullBarrier::arrive_and_expect_tx(sm.packed_full(stage), C::kTileN * p.packed_tile);
    cute::SM90_TMA_LOAD_3D::copy(map, sm.packed_full(stage), kKeep, sm.packed(stage), step.block * p.packed_tile,
                                 step.tap, t.n0);
    FullBarrier::arrive_and_expect_tx(sm.full(stage), C::kInputBytes);
  } else {
    FullBarrier::arrive_and_expect_tx(sm.full(stage), C::kInputBytes + C::kWeightBytes);
    cute::SM90_TMA_LOAD_3D::copy(map, sm.full(stage), kKeep, sm.weight(stage), step.block * kRowBytes, step.tap, t.n0);
  }
}

template <class C>
__device__ __forceinline__ void load_input(const Params& p, const Shared<C>& sm, int stage, int m0, const Origin& from,
                                           const Step& step) {
  if (p.rows) {
    constexpr uint64_t kKeep = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
    cute::SM90_TMA_LOAD_2D::copy(&p.input, sm.full(stage), kKeep, sm.input(stage), step.block * kRowBytes, m0);
    return;
  }
  auto dy = uint16_t(step.r * p.dilation_h), dx = uint16_t(step.s * p.dilation_w);
  cute::SM90_TMA_LOAD_IM2COL_4D::copy(&p.input, sm.full(stage), sm.input(stage), step.block * kRowBytes, from.x, from.y,
                                      from.image, dx, dy);
}

// One thread.
template <class C>
__device__ void produce(const Params& p, const Shared<C>& sm, int first, int stride, int tiles, Reduction r) {
  cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&p.input));
  Tile t = locate<C>(p, first);
  const int ahead = min(C::kStages, r.count);
  const Step begin(p, r.begin);
  Step early = begin;
  for (int i = 0; i < ahead; ++i, early.next(p)) load_weight(p, sm, i, t, early);
  wait_for_previous();
  let_next_start();  // its weights may come while this one multiplies
  Turn<C> turn;
  bool warm = true;
  for (int index = first; index < tiles; index += stride) {
    t = locate<C>(p, index);
    const Origin from(p, t.m0);
    Step step = begin;
    for (int i = 0; i < r.count; ++i, turn.step(), step.next(p)) {
      warm = warm && i < ahead;
      if (!warm) {
        EmptyBarrier::wait(sm.empty(turn.stage), turn.phase ^ 1);
        load_weight(p, sm, turn.stage, t, step);
      }
      load_input(p, sm, turn.stage, t.m0, from, step);
    }
    warm = false;
  }
}

// Eight 4-bit codes to bytes, in order, each in the high half.
__device__ __forceinline__ uint2 spread4(uint32_t v) {
  uint32_t even = (v << 4) & 0xF0F0F0F0u, odd = v & 0xF0F0F0F0u;
  return {__byte_perm(even, odd, 0x5140), __byte_perm(even, odd, 0x7362)};
}

// Four bytes of 2-bit codes to sixteen bytes, in order, each in the highest two bits.
__device__ __forceinline__ uint4 spread2(uint32_t v) {
  uint32_t a = (v << 6) & 0xC0C0C0C0u, b = (v << 4) & 0xC0C0C0C0u, c = (v << 2) & 0xC0C0C0C0u, d = v & 0xC0C0C0C0u;
  uint32_t ab_low = __byte_perm(a, b, 0x5140), ab_high = __byte_perm(a, b, 0x7362);
  uint32_t cd_low = __byte_perm(c, d, 0x5140), cd_high = __byte_perm(c, d, 0x7362);
  return {__byte_perm(ab_low, cd_low, 0x5410), __byte_perm(ab_low, cd_low, 0x7632),
          __byte_perm(ab_high, cd_high, 0x5410), __byte_perm(ab_high, cd_high, 0x7632)};
}

// Eight int8 codes to 16-bit floats, exactly.
__device__ __forceinline__ uint4 widen(Float type, uint2 codes) {
  uint32_t words[2] = {codes.x ^ 0x80808080u, codes.y ^ 0x80808080u}, out[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    // 2^23 + (code + 128) as a float has the code in its lowest byte.
    uint32_t a = __byte_perm(words[i / 2], 0x4B000000u, i % 2 ? 0x7652 : 0x7650);
    uint32_t b = __byte_perm(words[i / 2], 0x4B000000u, i % 2 ? 0x7653 : 0x7651);
    out[i] = pack2(type, __uint_as_float(a) - 8388736.f, __uint_as_float(b) - 8388736.f);
  }
  return {out[0], out[1], out[2], out[3]};
}

// The codes that 16 bytes of a row of the tile hold, from their stored form. `piece` counts such places.
template <class C>
__device__ __forceinline__ uint4 spread_piece(const Params& p, const uint8_t* from, int piece) {
  if constexpr (C::Math::kBytes == 1) {
    if (p.shift == 4) {
      uint2 v = reinterpret_cast<const uint2*>(from)[piece];
      uint2 low = spread4(v.x), high = spread4(v.y);
      return {low.x, low.y, high.x, high.y};
    }
    return spread2(reinterpret_cast<const uint32_t*>(from)[piece]);
  } else {
    uint2 codes;
    if (p.shift == 0) {
      codes = reinterpret_cast<const uint2*>(from)[piece];
    } else if (p.shift == 4) {
      codes = spread4(reinterpret_cast<const uint32_t*>(from)[piece]);
    } else {
      uint4 v = spread2(reinterpret_cast<const uint16_t*>(from)[piece]);
      codes = {v.x, v.y};
    }
    return widen(std::is_same_v<typename C::Math, Half> ? Float::f16 : Float::bf16, codes);
  }
}

// Three warps: stored codes of each stage to the swizzled tile that wgmma reads.
template <class C>
__device__ void spread(const Params& p, const Shared<C>& sm, int first, int stride, int tiles, Reduction r) {
  constexpr int kWorkers = 96, kPieces = C::kTileN * (kRowBytes / 16);
  const int worker = threadIdx.x - 32;
  Turn<C> turn;
  for (int index = first; index < tiles; index += stride) {
    for (int i = 0; i < r.count; ++i, turn.step()) {
      FullBarrier::wait(sm.packed_full(turn.stage), turn.phase);
      const uint8_t* from = sm.packed(turn.stage);
      uint8_t* to = sm.weight(turn.stage);
      for (int piece = worker; piece < kPieces; piece += kWorkers) {
        int row = piece / 8, place = (piece % 8) ^ (row % 8);
        *reinterpret_cast<uint4*>(to + row * kRowBytes + place * 16) = spread_piece<C>(p, from, piece);
      }
      cutlass::arch::fence_view_async_shared();
      __syncwarp();
      if (threadIdx.x % 32 == 0) FullBarrier::arrive(sm.full(turn.stage));
    }
  }
}

// --- multiplying ------------------------------------------------------------------------------------------------------

template <class C>
using Sums = typename C::Math::Sum[C::kBlocksM][C::kTileN / 2];

template <class C>
__device__ __forceinline__ void fence_sums(Sums<C>& sums) {
#pragma unroll
  for (int i = 0; i < C::kBlocksM; ++i) {
#pragma unroll
    for (int j = 0; j < C::kTileN / 2; ++j) cute::warpgroup_fence_operand(sums[i][j]);
  }
}

template <class C>
__device__ __forceinline__ void release(const Shared<C>& sm, int stage) {
  if (threadIdx.x % 32 == 0) EmptyBarrier::arrive(sm.empty(stage));
}

__device__ __forceinline__ void sync_group(int group) { cutlass::arch::NamedBarrier::sync(kGroup, 1 + group); }

// Ping-pong: a group begins to multiply when the other one has seen the last stage of its own tile. A stage's barrier
// tells only whether its uses so far are even or odd, so nobody may wait for a use while the one before is outstanding.
__device__ __forceinline__ void await_turn(int group) { cutlass::arch::NamedBarrier::sync(2 * kGroup, 3 + group); }
__device__ __forceinline__ void pass_turn(int group) { cutlass::arch::NamedBarrier::arrive(2 * kGroup, 3 + group); }

// The sums of one tile, or of this block's share of them. Then it is the turn of group `next`, if there is one.
template <class C>
__device__ __forceinline__ void multiply(const Shared<C>& sm, Turn<C>& turn, int count, int row0, Sums<C>& sums,
                                         int next = -1) {
  int before = 0;
  for (int k = 0; k < count; ++k) {
    FullBarrier::wait(sm.full(turn.stage), turn.phase);
    uint64_t a = tile_descriptor(cute::cast_smem_ptr_to_uint(sm.input(turn.stage) + row0 * kRowBytes));
    uint64_t b = tile_descriptor(cute::cast_smem_ptr_to_uint(sm.weight(turn.stage)));
    fence_sums<C>(sums);
    cute::warpgroup_arrive();
#pragma unroll
    for (int s = 0; s < kRowBytes / kStepBytes; ++s) {
#pragma unroll
      for (int i = 0; i < C::kBlocksM; ++i) {
        wgmma<typename C::Math, C::kTileN>(a + i * 512 + s * (kStepBytes / 16), b + s * (kStepBytes / 16), sums[i],
                                           k > 0 || s > 0);
      }
    }
    cute::warpgroup_commit_batch();
    fence_sums<C>(sums);
    cute::warpgroup_wait<1>();
    if (k > 0) release(sm, before);
    before = turn.stage;
    turn.step();
  }
  if (next >= 0) pass_turn(next);
  cute::warpgroup_wait<0>();
  fence_sums<C>(sums);
  release(sm, before);
}

// --- epilogue ---------------------------------------------------------------------------------------------------------

// What the epilogue needs of each column of a tile, in shared memory.
template <class C>
struct Columns {
  float* alpha;
  float* offset;
  int* weight_sum;
  __device__ explicit Columns(float* v)
      : alpha(v), offset(v + C::kTileN), weight_sum(reinterpret_cast<int*>(v + 2 * C::kTileN)) {}
  __device__ void fill(const Weight& w, int n0, int thread, int threads) const {
    for (int i = thread; i < C::kTileN; i += threads) {
      ChannelEpilogue c = n0 + i < w.n ? channel_epilogue(w, n0 + i) : ChannelEpilogue{0.f, 0.f, 0};
      alpha[i] = c.alpha, offset[i] = c.offset, weight_sum[i] = c.weight_sum;
    }
  }
  __device__ ChannelEpilogue operator[](int i) const { return {alpha[i], offset[i], weight_sum[i]}; }
  // Columns i and i + 1, for an even i.
  __device__ void pair(int i, ChannelEpilogue (&c)[2]) const {
    float2 a = *reinterpret_cast<const float2*>(alpha + i), o = *reinterpret_cast<const float2*>(offset + i);
    int2 w = *reinterpret_cast<const int2*>(weight_sum + i);
    c[0] = {a.x, o.x, w.x}, c[1] = {a.y, o.y, w.y};
  }
};

struct Row {
  float scale = 1.f;
  int zero_point = 0;
};

// Where the residual of a row begins.
__device__ __forceinline__ int64_t residual_row(const Params& p, int64_t m) {
  return (p.residual_rows == 1 ? m : unsigned(m) / unsigned(p.residual_rows)) * p.residual_stride;
}

// One output before the residual. `sum` is a register of the accumulator, whatever it counts.
template <class C>
__device__ __forceinline__ float finish(const Params& p, typename C::Math::Sum sum, const ChannelEpilogue& c,
                                        bool dynamic, const Row& row) {
  if constexpr (C::Math::kBytes == 1) {
    int exact = C::packed ? int(sum) >> p.shift : int(sum);
    return apply_epilogue(exact, c, dynamic, row.scale, row.zero_point);
  } else {
    return fmaf(sum * p.unscale, c.alpha, c.offset);
  }
}

__device__ __forceinline__ Row row_of(const Params& p, int64_t m) {
  if (!p.row_scale || m >= p.m) return {};
  return {p.row_scale[m * p.row_stride], int(p.row_zero_point[m * p.row_stride])};
}

// Up to eight 16-bit values between global memory and 16 bytes, those beyond `count` left alone.
__device__ __forceinline__ uint4 load8(const uint16_t* from, int count, bool aligned) {
  if (aligned && count >= 8) return *reinterpret_cast<const uint4*>(from);
  uint16_t v[8] = {};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i < count) v[i] = from[i];
  }
  return {v[0] | uint32_t(v[1]) << 16, v[2] | uint32_t(v[3]) << 16, v[4] | uint32_t(v[5]) << 16,
          v[6] | uint32_t(v[7]) << 16};
}

__device__ __forceinline__ void store8(uint16_t* to, uint4 v, int count, bool aligned) {
  if (aligned && count >= 8) {
    *reinterpret_cast<uint4*>(to) = v;
    return;
  }
  uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i < count) to[i] = uint16_t(words[i / 2] >> (i % 2 * 16));
  }
}

// Where a warp's staging rows hold a piece that begins with column c.
template <class Piece, class C>
__device__ __forceinline__ Piece& staged(uint8_t* staging, int row, int c) {
  return *reinterpret_cast<Piece*>(staging + row * C::kStagingRow + c * 2);
}

// Calls move(row, column, piece) for what exists of the 16 rows and kChunk columns of 16-bit values that a warp stages:
// in pieces of 16 bytes, or one by one where rows are not aligned to them.
template <class C, class Move>
__device__ __forceinline__ void move_rows(int lane, int rows, int columns, bool aligned, Move move) {
  if (aligned) {
    constexpr int kPieces = C::kChunk / 8;
#pragma unroll
    for (int v = lane; v < 16 * kPieces; v += 32) {
      int row = v / kPieces, c = v % kPieces * 8;
      if (row < rows && c < columns) move(row, c, uint4{});
    }
    return;
  }
#pragma unroll 1
  for (int v = lane; v < 16 * C::kChunk; v += 32) {
    int row = v / C::kChunk, c = v % C::kChunk;
    if (row < rows && c < columns) move(row, c, uint16_t{});
  }
}

// The residual of 16-bit outputs: none; of their type, read by way of the staging rows; or float32.
enum class Residual { none, staged, wide };

// 16-bit outputs of a math group from its registers, through the staging rows of each warp. All that could vary between
// launches is a parameter of the template: a branch in here would be repeated for each of up to 80 pairs of registers,
// and the code of one tile would not fit the instruction cache.
template <class C, Float kType, Residual kResidual, bool kDynamic>
__device__ __forceinline__ void write_half(const Params& p, const Tile& t, int row0, const Columns<C>& columns,
                                           const Sums<C>& sums, uint8_t* staging) {
  constexpr int kPieces = C::kChunk / 8;
  const int lane = threadIdx.x % 32, warp = threadIdx.x % kGroup / 32;
  const int columns_left = p.weights[t.weight].n - t.n0;
  const int64_t column = p.column[t.weight] + t.n0;
  auto* out = static_cast<uint16_t*>(p.out) + column;
  auto* residual = static_cast<const uint16_t*>(p.residual) + column;
#pragma unroll
  for (int i = 0; i < C::kBlocksM; ++i) {
    const int64_t m0 = int64_t(t.m0) + row0 + i * 64 + warp * 16;
    const int rows_left = int(p.m - m0);
    Row rows[2];
    const float* wide[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t m = m0 + lane / 4 + h * 8;
      if (kDynamic) rows[h] = row_of(p, m);
      // A row past the end reads what the last one reads, and is not written.
      if (kResidual == Residual::wide) {
        wide[h] = static_cast<const float*>(p.residual) + column + residual_row(p, m < p.m ? m : p.m - 1);
      }
    }
#pragma unroll
    for (int c0 = 0; c0 < C::kTileN; c0 += C::kChunk) {
      if (kResidual == Residual::staged) {
        move_rows<C>(lane, rows_left, columns_left - c0, p.residual_aligned, [&](int row, int c, auto piece) {
          using Piece = decltype(piece);
          const uint16_t* from = residual + residual_row(p, m0 + row) + c0 + c;
          staged<Piece, C>(staging, row, c) = *reinterpret_cast<const Piece*>(from);
        });
        __syncwarp();
      }
#pragma unroll
      for (int j = c0 / 8; j < (c0 + C::kChunk) / 8; ++j) {
        const int c = j * 8 + lane % 4 * 2;
        ChannelEpilogue channels[2];
        columns.pair(c, channels);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          auto& place = staged<uint32_t, C>(staging, lane / 4 + h * 8, c - c0);
          float x = finish<C>(p, sums[i][j * 4 + h * 2], channels[0], kDynamic, rows[h]);
          float y = finish<C>(p, sums[i][j * 4 + h * 2 + 1], channels[1], kDynamic, rows[h]);
          if (kResidual == Residual::staged) {
            float2 r = unpack2(kType, place);
            x += r.x, y += r.y;
          } else if (kResidual == Residual::wide) {
            if (c < columns_left) x += wide[h][c];
            if (c + 1 < columns_left) y += wide[h][c + 1];
          }
          place = pack2(kType, x, y);
        }
      }
      __syncwarp();
      move_rows<C>(lane, rows_left, columns_left - c0, p.out_aligned, [&](int row, int c, auto piece) {
        using Piece = decltype(piece);
        *reinterpret_cast<Piece*>(out + (m0 + row) * p.out_stride + c0 + c) = staged<Piece, C>(staging, row, c);
      });
      __syncwarp();
    }
  }
}

// float32 outputs: a quad of threads writes 32 bytes of a row, so nothing is staged.
template <class C, bool kDynamic>
__device__ __forceinline__ void write_float(const Params& p, const Tile& t, int row0, const Columns<C>& columns,
                                            const Sums<C>& sums) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x % kGroup / 32;
  const int columns_left = p.weights[t.weight].n - t.n0;
  const int64_t column = p.column[t.weight] + t.n0;
#pragma unroll
  for (int i = 0; i < C::kBlocksM; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t m = int64_t(t.m0) + row0 + i * 64 + warp * 16 + h * 8 + lane / 4;
      Row row;
      if (kDynamic) row = row_of(p, m);
      float* out = static_cast<float*>(p.out) + m * p.out_stride + column;
      const float* residual = static_cast<const float*>(p.residual) + residual_row(p, m) + column;
#pragma unroll
      for (int j = 0; j < C::kTileN / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int c = j * 8 + lane % 4 * 2 + e;
          if (m >= p.m || c >= columns_left) continue;
          float y = finish<C>(p, sums[i][j * 4 + h * 2 + e], columns[c], kDynamic, row);
          out[c] = p.residual ? y + residual[c] : y;
        }
      }
    }
  }
}

// Picks the instance for the residual of this launch; write_tile picks the one for its output type.
template <class C, Float kType, bool kDynamic>
__device__ __forceinline__ void write_half_of(const Params& p, const Tile& t, int row0, const Columns<C>& columns,
                                                const Sums<C>& sums, uint8_t* staging) {
  if (!p.residual) {
    write_half<C, kType, Residual::none, kDynamic>(p, t, row0, columns, sums, staging);
  } else if (p.residual_type != Float::f32) {
    write_half<C, kType, Residual::staged, kDynamic>(p, t, row0, columns, sums, staging);
  } else {
    write_half<C, kType, Residual::wide, kDynamic>(p, t, row0, columns, sums, staging);
  }
}

template <class C, bool kDynamic>
__device__ __forceinline__ void write_tile(const Params& p, const Tile& t, int row0, const Columns<C>& columns,
                                           const Sums<C>& sums, uint8_t* staging) {
  if (p.out_type == Float::f16) {
    write_half_of<C, Float::f16, kDynamic>(p, t, row0, columns, sums, staging);
  } else if (p.out_type == Float::bf16) {
    write_half_of<C, Float::bf16, kDynamic>(p, t, row0, columns, sums, staging);
  } else {
    write_float<C, kDynamic>(p, t, row0, columns, sums);
  }
}

// Outputs of a single tile, whose sums lie in the shared memory of the blocks of the cluster: each block adds up and
// writes its share of the rows.
template <class C>
__device__ __forceinline__ void write_shared(const Params& p, const Shared<C>& sm, const Tile& t, int rank) {
  namespace cg = cooperative_groups;
  const Columns<C> columns(sm.vectors(0));
  const int columns_left = p.weights[t.weight].n - t.n0, share = C::kTileM / p.splits;
  const int64_t column = p.column[t.weight] + t.n0;
  for (int v = threadIdx.x; v < share * (C::kTileN / 8); v += C::kThreads) {
    const int row = rank * share + v / (C::kTileN / 8), c = v % (C::kTileN / 8) * 8;
    const int64_t m = int64_t(t.m0) + row;
    if (m >= p.m || c >= columns_left) continue;
    using Sum = typename C::Math::Sum;
    Sum sums[8] = {};
    for (int block = 0; block < p.splits; ++block) {
      Sum* from = sm.sums() + row * C::kSumsRow + c;
      if (p.splits > 1) from = cg::this_cluster().map_shared_rank(from, block);
      alignas(16) Sum part[8];
      reinterpret_cast<uint4*>(part)[0] = reinterpret_cast<uint4*>(from)[0];
      reinterpret_cast<uint4*>(part)[1] = reinterpret_cast<uint4*>(from)[1];
#pragma unroll
      for (int e = 0; e < 8; ++e) sums[e] += part[e];
    }
    const Row of_row = row_of(p, m);
    float y[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      y[e] = finish<C>(p, sums[e], columns[c + e], p.row_scale, of_row);
    }
    const int64_t at = m * p.out_stride + column + c, from = residual_row(p, m) + column + c;
    const int count = columns_left - c;
    if (p.residual && p.residual_type == Float::f32) {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if (e < count) y[e] += static_cast<const float*>(p.residual)[from + e];
      }
    } else if (p.residual) {
      uint4 r = load8(static_cast<const uint16_t*>(p.residual) + from, count, p.residual_aligned);
      uint32_t words[4] = {r.x, r.y, r.z, r.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float2 pair = unpack2(p.residual_type, words[e]);
        y[2 * e] += pair.x, y[2 * e + 1] += pair.y;
      }
    }
    if (p.out_type == Float::f32) {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if (e < count) static_cast<float*>(p.out)[at + e] = y[e];
      }
    } else {
      uint4 v8 = {pack2(p.out_type, y[0], y[1]), pack2(p.out_type, y[2], y[3]), pack2(p.out_type, y[4], y[5]),
                  pack2(p.out_type, y[6], y[7])};
      store8(static_cast<uint16_t*>(p.out) + at, v8, count, p.out_aligned);
    }
  }
}

// --- kernel -----------------------------------------------------------------------------------------------------------
//
// Warps part by an index that the compiler knows to be one for all their threads: only then do the descriptors of wgmma
// stay in uniform registers, and TMA is issued without a loop over the threads that might ask for it.

template <class C>
__device__ __forceinline__ void start_barriers(const Shared<C>& sm) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < C::kStages; ++i) {
      FullBarrier::init(sm.full(i), C::packed ? 4 : 1);
      EmptyBarrier::init(sm.empty(i), C::turns == Turns::cooperative ? 8 : 4);
      if constexpr (C::packed) FullBarrier::init(sm.packed_full(i), 1);
    }
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
}

template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T first, second;
};

template <class C>
__device__ __forceinline__ void run_single(const Params& p, const Shared<C>& sm) {
  const int rank = blockIdx.x % p.splits, index = blockIdx.x / p.splits;
  const Reduction r = {p.k_tiles * rank / p.splits, p.k_tiles * (rank + 1) / p.splits - p.k_tiles * rank / p.splits};
  const int thread = threadIdx.x % kGroup, warp = cutlass::canonical_warp_idx_sync();
  const Tile t = locate<C>(p, index);
  if (warp < kGroup / 32) {
    if (warp == 0) {
      if (cute::elect_one_sync()) produce(p, sm, index, 1, index + 1, r);
    } else if (C::packed) {
      spread(p, sm, index, 1, index + 1, r);
    }
    __syncwarp();
    wait_for_previous();
  } else {
    wait_for_previous();
    Columns<C>(sm.vectors(0)).fill(p.weights[t.weight], t.n0, thread, kGroup);
    Turn<C> turn;
    Sums<C> sums;
    multiply(sm, turn, r.count, 0, sums);
    sync_group(0);  // every warp is done with the stages
    const int lane = thread % 32;
#pragma unroll
    for (int i = 0; i < C::kBlocksM; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        auto* row = sm.sums() + (i * 64 + thread / 32 * 16 + h * 8 + lane / 4) * C::kSumsRow + lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < C::kTileN / 8; ++j) {
          Pair<typename C::Math::Sum> pair = {sums[i][j * 4 + h * 2], sums[i][j * 4 + h * 2 + 1]};
          *reinterpret_cast<decltype(pair)*>(row + j * 8) = pair;
        }
      }
    }
  }
  if (p.splits > 1) {
    cooperative_groups::this_cluster().sync();
  } else {
    __syncthreads();
  }
  write_shared<C>(p, sm, t, rank);
  if (p.splits > 1) {  // others may still read this block's sums; what it wrote need not have arrived
    __syncwarp();
    cute::cluster_arrive_relaxed();
    cute::cluster_wait();
  }
}

template <class C>
__device__ __forceinline__ void run_persistent(const Params& p, const Shared<C>& sm) {
  const int tiles = p.tiles_m * p.tiles_n, stride = gridDim.x;
  const Reduction r = {0, p.k_tiles};
  const int warp = cutlass::canonical_warp_idx_sync();
  if (warp < kGroup / 32) {
    cutlass::arch::warpgroup_reg_dealloc<40>();
    if (warp == 0) {
      if (cute::elect_one_sync()) produce(p, sm, blockIdx.x, stride, tiles, r);
    } else if (C::packed) {
      spread(p, sm, blockIdx.x, stride, tiles, r);
    }
    return;
  }
  cutlass::arch::warpgroup_reg_alloc<232>();
  wait_for_previous();
  const int group = warp / (kGroup / 32) - 1;
  const int row0 = C::turns == Turns::cooperative ? group * C::kBlocksM * 64 : 0;
  const Columns<C> columns(sm.vectors(group));
  uint8_t* staging = sm.staging(group * 4 + threadIdx.x % kGroup / 32);
  Turn<C> turn;
  int mine = C::turns == Turns::ping_pong ? group : 0;  // tiles until this group's next turn
  for (int index = blockIdx.x; index < tiles; index += stride) {
    if (C::turns == Turns::ping_pong && mine-- != 0) {
      turn.next(r.count);
      continue;
    }
    if (C::turns == Turns::ping_pong) mine = 1;
    const Tile t = locate<C>(p, index);
    sync_group(group);  // every warp is done with the columns of the tile before
    columns.fill(p.weights[t.weight], t.n0, threadIdx.x % kGroup, kGroup);
    sync_group(group);
    Sums<C> sums;
    if (C::turns == Turns::ping_pong && index != int(blockIdx.x)) await_turn(group);
    const bool pass = C::turns == Turns::ping_pong && index + stride < tiles;
    multiply(sm, turn, r.count, row0, sums, pass ? 1 - group : -1);
    if (C::Math::kBytes == 1 && p.row_scale) {  // floating activations have no scales
      write_tile<C, true>(p, t, row0, columns, sums, staging);
    } else {
      write_tile<C, false>(p, t, row0, columns, sums, staging);
    }
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocksPerSm) matmul(const __grid_constant__ Params p) {
#ifdef CUTLASS_ARCH_MMA_SM90A_ENABLED
  extern __shared__ uint8_t raw[];
  const Shared<C> sm(raw);
  start_barriers(sm);
  if constexpr (C::turns == Turns::single) {
    run_single<C>(p, sm);
  } else {
    run_persistent<C>(p, sm);
  }
#endif
}

template <class C>
cudaError_t run(const Matmul& problem, int splits, const Stream& on) {
  Params p = {};
  if (input_map(problem, C::kTileM, &p.input) != CUDA_SUCCESS) return cudaErrorInvalidValue;
  int column = 0, out_align = 0, element = problem.out_type == Float::f32 ? 4 : 2;
  for (int i = 0; i < problem.weight_count; ++i) {
    const Weight& w = problem.weights[i];
    if (weight_map(problem, w, C::kTileN, &p.weight_maps[i]) != CUDA_SUCCESS) return cudaErrorInvalidValue;
    p.weights[i] = w;
    p.column[i] = column;
    column += w.n;
    out_align |= column;
    p.tiles_n += (w.n + C::kTileN - 1) / C::kTileN;
    p.tile_end[i] = p.tiles_n;
  }
  p.m = int(problem.m());
  p.tiles_m = (p.m + C::kTileM - 1) / C::kTileM;
  p.channel_blocks = (problem.x.channels + C::kTileK - 1) / C::kTileK;
  p.k_tiles = problem.taps() * p.channel_blocks;
  while (splits > p.k_tiles) splits /= 2;  // every block multiplies something
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
  auto aligned = [&](const void* data, int64_t stride) {
    return (reinterpret_cast<uintptr_t>(data) | uintptr_t(stride * element) | uintptr_t(out_align * element)) % 16 == 0;
  };
  p.out_aligned = aligned(p.out, p.out_stride);
  p.residual_aligned = aligned(p.residual, p.residual_stride);

  static bool ready[64] = {};  // by device; setting it twice does no harm
  if (!ready[on.device % 64]) {
    auto* kernel = reinterpret_cast<const void*>(&matmul<C>);
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes);
    if (error != cudaSuccess) return error;
    ready[on.device % 64] = true;
  }
  Grid grid;
  grid.threads = C::kThreads;
  grid.shared_bytes = C::kSharedBytes;
  const int tiles = p.tiles_m * p.tiles_n;
  if (C::turns == Turns::single) {
    grid.blocks = tiles * splits;
    grid.cluster = splits;
  } else {
    grid.blocks = tiles < on.sm_count ? tiles : on.sm_count;
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

// The same for floating activations: one instance for each type.
#define MIXDQ_SM90_FLOATING_INSTANCE(NAME, TILE_M, TILE_N, TURNS)                                      \
  cudaError_t mixdq::NAME(const Matmul& problem, int splits, const Stream& on) {                       \
    using namespace mixdq::sm90;                                                                       \
    if (problem.x_type == Float::f16) {                                                                \
      return run<Config<TILE_M, TILE_N, Turns::TURNS, true, Half>>(problem, splits, on);               \
    }                                                                                                  \
    return run<Config<TILE_M, TILE_N, Turns::TURNS, true, Bfloat16>>(problem, splits, on);             \
  }
