// From the sums of a tile to its outputs.
#pragma once
#include <cooperative_groups.h>
#include "sm90/halves.cuh"
#include "sm90/multiply.cuh"

namespace mixdq::sm90 {

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

}  // namespace mixdq::sm90
