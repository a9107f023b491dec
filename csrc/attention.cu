// Attention for few tokens, where the time of one block is what counts: mma.sync, fed by cp.async through two stages.
//
// A block computes some rows of one head, 16 for each row of its warps, and the warps in a column share the keys: each
// takes every so manieth chunk of 32, with an online softmax of its own, and in the end their sums are added. So a block
// may have as many rows as spread the work evenly over the GPU, and all its schedulers are busy whatever that number is.
// Keys past the last are zeros that count as minus infinity; rows past the last are zeros that are not written.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include "attention.cuh"

namespace mixdq {
namespace {

constexpr int kChunk = 32;  // keys that a warp takes at once
constexpr int kStageChunks = 4;
constexpr int kStageKeys = kStageChunks * kChunk;
constexpr int kRingChunks = 2 * kStageChunks;
constexpr int kMostWarps = 16;  // more would leave too few registers for each
constexpr int kMostKeyWarps = 4;
constexpr int kMostShared = 99 * 1024;  // sm_86 and sm_89 have no more
constexpr int kRing = kRingChunks * kChunk * kPitch;  // elements of the keys in both stages; the values follow
constexpr int kSumsPitch = kC + 8;                    // floats; rows of a fragment are in different banks

// Warps of a block: by rows of queries, and by keys.
struct Shape {
  int rows, keys;

  int warps() const { return rows * keys; }
  int shared_bytes() const {
    int inputs = (rows * kRows * kPitch + 2 * kRing) * 2;
    int sums = warps() * kRows * (kSumsPitch * 4 + int(sizeof(float2)));  // in their place, after the last stage
    return inputs > sums ? inputs : sums;
  }
  bool fits() const {
    bool counts = rows >= 1 && keys >= 1 && keys <= kMostKeyWarps && warps() <= kMostWarps;
    return counts && shared_bytes() <= kMostShared;
  }
};

// Starts the copy of rows, those past `valid` as zeros. A thread keeps to one piece of every so manieth row.
template <class T>
__device__ __forceinline__ void copy_rows(const T* from, int64_t stride, int rows, int valid, T* to) {
  constexpr int kPieces = kC / 8;
  int row = threadIdx.x / kPieces, piece = threadIdx.x % kPieces * 8, step = blockDim.x / kPieces;
  from += row * stride + piece;
  to += row * kPitch + piece;
  int64_t next = step * stride;
  for (; row < rows; row += step, from += next, to += step * kPitch) {
    cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<uint4>::copy(*reinterpret_cast<const uint4*>(from),
                                                       *reinterpret_cast<uint4*>(to), row < valid);
  }
}

// The rows of a warp over the keys that it has seen. A fragment holds columns 2t, 2t+1 of rows g and g+8, for lane 4g+t.
template <class T>
struct Rows {
  uint32_t q[kC / 16][4];
  float out[kC / 8][4] = {};
  float most[2] = {-kInfinity, -kInfinity};  // scaled score of rows g and g+8
  float sum[2] = {};                         // of this lane's columns

  // One chunk.
  __device__ __forceinline__ void add(const T* keys, const T* values, int valid, float scale) {
    int lane = threadIdx.x % 32;
    float score[kChunk / 8][4] = {};
    multiply_keys(q, keys, score);
    if (valid < kChunk) {
#pragma unroll
      for (int j = 0; j < kChunk / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (j * 8 + lane % 4 * 2 + i % 2 >= valid) score[j][i] = -kInfinity;
        }
      }
    }
    softmax(score, scale);
    uint32_t p[kChunk / 16][4];
#pragma unroll
    for (int j = 0; j < kChunk / 8; ++j) {
      p[j / 2][j % 2 * 2] = pair<T>(score[j][0], score[j][1]);
      p[j / 2][j % 2 * 2 + 1] = pair<T>(score[j][2], score[j][3]);
    }
#pragma unroll
    for (int j = 0; j < kChunk / 16; ++j) multiply_values(p[j], values + j * 16 * kPitch, out);
  }

  // Scores to probabilities, up to the factor that all keys seen so far share.
  __device__ __forceinline__ void softmax(float (&score)[kChunk / 8][4], float scale) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float high = -kInfinity;
#pragma unroll
      for (int j = 0; j < kChunk / 8; ++j) high = fmaxf(high, fmaxf(score[j][2 * half], score[j][2 * half + 1]));
      high = fmaxf(high, __shfl_xor_sync(~0u, high, 1));
      high = fmaxf(high, __shfl_xor_sync(~0u, high, 2));
      high = fmaxf(most[half], high * scale);
      float factor = exp2_fast(most[half] - high), added = 0.f;
      most[half] = high;
#pragma unroll
      for (int j = 0; j < kChunk / 8; ++j) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          score[j][i] = exp2_fast(fmaf(score[j][i], scale, -high));
          added += score[j][i];
        }
      }
      sum[half] = sum[half] * factor + added;
#pragma unroll
      for (int i = 0; i < kC / 8; ++i) out[i][2 * half] *= factor, out[i][2 * half + 1] *= factor;
    }
  }

  // The sums of each row, and its largest score beside the sum of its probabilities.
  __device__ __forceinline__ void put(float* sums, float2* ranges) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float s = sum[half];
      s += __shfl_xor_sync(~0u, s, 1);
      s += __shfl_xor_sync(~0u, s, 2);
      if (t == 0) ranges[g + half * 8] = make_float2(most[half], s);
#pragma unroll
      for (int i = 0; i < kC / 8; ++i) {
        *reinterpret_cast<float2*>(sums + (g + half * 8) * kSumsPitch + i * 8 + t * 2) =
            make_float2(out[i][2 * half], out[i][2 * half + 1]);
      }
    }
  }
};

// Four columns of a row, rounded: the sum of what the warps of that row have found.
template <class T>
__device__ __forceinline__ uint2 add_up(const float* sums, const float2* ranges, Shape warps, int row, int column) {
  float high = -kInfinity, sum = 0.f;
#pragma unroll
  for (int k = 0; k < kMostKeyWarps; ++k) {
    if (k < warps.keys) high = fmaxf(high, ranges[k * warps.rows * kRows + row].x);
  }
  float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
  for (int k = 0; k < kMostKeyWarps; ++k) {
    if (k >= warps.keys) break;
    int at = k * warps.rows * kRows + row;
    float2 range = ranges[at];
    float factor = exp2_fast(range.x - high);
    float4 add = *reinterpret_cast<const float4*>(sums + at * kSumsPitch + column);
    sum += range.y * factor;
    total.x += add.x * factor, total.y += add.y * factor, total.z += add.z * factor, total.w += add.w * factor;
  }
  float f = __fdividef(1.f, sum);
  return make_uint2(pair<T>(total.x * f, total.y * f), pair<T>(total.z * f, total.w * f));
}

template <class T>
__device__ __forceinline__ void write_rows(const float* sums, const float2* ranges, Shape warps, T* out, int64_t stride,
                                           int rows) {
  constexpr int kVectors = kC / 4;
  for (int i = threadIdx.x; i < rows * kVectors; i += blockDim.x) {
    int row = i / kVectors, column = i % kVectors * 4;
    *reinterpret_cast<uint2*>(out + row * stride + column) = add_up<T>(sums, ranges, warps, row, column);
  }
}

// The codes of what write_rows() would write.
template <class T>
__device__ __forceinline__ void write_codes(const float* sums, const float2* ranges, Shape warps, const Encoder& e,
                                            int8_t* out, int64_t stride, int rows) {
  constexpr int kVectors = kC / kVector;
  for (int i = threadIdx.x; i < rows * kVectors; i += blockDim.x) {
    int row = i / kVectors, column = i % kVectors * kVector;
    uint2 low = add_up<T>(sums, ranges, warps, row, column), high = add_up<T>(sums, ranges, warps, row, column + 4);
    Raw<T> raw;
    raw.part[0] = uint4{low.x, low.y, high.x, high.y};
    float f[kVector];
    raw.get(f);
    *reinterpret_cast<uint2*>(out + row * stride + column) = encode(f, e);
  }
}

// Out: T, or int8_t for its codes.
template <class T, class Out>
__global__ void __launch_bounds__(kMostWarps * 32) attend(const __grid_constant__ Attention p, Shape warps) {
  extern __shared__ __align__(16) int8_t shared[];
  T *q = reinterpret_cast<T*>(shared), *keys = q + warps.rows * kRows * kPitch;
  int64_t row0 = int64_t(blockIdx.x) * warps.rows * kRows;
  int rows = int(min(p.queries - row0, int64_t(warps.rows * kRows)));
  int chunks = (p.keys + kChunk - 1) / kChunk;
  int warp = threadIdx.x / 32, warp_k = warp / warps.rows, warp_row = warp % warps.rows;

  auto copy = [&](int chunk) {  // and what else is of its stage
    int64_t first = int64_t(chunk) * kChunk;
    int valid = int(min(p.keys - first, int64_t(kStageKeys)));
    int count = (valid + kChunk - 1) / kChunk * kChunk;
    const T* k = head(static_cast<const T*>(p.k), p.k_stride);
    const T* v = head(static_cast<const T*>(p.v), p.v_stride);
    T* to = keys + chunk % kRingChunks * kChunk * kPitch;
    copy_rows(k + first * p.k_stride[2], p.k_stride[2], count, valid, to);
    copy_rows(v + first * p.v_stride[2], p.v_stride[2], count, valid, to + kRing);
  };

  wait_for_previous();
  let_next_start();
  copy_rows(head(static_cast<const T*>(p.q), p.q_stride) + row0 * p.q_stride[2], p.q_stride[2], warps.rows * kRows,
            rows, q);
  copy(0);
  cute::cp_async_fence();
  if (kStageChunks < chunks) copy(kStageChunks);
  cute::cp_async_fence();

  constexpr bool kCodes = std::is_same_v<Out, int8_t>;
  float act_scale = 1.f, act_zero_point = 0.f;  // here already: nobody waits for them later
  if constexpr (kCodes) act_scale = *p.codes.scale, act_zero_point = *p.codes.zero_point;

  Rows<T> found;
  cute::cp_async_wait<1>();
  __syncthreads();
  read_queries(q + warp_row * kRows * kPitch + place_of_lane(), found.q);
  int chunk = warp_k;
#pragma unroll 1
  for (int first = 0; first < chunks; first += kStageChunks) {
#pragma unroll 1
    for (; chunk < min(chunks, first + kStageChunks); chunk += warps.keys) {
      const T* at = keys + chunk % kRingChunks * kChunk * kPitch + place_of_lane();
      found.add(at, at + kRing, p.keys - chunk * kChunk, p.scale);
    }
    if (first + kRingChunks < chunks) {
      __syncthreads();
      copy(first + kRingChunks);
    }
    cute::cp_async_fence();  // also where there is nothing left: the wait counts groups
    cute::cp_async_wait<1>();
    __syncthreads();
  }

  float* sums = reinterpret_cast<float*>(shared);
  float2* ranges = reinterpret_cast<float2*>(sums + warps.rows * warps.keys * kRows * kSumsPitch);
  found.put(sums + warp * kRows * kSumsPitch, ranges + warp * kRows);
  __syncthreads();
  Out* out = head(static_cast<Out*>(p.out), p.out_stride) + row0 * p.out_stride[2];
  if constexpr (kCodes) {
    Encoder e(act_scale, act_zero_point, p.codes.bits);
    write_codes<T>(sums, ranges, warps, e, out, p.out_stride[2], rows);
  } else {
    write_rows(sums, ranges, warps, out, p.out_stride[2], rows);
  }
}

// Cycles of the multiprocessor that has most to do, roughly. Its blocks come one or two at a time, by their registers and
// shared memory: they begin, compute what tensor cores and shared memory take equally long for, or the chunks of a single
// warp one after another, or wait for keys and values; then they add their sums.
int64_t estimate(const Attention& p, Shape warps, int sm_count) {
  constexpr int64_t kBegin = 1000, kMath = 256, kLatency = 700, kLoad = 128, kSums = 64;
  int64_t blocks = ceil_div(ceil_div(p.queries, warps.rows * kRows) * p.heads * p.batch, sm_count);
  int64_t together = std::min<int64_t>(blocks, warps.warps() <= kMostWarps / 2 ? 2 : 1), chunks = ceil_div(p.keys, kChunk);
  int64_t in_turn = ceil_div(chunks, warps.keys);
  int64_t math = in_turn * std::max(ceil_div(warps.warps() * together, 4) * kMath, kLatency);
  int64_t wave = kBegin + std::max(math, chunks * together * kLoad) + warps.warps() * together * kSums;
  return ceil_div(blocks, together) * wave;
}

Shape choose(const Attention& p, int sm_count, const char* wanted) {
  Shape best = {1, 1};
  if (*wanted) return std::sscanf(wanted, "%d:%d", &best.rows, &best.keys) == 2 ? best : Shape{0, 0};
  int64_t least = INT64_MAX;
  for (int keys = 1; keys <= kMostKeyWarps; ++keys) {
    for (int rows = 1; Shape{rows, keys}.fits(); ++rows) {
      int64_t cycles = estimate(p, {rows, keys}, sm_count);
      if (cycles < least) best = {rows, keys}, least = cycles;
    }
  }
  return best;
}

template <class T, class Out>
cudaError_t run(const Attention& p, Shape warps, const Stream& on) {
  // More shared memory than 48 KiB has to be asked for, once on each device.
  static std::atomic<uint64_t> asked{0};
  uint64_t bit = on.device < 64 ? uint64_t(1) << on.device : 0;
  if (!(asked.load() & bit)) {
    cudaError_t error =
        cudaFuncSetAttribute(attend<T, Out>, cudaFuncAttributeMaxDynamicSharedMemorySize, kMostShared);
    if (error != cudaSuccess) return error;
    asked |= bit;
  }
  Grid grid = {dim3(unsigned(ceil_div(p.queries, warps.rows * kRows)), unsigned(p.heads), unsigned(p.batch)),
               dim3(unsigned(warps.warps() * 32)), warps.shared_bytes()};
  Attention given = p;
  given.scale *= 1.4426950408889634f;  // log2(e), for powers of 2
  return launch(attend<T, Out>, grid, on, given, warps);
}

template <class T>
cudaError_t run_typed(const Attention& p, Shape warps, const Stream& on) {
  return p.codes.scale ? run<T, int8_t>(p, warps, on) : run<T, T>(p, warps, on);
}

}  // namespace

// MIXDQ_ATTENTION, as rows:keys or few or few:blocks:warps, is for measurements and tests.
cudaError_t attention(const Attention& p, const Stream& on) {
  const char* wanted = std::getenv("MIXDQ_ATTENTION");
  if (!wanted) wanted = "";
  if (p.heads > 65535 || p.batch > 65535 || p.keys < 1 || !(p.scale > 0)) return cudaErrorInvalidValue;
  if (*wanted ? !std::strncmp(wanted, "few", 3) : p.keys <= kFewKeys) return attention_few_keys(p, wanted, on);
  Shape warps = choose(p, on.sm_count, wanted);
  if (!warps.fits()) return cudaErrorInvalidValue;
  return p.type == Float::f16 ? run_typed<__half>(p, warps, on) : run_typed<__nv_bfloat16>(p, warps, on);
}

}  // namespace mixdq
