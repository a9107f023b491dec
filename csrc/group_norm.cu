// GroupNorm, SiLU where asked, then quantize.
#include <cooperative_groups.h>
#include "norm.cuh"

namespace mixdq {
namespace {

constexpr int kThreads = 256;

// For each image, group and part of the pixels there is a share: the mean, and the sum of squared deviations from it. The
// shares of a group are put together always in the same order. They lie in the shared memory of a cluster, whose blocks go
// on with their pixels, or in the workspace for a second kernel.
struct Shares {
  float2* data;  // [image, group, split]
  int groups, splits;
  int group_channels;
  int pixels, split_pixels;  // of an image, of a split but the last

  __device__ float count(int split) const {
    return float(min(split_pixels, pixels - split * split_pixels)) * float(group_channels);
  }
};

// Lanes of a warp that work on one group, where `threads` work on `groups`.
__device__ __forceinline__ int lanes_of_group(int groups, int threads) {
  int lanes = 32;
  while (lanes > 1 && groups * lanes > threads) lanes /= 2;
  return lanes;
}

// Mean and reciprocal deviation of each group, by all threads of the block; share(g, i) is a share.
template <class Share>
__device__ __forceinline__ void put_together(const Shares& s, int groups, float eps, Share share, float2* moments) {
  int lanes = lanes_of_group(groups, blockDim.x), lane = threadIdx.x % lanes;
  for (int base = 0; base < groups; base += blockDim.x / lanes) {
    int g = base + threadIdx.x / lanes;
    Sums sums;
    float pivot = 0.f;
    if (g < groups) {
      pivot = share(g, 0).x;
#pragma unroll 4
      for (int i = lane; i < s.splits; i += lanes) {
        float2 m = share(g, i);
        sums.add(s.count(i), m.x, m.y, pivot);
      }
    }
    sums.reduce(lanes);
    if (g < groups && lane == 0) {
      float2 m = sums.moments(pivot);
      moments[g] = {m.x, rsqrtf(m.y / sums.count + eps)};
    }
  }
  __syncthreads();
}

// A block works on a slab: some channels, whole groups and whole vectors, of some pixels of an image. Its threads are
// `lines` times a thread for each vector of the slab.
struct Slab {
  int channels, per_image, vectors, lines;

  int threads() const { return round_up(vectors * lines, 32); }
};

constexpr int kSlabThreads = 320;    // at most; with two blocks to a multiprocessor that leaves 96 registers
constexpr int kLeastSize = 7;        // of a group, so that a vector touches two at most
constexpr int kSlabChannels = 256;   // at most, unless a single unit of whole groups and vectors has more
constexpr int kSlabGroups = 40;      // at most: kSlabChannels / kLeastSize, rounded up to what 16 bytes divide

template <class T>
constexpr int kLoads = sizeof(T) == 2 ? 8 : 4;  // pixels that a thread loads at a time

// The share of each group of the slab in the pixels from begin to end, by all threads; x is the slab in the image, and
// `shared` holds a float4 for each thread.
template <class T, class Store>
__device__ __forceinline__ void compute_shares(const T* x, const Pixels& pixels, const Slab& slab, int size, int begin,
                                               int end, float4* shared, Store store) {
  constexpr int kPixels = kLoads<T>;
  int line = threadIdx.x / slab.vectors, v = threadIdx.x - line * slab.vectors;
  auto place = [&](uint32_t pixel) {
    uint32_t column, row = pixels.width.divide(pixel, column);
    return row * pixels.stride_h + column * pixels.stride_w;
  };
  const T* pivots = x + place(begin);  // that of a group is its first value here

  if (line < slab.lines) {
    int group = v * kVector / size, cut = (group + 1) * size - v * kVector;  // from there on the next group's channels
    float here = to_float(pivots[group * size]), next = cut < kVector ? to_float(pivots[(group + 1) * size]) : 0.f;
    float first[kVector] = {}, second[kVector] = {};
    for (int p = begin + line; p < end; p += slab.lines * kPixels) {
      Raw<T> raw[kPixels];
#pragma unroll
      for (int i = 0; i < kPixels; ++i) {
        int q = p + i * slab.lines;
        if (q < end) raw[i].load(x + place(q) + v * kVector);
      }
#pragma unroll
      for (int i = 0; i < kPixels; ++i) {
        if (p + i * slab.lines >= end) break;
        float f[kVector];
        raw[i].get(f);
#pragma unroll
        for (int k = 0; k < kVector; ++k) {
          float d = f[k] - (k < cut ? here : next);
          first[k] += d;
          second[k] += d * d;
        }
      }
    }
    float4 sums = {0.f, 0.f, 0.f, 0.f};  // of this group, of the next
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      if (k < cut) {
        sums.x += first[k], sums.y += second[k];
      } else {
        sums.z += first[k], sums.w += second[k];
      }
    }
    shared[threadIdx.x] = sums;
  }
  __syncthreads();

  int groups = slab.channels / size, lanes = lanes_of_group(groups, blockDim.x), lane = threadIdx.x % lanes;
  for (int base = 0; base < groups; base += blockDim.x / lanes) {
    int g = base + threadIdx.x / lanes;
    Sums sums;
    if (g < groups) {
      int channel = g * size, last = (channel + size - 1) / kVector;
      for (int l = lane; l < slab.lines; l += lanes) {
        for (int w = channel / kVector; w <= last; ++w) {
          float4 add = shared[l * slab.vectors + w];
          bool begins_here = w * kVector >= channel;  // else in the group before
          sums.first += begins_here ? add.x : add.z;
          sums.second += begins_here ? add.y : add.w;
        }
      }
    }
    sums.reduce(lanes);
    if (g < groups && lane == 0) {
      sums.count = float(end - begin) * float(size);
      store(g, sums.moments(to_float(pivots[g * size])));
    }
  }
}

__device__ __forceinline__ float silu(float y) { return __fdividef(y, 1.f + __expf(-y)); }

// The codes of the slab in the output's pixels from begin to end. x and out are the image; moments(), called by all threads
// while the first values are under way, gives mean and reciprocal deviation of the slab's groups.
template <class T, class Moments>
__device__ __forceinline__ void normalize(const T* x, const Pixels& pixels, const Slab& slab, int s, int size, int begin,
                                          int end, const Norm& norm, bool with_silu, const Codes& codes, int8_t* out,
                                          Moments moments) {
  constexpr int kPixels = kLoads<T> / 2;
  int line = threadIdx.x / slab.vectors, v = threadIdx.x - line * slab.vectors;
  int channel = s * slab.channels + v * kVector, channels = slab.per_image * slab.channels;
  int p = line < slab.lines ? begin + line : end;
  x += channel;
  out += channel;

  Raw<T> raw[kPixels];
  uint32_t inside = 0;
  auto load = [&] {
    inside = 0;
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
      int q = p + i * slab.lines;
      int64_t offset = q < end ? pixels.offset(q) : -1;
      if (offset < 0) continue;
      raw[i].load(x + offset);
      inside |= 1u << i;
    }
  };
  load();
  NormWeights weights;
  if (p < end) weights.load(norm, channel);
  Encoder e = encoder_of_channel(codes, channel);

  const float2* of_groups = moments();
  if (p >= end) return;
  float scale[kVector], shift[kVector];
  weights.get(norm, scale, shift);
  int g = v * kVector / size, c = v * kVector - g * size;
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    float2 m = of_groups[g];
    scale[k] *= m.y;
    shift[k] -= m.x * scale[k];
    if (++c == size) c = 0, ++g;
  }
  uint32_t b = e.border();
  b = pack(b, b, b, b);
  while (true) {
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
      int q = p + i * slab.lines;
      if (q >= end) break;
      uint2 code = {b, b};
      if (inside >> i & 1) {
        float f[kVector];
        raw[i].get(f);
#pragma unroll
        for (int k = 0; k < kVector; ++k) {
          f[k] = fmaf(f[k], scale[k], shift[k]);
          if (with_silu) f[k] = silu(f[k]);
        }
        code = encode_rounded(f, e);
      }
      *reinterpret_cast<uint2*>(out + int64_t(q) * channels) = code;
    }
    p += kPixels * slab.lines;
    if (p >= end) break;
    load();
  }
}

// Two kernels, where the pixels of a slab are too many for a cluster.
template <class T>
__global__ void __launch_bounds__(kSlabThreads, 2) group_shares(const T* x, Pixels pixels, Slab slab, Shares shares) {
  __shared__ float4 sums[kSlabThreads];
  wait_for_previous();
  let_next_start();
  int split = blockIdx.x % shares.splits, rest = blockIdx.x / shares.splits;
  int image = rest / slab.per_image, s = rest - image * slab.per_image;
  int begin = split * shares.split_pixels, end = min(begin + shares.split_pixels, shares.pixels);
  int first = image * shares.groups + s * (slab.channels / shares.group_channels);
  compute_shares(x + image * pixels.stride_n + s * slab.channels, pixels, slab, shares.group_channels, begin, end, sums,
                 [&](int g, float2 share) { shares.data[int64_t(first + g) * shares.splits + split] = share; });
}

template <class T>
__global__ void __launch_bounds__(kSlabThreads, 2)
    group_apply(const T* x, Pixels pixels, int out_pixels, int chunks, int chunk_pixels, Slab slab, Shares shares,
                Norm norm, bool with_silu, Codes codes, int8_t* out) {
  __shared__ float2 moments[kSlabGroups];
  prefetch(norm, codes, slab.per_image * slab.channels);
  wait_for_previous();
  let_next_start();
  int chunk = blockIdx.x % chunks, rest = blockIdx.x / chunks;
  int image = rest / slab.per_image, s = rest - image * slab.per_image;
  int groups = slab.channels / shares.group_channels, first = image * shares.groups + s * groups;
  int begin = chunk * chunk_pixels, end = min(begin + chunk_pixels, out_pixels);
  normalize(x + image * pixels.stride_n, pixels, slab, s, shares.group_channels, begin, end, norm, with_silu, codes,
            out + int64_t(image) * out_pixels * (slab.per_image * slab.channels), [&] {
              auto share = [&](int g, int i) { return shares.data[int64_t(first + g) * shares.splits + i]; };
              put_together(shares, groups, norm.eps, share, moments);
              return moments;
            });
}

// One kernel: a cluster for each slab.
template <class T>
__global__ void __launch_bounds__(kSlabThreads, 2)
    group_norm_clusters(const T* x, Pixels in, Pixels padded, int out_pixels, int chunk_pixels, Slab slab, Shares shares,
                        Norm norm, bool with_silu, Codes codes, int8_t* out) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  extern __shared__ float4 shared[];
  float2* own = reinterpret_cast<float2*>(shared + kSlabThreads);
  float2* moments = own + kSlabGroups;
  auto cluster = cooperative_groups::this_cluster();
  prefetch(norm, codes, slab.per_image * slab.channels);
  wait_for_previous();
  let_next_start();
  int rank = blockIdx.x % shares.splits, rest = blockIdx.x / shares.splits;
  int image = rest / slab.per_image, s = rest - image * slab.per_image;
  int size = shares.group_channels;
  x += image * in.stride_n;
  int begin = rank * shares.split_pixels, end = min(begin + shares.split_pixels, shares.pixels);
  compute_shares(x + s * slab.channels, in, slab, size, begin, end, shared,
                 [&](int g, float2 share) { own[g] = share; });
  begin = min(rank * chunk_pixels, out_pixels), end = min(begin + chunk_pixels, out_pixels);
  normalize(x, padded, slab, s, size, begin, end, norm, with_silu, codes,
            out + int64_t(image) * out_pixels * (slab.per_image * slab.channels), [&] {
              cluster.sync();
              auto share = [&](int g, int i) { return cluster.map_shared_rank(own, i)[g]; };
              put_together(shares, slab.channels / size, norm.eps, share, moments);
              cluster.barrier_arrive();
              return moments;
            });
  cluster.barrier_wait();  // nobody ends while others read its shares
#endif
}

// Any layout: a block for some pixels of one group. `by_pixel`: neighbouring threads take neighbouring pixels.
__global__ void __launch_bounds__(kThreads)
    group_shares_any(Floats x, bool by_pixel, Divider inner, Shares shares) {
  __shared__ float shared[kThreads / 32];
  __shared__ float pivot;
  wait_for_previous();
  let_next_start();
  int split = blockIdx.x % shares.splits, rest = blockIdx.x / shares.splits;
  int image = rest / shares.groups, group = rest - image * shares.groups;
  int begin = split * shares.split_pixels, count = min(shares.split_pixels, shares.pixels - begin);
  int size = shares.group_channels;
  uint32_t total = uint32_t(shares.split_pixels) * size;
  float mean = 0.f, squares = 0.f, seen = 0.f;
  for (uint32_t i = threadIdx.x; i < total; i += kThreads) {
    uint32_t in, out = inner.divide(i, in);
    int c = by_pixel ? out : in, p = by_pixel ? in : out;
    if (p >= count) continue;
    p += begin;
    int h = p / int(x.size[2]), w = p - h * int(x.size[2]);
    int64_t at = image * x.stride[0] + h * x.stride[1] + w * x.stride[2] + (int64_t(group) * size + c) * x.stride[3];
    float f = load_float(x.data, x.type, at), d = f - mean;  // Welford
    seen += 1.f;
    mean += d / seen;
    squares += d * (f - mean);
  }
  if (threadIdx.x == 0) pivot = mean;  // thread 0 always has a value
  __syncthreads();
  Sums sums;
  sums.add(seen, mean, squares, pivot);
  sums.count = reduce_block(sums.count, shared, Add());
  sums.first = reduce_block(sums.first, shared, Add());
  sums.second = reduce_block(sums.second, shared, Add());
  if (threadIdx.x == 0) {
    shares.data[(int64_t(image) * shares.groups + group) * shares.splits + split] = sums.moments(pivot);
  }
}

__global__ void __launch_bounds__(kThreads, 4)
    group_apply_any(Floats x, Pad pad, Divider size, int chunks, int chunk_pixels, Shares shares, Norm norm,
                    bool with_silu, Codes codes, int8_t* out) {
  __shared__ float2 moments;
  wait_for_previous();
  let_next_start();
  int chunk = blockIdx.x % chunks, rest = blockIdx.x / chunks;
  int image = rest / shares.groups, group = rest - image * shares.groups;
  const float2* data = shares.data + int64_t(rest) * shares.splits;
  put_together(shares, 1, norm.eps, [&](int, int i) { return data[i]; }, &moments);
  int width = int(x.size[2]) + pad.left + pad.right, height = int(x.size[1]) + pad.top + pad.bottom;
  int begin = chunk * chunk_pixels, count = min(chunk_pixels, width * height - begin);
  uint32_t total = uint32_t(count) * size.divisor;
  for (uint32_t i = threadIdx.x; i < total; i += kThreads) {
    uint32_t c, p = begin + size.divide(i, c);
    int channel = group * int(size.divisor) + int(c);
    int line = int(p) / width, w = int(p) - line * width - pad.left, h = line - pad.top;
    float f = 0.f;  // in the border
    if (w >= 0 && w < x.size[2] && h >= 0 && h < x.size[1]) {
      int64_t at = image * x.stride[0] + h * x.stride[1] + w * x.stride[2] + channel * x.stride[3];
      f = (load_float(x.data, x.type, at) - moments.x) * moments.y;
      f = f * weight_of(norm.weight, norm.type, channel, 1.f) + weight_of(norm.bias, norm.type, channel, 0.f);
      if (with_silu) f = silu(f);
    }
    out[(int64_t(image) * width * height + p) * x.size[3] + channel] =
        int8_t(encoder_of_channel(codes, channel).code(f));
  }
}

constexpr int64_t kBlockElements = kIndexLimit / 4;  // that a block of the kernels for any layout may work on

int greatest_divisor(int a, int b) { return b == 0 ? a : greatest_divisor(b, a % b); }

// The slabs of an image: as wide as `most` channels allow; no vectors where there are no slabs.
Slab make_slab(const Floats& x, int norm_groups, int most) {
  int channels = x.channels(), size = channels / norm_groups;
  Slab slab = {};
  if (channels % kVector != 0 || size < kLeastSize) return slab;
  int unit = size / greatest_divisor(size, kVector) * kVector, units = channels / unit;
  if (unit > kSlabThreads * kVector) return slab;
  int wide = 1;
  for (int k = 1; k <= units && k * unit <= most; ++k) {
    if (units % k == 0) wide = k;
  }
  slab.channels = unit * wide, slab.per_image = units / wide;
  slab.vectors = slab.channels / kVector, slab.lines = kSlabThreads / slab.vectors;
  return slab;
}

// Parts of the pixels of an image: `parts`, but of at least `least` and at most `most` pixels.
void split_pixels(int64_t pixels, int64_t parts, int64_t least, int64_t most, int& splits, int& each) {
  int64_t e = ceil_div(pixels, parts < 1 ? 1 : parts);
  if (e < least) e = least;
  if (e > most) e = most;
  if (e > pixels) e = pixels;
  each = int(e), splits = int(ceil_div(pixels, e));
}

Shares make_shares(const Floats& x, int norm_groups) {
  Shares s = {};
  s.groups = norm_groups, s.group_channels = x.channels() / norm_groups;
  s.pixels = int(x.size[1] * x.size[2]);
  return s;
}

// Of group_shares(): a wave of blocks; one to a multiprocessor where that leaves fewer shares to put together.
Shares make_shares(const Floats& x, int norm_groups, const Slab& slab, const Stream& on) {
  Shares s = make_shares(x, norm_groups);
  int64_t slabs = x.size[0] * slab.per_image, parts = on.sm_count / slabs;
  if (s.pixels / (2 * parts + 1) >= slab.lines * 8) parts = 2 * int64_t(on.sm_count) / slabs;
  split_pixels(s.pixels, parts, 4, s.pixels, s.splits, s.split_pixels);
  return s;
}

// Of group_shares_any().
Shares make_shares(const Floats& x, int norm_groups, const Stream& on) {
  Shares s = make_shares(x, norm_groups);
  int64_t parts = 8 * int64_t(on.sm_count) / (x.size[0] * norm_groups);
  split_pixels(s.pixels, parts, 64, kBlockElements / s.group_channels, s.splits, s.split_pixels);
  return s;
}

// Of group_norm_clusters(), with the narrowest slabs; no splits where two kernels are to be preferred. Clusters use fewer
// multiprocessors, so one may have more to do than its even part: what it can do while a second kernel would begin.
constexpr int kMostBlocks = 8, kWorthSplitting = 16384, kWorthAKernel = 32768;  // blocks of a cluster; values

Shares make_shares_of_clusters(const Floats& x, int norm_groups, const Slab& slab, const Stream& on) {
  Shares s = make_shares(x, norm_groups);
  int64_t slabs = x.size[0] * slab.per_image, blocks = 1;
  auto values = [&] { return ceil_div(s.pixels, blocks) * slab.channels; };
  while (blocks < kMostBlocks && (slabs * blocks * 2 <= on.sm_count || values() > kWorthSplitting)) blocks *= 2;
  split_pixels(s.pixels, blocks, 4, s.pixels, s.splits, s.split_pixels);
  int64_t busiest = ceil_div(slabs * s.splits, on.sm_count) * s.split_pixels * slab.channels;
  if (on.arch < 90 || busiest - x.rows() * x.channels() / on.sm_count > kWorthAKernel) s.splits = 0;
  return s;
}

}  // namespace

int64_t group_norm_workspace(const Floats& x, int norm_groups, const Stream& on) {
  if (empty(x)) return 0;
  // Which kernels run depends on the address too: enough for either.
  int splits = make_shares(x, norm_groups, on).splits;
  Slab slab = make_slab(x, norm_groups, kSlabChannels);
  if (slab.vectors) {
    int of_slabs = make_shares(x, norm_groups, slab, on).splits;
    splits = splits > of_slabs ? splits : of_slabs;
  }
  return x.size[0] * norm_groups * splits * int64_t(sizeof(float2));
}

cudaError_t group_norm_quantize(const Floats& x, int norm_groups, const Norm& norm, bool silu, const Codes& codes,
                                const Pad& pad, int8_t* out, void* workspace, const Stream& on) {
  int64_t width = x.size[2] + pad.left + pad.right, height = x.size[1] + pad.top + pad.bottom;
  int64_t out_pixels = width * height;
  if (x.size[0] == 0 || out_pixels == 0 || x.size[3] == 0) return cudaSuccess;
  if (empty(x)) return quantize(x, codes, pad, out, on);  // all border
  // Indices of pixels, and of blocks, are 32 bit.
  int64_t blocks = x.size[0] * norm_groups * (16 * int64_t(on.sm_count) + 1);
  if (norm_groups < 1 || x.size[3] % norm_groups != 0 || x.size[0] * out_pixels >= kIndexLimit / 2 ||
      blocks >= kIndexLimit) {
    return cudaErrorInvalidValue;
  }
  Slab slab = make_slab(x, norm_groups, kSlabChannels);
  if (!slab.vectors || !vectors_fit(x, codes) || !weights_fit(norm) || !aligned(out, 8)) {
    Shares shares = make_shares(x, norm_groups, on);
    shares.data = static_cast<float2*>(workspace);
    bool by_pixel = x.stride[3] != 1;
    Grid grid{dim3(unsigned(x.size[0] * norm_groups * shares.splits)), dim3(kThreads)};
    cudaError_t error = launch(group_shares_any, grid, on, x, by_pixel,
                               Divider(by_pixel ? shares.split_pixels : shares.group_channels), shares);
    if (error != cudaSuccess) return error;
    int64_t parts = 16 * int64_t(on.sm_count) / (x.size[0] * norm_groups);
    int chunks, chunk_pixels;
    split_pixels(out_pixels, parts, 64, kBlockElements / shares.group_channels, chunks, chunk_pixels);
    grid.blocks = dim3(unsigned(x.size[0] * norm_groups * chunks));
    return launch(group_apply_any, grid, on, x, pad, Divider(shares.group_channels), chunks, chunk_pixels, shares, norm,
                  silu, codes, out);
  }
  return with_type(x.type, [&](auto t) {
    using T = decltype(t);
    const T* data = static_cast<const T*>(x.data);
    // No more lines than pixels.
    auto with_lines = [](Slab slab, int pixels) {
      if (slab.lines > pixels) slab.lines = pixels;
      return slab;
    };
    Slab narrow = make_slab(x, norm_groups, 0);
    Shares shares = make_shares_of_clusters(x, norm_groups, narrow, on);
    if (shares.splits) {
      int chunk_pixels = int(ceil_div(out_pixels, shares.splits));
      narrow = with_lines(narrow, chunk_pixels > shares.split_pixels ? chunk_pixels : shares.split_pixels);
      Grid grid{dim3(unsigned(x.size[0] * narrow.per_image * shares.splits)), dim3(narrow.threads())};
      grid.shared_bytes = kSlabThreads * int(sizeof(float4)) + 2 * kSlabGroups * int(sizeof(float2));
      grid.cluster = shares.splits;
      return launch(group_norm_clusters<T>, grid, on, data, Pixels(x, Pad()), Pixels(x, pad), int(out_pixels),
                    chunk_pixels, narrow, shares, norm, silu, codes, out);
    }
    shares = make_shares(x, norm_groups, slab, on);
    shares.data = static_cast<float2*>(workspace);
    int images = int(x.size[0]) * slab.per_image;
    Slab of_shares = with_lines(slab, shares.split_pixels);
    Grid grid{dim3(unsigned(images * shares.splits)), dim3(of_shares.threads())};
    cudaError_t error = launch(group_shares<T>, grid, on, data, Pixels(x, Pad()), of_shares, shares);
    if (error != cudaSuccess) return error;
    int chunks, chunk_pixels;
    split_pixels(out_pixels, 2 * int64_t(on.sm_count) / images, 4, out_pixels, chunks, chunk_pixels);
    Slab of_apply = with_lines(slab, chunk_pixels);
    Grid apply{dim3(unsigned(images * chunks)), dim3(of_apply.threads())};
    return launch(group_apply<T>, apply, on, data, Pixels(x, pad), int(out_pixels), chunks, chunk_pixels, of_apply,
                  shares, norm, silu, codes, out);
  });
}

}  // namespace mixdq
