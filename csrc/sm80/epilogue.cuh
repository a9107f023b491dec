// From a warp's sums to the output, straight from registers where runs of columns are vectors, else by shared memory.
#pragma once
#include "sm80/multiply.cuh"
#include "tile.cuh"

namespace mixdq::sm80 {

// The epilogue's vectors for the columns of a tile, in shared memory.
template <int N>
struct alignas(16) Vectors {
  float alpha[N], offset[N];
  int weight_sum[N];

  __device__ __forceinline__ void put(int n, const ChannelEpilogue& c) {
    alpha[n] = c.alpha, offset[n] = c.offset, weight_sum[n] = c.weight_sum;
  }
  __device__ __forceinline__ ChannelEpilogue get(int n) const { return {alpha[n], offset[n], weight_sum[n]}; }
};

// A warp's place in the output.
struct Place {
  uint32_t row, m;      // its first row; rows of the output
  int64_t column;       // its first column
  int first, left;      // the same column within the tile; columns of the weight from there on
  const Divider& residual_rows;
};

template <int N>
__device__ __forceinline__ void read_run(const float* from, float (&to)[N]) {
#pragma unroll
  for (int j = 0; j < N; j += 4) {
    float4 four = *reinterpret_cast<const float4*>(from + j);
    to[j] = four.x, to[j + 1] = four.y, to[j + 2] = four.z, to[j + 3] = four.w;
  }
}

// Rows of 16 as vectors: each lane has runs of kRun columns.
template <class C, int kBlocks>
__device__ __forceinline__ void write_vectors(const Matmul& p, const Place& at, const Rows<C> (&sums)[kBlocks],
                                              const Vectors<C::kTileN>& vectors) {
  constexpr int kRun = C::kRun, kBatch = kBlocks % 2 == 0 ? 4 : 2;  // rows whose residual is on its way together
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int c = 0; c < C::kWarpN / (4 * kRun); ++c) {
    int within = (c * 4 + lane % 4) * kRun;
    if (within >= at.left) return;
    float alpha[kRun], offset[kRun];
    read_run(vectors.alpha + at.first + within, alpha);
    read_run(vectors.offset + at.first + within, offset);
#pragma unroll
    for (int first = 0; first < kBlocks * 2; first += kBatch) {
      float v[kBatch][kRun] = {};
      auto row_of = [&](int i) { return at.row + lane / 4 + (first + i) * 8; };
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (!p.residual || row_of(i) >= at.m) continue;
        int64_t residual = int64_t(at.residual_rows.divide(row_of(i))) * p.residual_stride + at.column + within;
        load_residual(p, residual, kRun, true, v[i]);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (row_of(i) >= at.m) continue;
        const Rows<C>& rows = sums[(first + i) / 2];
        if (p.row_scale) {
          RowEpilogue of_row = row_epilogue(p, row_of(i));
#pragma unroll
          for (int j = 0; j < kRun; ++j) {
            ChannelEpilogue channel = {alpha[j], offset[j], vectors.weight_sum[at.first + within + j]};
            v[i][j] += apply_epilogue(rows.sum(c, j, i % 2), channel, true, of_row.scale, of_row.zero_point);
          }
        } else {
#pragma unroll
          for (int j = 0; j < kRun; ++j) v[i][j] += fmaf(float(rows.sum(c, j, i % 2)), alpha[j], offset[j]);
        }
        store_out(p, row_of(i), at.column + within, kRun, true, v[i]);
      }
    }
  }
}

// Rows of 16 by single values, through 16 rows of shared memory of this warp's own.
template <class C, int kBlocks>
__device__ __forceinline__ void write_values(const Matmul& p, const Place& at, const Rows<C> (&sums)[kBlocks],
                                             const Vectors<C::kTileN>& vectors, int* staging) {
  int lane = threadIdx.x % 32, columns = min(at.left, C::kWarpN);
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
    for (int c = 0; c < C::kWarpN / (4 * C::kRun); ++c) {
#pragma unroll
      for (int i = 0; i < 2 * C::kRun; ++i) {
        int row = lane / 4 + i / C::kRun * 8, column = (c * 4 + lane % 4) * C::kRun + i % C::kRun;
        staging[row * C::kWarpN + column] = sums[block].sum(c, i % C::kRun, i / C::kRun);
      }
    }
    __syncwarp();
#pragma unroll 1
    for (int i = lane; i < 16 * C::kWarpN; i += 32) {
      uint32_t row = at.row + block * 16 + i / C::kWarpN;
      int n = i % C::kWarpN;
      if (row >= at.m || n >= columns) continue;
      RowEpilogue of_row = row_epilogue(p, row);
      float v = apply_epilogue(staging[i], vectors.get(at.first + n), p.row_scale, of_row.scale, of_row.zero_point);
      int64_t residual = int64_t(at.residual_rows.divide(row)) * p.residual_stride + at.column + n;
      if (p.residual) v += load_float(p.residual, p.residual_type, residual);
      store_float(p.out, p.out_type, row * p.out_stride + at.column + n, v);
    }
    __syncwarp();  // until all have read
  }
}

}  // namespace mixdq::sm80
