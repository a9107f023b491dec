#include "sm90/tensor_map.h"

#include <cuda_runtime.h>
#include <cudaTypedefs.h>

namespace mixdq::sm90 {
namespace {

// Through the runtime, so that libcuda is not linked.
void* driver_function(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  cudaError_t error = cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found);
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? function : nullptr;
}

PFN_cuTensorMapEncodeTiled_v12000 encode_tiled() {
  static const auto encode = PFN_cuTensorMapEncodeTiled_v12000(driver_function("cuTensorMapEncodeTiled"));
  return encode;
}

// So that eight rows of a tile, as wgmma reads them, lie in all banks. Longer rows are for ordinary loads.
CUtensorMapSwizzle swizzle_of(int bytes) {
  return bytes > kRowBytes    ? CU_TENSOR_MAP_SWIZZLE_NONE
         : bytes == kRowBytes ? CU_TENSOR_MAP_SWIZZLE_128B
                              : CU_TENSOR_MAP_SWIZZLE_64B;
}

}  // namespace

// L2 promotions as CUTLASS sets them for both forms of input. Weights come from DRAM in order: fetch twice the row.
CUresult input_map(const Matmul& p, int tile_m, int row, CUtensorMap* map) {
  static const auto tiled = encode_tiled();
  static const auto im2col = PFN_cuTensorMapEncodeIm2col_v12000(driver_function("cuTensorMapEncodeIm2col"));
  if (!tiled || !im2col) return CUDA_ERROR_NOT_SUPPORTED;
  void* data = const_cast<int8_t*>(p.x.data);
  const Image& x = p.x;
  const int bytes = p.x_bytes();
  if (p.is_rows()) {
    cuuint64_t size[2] = {cuuint64_t(x.channels * bytes), cuuint64_t(p.m())};
    cuuint64_t stride[1] = {cuuint64_t(x.stride_w * bytes)};
    cuuint32_t box[2] = {cuuint32_t(row), cuuint32_t(tile_m)}, step[2] = {1, 1};
    return tiled(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, data, size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                 swizzle_of(row), CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  }
  cuuint64_t size[4] = {cuuint64_t(x.channels * bytes), cuuint64_t(x.width), cuuint64_t(x.height), cuuint64_t(x.batch)};
  cuuint64_t stride[3] = {cuuint64_t(x.stride_w * bytes), cuuint64_t(x.stride_h * bytes), cuuint64_t(x.stride_n * bytes)};
  // The window's first tap visits the pixels from the lower corner to the last one plus the upper corner.
  int lower[2] = {0, 0};
  int upper[2] = {-(p.window.s - 1) * p.window.dilation_w, -(p.window.r - 1) * p.window.dilation_h};
  cuuint32_t step[4] = {1, cuuint32_t(p.window.stride_w), cuuint32_t(p.window.stride_h), 1};
  return im2col(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 4, data, size, stride, lower, upper, row, tile_m, step,
                CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle_of(row), CU_TENSOR_MAP_L2_PROMOTION_NONE,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

CUresult weight_map(const Matmul& p, const Weight& weight, int tile_n, int row, CUtensorMap* map) {
  static const auto tiled = encode_tiled();
  if (!tiled) return CUDA_ERROR_NOT_SUPPORTED;
  cuuint64_t packed = p.packed_channels(), pitch = p.pitch(), taps = p.taps();
  cuuint64_t size[3] = {packed, taps, cuuint64_t(weight.n)};
  cuuint64_t stride[2] = {pitch, pitch * taps};
  cuuint32_t box[3] = {cuuint32_t(row / p.element_bytes() * p.bits / 8), 1, cuuint32_t(tile_n)}, step[3] = {1, 1, 1};
  // Codes that are spread first are read by ordinary loads, which want plain rows.
  CUtensorMapSwizzle swizzle = p.bits == 8 && !p.floating ? swizzle_of(row) : CU_TENSOR_MAP_SWIZZLE_NONE;
  return tiled(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 3, const_cast<void*>(weight.data), size, stride, box, step,
               CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

CUresult out_map(const Matmul& p, int64_t column, const Weight& weight, int rows, int columns, CUtensorMap* map) {
  static const auto tiled = encode_tiled();
  if (!tiled) return CUDA_ERROR_NOT_SUPPORTED;
  cuuint64_t size[2] = {cuuint64_t(weight.n) * 2, cuuint64_t(p.m())}, stride[1] = {cuuint64_t(p.out_stride) * 2};
  cuuint32_t box[2] = {cuuint32_t(columns * 2), cuuint32_t(rows)}, step[2] = {1, 1};
  CUtensorMapSwizzle swizzle = columns == 32 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_32B;
  return tiled(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, static_cast<uint16_t*>(p.out) + column, size, stride, box, step,
               CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_NONE,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

CUresult codes_map(const Matmul& p, int rows, int columns, CUtensorMap* map) {
  static const auto tiled = encode_tiled();
  if (!tiled) return CUDA_ERROR_NOT_SUPPORTED;
  cuuint64_t size[2] = {cuuint64_t(p.n() / 2), cuuint64_t(p.m())}, stride[1] = {cuuint64_t(p.out_stride)};
  cuuint32_t box[2] = {cuuint32_t(columns), cuuint32_t(rows)}, step[2] = {1, 1};
  return tiled(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, p.out, size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

}  // namespace mixdq::sm90
