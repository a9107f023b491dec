// Attention to few keys, as a text has, where what is around the arithmetic is what costs: a block takes one head,
// loads its keys and values once, and each of its warps goes over tiles of 16 rows by itself, the next tile's q on its
// way to shared memory. All scores of a row are there at once, so its softmax needs no second thought, and no two warps
// share a row: what they find goes from registers to global memory. Most warps have a tile or two, so it also counts
// how many instructions have to be fetched for the first.
//
// Values lie in shared memory in an order in which a lane's columns 2t and 2t+1 of four products are channels 8t to
// 8t+7 of a half of the row, one vector.
//
// In the place of keys past the last are copies of it, which leave the largest score as it is. Their values are zeros,
// and so is what they add to a row's sum: probabilities times a column of ones, zero for them.
#include <algorithm>
#include <cstdio>
#include "attention.cuh"

namespace mixdq {
namespace {

constexpr int kKeys = kFewKeys;
constexpr int kMostWarps = 10, kLeastWarps = 4;  // few would load slowly
constexpr int kMostBlocks = 2;                   // at once on a multiprocessor
// Keys, values, ones, and a tile of each warp.
constexpr int shared_bytes(int warps) { return (2 * kKeys * kPitch + kKeys + warps * kRows * kPitch) * 2; }
static_assert(shared_bytes(kMostWarps) <= 48 * 1024, "more has to be asked for");

// Starts the copy of all keys.
template <class T>
__device__ __forceinline__ void copy_keys(const T* from, int64_t stride, int keys, T* to) {
  int key = threadIdx.x / (kC / 8), piece = threadIdx.x % (kC / 8) * 8, step = blockDim.x / (kC / 8);
#pragma unroll 1
  for (; key < kKeys; key += step) {
    const T* row = from + min(key, keys - 1) * stride;
    cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<uint4>::copy(*reinterpret_cast<const uint4*>(row + piece),
                                                       *reinterpret_cast<uint4*>(to + key * kPitch + piece), true);
  }
}

// The same of values, whose pairs of channels change places: of each half, pair 4t+i goes to 4i+t.
template <class T>
__device__ __forceinline__ void copy_values(const T* from, int64_t stride, int keys, T* to) {
  int key = threadIdx.x / 32, pair = threadIdx.x % 32, step = blockDim.x / 32;
  from += key * stride + pair * 2;
  to += (pair & 16 | pair % 4 * 4 | pair / 4 % 4) * 2;
  stride *= step;
#pragma unroll 1
  for (; key < kKeys; key += step, from += stride) {
    cute::SM80_CP_ASYNC_CACHEALWAYS_ZFILL<uint32_t>::copy(*reinterpret_cast<const uint32_t*>(from),
                                                          *reinterpret_cast<uint32_t*>(to + key * kPitch), key < keys);
  }
}

// The same of a warp's rows; those past the last are zeros.
template <class T>
__device__ __forceinline__ void copy_queries(const T* from, int64_t stride, int rows, T* to) {
  constexpr int kLanes = kC / 8, kStep = 32 / kLanes;  // of a row; rows at once
  int row = threadIdx.x % 32 / kLanes, piece = threadIdx.x % kLanes * 8;
  from += row * stride + piece;
  to += row * kPitch + piece;
#pragma unroll
  for (int i = 0; i < kRows; i += kStep, from += kStep * stride) {
    cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<uint4>::copy(*reinterpret_cast<const uint4*>(from),
                                                       *reinterpret_cast<uint4*>(to + i * kPitch), row + i < rows);
  }
}

// Scores to fragments of probabilities, up to a factor of each row.
template <class T>
__device__ __forceinline__ void softmax(const float (&score)[kKeys / 8][4], float scale, uint32_t (&p)[kKeys / 16][4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float high = -kInfinity;
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) high = fmaxf(high, fmaxf(score[j][2 * half], score[j][2 * half + 1]));
    high = scale * reduce_lanes<4>(high, Most{});
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
      float a = exp2_fast(fmaf(score[j][2 * half], scale, -high));
      float b = exp2_fast(fmaf(score[j][2 * half + 1], scale, -high));
      p[j / 2][j % 2 * 2 + half] = pair<T>(a, b);
    }
  }
}

// Products with the values, and with ones: two of a row's sum beside two of the other's.
template <class T>
__device__ __forceinline__ void multiply_all(const uint32_t (&p)[kKeys / 16][4], const T* values, const T* ones,
                                             float (&out)[kC / 8][4], float (&sum)[4]) {
  values += place_of_lane();
  ones += threadIdx.x % 4 * 2;
#pragma unroll
  for (int j = 0; j < kKeys / 16; ++j) {
    auto one = [&](int k) { return *reinterpret_cast<const uint32_t*>(ones + j * 16 + k); };
    multiply<T>(p[j], one(0), one(8), sum);
    multiply_values(p[j], values + j * 16 * kPitch, out);
  }
}

// `write` gets a row, a channel, and eight rounded values from there on; its code is there once for four turns.
template <class T, class Write>
__device__ __forceinline__ void write_rows(const float (&out)[kC / 8][4], const float (&sum)[4], int rows,
                                           Write write) {
  int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  constexpr int kTurns = 4;
  Raw<T> raw[kTurns];
#pragma unroll
  for (int i = 0; i < kTurns; ++i) {
    int half = i / 2 * 2;
    float f = __fdividef(1.f, sum[half]);
    auto two = [&](int j) { return pair<T>(out[i % 2 * 4 + j][half] * f, out[i % 2 * 4 + j][half + 1] * f); };
    raw[i].part[0] = uint4{two(0), two(1), two(2), two(3)};
  }
#pragma unroll 1
  for (int i = 0; i < kTurns; ++i) {
    int row = g + i / 2 * 8;
    if (row < rows) write(row, i % 2 * 32 + t * 8, raw[0]);
#pragma unroll
    for (int j = 0; j + 1 < kTurns; ++j) raw[j] = raw[j + 1];
  }
}

// Out: T, or int8_t for its codes.
template <class T, class Out>
__global__ void __launch_bounds__(kMostWarps * 32, kMostBlocks) attend_few_keys(const __grid_constant__ Attention p) {
  extern __shared__ __align__(16) int8_t shared[];
  T *keys = reinterpret_cast<T*>(shared), *values = keys + kKeys * kPitch, *ones = values + kKeys * kPitch;
  T* tile = ones + kKeys + threadIdx.x / 32 * kRows * kPitch;
  const T* q = head(static_cast<const T*>(p.q), p.q_stride);
  Out* out = head(static_cast<Out*>(p.out), p.out_stride);
  // Unsigned: the last sum may be above 2^31.
  uint32_t row0 = (threadIdx.x / 32 * gridDim.x + blockIdx.x) * kRows, step = blockDim.x / 32 * gridDim.x * kRows;
  auto copy_tile = [&](uint32_t row) {
    copy_queries(q + row * p.q_stride[2], p.q_stride[2], int(p.queries - row), tile);
  };
  constexpr bool kCodes = std::is_same_v<Out, int8_t>;
  if constexpr (kCodes) prefetch(p.codes);
  for (int i = threadIdx.x; i < kKeys; i += blockDim.x) ones[i] = from_float<T>(i < p.keys ? 1.f : 0.f);

  wait_for_previous();
  let_next_start();
  float act_scale = 1.f, act_zero_point = 0.f;
  if constexpr (kCodes) act_scale = *p.codes.scale, act_zero_point = *p.codes.zero_point;
  copy_tile(row0);
  copy_keys(head(static_cast<const T*>(p.k), p.k_stride), p.k_stride[2], p.keys, keys);
  cute::cp_async_fence();
  copy_values(head(static_cast<const T*>(p.v), p.v_stride), p.v_stride[2], p.keys, values);
  cute::cp_async_fence();

  cute::cp_async_wait<1>();
  __syncthreads();
  Encoder e(act_scale, act_zero_point, p.codes.bits);
  // Once at least, since all have to wait for the values: warps without rows then compute what nobody writes.
#pragma unroll 1
  do {
    float score[kKeys / 8][4] = {}, found[kC / 8][4] = {}, sum[4] = {};
    uint32_t query[kC / 16][4];
    read_queries(tile + place_of_lane(), query);
    __syncwarp();
    copy_tile(row0 + step);
    cute::cp_async_fence();
    multiply_keys(query, keys + place_of_lane(), score);
    uint32_t probable[kKeys / 16][4];
    softmax<T>(score, p.scale, probable);
    if (row0 < step) {  // the first time
      cute::cp_async_wait<1>();
      __syncthreads();
    }
    multiply_all(probable, values, ones, found, sum);
    write_rows<T>(found, sum, int(p.queries - row0), [&](int row, int channel, const Raw<T>& raw) {
      Out* to = out + (row0 + row) * p.out_stride[2] + channel;
      if constexpr (kCodes) {
        float f[kVector];
        raw.get(f);
        *reinterpret_cast<uint2*>(to) = encode(f, e);
      } else {
        *reinterpret_cast<uint4*>(to) = raw.part[0];
      }
    });
    row0 += step;
    cute::cp_async_wait<0>();
    __syncwarp();
  } while (row0 < p.queries);
}

// Blocks of one head, and warps of each.
struct Shape {
  int64_t blocks = 0, warps = 0;
};

// As many blocks as fit at once, one or two on a multiprocessor, or a few times that where heads are many. Cycles are a
// guess: a warp's tile takes kAlone by itself, and kTogether of one that is shared with enough others.
Shape choose(const Attention& p, int sm_count) {
  constexpr int64_t kBegin = 1500, kAlone = 2000, kTogether = 950;
  int64_t tiles = ceil_div(p.queries, kRows), heads = int64_t(p.heads) * p.batch, least = INT64_MAX;
  Shape best;
  for (int64_t together = 1; together <= kMostBlocks; ++together) {
    for (int64_t waves = 1, slots = together * sm_count; waves <= 4 || !best.blocks; ++waves) {
      int64_t blocks = std::min(tiles, waves * slots / heads);
      if (!blocks) continue;
      int64_t of_block = ceil_div(tiles, blocks), rounds = ceil_div(of_block, kMostWarps);
      int64_t warps = ceil_div(of_block, rounds), of_scheduler = ceil_div(warps * together, 4);
      int64_t cycles = ceil_div(blocks * heads, slots) * (kBegin + rounds * std::max(kAlone, of_scheduler * kTogether));
      if (cycles < least) best = {blocks, std::max<int64_t>(warps, kLeastWarps)}, least = cycles;
    }
  }
  return best;
}

template <class T>
cudaError_t run(const Attention& p, const Shape& shape, const Stream& on) {
  Grid grid = {dim3(unsigned(shape.blocks), unsigned(p.heads), unsigned(p.batch)), dim3(unsigned(shape.warps * 32)),
               shared_bytes(int(shape.warps))};
  return p.codes.scale ? launch(attend_few_keys<T, int8_t>, grid, on, p) : launch(attend_few_keys<T, T>, grid, on, p);
}

}  // namespace

cudaError_t attention_few_keys(const Attention& p, const char* wanted, const Stream& on) {
  Shape shape = choose(p, on.sm_count);
  int blocks = int(shape.blocks), warps = int(shape.warps);
  std::sscanf(wanted, "few:%d:%d", &blocks, &warps);
  if (p.keys > kKeys || blocks < 1 || warps < 1 || warps > kMostWarps) return cudaErrorInvalidValue;
  Attention given = p;
  given.scale *= 1.4426950408889634f;  // log2(e), for powers of 2
  shape = {blocks, warps};
  return p.type == Float::f16 ? run<__half>(given, shape, on) : run<__nv_bfloat16>(given, shape, on);
}

}  // namespace mixdq
