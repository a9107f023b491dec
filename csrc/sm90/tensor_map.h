// Descriptors for the tensor memory accelerator, which copies tiles to shared memory and fills zeros beyond the edges.
#pragma once
#include <cuda.h>
#include "problem.h"

namespace mixdq::sm90 {

// Codes of a tap that one step of the reduction takes; with the 128-byte swizzle also the bytes of a row in shared memory.
constexpr int kTileK = 128;

// Tiles of tile_m output pixels by kTileK channels. As rows [m, channels] where the problem allows, else im2col.
CUresult input_map(const Matmul& problem, int tile_m, CUtensorMap* map);

// Tiles of tile_n rows by the stored bytes of kTileK channels of one tap of [n, taps, packed channels].
CUresult weight_map(const Matmul& problem, const Weight& weight, int tile_n, CUtensorMap* map);

}  // namespace mixdq::sm90
