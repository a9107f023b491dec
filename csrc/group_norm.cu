// GroupNorm, SiLU where asked, then quantize.
#include "norm.cuh"

namespace mixdq {
namespace {

constexpr int kThreads = 256;

// Two kernels. The first leaves in the workspace, for each image, group and part of the pixels, the mean and the sum of
// squared deviations from it; the second puts those of its groups together, always in the same order, and normalizes.
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

// Mean and reciprocal deviation of `groups` groups from `group` on, by all threads of the block.
__device__ __forceinline__ void put_together(const Shares& s, int image, int group, int groups, float eps,
                                             float2* moments) {
  int lanes = lanes_of_group(groups, blockDim.x), lane = threadIdx.x % lanes;
  for (int base = 0; base < groups; base += blockDim.x / lanes) {
    int g = base + threadIdx.x / lanes;
    Sums sums;
    float pivot = 0.f;
    if (g < groups) {
      const float2* from = s.data + (int64_t(image) * s.groups + group + g) * s.splits;
      pivot = from[0].x;
#pragma unroll 4
      for (int i = lane; i < s.splits; i += lanes) {
        float2 share = from[i];
        sums.add(s.count(i), share.x, share.y, pivot);
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

constexpr int kSlabThreads = 384;  // at most; with two blocks to a multiprocessor that leaves 80 registers

template <class T>
constexpr int kLoads = sizeof(T) == 2 ? 8 : 4;  // pixels that a thread loads at a time

template <class T>
__global__ void __launch_bounds__(kSlabThreads, 2) group_shares(const T* x, Pixels pixels, Slab slab, Shares shares) {
  extern __shared__ float4 shared[];
  wait_for_previous();
  let_next_start();
  constexpr int kPixels = kLoads<T>;
  int split = blockIdx.x % shares.splits, rest = blockIdx.x / shares.splits;
  int image = rest / slab.per_image, s = rest - image * slab.per_image;
  int line = threadIdx.x / slab.vectors, v = threadIdx.x - line * slab.vectors;
  int begin = split * shares.split_pixels, end = min(begin + shares.split_pixels, shares.pixels);
  float* means = reinterpret_cast<float*>(shared);  // [line, channel]
  float* deviations = means + slab.lines * slab.channels;

  if (line < slab.lines) {
    x += image * pixels.stride_n + s * slab.channels + v * kVector;
    float mean[kVector] = {}, squares[kVector] = {}, seen = 0.f;
    for (int p = begin + line; p < end; p += slab.lines * kPixels) {
      Raw<T> raw[kPixels];
      int count = 0;
#pragma unroll
      for (int i = 0; i < kPixels; ++i) {
        uint32_t column, q = p + i * slab.lines;
        if (q >= uint32_t(end)) {
          raw[i].clear();
          continue;
        }
        uint32_t row = pixels.width.divide(q, column);
        raw[i].load(x + row * pixels.stride_h + column * pixels.stride_w);
        count = i + 1;
      }
      // The mean of these pixels, then their deviations from it, then both into those of all so far.
      float inverse = 1.f / float(count), before = seen;
      seen += float(count);
      float share = float(count) / seen;
      float m[kVector] = {}, d[kVector] = {}, f[kVector];
#pragma unroll
      for (int i = 0; i < kPixels; ++i) {
        if (i >= count) break;
        raw[i].get(f);
#pragma unroll
        for (int k = 0; k < kVector; ++k) m[k] += f[k];
      }
#pragma unroll
      for (int k = 0; k < kVector; ++k) m[k] *= inverse;
#pragma unroll
      for (int i = 0; i < kPixels; ++i) {
        if (i >= count) break;
        raw[i].get(f);
#pragma unroll
        for (int k = 0; k < kVector; ++k) d[k] += (f[k] - m[k]) * (f[k] - m[k]);
      }
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        float delta = m[k] - mean[k];
        mean[k] += delta * share;
        squares[k] += d[k] + delta * delta * before * share;
      }
    }
    float4* to = reinterpret_cast<float4*>(means + line * slab.channels + v * kVector);
    to[0] = {mean[0], mean[1], mean[2], mean[3]}, to[1] = {mean[4], mean[5], mean[6], mean[7]};
    to = reinterpret_cast<float4*>(deviations + line * slab.channels + v * kVector);
    to[0] = {squares[0], squares[1], squares[2], squares[3]}, to[1] = {squares[4], squares[5], squares[6], squares[7]};
  }
  __syncthreads();

  int size = shares.group_channels, groups = slab.channels / size;
  int lanes = lanes_of_group(groups, blockDim.x), lane = threadIdx.x % lanes;
  int lines = min(slab.lines, end - begin);  // those that saw a pixel
  int line_step = lanes / size, channel_step = lanes - line_step * size;
  int each = (end - begin) / slab.lines;  // pixels of a line; the first lines have one more
  int longer = end - begin - each * slab.lines;
  for (int base = 0; base < groups; base += blockDim.x / lanes) {
    int g = base + threadIdx.x / lanes;
    Sums sums;
    float pivot = 0.f;
    if (g < groups) {
      pivot = means[g * size];
      int l = lane / size, c = lane - l * size;
#pragma unroll 4
      for (int i = lane; i < lines * size; i += lanes) {
        int at = l * slab.channels + g * size + c;
        sums.add(float(l < longer ? each + 1 : each), means[at], deviations[at], pivot);
        l += line_step, c += channel_step;
        if (c >= size) c -= size, ++l;
      }
    }
    sums.reduce(lanes);
    if (g < groups && lane == 0) {
      int group = s * groups + g;
      shares.data[(int64_t(image) * shares.groups + group) * shares.splits + split] = sums.moments(pivot);
    }
  }
}

__device__ __forceinline__ float silu(float y) { return __fdividef(y, 1.f + __expf(-y)); }

template <class T>
__global__ void __launch_bounds__(kSlabThreads, 2)
    group_apply(const T* x, Pixels pixels, int out_pixels, int chunks, int chunk_pixels, Slab slab, Shares shares,
                Norm norm, bool with_silu, Codes codes, int8_t* out) {
  __shared__ float2 moments[256];
  wait_for_previous();
  let_next_start();
  constexpr int kPixels = kLoads<T> / 2;
  int chunk = blockIdx.x % chunks, rest = blockIdx.x / chunks;
  int image = rest / slab.per_image, s = rest - image * slab.per_image;
  int line = threadIdx.x / slab.vectors, v = threadIdx.x - line * slab.vectors;
  int end = min((chunk + 1) * chunk_pixels, out_pixels);
  int channel = s * slab.channels + v * kVector;
  int p = line < slab.lines ? chunk * chunk_pixels + line : end;
  x += image * pixels.stride_n + channel;
  out += int64_t(image) * out_pixels * (slab.per_image * slab.channels) + channel;

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
  load();  // under way while the statistics are put together, as are these
  NormWeights weights;
  if (p < end) weights.load(norm, channel);
  Encoder e = encoder_of_channel(codes, channel);

  int size = shares.group_channels, groups = slab.channels / size;
  put_together(shares, image, s * groups, groups, norm.eps, moments);
  if (p >= end) return;
  float scale[kVector], shift[kVector];
  weights.get(norm, scale, shift);
  int g = v * kVector / size, c = v * kVector - g * size;
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    float2 m = moments[g];
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
      *reinterpret_cast<uint2*>(out + int64_t(q) * (slab.per_image * slab.channels)) = code;
    }
    p += kPixels * slab.lines;
    if (p >= end) break;
    load();
  }
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
  put_together(shares, image, group, 1, norm.eps, &moments);
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

constexpr int kSlabChannels = 256;  // at most, unless a single group with whole vectors has more

constexpr int64_t kBlockElements = kIndexLimit / 4;  // that a block of the kernels for any layout may work on

int greatest_divisor(int a, int b) { return b == 0 ? a : greatest_divisor(b, a % b); }

// The slabs of an image: as wide as the limit allows; no vectors where there are no slabs.
Slab make_slab(const Floats& x, int norm_groups) {
  int channels = x.channels(), size = channels / norm_groups;
  Slab slab = {};
  if (channels % kVector != 0) return slab;
  int unit = size / greatest_divisor(size, kVector) * kVector, units = channels / unit;
  if (unit > kSlabThreads * kVector) return slab;
  int wide = 1;
  for (int k = 1; k <= units && k * unit <= kSlabChannels; ++k) {
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

Shares make_shares(const Floats& x, int norm_groups, bool slabs, const Stream& on) {
  Shares s = {};
  s.groups = norm_groups, s.group_channels = x.channels() / norm_groups;
  s.pixels = int(x.size[1] * x.size[2]);
  if (slabs) {  // a wave of blocks; one to a multiprocessor where that leaves fewer shares to put together
    Slab slab = make_slab(x, norm_groups);
    int64_t parts = on.sm_count / (x.size[0] * slab.per_image);
    if (s.pixels / (2 * parts + 1) >= slab.lines * 8) parts = 2 * int64_t(on.sm_count) / (x.size[0] * slab.per_image);
    split_pixels(s.pixels, parts, 4, s.pixels, s.splits, s.split_pixels);
  } else {
    int64_t parts = 8 * int64_t(on.sm_count) / (x.size[0] * norm_groups);
    split_pixels(s.pixels, parts, 64, kBlockElements / s.group_channels, s.splits, s.split_pixels);
  }
  return s;
}

}  // namespace

int64_t group_norm_workspace(const Floats& x, int norm_groups, const Stream& on) {
  if (empty(x)) return 0;
  // Which kernels run depends on the address too: enough for either.
  int splits = make_shares(x, norm_groups, false, on).splits;
  if (make_slab(x, norm_groups).vectors) {
    int of_slabs = make_shares(x, norm_groups, true, on).splits;
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
  Slab slab = make_slab(x, norm_groups);
  bool slabs = slab.vectors && vectors_fit(x, codes) && weights_fit(norm) && aligned(out, 8);
  Shares shares = make_shares(x, norm_groups, slabs, on);
  shares.data = static_cast<float2*>(workspace);
  int chunks, chunk_pixels;
  if (!slabs) {
    bool by_pixel = x.stride[3] != 1;
    Grid grid{dim3(unsigned(x.size[0] * norm_groups * shares.splits)), dim3(kThreads)};
    cudaError_t error = launch(group_shares_any, grid, on, x, by_pixel,
                               Divider(by_pixel ? shares.split_pixels : shares.group_channels), shares);
    if (error != cudaSuccess) return error;
    int64_t parts = 16 * int64_t(on.sm_count) / (x.size[0] * norm_groups);
    split_pixels(out_pixels, parts, 64, kBlockElements / shares.group_channels, chunks, chunk_pixels);
    grid.blocks = dim3(unsigned(x.size[0] * norm_groups * chunks));
    return launch(group_apply_any, grid, on, x, pad, Divider(shares.group_channels), chunks, chunk_pixels, shares, norm,
                  silu, codes, out);
  }
  return with_type(x.type, [&](auto t) {
    using T = decltype(t);
    const T* data = static_cast<const T*>(x.data);
    int images = int(x.size[0]) * slab.per_image;
    Slab of_shares = slab;  // no more lines than pixels
    if (of_shares.lines > shares.split_pixels) of_shares.lines = shares.split_pixels;
    Grid grid{dim3(unsigned(images * shares.splits)), dim3(of_shares.threads())};
    grid.shared_bytes = of_shares.lines * of_shares.channels * 2 * int(sizeof(float));
    cudaError_t error = launch(group_shares<T>, grid, on, data, Pixels(x, Pad()), of_shares, shares);
    if (error != cudaSuccess) return error;
    int chunks, chunk_pixels;
    split_pixels(out_pixels, 2 * int64_t(on.sm_count) / images, 4, out_pixels, chunks, chunk_pixels);
    Slab of_apply = slab;
    if (of_apply.lines > chunk_pixels) of_apply.lines = chunk_pixels;
    Grid apply{dim3(unsigned(images * chunks)), dim3(of_apply.threads())};
    return launch(group_apply<T>, apply, on, data, Pixels(x, pad), int(out_pixels), chunks, chunk_pixels, of_apply,
                  shares, norm, silu, codes, out);
  });
}

}  // namespace mixdq
