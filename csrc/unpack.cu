// Weights of 4 or 2 bits to int8, for the matmul kernels that cannot read them as they are stored; and weights to floats,
// for torch's own operators.
#include "device.cuh"

namespace mixdq {
namespace {

constexpr int kThreads = 256;

// The code in the low `Bits` bits of each byte, widened to the byte.
template <int Bits>
__device__ __forceinline__ unsigned widen(unsigned bytes) {
  constexpr unsigned kSign = Bits == 4 ? 0x08080808u : 0x02020202u;
  constexpr unsigned kFill = Bits == 4 ? 0x1E : 0x7E;  // times the sign bit: all bits above it
  return bytes | (bytes & kSign) * kFill;
}

// 16 codes each, for rows that are packed without a gap.
template <int Bits>
__global__ void __launch_bounds__(kThreads) unpack_vectors(const unsigned* packed, uint4* out, int64_t count) {
  wait_for_previous();
  int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= count) return;
  uint4 codes;
  if constexpr (Bits == 4) {
    uint2 in = reinterpret_cast<const uint2*>(packed)[at];
    unsigned low = widen<4>(in.x & 0x0F0F0F0Fu), high = widen<4>(in.x >> 4 & 0x0F0F0F0Fu);
    codes.x = __byte_perm(low, high, 0x5140);
    codes.y = __byte_perm(low, high, 0x7362);
    low = widen<4>(in.y & 0x0F0F0F0Fu), high = widen<4>(in.y >> 4 & 0x0F0F0F0Fu);
    codes.z = __byte_perm(low, high, 0x5140);
    codes.w = __byte_perm(low, high, 0x7362);
  } else {
    unsigned in = packed[at], planes[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) planes[i] = widen<2>(in >> 2 * i & 0x03030303u);
    unsigned low01 = __byte_perm(planes[0], planes[1], 0x5140), high01 = __byte_perm(planes[0], planes[1], 0x7362);
    unsigned low23 = __byte_perm(planes[2], planes[3], 0x5140), high23 = __byte_perm(planes[2], planes[3], 0x7362);
    codes.x = __byte_perm(low01, low23, 0x5410);
    codes.y = __byte_perm(low01, low23, 0x7632);
    codes.z = __byte_perm(high01, high23, 0x5410);
    codes.w = __byte_perm(high01, high23, 0x7632);
  }
  out[at] = codes;
}

// One code each, any channels.
__global__ void __launch_bounds__(kThreads)
    unpack_codes(const uint8_t* packed, int8_t* out, int64_t count, int channels, int bits) {
  wait_for_previous();
  int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= count) return;
  int per_byte = 8 / bits;
  int64_t row = at / channels, row_bytes = (channels + per_byte - 1) / per_byte;
  int channel = int(at - row * channels);
  unsigned byte = packed[row * row_bytes + channel / per_byte];
  // Up to the top of a byte, where the sign lies, and down again.
  out[at] = int8_t(int8_t(byte << (8 - bits - channel % per_byte * bits)) >> (8 - bits));
}

// Eight neighbouring channels to a thread.
__global__ void __launch_bounds__(kThreads)
    dequantize_codes(const uint8_t* codes, int64_t pitch, const float* scale, void* out, Float type, int64_t out_pitch,
                     int64_t rows, int taps, int channels, int bits) {
  wait_for_previous();
  int64_t eights = (channels + 7) / 8, at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= rows * eights) return;
  int64_t row = at / eights;
  int first = int(at - row * eights) * 8, per_byte = 8 / bits;
  float factor = scale[row / taps];
  for (int c = first; c < min(first + 8, channels); ++c) {
    unsigned byte = codes[row * pitch + c / per_byte];
    int code = int8_t(byte << (8 - bits - c % per_byte * bits)) >> (8 - bits);
    store_float(out, type, row * out_pitch + c, float(code) * factor);
  }
}

}  // namespace

cudaError_t dequantize_weight(const void* codes, int64_t pitch, const float* scale, void* out, Float type,
                              int64_t out_pitch, int64_t n, int taps, int channels, int bits, const Stream& on) {
  int64_t blocks = (n * taps * ((channels + 7) / 8) + kThreads - 1) / kThreads;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  Grid grid = {dim3(unsigned(blocks)), dim3(kThreads)};
  return launch(dequantize_codes, grid, on, static_cast<const uint8_t*>(codes), pitch, scale, out, type, out_pitch,
                n * taps, taps, channels, bits);
}

// No kernel here lets the next one start: a matmul may load its weights, which are written here, before its own wait.
cudaError_t unpack_weight(const void* packed, int8_t* out, int64_t rows, int channels, int bits, const Stream& on) {
  if (bits != 4 && bits != 2) return cudaErrorInvalidValue;
  int64_t count = rows * channels;
  if (count <= 0) return cudaSuccess;
  bool vectors = channels % 16 == 0 && reinterpret_cast<uint64_t>(packed) % 8 == 0 &&
                 reinterpret_cast<uint64_t>(out) % 16 == 0;
  if (vectors) count /= 16;
  int64_t blocks = (count + kThreads - 1) / kThreads;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  Grid grid = {dim3(unsigned(blocks)), dim3(kThreads)};
  if (!vectors) return launch(unpack_codes, grid, on, static_cast<const uint8_t*>(packed), out, count, channels, bits);
  return launch(bits == 4 ? unpack_vectors<4> : unpack_vectors<2>, grid, on, static_cast<const unsigned*>(packed),
                reinterpret_cast<uint4*>(out), count);
}

}  // namespace mixdq
