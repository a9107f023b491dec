// The warps that quantize a floating input for wgmma.
#pragma once
#include "codes.cuh"
#include "sm90/prepare.cuh"

namespace mixdq::sm90 {

// A warp's share of one stage: eight values to eight codes at a time, two rows at once. All warps work at one stage, since the
// arithmetic takes longest. What lies past the last channel becomes the code of zero, which weights of zero multiply.
template <class C, class T>
__device__ __forceinline__ void encode_stage(const uint8_t* from, uint8_t* to, int warp, const Encoder& e) {
  constexpr int kRowVectors = C::kTileK / kVector, kRows = 32 / kRowVectors, kStep = kRows * C::kPreparers;
  static_assert(kRowVectors * kRows == 32);
  const int lane = threadIdx.x % 32, in_step = lane / kRowVectors, piece = lane % kRowVectors / 2, half = lane % 2;
  auto load = [&](int row, float(&f)[kVector]) {
    Raw<T> raw;
    raw.load(reinterpret_cast<const T*>(from) + row * C::kTileK + lane % kRowVectors * kVector);
    raw.get(f);
  };
  auto store = [&](int row, uint2 codes) {
    *reinterpret_cast<uint2*>(to + row * kRowBytes + ((piece ^ row % 8) * 16) + half * 8) = codes;
  };
  const int first = warp * kRows + in_step;
  float f[kVector], odd = 0.f;
#pragma unroll
  for (int i = 0; i < C::kTileM; i += kStep) {
    if (first + i >= C::kTileM) break;
    load(first + i, f);
    store(first + i, encode_finite(f, e, odd));
  }
  if (odd == odd) return;
#pragma unroll 1
  for (int row = first; row < C::kTileM; row += kStep) {
    load(row, f);
    store(row, encode_any(f, e));
  }
}

// By one of the warps that do so, for all steps of the one tile.
template <class C>
__device__ __forceinline__ void encode_input(const Params& p, const Shared<C>& sm, int warp, int steps) {
  wait_for_previous();  // it may have written the scale
  const Encoder encoder(*p.quantizer.scale, *p.quantizer.zero_point, p.quantizer.bits);
  auto encode_type = [&](auto t) {
    prepare(sm, 0, 1, steps,
            [&](int stage) { encode_stage<C, decltype(t)>(sm.raw(stage), sm.input(stage), warp, encoder); });
  };
  p.x_type == Float::f16 ? encode_type(__half{}) : encode_type(__nv_bfloat16{});
}

}  // namespace mixdq::sm90
