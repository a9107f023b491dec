// Descriptors for the tensor memory accelerator, which copies tiles to shared memory and fills zeros beyond the edges.
#pragma once
#include <cuda.h>
#include "problem.h"

namespace mixdq::sm90 {

// Bytes of a pixel that one step of the reduction takes, which are 128 codes or 64 floats: a row of a swizzled tile.
constexpr int kRowBytes = 128;
// Of the last step of a tap whose channels fill half of it or less, as 320 do: half the arithmetic.
constexpr int kTailBytes = 64;

// Tiles of tile_m output pixels by `bytes` of their channels: kRowBytes, kTailBytes, or twice kRowBytes of floats that are
// to be quantized. As rows [m, channels] where the problem allows, else im2col.
CUresult input_map(const Matmul& problem, int tile_m, int bytes, CUtensorMap* map);

// Boxes of `rows` by `columns` of a weight's 16-bit outputs, whose first column is `column` of the output.
CUresult out_map(const Matmul& problem, int64_t column, const Weight& weight, int rows, int columns, CUtensorMap* map);

// Boxes of `rows` by `columns` of the codes that a kernel with GEGLU writes.
CUresult codes_map(const Matmul& problem, int rows, int columns, CUtensorMap* map);

// Tiles of tile_n rows by the stored bytes of as many channels of one tap of [n, taps, packed channels].
CUresult weight_map(const Matmul& problem, const Weight& weight, int tile_n, int bytes, CUtensorMap* map);

}  // namespace mixdq::sm90
