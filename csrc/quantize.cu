// The plain quantizer and the one with a range per row.
#include "codes.cuh"

namespace mixdq {
namespace {

constexpr int kThreads = 256;

// --- quantize: vectors of eight channels -----------------------------------------------------------------------------

// Dense values in the order of the codes, one group, no border: where channels begin does not matter.
template <class T, int kUnroll>
__global__ void __launch_bounds__(kThreads) quantize_flat(const T* x, int64_t count, Codes codes, int8_t* out) {
  prefetch(codes);
  wait_for_previous();
  let_next_start();
  int64_t vectors = count / kVector, first = int64_t(blockIdx.x) * (kThreads * kUnroll) + threadIdx.x;
  Raw<T> raw[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    int64_t i = first + u * kThreads;
    if (i < vectors) raw[u].load(x + i * kVector);
  }
  Encoder e = encoder(codes, 0);
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    int64_t i = first + u * kThreads;
    float f[kVector];
    raw[u].get(f);
    if (i < vectors) reinterpret_cast<uint2*>(out)[i] = encode(f, e);
  }
  int64_t rest = vectors * kVector + threadIdx.x;
  if (blockIdx.x == 0 && rest < count) out[rest] = int8_t(e.code(to_float(x[rest])));
}

template <class T, int kUnroll>
__global__ void __launch_bounds__(kThreads)
    quantize_vectors(const T* x, Pixels pixels, Divider vectors, uint32_t total, Codes codes, int8_t* out) {
  prefetch(codes);
  wait_for_previous();
  let_next_start();
  uint32_t first = blockIdx.x * (kThreads * kUnroll) + threadIdx.x;
  Raw<T> raw[kUnroll];
  bool inside[kUnroll];
  uint32_t vector[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    uint32_t i = first + u * kThreads;
    inside[u] = false;
    if (i >= total) continue;
    int64_t offset = pixels.offset(vectors.divide(i, vector[u]));
    inside[u] = offset >= 0;
    if (inside[u]) raw[u].load(x + offset + vector[u] * kVector);
  }
  Encoder e = encoder(codes, 0);
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    uint32_t i = first + u * kThreads;
    if (i >= total) break;
    if (codes.groups > 1) e = encoder(codes, group_of(codes, int(vector[u]) * kVector));
    uint2 q;
    if (inside[u]) {
      float f[kVector];
      raw[u].get(f);
      q = encode(f, e);
    } else {
      uint32_t b = e.border();
      q.x = q.y = pack(b, b, b, b);
    }
    reinterpret_cast<uint2*>(out)[i] = q;
  }
}

// --- quantize: planes, one for each channel --------------------------------------------------------------------------

// The codes of 64 pixels by 64 channels are made in the order of the input, and turned in shared memory, four channels
// to a word. The blocks of a row of the grid that come after those of the pixels write the border.
struct Planes {
  int64_t stride_n, stride_c;
  int pixels, channels;  // of an image
  Divider width;         // of the input
  int out_width, out_height;
  Pad pad;
  int border;      // pixels of the border of an image
  int pixel_tiles;
  bool aligned;    // the first pixel of each plane lies at 16 bytes
  int store;       // bytes that can be stored at once: 16, 4 or 1
};

constexpr int kTile = 64;

// The place in the padded image of a pixel of the border: lines above, lines below, then both sides.
__device__ int border_place(const Planes& g, int b) {
  int above = g.pad.top * g.out_width, below = g.pad.bottom * g.out_width;
  if (b < above) return b;
  if (b < above + below) return (g.out_height - g.pad.bottom) * g.out_width + b - above;
  b -= above + below;
  int sides = g.pad.left + g.pad.right, line = b / sides, side = b - line * sides;
  int column = side < g.pad.left ? side : g.out_width - sides + side;
  return (g.pad.top + line) * g.out_width + column;
}

// Rows a, b, c, d of four bytes to their columns.
__device__ __forceinline__ void turn(uint32_t a, uint32_t b, uint32_t c, uint32_t d, uint32_t (&column)[4]) {
  uint32_t ab = __byte_perm(a, b, 0x5140), cd = __byte_perm(c, d, 0x5140);
  column[0] = __byte_perm(ab, cd, 0x5410), column[1] = __byte_perm(ab, cd, 0x7632);
  ab = __byte_perm(a, b, 0x7362), cd = __byte_perm(c, d, 0x7362);
  column[2] = __byte_perm(ab, cd, 0x5410), column[3] = __byte_perm(ab, cd, 0x7632);
}

template <class T>
__global__ void __launch_bounds__(128) quantize_planes(const T* x, Planes g, Codes codes, int8_t* out) {
  __shared__ uint32_t tile[kTile][kTile / 4 + 1];
  prefetch(codes);
  wait_for_previous();
  let_next_start();
  bool border = int(blockIdx.x) >= g.pixel_tiles;
  int first_pixel = (border ? int(blockIdx.x) - g.pixel_tiles : int(blockIdx.x)) * kTile;
  int first_channel = blockIdx.y * kTile;
  int quad = threadIdx.x / 8, pixel = threadIdx.x % 8 * kVector;
  int channel = first_channel + quad * 4;

  if (channel < g.channels) {
    uint2 rows[4] = {};
    if (border) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        uint32_t b = encoder_of_channel(codes, min(channel + k, g.channels - 1)).border();
        rows[k].x = rows[k].y = pack(b, b, b, b);
      }
    } else if (first_pixel + pixel < g.pixels) {
      const T* from = x + blockIdx.z * g.stride_n + channel * g.stride_c + first_pixel + pixel;
      bool whole = g.aligned && first_pixel + pixel + kVector <= g.pixels;
      Raw<T> raw[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        raw[k].clear();
        if (whole && channel + k < g.channels) raw[k].load(from + k * g.stride_c);
      }
      Encoder e = encoder_of_channel(codes, channel);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        float f[kVector];
        raw[k].get(f);
        if (!whole) {
#pragma unroll
          for (int j = 0; j < kVector; ++j) {
            bool there = first_pixel + pixel + j < g.pixels && channel + k < g.channels;
            f[j] = there ? to_float(from[k * g.stride_c + j]) : 0.f;
          }
        }
        if (codes.groups > 1) e = encoder_of_channel(codes, min(channel + k, g.channels - 1));
        rows[k] = encode(f, e);
      }
    }
    uint32_t column[4];
    turn(rows[0].x, rows[1].x, rows[2].x, rows[3].x, column);
#pragma unroll
    for (int j = 0; j < 4; ++j) tile[pixel + j][quad] = column[j];
    turn(rows[0].y, rows[1].y, rows[2].y, rows[3].y, column);
#pragma unroll
    for (int j = 0; j < 4; ++j) tile[pixel + 4 + j][quad] = column[j];
  }
  __syncthreads();

  int pixels = min(kTile, (border ? g.border : g.pixels) - first_pixel);
  int channels = min(kTile, g.channels - first_channel);
  int parts_log2 = g.store == 16 ? 2 : g.store == 4 ? 4 : 6;  // of the 64 channels
  for (int i = threadIdx.x; i < pixels << parts_log2; i += blockDim.x) {
    int p = i >> parts_log2, c = (i & ((1 << parts_log2) - 1)) * g.store;
    if (c >= channels) continue;
    int place;
    if (border) {
      place = border_place(g, first_pixel + p);
    } else {
      uint32_t column, line = g.width.divide(uint32_t(first_pixel + p), column);
      place = (int(line) + g.pad.top) * g.out_width + int(column) + g.pad.left;
    }
    int64_t image = int64_t(blockIdx.z) * g.out_height * g.out_width;
    int8_t* to = out + (image + place) * g.channels + first_channel + c;
    const uint32_t* from = &tile[p][c / 4];
    if (g.store == 16) {
      *reinterpret_cast<uint4*>(to) = uint4{from[0], from[1], from[2], from[3]};
    } else if (g.store == 4) {
      *reinterpret_cast<uint32_t*>(to) = from[0];
    } else {
      *to = reinterpret_cast<const int8_t*>(from)[c % 4];
    }
  }
}

// --- quantize: any layout --------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads) quantize_any(Floats x, Codes codes, Pad pad, int64_t total, int8_t* out) {
  prefetch(codes);
  wait_for_previous();
  let_next_start();
  int64_t width = x.size[2] + pad.left + pad.right, height = x.size[1] + pad.top + pad.bottom;
  int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < total; i += step) {
    int64_t pixel = i / x.size[3], channel = i - pixel * x.size[3];
    int64_t line = pixel / width, w = pixel - line * width - pad.left;
    int64_t image = line / height, h = line - image * height - pad.top;
    Encoder e = encoder_of_channel(codes, int(channel));
    uint32_t code = e.border();
    if (w >= 0 && w < x.size[2] && h >= 0 && h < x.size[1]) {
      int64_t at = image * x.stride[0] + h * x.stride[1] + w * x.stride[2] + channel * x.stride[3];
      code = e.code(load_float(x.data, x.type, at));
    }
    out[i] = int8_t(code);
  }
}

// Whether the values lie without gaps in the order of rows and channels.
bool is_dense(const Floats& x) {
  int64_t expected = 1;
  for (int i = 3; i >= 0; --i) {
    if (x.size[i] != 1 && x.stride[i] != expected) return false;
    expected *= x.size[i];
  }
  return true;
}

template <class T>
cudaError_t launch_flat(const Floats& x, const Codes& codes, int8_t* out, const Stream& on) {
  const T* data = static_cast<const T*>(x.data);
  int64_t count = x.rows() * x.size[3], vectors = ceil_div(count, kVector);
  // Several loads in flight for each thread, where that leaves threads enough.
  if (vectors >= int64_t(on.sm_count) * 2048 * 2) {
    Grid grid{dim3(unsigned(ceil_div(vectors, kThreads * 4))), dim3(kThreads)};
    return launch(quantize_flat<T, 4>, grid, on, data, count, codes, out);
  }
  Grid grid{dim3(unsigned(ceil_div(vectors, kThreads))), dim3(kThreads)};
  return launch(quantize_flat<T, 1>, grid, on, data, count, codes, out);
}

template <class T>
cudaError_t launch_vectors(const Floats& x, const Codes& codes, const Pad& pad, int64_t total, int8_t* out,
                           const Stream& on) {
  const T* data = static_cast<const T*>(x.data);
  Divider vectors(x.size[3] / kVector);
  if (total >= int64_t(on.sm_count) * 2048 * 2) {
    Grid grid{dim3(unsigned(ceil_div(total, kThreads * 4))), dim3(kThreads)};
    return launch(quantize_vectors<T, 4>, grid, on, data, Pixels(x, pad), vectors, uint32_t(total), codes, out);
  }
  Grid grid{dim3(unsigned(ceil_div(total, kThreads))), dim3(kThreads)};
  return launch(quantize_vectors<T, 1>, grid, on, data, Pixels(x, pad), vectors, uint32_t(total), codes, out);
}

template <class T>
cudaError_t launch_planes(const Floats& x, const Codes& codes, const Pad& pad, int8_t* out, const Stream& on) {
  Planes g = {};
  int64_t step = 16 / sizeof(T);
  g.stride_n = x.stride[0], g.stride_c = x.stride[3];
  g.pixels = int(x.size[1] * x.size[2]), g.channels = x.channels();
  g.width = Divider(x.size[2]);
  g.out_width = int(x.size[2]) + pad.left + pad.right, g.out_height = int(x.size[1]) + pad.top + pad.bottom;
  g.pad = pad;
  g.border = g.out_width * g.out_height - g.pixels;
  g.pixel_tiles = int(ceil_div(g.pixels, kTile));
  g.aligned = aligned(x.data, 16) && (x.size[0] == 1 || g.stride_n % step == 0) &&
              (g.channels == 1 || g.stride_c % step == 0);
  g.store = g.channels % 16 == 0 && aligned(out, 16) ? 16 : g.channels % 4 == 0 && aligned(out, 4) ? 4 : 1;
  unsigned tiles = unsigned(g.pixel_tiles + ceil_div(g.border, kTile));
  Grid grid{dim3(tiles, unsigned(ceil_div(g.channels, kTile)), unsigned(x.size[0])), dim3(128)};
  return launch(quantize_planes<T>, grid, on, static_cast<const T*>(x.data), g, codes, out);
}

// --- quantize_per_token ----------------------------------------------------------------------------------------------

struct TokenOut {
  int8_t* codes;
  int64_t pitch;                  // from the codes of one row to those of the next
  float *scale, *zero_point;
  int groups;                     // from the parameters of one row to those of the next
};

template <class T>
__device__ float largest_finite();
template <>
__device__ float largest_finite<__half>() { return 65504.f; }
template <>
__device__ float largest_finite<__nv_bfloat16>() { return 0x1.fep127f; }
template <>
__device__ float largest_finite<float>() { return 0x1.fffffep127f; }

// The operations of dynamic_range(), one by one. A NaN counted as 0, an infinity counts as the largest number.
__device__ __forceinline__ Encoder encoder_of_range(float low, float high, float largest, int bits) {
  low = fmaxf(low, -largest), high = fminf(high, largest);
  float steps = bits == 8 ? 255.f : 15.f;
  float span = __fsub_rn(__fdiv_rn(high, steps), __fdiv_rn(low, steps));
  Encoder e(span > 0.f ? span : 1.f, 0.f, bits);
  float zero_point = __fadd_rn(rintf(__fdiv_rn(-low, e.scale)), e.low);
  e.zero_point = fminf(fmaxf(zero_point, e.low), e.high);
  return e;
}

template <class T, int kVectors, bool kWarp>
__global__ void __launch_bounds__(kWarp ? 128 : 512)
    token_rows(const T* x, Pixels pixels, uint32_t rows, int vectors, int bits, TokenOut out) {
  __shared__ float shared[2][16];
  wait_for_previous();
  let_next_start();
  uint32_t row = kWarp ? blockIdx.x * 4 + threadIdx.x / 32 : blockIdx.x;
  int first = kWarp ? threadIdx.x % 32 : threadIdx.x, step = kWarp ? 32 : blockDim.x;
  if (row >= rows) return;
  x += pixels.offset(row);
  Raw<T> raw[kVectors];
  load_row(raw, x, first, step, vectors);  // zeros change no range, which includes 0 anyway
  float low = 0.f, high = 0.f;  // fminf and fmaxf pass over a NaN
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    float f[kVector];
    raw[j].get(f);
#pragma unroll
    for (int i = 0; i < kVector; ++i) low = fminf(low, f[i]), high = fmaxf(high, f[i]);
  }
  if (kWarp) {
    low = reduce_lanes(low, Least()), high = reduce_lanes(high, Most());
  } else {
    low = reduce_lanes(low, Least()), high = reduce_lanes(high, Most());
    if (threadIdx.x % 32 == 0) shared[0][threadIdx.x / 32] = low, shared[1][threadIdx.x / 32] = high;
    __syncthreads();
    for (int i = 0; i < int(blockDim.x / 32); ++i) {
      low = fminf(low, shared[0][i]), high = fmaxf(high, shared[1][i]);
    }
  }
  Encoder e = encoder_of_range(low, high, largest_finite<T>(), bits);
  int64_t at = int64_t(row) * out.groups;
  if (first == 0) out.scale[at] = e.scale, out.zero_point[at] = e.zero_point;
  uint2* to = reinterpret_cast<uint2*>(out.codes + row * out.pitch);
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    int v = first + j * step;
    float f[kVector];
    raw[j].get(f);
    if (v < vectors) to[v] = encode(f, e);
  }
}

// Any layout: a block reads its row twice. x and out begin at the first channel of the group.
template <class T>
__global__ void __launch_bounds__(kThreads) token_any(const T* x, Floats shape, int channels, int bits, TokenOut out) {
  __shared__ float shared[kThreads / 32];
  wait_for_previous();
  let_next_start();
  int64_t row = blockIdx.x, line = row / shape.size[2], image = line / shape.size[1];
  x += image * shape.stride[0] + (line - image * shape.size[1]) * shape.stride[1] +
       (row - line * shape.size[2]) * shape.stride[2];
  float low = 0.f, high = 0.f;
  for (int c = threadIdx.x; c < channels; c += kThreads) {
    float f = to_float(x[c * shape.stride[3]]);
    low = fminf(low, f), high = fmaxf(high, f);
  }
  low = reduce_block(low, shared, Least()), high = reduce_block(high, shared, Most());
  Encoder e = encoder_of_range(low, high, largest_finite<T>(), bits);
  if (threadIdx.x == 0) out.scale[row * out.groups] = e.scale, out.zero_point[row * out.groups] = e.zero_point;
  for (int c = threadIdx.x; c < channels; c += kThreads) {
    out.codes[row * out.pitch + c] = int8_t(e.code(to_float(x[c * shape.stride[3]])));
  }
}

template <class T>
cudaError_t launch_token(const Floats& x, int channels, bool fast, int bits, const TokenOut& out, const Stream& on) {
  const T* data = static_cast<const T*>(x.data);
  if (!fast) {
    return launch(token_any<T>, Grid{dim3(unsigned(x.rows())), dim3(kThreads)}, on, data, x, channels, bits, out);
  }
  int vectors = channels / kVector;
  Team team(x.rows(), vectors, on);
  auto kernel = team.warp ? (team.vectors == 3 ? token_rows<T, 3, true> : token_rows<T, 5, true>)
                          : (team.vectors == 1 ? token_rows<T, 1, false> : token_rows<T, 4, false>);
  return launch(kernel, team.grid, on, data, Pixels(x, Pad()), uint32_t(x.rows()), vectors, bits, out);
}

}  // namespace

cudaError_t quantize(const Floats& x, const Codes& codes, const Pad& pad, int8_t* out, const Stream& on) {
  int64_t width = x.size[2] + pad.left + pad.right, height = x.size[1] + pad.top + pad.bottom;
  int64_t pixels = x.size[0] * height * width, total = pixels * x.size[3];
  if (total == 0) return cudaSuccess;
  bool padded = pad.left || pad.right || pad.top || pad.bottom;
  if (!padded && codes.groups == 1 && is_dense(x) && aligned(x.data, 16) && aligned(out, 8)) {
    return with_type(x.type, [&](auto t) { return launch_flat<decltype(t)>(x, codes, out, on); });
  }
  // An image without pixels is all border: the kernels for a layout need not know of it.
  bool usual = !empty(x) && pixels < kIndexLimit - kTile && x.size[0] <= 65535;
  int64_t vectors = total / kVector;
  if (usual && vectors < kIndexLimit - 4 * kThreads && vectors_fit(x, codes) && aligned(out, 8)) {
    return with_type(x.type, [&](auto t) { return launch_vectors<decltype(t)>(x, codes, pad, vectors, out, on); });
  }
  bool planes = (x.size[2] == 1 || x.stride[2] == 1) && (x.size[1] == 1 || x.stride[1] == x.size[2]);
  if (usual && planes && x.size[3] <= 65535 * kTile && x.stride[3] != 1) {
    return with_type(x.type, [&](auto t) { return launch_planes<decltype(t)>(x, codes, pad, out, on); });
  }
  int64_t blocks = ceil_div(total, kThreads), most = int64_t(on.sm_count) * 32;
  Grid grid{dim3(unsigned(blocks < most ? blocks : most)), dim3(kThreads)};
  return launch(quantize_any, grid, on, x, codes, pad, total, out);
}

cudaError_t quantize_per_token(const Floats& x, const Codes& codes, int8_t* out, float* scale, float* zero_point,
                               const Stream& on) {
  if (x.rows() == 0) return cudaSuccess;
  if (x.rows() >= kIndexLimit) return cudaErrorInvalidValue;
  int first = 0;
  for (int g = 0; g < codes.groups; ++g) {
    int channels = codes.groups == 1 ? x.channels() : codes.group_channels[g];
    Floats part = x;
    int bytes = x.type == Float::f32 ? 4 : 2;
    part.data = static_cast<const char*>(x.data) + first * x.stride[3] * bytes;
    part.size[3] = channels;
    bool fast = channels > 0 && channels <= kTeamChannels && x.size[3] % kVector == 0 && aligned(out + first, 8) &&
                vectors_fit(part, Codes());
    TokenOut to{out + first, x.size[3], scale + g, zero_point + g, codes.groups};
    cudaError_t error = with_type(
        x.type, [&](auto t) { return launch_token<decltype(t)>(part, channels, fast, codes.bits, to, on); });
    if (error != cudaSuccess) return error;
    first += channels;
  }
  return cudaSuccess;
}

}  // namespace mixdq
