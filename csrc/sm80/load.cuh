// How one tile of rows, 64 bytes of each, comes to shared memory by cp.async, and which 64 bytes come next.
//
// Offsets are 32 bits and count 16 bytes, of which every address is a multiple: half the registers and additions.
#pragma once
#include "cute/arch/copy_sm80.hpp"
#include "device.cuh"

namespace mixdq::sm80 {

constexpr int kTileK = 64;            // bytes of a row in one stage
constexpr int kPieces = kTileK / 16;  // of 16 bytes: what one copy moves

// What the host can say of a problem's rows and of the way through the reduction; threads divide by multiplying.
struct Route {
  Divider out_width, out_height, window_width, tap_stages, residual_rows;
  uint32_t rows;
  int channels, stages;  // stages: of the whole reduction
  uint32_t pixel_n, pixel_h, pixel_w, tap_h, tap_w, weight_tap;

  explicit Route(const Matmul& p)
      : out_width(p.out_w),
        out_height(p.out_h),
        window_width(p.window.s),
        tap_stages((p.x.channels + kTileK - 1) / kTileK),
        residual_rows(p.residual_rows),
        rows(uint32_t(p.m())),
        channels(p.x.channels),
        stages(p.taps() * int(tap_stages.divisor)),
        pixel_n(uint32_t(p.x.stride_n / 16)),
        pixel_h(uint32_t(p.window.stride_h * p.x.stride_h / 16)),
        pixel_w(uint32_t(p.window.stride_w * p.x.stride_w / 16)),
        tap_h(uint32_t(p.window.dilation_h * p.x.stride_h / 16)),
        tap_w(uint32_t(p.window.dilation_w * p.x.stride_w / 16)),
        weight_tap(uint32_t(p.pitch() / 16)) {}

  // First code that the window covers for a row of the product.
  __device__ __forceinline__ uint32_t first_pixel(uint32_t row) const {
    uint32_t w, h, image = out_height.divide(out_width.divide(row, w), h);
    return image * pixel_n + h * pixel_h + w * pixel_w;
  }
};

// Where a stage begins within a row of the input and of the weight: a tap of the window and a channel.
struct Walk {
  uint32_t x, w;
  int channel, column;  // of the window

  __device__ __forceinline__ Walk(const Route& r, int stage) {
    uint32_t within, across, tap = r.tap_stages.divide(stage, within), line = r.window_width.divide(tap, across);
    channel = int(within) * kTileK, column = int(across);
    x = line * r.tap_h + across * r.tap_w + within * kPieces;
    w = tap * r.weight_tap + within * kPieces;
  }

  // Without branches, so that tensor instructions can be issued in between.
  __device__ __forceinline__ void advance(const Route& r) {
    channel += kTileK;
    bool next_tap = channel >= r.channels;
    uint32_t back = (r.tap_stages.divisor - 1) * kPieces;
    x += next_tap ? r.tap_w - back : kPieces;
    w += next_tap ? r.weight_tap - back : kPieces;
    channel = next_tap ? 0 : channel;
    column += next_tap;
    bool next_line = column == int(r.window_width.divisor);
    x += next_line ? r.tap_h - r.window_width.divisor * r.tap_w : 0;
    column = next_line ? 0 : column;
  }
};

// Byte of a piece in a tile of rows of 64 bytes. ldmatrix reads eight rows at once; they must lie in eight different
// groups of banks: two side by side, and pairs of them every `Every` rows.
template <int Every>
__device__ __forceinline__ int swizzled(int row, int piece) {
  return row * kTileK + ((piece ^ (row / Every % kPieces)) * 16);
}

// Copies one tile of rows per stage: each thread the same piece of every kPass-th row.
template <int Rows, int Threads, int Every>
struct TileCopy {
  static constexpr int kPass = Threads / kPieces;
  static constexpr int kCopies = (Rows + kPass - 1) / kPass;
  uint32_t source[kCopies];

  __device__ static int row(int i) { return int(threadIdx.x % Threads / kPieces) + i * kPass; }
  __device__ static int piece() { return int(threadIdx.x % kPieces); }

  __device__ __forceinline__ void copy(const int8_t* data, uint32_t at, bool inside, int8_t* tile) const {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      if (Rows % kPass != 0 && row(i) >= Rows) break;
      cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<uint4>::copy(reinterpret_cast<const uint4*>(data)[source[i] + at],
                                                         *reinterpret_cast<uint4*>(tile + destination(i)), inside);
    }
  }

 private:
  // Passes begin at multiples of a power of two, so that what they change of the swizzle is known beforehand.
  __device__ static __forceinline__ int destination(int i) {
    static_assert(kPass % 8 == 0 && (kPass & (kPass - 1)) == 0);
    return (swizzled<Every>(row(0), piece()) ^ (i * kPass / Every % kPieces * 16)) + i * kPass * kTileK;
  }
};

}  // namespace mixdq::sm80
