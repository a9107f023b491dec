// What the parts of a kernel share: its configuration and parameters, the tiles, and the stages that data passes through.
#pragma once
#include "cute/arch/util.hpp"
#include "cutlass/arch/barrier.h"
#include "device.cuh"
#include "sm90/tensor_map.h"
#include "sm90/wgmma.cuh"

namespace mixdq::sm90 {

using FullBarrier = cutlass::arch::ClusterTransactionBarrier;
using EmptyBarrier = cutlass::arch::ClusterBarrier;

constexpr int kStepBytes = 32;  // of a row, that one instruction multiplies
constexpr int kRaster = 16;     // tile rows that are walked together, so that their inputs stay in the L2 cache
constexpr int kGroup = 128;     // threads of a warpgroup

// GEGLU computes with 16 values and their gates of a row at a time, as 16-bit floats in shared memory.
constexpr int kPart = 16, kPartPitch = 4 * kPart;

enum class Turns { single, sharing, ping_pong, pairs, cooperative };

template <int TileM, int TileN, Turns turns_, bool Packed, class Math_ = Int8, bool Geglu_ = false, bool Quantizes = false>
struct Config {
  using Math = Math_;
  static constexpr int kTileM = TileM, kTileN = TileN;
  static constexpr Turns turns = turns_;
  static constexpr bool packed = Packed;
  static constexpr bool kQuantizes = Quantizes;
  // What is copied passes through other warps of the block: packed weights, or floats.
  static constexpr bool kPrepares = Packed || Quantizes;
  static constexpr bool kTails = !kPrepares;
  static constexpr bool kGeglu = Geglu_;
  // Columns of the output. Of GEGLU a tile has as many of the values, then the same ones of the gates.
  static constexpr int kTileOut = kGeglu ? TileN / 2 : TileN;
  static constexpr bool kPingPong = turns == Turns::ping_pong || turns == Turns::pairs;
  static constexpr bool kSharing = turns == Turns::sharing || turns == Turns::pairs;
  static constexpr bool kOneTile = turns == Turns::single || turns == Turns::sharing;  // of a block
  // A large tile that is split has a group for each 64 rows, as many threads as can to write and add up its sums.
  static constexpr bool kLarge = TileM * TileN > 128 * 64;
  static constexpr int kMathGroups = turns == Turns::single && !kLarge ? 1 : kOneTile ? TileM / 64 : 2;
  // Of the threads that load and prepare: quantizing is most of the work where it is done.
  static constexpr int kFeedGroups = kQuantizes ? 2 : 1, kFeedWarps = kFeedGroups * kGroup / 32;
  static constexpr int kPreparers = kFeedWarps - 1;  // warps; one of those that feed copies
  static constexpr int kThreads = kGroup * (kMathGroups + kFeedGroups);
  // What is prepared is a while under way, first from memory and then through those warps: that takes more stages than fit
  // twice.
  static constexpr int kBlocksPerSm = kOneTile && !kPrepares && !kLarge ? 2 : 1;
  // Rows of one math group, in blocks of the 64 that an instruction takes.
  static constexpr int kBlocksM = (kPingPong ? TileM : TileM / kMathGroups) / 64;

  static constexpr int kTileK = kRowBytes / Math::kBytes;  // channels of a step of the reduction
  static constexpr int kInputBytes = TileM * kRowBytes;
  static constexpr int kWeightBytes = TileN * kRowBytes;
  static constexpr int kRawBytes = Packed ? TileN * kRowBytes / 2 : Quantizes ? TileM * kTileK * 2 : 0;
  static constexpr int kStageBytes = kInputBytes + kWeightBytes + kRawBytes;

  // Epilogue: 16-bit outputs leave a warp's registers by way of buffers, kChunk columns at a time, and codes all at once.
  // Where a block has one tile those, or the sums of a split reduction, take the place of the stages.
  static constexpr int kWarpRows = 16 * kBlocksM;
  static constexpr int kChunk = TileN % 32 == 0 ? 32 : 16;
  static constexpr int kBufferBytes = kWarpRows * (kGeglu ? kTileOut + kPartPitch : kChunk * 2);
  static constexpr int kSumsRow = TileN + 8;

  static constexpr int kVectorBytes = kMathGroups * TileN * 12;
  static constexpr int kBudget = kBlocksPerSm == 2 ? 113 * 1024 : 227 * 1024;
  static constexpr int staging_bytes(int buffers) {
    return kOneTile ? 0 : kMathGroups * 4 * buffers * kBufferBytes;
  }
  static constexpr int fit(int buffers) {
    return (kBudget - (1024 + staging_bytes(buffers) + kVectorBytes + 512)) / kStageBytes;
  }
  // One tile has buffers for all of it. Else a second one, if that does not cost a stage.
  static constexpr int kBuffers = kOneTile ? TileN / kChunk : fit(2) < fit(1) ? 1 : 2;
  static constexpr int kStagingBytes = staging_bytes(kBuffers);
  static constexpr int kFixedBytes = 1024 + kStagingBytes + kVectorBytes + 512;
  static constexpr int kStages = fit(kBuffers) < 8 ? fit(kBuffers) : 8;
  static constexpr int kSharedBytes = kFixedBytes + kStages * kStageBytes;
  // Where there are no more blocks than multiprocessors, each has one to itself: a little more shared memory than a half,
  // which leaves room for a block of the next kernel if that is another one, but not for a second of this one.
  static constexpr int kAloneBytes = kBlocksPerSm == 2 ? 113 * 1024 + 256 : kSharedBytes;
  static_assert(kSharedBytes <= kAloneBytes);
  static_assert(kStages >= 3 && 3 * kStages * 8 <= 512);
  static_assert(turns != Turns::single || TileM * kSumsRow * 4 <= kStages * kStageBytes);
  static_assert(!kGeglu || !kOneTile && kTileOut % kPart == 0 && kBufferBytes % 128 == 0);
  static_assert(!Quantizes || kOneTile && !Packed && Math::kBytes == 1);
};

struct Params {
  CUtensorMap input;
  CUtensorMap weight_maps[kMaxWeights];
  CUtensorMap input_tail, weight_tail;
  CUtensorMap out_maps[kMaxWeights];
  Weight weights[kMaxWeights];
  int tile_end[kMaxWeights];  // tiles along n up to and with that weight
  int column[kMaxWeights];    // of the output, where that weight begins
  int tiles_m, tiles_n;
  Divider band_tiles, last_rows;  // tiles of kRaster rows of them; rows of the last band
  int splits;  // of the reduction; of a sharing kernel, the blocks of a cluster
  int m;
  int channel_blocks, taps;                 // blocks of whole rows of a tap's channels
  int whole_steps, steps;                   // of the reduction: of whole rows, with the tails of the taps behind them
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
  bool bulk_out;     // and by bulk copies: 16-bit outputs and, if there is one, an aligned residual of their type
  Quantizer geglu, quantizer;
  const void* x;  // what is quantized
  Float x_type;
  int64_t x_stride;
  int channels;
  Bos bos;
};

// Steps of a tile's reduction, the first of which have whole rows.
struct Reduction {
  int begin, count, whole;
  __device__ Reduction(const Params& p, int begin, int end)
      : begin(begin), count(end - begin), whole(min(max(p.whole_steps - begin, 0), count)) {}
};

struct Tile {
  int m0, weight, n0;  // n0: the first of the weight's outputs
};

template <class C>
__device__ __forceinline__ Tile locate(const Params& p, int index) {
  uint32_t within, row, band = p.band_tiles.divide(index, within), tile_n = within / kRaster;
  row = within % kRaster;
  if ((band + 1) * kRaster > p.tiles_m) tile_n = p.last_rows.divide(within, row);
  int weight = 0, begin = 0;
  while (int(tile_n) >= p.tile_end[weight]) begin = p.tile_end[weight++];
  return {int(band * kRaster + row) * C::kTileM, weight, (int(tile_n) - begin) * C::kTileOut};
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
  // What is to be prepared.
  __device__ uint8_t* raw(int stage) const {
    return base + C::kStages * (C::kInputBytes + C::kWeightBytes) + stage * C::kRawBytes;
  }
  __device__ uint8_t* staging(int warp) const {
    return base + (C::kOneTile ? 0 : C::kStages * C::kStageBytes) + warp * C::kBuffers * C::kBufferBytes;
  }
  __device__ float* vectors(int group) const {
    return reinterpret_cast<float*>(base + C::kStages * C::kStageBytes + C::kStagingBytes) + group * 3 * C::kTileN;
  }
  __device__ uint64_t* full(int stage) const {
    return reinterpret_cast<uint64_t*>(base + C::kStages * C::kStageBytes + C::kStagingBytes + C::kVectorBytes) + stage;
  }
  __device__ uint64_t* empty(int stage) const { return full(C::kStages + stage); }
  __device__ uint64_t* raw_full(int stage) const { return full(2 * C::kStages + stage); }
  __device__ auto* sums() const { return reinterpret_cast<typename C::Math::Sum*>(base); }
};

}  // namespace mixdq::sm90
