// Attention to few keys, as a text has, where what is around the arithmetic is what costs: a block takes one head, loads
// its keys and values once, and each of its warps goes over tiles of 16 rows by itself, from global memory to registers to
// global memory. All scores of a row are there at once, so its softmax needs no second thought, and no two warps share a
// row.
//
// Channels are in an order that suits both ends. The products do not care in which order they add: lane t of four has
// channels 8t to 8t+7 of each half of a row of q and of a key, one vector of 16 bytes in place of four words. Values lie in
// shared memory so that the lane's columns 2t and 2t+1 of four products are again channels 8t to 8t+7, which it writes as
// one vector.
#include <cstdio>
#include <cstdlib>
#include <limits>
#include "attention.cuh"

namespace mixdq {
namespace {

constexpr int kKeys = kFewKeys;
constexpr int kMostWarps = 10, kLeastWarps = 4;  // few would load slowly
constexpr int kMostBlocks = 2;                   // at once on a multiprocessor
// Rows of keys begin 64 bytes further on in the banks: eight lanes read vectors of two rows at a time.
constexpr int kKeyPitch = kC + 32;
constexpr int kSharedBytes = kKeys * (kKeyPitch + kPitch) * 2;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Starts the copy of all keys; those past the last are zeros.
template <class T>
__device__ __forceinline__ void copy_keys(const T* from, int64_t stride, int keys, T* to) {
  for (int i = threadIdx.x; i < kKeys * kC / 8; i += blockDim.x) {
    int key = i / (kC / 8), piece = i % (kC / 8) * 8;
    cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<uint4>::copy(*reinterpret_cast<const uint4*>(from + key * stride + piece),
                                                       *reinterpret_cast<uint4*>(to + key * kKeyPitch + piece),
                                                       key < keys);
  }
}

// The same of values, whose pairs of channels change places: of each half, pair 4t+i goes to 4i+t.
template <class T>
__device__ __forceinline__ void copy_values(const T* from, int64_t stride, int keys, T* to) {
  int pair = threadIdx.x % 32;
  from += pair * 2;
  to += (pair & 16 | pair % 4 * 4 | pair / 4 % 4) * 2;
  for (int key = threadIdx.x / 32; key < kKeys; key += blockDim.x / 32) {
    cute::SM80_CP_ASYNC_CACHEALWAYS_ZFILL<uint32_t>::copy(*reinterpret_cast<const uint32_t*>(from + key * stride),
                                                          *reinterpret_cast<uint32_t*>(to + key * kPitch), key < keys);
  }
}

// Fragments of 16 rows; zeros past the last.
template <class T>
__device__ __forceinline__ void load_queries(const T* from, int64_t stride, int rows, uint32_t (&to)[kC / 16][4]) {
  int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int row = g + half * 8;
#pragma unroll
    for (int i = 0; i < kC / 32; ++i) {
      uint4 v = {0, 0, 0, 0};
      if (row < rows) v = *reinterpret_cast<const uint4*>(from + row * stride + i * 32 + t * 8);
      to[2 * i][half] = v.x, to[2 * i][half + 2] = v.y;
      to[2 * i + 1][half] = v.z, to[2 * i + 1][half + 2] = v.w;
    }
  }
}

// A lane's scores: keys 2t, 2t+1 of each eight, for rows g and g+8; -infinity where there is no key.
template <class T>
__device__ __forceinline__ void multiply_keys(const uint32_t (&q)[kC / 16][4], const T* keys, int valid,
                                              float (&score)[kKeys / 8][4]) {
  int lane = threadIdx.x % 32;
  const T* mine = keys + lane / 4 * kKeyPitch + lane % 4 * 8;
#pragma unroll
  for (int i = 0; i < kC / 32; ++i) {
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
      uint4 k = *reinterpret_cast<const uint4*>(mine + j * 8 * kKeyPitch + i * 32);
      multiply<T>(q[2 * i], k.x, k.y, score[j]);
      multiply<T>(q[2 * i + 1], k.z, k.w, score[j]);
    }
  }
#pragma unroll
  for (int j = 0; j < kKeys / 8; ++j) {
    if (j * 8 + 8 <= valid) continue;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (j * 8 + lane % 4 * 2 + i % 2 >= valid) score[j][i] = -kInfinity;
    }
  }
}

// Scores to fragments of probabilities up to a factor, which is one over the sum of each row.
template <class T>
__device__ __forceinline__ void softmax(float (&score)[kKeys / 8][4], float scale, uint32_t (&p)[kKeys / 16][4],
                                        float (&sum)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float high = -kInfinity;
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) high = fmaxf(high, fmaxf(score[j][2 * half], score[j][2 * half + 1]));
    high = scale * reduce_lanes<4>(high, Most{});
    sum[half] = 0.f;
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
      float a = exp2_fast(fmaf(score[j][2 * half], scale, -high));
      float b = exp2_fast(fmaf(score[j][2 * half + 1], scale, -high));
      sum[half] += a + b;
      p[j / 2][j % 2 * 2 + half] = pair<T>(a, b);
    }
    sum[half] = reduce_lanes<4>(sum[half], Add{});
  }
}

template <class T>
__device__ __forceinline__ void multiply_values(const uint32_t (&p)[kKeys / 16][4], const T* values,
                                                float (&out)[kC / 8][4]) {
  values += place_of_lane();
#pragma unroll
  for (int j = 0; j < kKeys / 16; ++j) {
#pragma unroll
    for (int i = 0; i < kC / 16; ++i) {
      uint32_t v[4];
      read<cute::SM75_U16x8_LDSM_T>(values + j * 16 * kPitch + i * 16, v);
      multiply<T>(p[j], v[0], v[1], out[2 * i]);
      multiply<T>(p[j], v[2], v[3], out[2 * i + 1]);
    }
  }
}

// `write` gets a row, a channel, and eight rounded values from there on.
template <class T, class Write>
__device__ __forceinline__ void write_rows(const float (&out)[kC / 8][4], const float (&sum)[2], int rows, Write write) {
  int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int row = g + half * 8;
    float f = __fdividef(1.f, sum[half]);
    if (row >= rows) continue;
#pragma unroll
    for (int i = 0; i < kC / 32; ++i) {
      uint32_t v[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) v[j] = pair<T>(out[4 * i + j][2 * half] * f, out[4 * i + j][2 * half + 1] * f);
      Raw<T> raw;
      raw.part[0] = uint4{v[0], v[1], v[2], v[3]};
      write(row, i * 32 + t * 8, raw);
    }
  }
}

// Out: T, or int8_t for its codes.
template <class T, class Out>
__global__ void __launch_bounds__(kMostWarps * 32, kMostBlocks) attend_few_keys(const __grid_constant__ Attention p) {
  extern __shared__ __align__(16) int8_t shared[];
  T *keys = reinterpret_cast<T*>(shared), *values = keys + kKeys * kKeyPitch;
  const T* q = head(static_cast<const T*>(p.q), p.q_stride);
  Out* out = head(static_cast<Out*>(p.out), p.out_stride);
  // Unsigned: the last sum may be above 2^31.
  uint32_t row0 = (threadIdx.x / 32 * gridDim.x + blockIdx.x) * kRows, step = blockDim.x / 32 * gridDim.x * kRows;
  auto load = [&](uint32_t row, uint32_t (&to)[kC / 16][4]) {
    load_queries(q + row * p.q_stride[2], p.q_stride[2], int(p.queries - row), to);
  };

  wait_for_previous();
  let_next_start();
  copy_keys(head(static_cast<const T*>(p.k), p.k_stride), p.k_stride[2], p.keys, keys);
  cute::cp_async_fence();
  uint32_t query[kC / 16][4];
  load(row0, query);
  copy_values(head(static_cast<const T*>(p.v), p.v_stride), p.v_stride[2], p.keys, values);
  cute::cp_async_fence();

  constexpr bool kCodes = std::is_same_v<Out, int8_t>;
  float act_scale = 1.f, act_zero_point = 0.f;
  if constexpr (kCodes) act_scale = *p.codes.scale, act_zero_point = *p.codes.zero_point;
  Encoder e(act_scale, act_zero_point, p.codes.bits);

  cute::cp_async_wait<1>();
  __syncthreads();
  bool values_are_here = false;
  // Once at least, since all have to wait for the values: warps without rows then compute what nobody writes.
#pragma unroll 1
  do {
    float score[kKeys / 8][4] = {}, found[kC / 8][4] = {}, sum[2];
    multiply_keys(query, keys, p.keys, score);
    uint32_t probable[kKeys / 16][4];
    softmax<T>(score, p.scale, probable, sum);
    // The next rows come while these are worked on.
    if (row0 + step < p.queries) load(row0 + step, query);
    if (!values_are_here) {
      cute::cp_async_wait<0>();
      __syncthreads();
      values_are_here = true;
    }
    multiply_values(probable, values, found);
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
  } while (row0 < p.queries);
}

// Blocks of one head, and warps of each.
struct Shape {
  int64_t blocks = 0, warps = 0;
};

// As many blocks as fit at once, one or two on a multiprocessor, or a few times that where heads are many. Cycles are a
// guess: a warp's tile takes kAlone by itself, and kTogether of one that is shared with enough others.
Shape choose(const Attention& p, int sm_count) {
  constexpr int64_t kBegin = 1500, kAlone = 1800, kTogether = 900;
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
               kSharedBytes};
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
