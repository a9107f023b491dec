// From the sums of a tile to its outputs.
#pragma once
#include <cooperative_groups.h>
#include "cute/arch/copy_sm90.hpp"
#include "cute/arch/copy_sm90_tma.hpp"
#include "sm90/halves.cuh"
#include "sm90/multiply.cuh"

namespace mixdq::sm90 {

// What the epilogue needs of each column of a tile, in shared memory.
template <class C>
struct Columns {
  float2* scale;  // alpha, offset
  int* weight_sum;
  __device__ explicit Columns(float* v)
      : scale(reinterpret_cast<float2*>(v)), weight_sum(reinterpret_cast<int*>(v + 2 * C::kTileN)) {}
  __device__ ChannelEpilogue operator[](int i) const { return {scale[i].x, scale[i].y, weight_sum[i]}; }
  // Columns i and i + 1, for an even i.
  __device__ __forceinline__ void pair(int i, bool dynamic, ChannelEpilogue (&c)[2]) const {
    float4 s = *reinterpret_cast<const float4*>(scale + i);
    int2 w = dynamic ? *reinterpret_cast<const int2*>(weight_sum + i) : int2{0, 0};
    c[0] = {s.x, s.y, w.x}, c[1] = {s.z, s.w, w.y};
  }
};

// A thread's share of them on the way there: asked for before a tile is multiplied, and looked at only afterwards, since
// whoever converts the bias waits for it.
template <class C>
struct ColumnLoads {
  static constexpr int kEach = (C::kTileN + kGroup - 1) / kGroup;
  struct Column {
    float alpha, beta;
    uint32_t bias;  // its bits
    int weight_sum;
  };
  Column values[kEach];

  // The row of the weight in column i of a tile; w.n or more where there is none.
  static __device__ __forceinline__ int weight_row(const Weight& w, int n0, int i) {
    if constexpr (!C::kGeglu) return n0 + i;
    const int half = w.n / 2, n = n0 + i % C::kTileOut;
    return n < half ? n + i / C::kTileOut * half : w.n;
  }
  __device__ __forceinline__ void load(const Weight& w, int n0) {
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int i = threadIdx.x % kGroup + e * kGroup, row = weight_row(w, n0, i);
      values[e] = {};
      if (i >= C::kTileN || row >= w.n) continue;
      values[e].alpha = w.alpha[row];
      if (w.beta) values[e].beta = w.beta[row];
      if (w.weight_sum) values[e].weight_sum = w.weight_sum[row];
      if (w.bias) values[e].bias = load_bits(w.bias, w.bias_type, row);
    }
  }
  __device__ __forceinline__ void store(const Columns<C>& to, Float bias_type) const {
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int i = threadIdx.x % kGroup + e * kGroup;
      if (i >= C::kTileN) continue;
      to.scale[i] = {values[e].alpha, values[e].beta + float_of_bits(values[e].bias, bias_type)};
      to.weight_sum[i] = values[e].weight_sum;
    }
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
    __stwb(reinterpret_cast<uint4*>(to), v);  // an assignment becomes four stores where the words come from branches
    return;
  }
  uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i < count) to[i] = uint16_t(words[i / 2] >> (i % 2 * 16));
  }
}

// The rows of a tile that a math warp has in its registers, one behind the other.
//
// A thread has two columns in every eight of the rows (i, h): of block i, and there of half h of the warp's 16 rows.
// input_descriptor() makes the blocks' rows alternate in eights.
template <class C>
struct WarpTile {
  int lane, row0, columns;  // row0: of the output; columns: of the weight, from the tile's first on
  int64_t column;           // of the output

  // `warp`: of the group, and one for all its threads to the compiler's knowledge.
  __device__ WarpTile(const Params& p, const Tile& t, int group_row, int warp)
      : lane(threadIdx.x % 32),
        row0(t.m0 + group_row + warp * C::kWarpRows),
        columns(p.weights[t.weight].n - t.n0),
        column(p.column[t.weight] + t.n0) {}
  __device__ static int row(int in_eight, int i, int h) { return (h * C::kBlocksM + i) * 8 + in_eight; }
  __device__ int64_t m(int i, int h) const { return int64_t(row0) + row(lane / 4, i, h); }
};

// 16-bit residuals of kColumns columns, as the sums lie in the registers.
template <class C, int kColumns>
struct Residuals {
  uint32_t pairs[C::kBlocksM][kColumns / 8][2];

  __device__ __forceinline__ void load(const Params& p, const WarpTile<C>& at, int first) {
    auto* from = static_cast<const uint16_t*>(p.residual) + at.column + first + at.lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < C::kBlocksM; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t m = at.m(i, h);  // a row past the end reads what the last one reads, and is not written
        const uint16_t* row = from + residual_row(p, m < p.m ? m : p.m - 1);
#pragma unroll
        for (int j = 0; j < kColumns / 8; ++j) {
          const bool there = first + j * 8 < at.columns;  // with bulk_out there are whole eights
          pairs[i][j][h] = there ? *reinterpret_cast<const uint32_t*>(row + j * 8) : 0;
        }
      }
    }
  }
};

// Those of a tile whose sums leave registers free come before it is multiplied; else they come chunk by chunk.
template <class C>
constexpr bool kEarlyResiduals = !C::kGeglu && C::kBlocksM * C::kTileN <= 160;

template <class C>
using EarlyResiduals = Residuals<C, kEarlyResiduals<C> ? C::kTileN : 8>;

// Buffers of a warp in shared memory: each for some columns of its rows, as the tensor map of the output has them, from
// where a bulk copy takes them away. They take turns; a block's only tile fills them all before any copy begins.
template <class C>
struct Staging {
  static constexpr int kColumns = C::kGeglu ? C::kTileOut : C::kChunk;  // of a buffer
  static constexpr int kBytes = C::kGeglu ? 1 : 2;                      // of an output
  uint8_t* memory;
  int turn = 0;

  // The buffer for the columns from c0 on, which becomes the one in hand.
  __device__ __forceinline__ uint8_t* next(int c0) {
    if (!C::kOneTile) {
      if (C::kBuffers > 1) turn ^= 1;
      if (cute::elect_one_sync()) cute::tma_store_wait<C::kBuffers - 1>();  // what was in this one has been read
      __syncwarp();
    }
    return in_hand(c0);
  }
  __device__ __forceinline__ uint8_t* in_hand(int c0) const {
    return memory + (C::kOneTile ? c0 / C::kChunk : turn) * C::kBufferBytes;
  }
  // Copies the tile's columns first to end, which begin in the buffer in hand.
  __device__ __forceinline__ void send(const Params& p, const Tile& t, const WarpTile<C>& at, int first, int end) const {
    cutlass::arch::fence_view_async_shared();
    __syncwarp();
    if (!cute::elect_one_sync()) return;  // always the same thread, which the bulk copies belong to
    if (at.row0 < p.m) {
      const uint8_t* buffer = in_hand(first);
      for (int c = first; c < end; c += kColumns, buffer += C::kBufferBytes) {
        cute::SM90_TMA_STORE_2D::copy(&p.out_maps[t.weight], buffer, (t.n0 + c) * kBytes, at.row0);
      }
    }
    cute::tma_store_arrive();
  }
  // Shared memory must outlive what is still to be read there.
  __device__ __forceinline__ void finish() const {
    if (cute::elect_one_sync()) cute::tma_store_wait<0>();
  }
};

// 16-bit outputs. All that could vary between launches is a parameter of the template: a branch in here would be
// repeated for each of up to 80 pairs of registers, and long code does not stay in the instruction cache.
template <class C, Float kType, bool kResidual, bool kDynamic>
__device__ __forceinline__ void write_half(const Params& p, const Tile& t, const WarpTile<C>& at,
                                           const Columns<C>& columns, const Sums<C>& sums,
                                           const EarlyResiduals<C>& early, Staging<C>& staging) {
  constexpr int kPitch = C::kChunk * 2;
  const int lane = at.lane;
  Row rows[C::kBlocksM][2];
  if (kDynamic) {
#pragma unroll
    for (int i = 0; i < C::kBlocksM; ++i) rows[i][0] = row_of(p, at.m(i, 0)), rows[i][1] = row_of(p, at.m(i, 1));
  }
  // The row that this lane names of stmatrix's four matrices, which are both halves of eight columns, then of the next.
  const int my_row = WarpTile<C>::row(lane % 8, 0, lane / 8 % 2);
  const int swizzle = C::kChunk == 32 ? my_row >> 1 & 3 : my_row >> 2 & 1;
  const int place = my_row * kPitch + ((lane / 16 ^ swizzle) << 4);
  // Asked for a chunk ahead: shared memory answers in the order in which it is asked, and stores are in front otherwise.
  ChannelEpilogue of_chunk[C::kChunk / 8][2];
  auto load_channels = [&](int c0) {
#pragma unroll
    for (int c = 0; c < C::kChunk; c += 8) columns.pair(c0 + c + lane % 4 * 2, kDynamic, of_chunk[c / 8]);
  };
  load_channels(0);
#pragma unroll
  for (int c0 = 0; c0 < C::kTileN; c0 += C::kChunk) {
    if (c0 >= at.columns) break;
    Residuals<C, C::kChunk> late;
    if (kResidual && !kEarlyResiduals<C>) late.load(p, at, c0);
    uint32_t out[C::kChunk / 16][C::kBlocksM][4];
#pragma unroll
    for (int c = 0; c < C::kChunk; c += 16) {
#pragma unroll
      for (int i = 0; i < C::kBlocksM; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int j = c / 8 + e / 2, h = e % 2, from = (c0 / 8 + j) * 4 + h * 2;
          float x = finish<C>(p, sums[i][from], of_chunk[j][0], kDynamic, rows[i][h]);
          float y = finish<C>(p, sums[i][from + 1], of_chunk[j][1], kDynamic, rows[i][h]);
          if constexpr (kResidual) {
            uint32_t pair;
            if constexpr (kEarlyResiduals<C>) {
              pair = early.pairs[i][c0 / 8 + j][h];
            } else {
              pair = late.pairs[i][j][h];
            }
            float2 r = unpack2(kType, pair);
            x += r.x, y += r.y;
          }
          out[c / 16][i][e] = pack2(kType, x, y);
        }
      }
    }
    if (c0 + C::kChunk < C::kTileN) load_channels(c0 + C::kChunk);
    // The columns before leave only now: what the fence waits for has happened while these were computed.
    if (!C::kOneTile && c0 > 0) staging.send(p, t, at, c0 - C::kChunk, c0);
    uint8_t* buffer = staging.next(c0);
#pragma unroll
    for (int c = 0; c < C::kChunk; c += 16) {
#pragma unroll
      for (int i = 0; i < C::kBlocksM; ++i) {
        const uint32_t(&o)[4] = out[c / 16][i];
        uint8_t* to = buffer + (place ^ c * 2) + i * 8 * kPitch;
        cute::SM90_U32x4_STSM_N::copy(o[0], o[1], o[2], o[3], *reinterpret_cast<cute::uint128_t*>(to));
      }
    }
  }
  const int end = min(at.columns, C::kTileN), last = (end - 1) / C::kChunk * C::kChunk;
  staging.send(p, t, at, C::kOneTile ? 0 : last, end);
}

// Four values of any type, from and to places that are aligned for it.
__device__ __forceinline__ float4 load4(const void* from, Float type, int64_t at) {
  if (type == Float::f32) return *reinterpret_cast<const float4*>(static_cast<const float*>(from) + at);
  const uint2 pairs = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(from) + at);
  const float2 low = unpack2(type, pairs.x), high = unpack2(type, pairs.y);
  return {low.x, low.y, high.x, high.y};
}

__device__ __forceinline__ void store4(void* to, Float type, int64_t at, float4 v) {
  if (type == Float::f32) {
    __stwb(reinterpret_cast<float4*>(static_cast<float*>(to) + at), v);
  } else {
    __stwb(reinterpret_cast<uint2*>(static_cast<uint16_t*>(to) + at), uint2{pack2(type, v.x, v.y), pack2(type, v.z, v.w)});
  }
}

// Some columns of a warp's rows as float32, in its buffers.
template <class C>
struct Values {
  static constexpr int kColumns = C::kChunk * C::kBuffers / 2;
  static constexpr int kQuads = kColumns / 4, kEach = C::kWarpRows * kQuads / 32;  // of a row, and of a lane
  static_assert(C::kWarpRows * kQuads % 32 == 0);
  float* memory;

  // Rows that would begin in the same bank are shifted by eights, so that four of them are written without conflict.
  __device__ __forceinline__ float* at(int row, int c) const {
    constexpr int kShifts = kColumns % 32 == 0 ? 3 : kColumns == 16 ? 1 : 0;
    return memory + row * kColumns + (c ^ (row * kColumns / 32 & kShifts) * 8);
  }

  // To the output, from column c0 on, with the residual, of which several are on their way at a time.
  __device__ __forceinline__ void write(const Params& p, const WarpTile<C>& tile, int c0) const {
    constexpr int kAtOnce = 4;
#pragma unroll
    for (int first = 0; first < kEach; first += kAtOnce) {
      float4 y[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce && first + i < kEach; ++i) {
        const int v = (first + i) * 32 + tile.lane, c = v % kQuads * 4;
        const int64_t m = int64_t(tile.row0) + v / kQuads;
        y[i] = {0.f, 0.f, 0.f, 0.f};
        if (p.residual && m < p.m && c0 + c < tile.columns) {
          y[i] = load4(p.residual, p.residual_type, residual_row(p, m) + tile.column + c0 + c);
        }
      }
#pragma unroll
      for (int i = 0; i < kAtOnce && first + i < kEach; ++i) {
        const int v = (first + i) * 32 + tile.lane, c = v % kQuads * 4;
        const int64_t m = int64_t(tile.row0) + v / kQuads;
        if (m >= p.m || c0 + c >= tile.columns) continue;
        const float4 x = *reinterpret_cast<const float4*>(at(v / kQuads, c));
        y[i] = {x.x + y[i].x, x.y + y[i].y, x.z + y[i].z, x.w + y[i].w};
        store4(p.out, p.out_type, m * p.out_stride + tile.column + c0 + c, y[i]);
      }
    }
  }

  // The same one by one, for whatever is not aligned.
  __device__ __forceinline__ void write_each(const Params& p, const WarpTile<C>& tile, int c0) const {
#pragma unroll 1
    for (int v = tile.lane; v < C::kWarpRows * kColumns; v += 32) {
      const int c = c0 + v % kColumns;
      const int64_t m = int64_t(tile.row0) + v / kColumns;
      if (m >= p.m || c >= tile.columns) continue;
      float y = *at(v / kColumns, v % kColumns);
      if (p.residual) y += load_float(p.residual, p.residual_type, residual_row(p, m) + tile.column + c);
      store_float(p.out, p.out_type, m * p.out_stride + tile.column + c, y);
    }
  }
};

// What bulk copies cannot do: float32 outputs, rows that are not aligned, residuals of another type than the output's.
template <class C, bool kDynamic>
__device__ __forceinline__ void write_any(const Params& p, const WarpTile<C>& at, const Columns<C>& columns,
                                          const Sums<C>& sums, uint8_t* staging) {
  const Values<C> values = {reinterpret_cast<float*>(staging)};
  const int lane = at.lane;
  const bool vectors = p.out_aligned && (!p.residual || p.residual_aligned);
#pragma unroll
  for (int c0 = 0; c0 < C::kTileN; c0 += Values<C>::kColumns) {
    __syncwarp();  // all have read the columns before
#pragma unroll
    for (int i = 0; i < C::kBlocksM; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        Row row;
        if (kDynamic) row = row_of(p, at.m(i, h));
#pragma unroll
        for (int j = 0; j < Values<C>::kColumns / 8; ++j) {
          const int c = j * 8 + lane % 4 * 2, from = (c0 / 8 + j) * 4 + h * 2;
          ChannelEpilogue channels[2];
          columns.pair(c0 + c, kDynamic, channels);
          float2 v = {finish<C>(p, sums[i][from], channels[0], kDynamic, row),
                      finish<C>(p, sums[i][from + 1], channels[1], kDynamic, row)};
          *reinterpret_cast<float2*>(values.at(WarpTile<C>::row(lane / 4, i, h), c)) = v;
        }
      }
    }
    __syncwarp();
    if (vectors) {
      values.write(p, at, c0);
    } else {
      values.write_each(p, at, c0);
    }
  }
}

template <class C, Float kType, bool kDynamic>
__device__ __forceinline__ void write_half_of(const Params& p, const Tile& t, const WarpTile<C>& at,
                                              const Columns<C>& columns, const Sums<C>& sums,
                                              const EarlyResiduals<C>& early, Staging<C>& staging) {
  if (p.residual) {
    write_half<C, kType, true, kDynamic>(p, t, at, columns, sums, early, staging);
  } else {
    write_half<C, kType, false, kDynamic>(p, t, at, columns, sums, early, staging);
  }
}

template <class C, bool kDynamic>
__device__ __forceinline__ void write_tile_of(const Params& p, const Tile& t, const WarpTile<C>& at,
                                              const Columns<C>& columns, const Sums<C>& sums,
                                              const EarlyResiduals<C>& early, Staging<C>& staging) {
  if (!p.bulk_out) {
    write_any<C, kDynamic>(p, at, columns, sums, staging.memory);
  } else if (p.out_type == Float::f16) {
    write_half_of<C, Float::f16, kDynamic>(p, t, at, columns, sums, early, staging);
  } else {
    write_half_of<C, Float::bf16, kDynamic>(p, t, at, columns, sums, early, staging);
  }
}

template <class C>
__device__ __forceinline__ void write_tile(const Params& p, const Tile& t, const WarpTile<C>& at,
                                           const Columns<C>& columns, const Sums<C>& sums,
                                           const EarlyResiduals<C>& early, Staging<C>& staging) {
  if (C::Math::kBytes == 1 && p.row_scale) {  // floating activations have no scales
    write_tile_of<C, true>(p, t, at, columns, sums, early, staging);
  } else {
    write_tile_of<C, false>(p, t, at, columns, sums, early, staging);
  }
}

// Outputs of a tile whose reduction was split: its sums lie in the shared memory of the blocks of the cluster, and each
// block adds up and writes its share of the vectors.
template <class C>
__device__ __forceinline__ void write_shared(const Params& p, const Shared<C>& sm, const Tile& t, int rank) {
  namespace cg = cooperative_groups;
  const Columns<C> columns(sm.vectors(0));
  constexpr int kRow = C::kTileN / 8, kAll = C::kTileM * kRow;  // vectors
  constexpr int kParts = 4;                                     // of a sum that are under way at a time
  const int columns_left = p.weights[t.weight].n - t.n0;
  const int64_t column = p.column[t.weight] + t.n0;
  for (int v = kAll * rank / p.splits + threadIdx.x; v < kAll * (rank + 1) / p.splits; v += C::kThreads) {
    const int row = v / kRow, c = v % kRow * 8;
    const int64_t m = int64_t(t.m0) + row;
    if (m >= p.m || c >= columns_left) continue;
    const int64_t at = m * p.out_stride + column + c, from = residual_row(p, m) + column + c;
    const int count = columns_left - c;
    uint4 residual = {};  // asked for first: it comes from farther away than sums
    const bool halves = p.residual && p.residual_type != Float::f32;
    if (halves) residual = load8(static_cast<const uint16_t*>(p.residual) + from, count, p.residual_aligned);
    using Sum = typename C::Math::Sum;
    Sum sums[8] = {};
    for (int block = 0; block < p.splits; block += kParts) {
      alignas(16) Sum parts[kParts][8] = {};
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        if (block + i >= p.splits) break;
        const Sum* theirs = cg::this_cluster().map_shared_rank(sm.sums() + row * C::kSumsRow + c, block + i);
        reinterpret_cast<uint4*>(parts[i])[0] = reinterpret_cast<const uint4*>(theirs)[0];
        reinterpret_cast<uint4*>(parts[i])[1] = reinterpret_cast<const uint4*>(theirs)[1];
      }
#pragma unroll
      for (int e = 0; e < 8; ++e) sums[e] += (parts[0][e] + parts[1][e]) + (parts[2][e] + parts[3][e]);
    }
    const Row of_row = row_of(p, m);
    float y[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      y[e] = finish<C>(p, sums[e], columns[c + e], p.row_scale, of_row);
    }
    if (halves) {
      uint32_t words[4] = {residual.x, residual.y, residual.z, residual.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float2 pair = unpack2(p.residual_type, words[e]);
        y[2 * e] += pair.x, y[2 * e + 1] += pair.y;
      }
    } else if (p.residual) {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if (e < count) y[e] += static_cast<const float*>(p.residual)[from + e];
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

}  // namespace mixdq::sm90
