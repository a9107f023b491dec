// A matrix product or convolution from the tensors of a call.
#pragma once
#include "ops/call.h"
#include "problem.h"

namespace mixdq {

// Codes [..., channels] where they lie if the fast kernels can read them there, else copied.
Image code_rows(Call& call, const Tensor& xq, View* view);

Image code_image(Call& call, const Tensor& xq);

Image dense_image(const int8_t* data, int64_t batch, int64_t height, int64_t width, int64_t channels);

inline int64_t packed_size(int64_t channels, int64_t bits) { return (channels * bits + 7) / 8; }

void check_groups(const Call& call, const Ints& groups, int64_t channels, int64_t bits);

// The stored codes [n, packed] or [n, packed, r, s] (channels-last in memory).
Weight stored_weight(Call& call, const Tensor& qdata, const Ints& groups, int64_t bits, int64_t dims, Window* window);

Weight static_weight(Call& call, const Tensor& qdata, const Tensor& alpha, const Tensor& beta,
                     const OptionalTensor& bias, const Ints& groups, int64_t bits, int64_t dims = 2,
                     Window* window = nullptr);

void set_out(Matmul& p, const View& out, Float type, int64_t columns);

// A linear layer's residual [..., n].
void add_row_residual(Call& call, Matmul& p, const OptionalTensor& residual, const View& out);

// A convolution's residual [batch, n, height, width], or [batch, n, 1, 1] for all pixels of an image.
void add_image_residual(Call& call, Matmul& p, const OptionalTensor& residual, const View& out);

Matmul row_problem(const Image& x, int64_t bits);

void set_rows(Matmul& p, const Image& x);

// Sizes of the output and the window's steps; r and s are set already.
void set_window(const Call& call, Matmul& p, const Ints& stride, const Ints& dilation);

}  // namespace mixdq
