// From a problem to the launch of the kernel that is chosen for it.
#pragma once
#include "ops/call.h"
#include "problem.h"

namespace mixdq {

// Whether there is a kernel for the problem, which may have none if its activations are floating or it has GEGLU.
bool is_multiplied(const Call& call, const Matmul& p);

// Launches the kernel that computes p.out; false where there is none, as above.
bool try_to_multiply(Call& call, const Matmul& p);

// Launches what computes p.out: for each group of input channels a kernel, and before it what that kernel needs, such as
// unpacked weights. Nothing is launched where the output is empty.
void multiply(Call& call, const Matmul& p, const Ints& groups);

// The rest of a convolution whose input and window are known.
Tensor convolve(Call& call, Matmul& p, const Ints& groups, Float type, const OptionalTensor& residual);

}  // namespace mixdq
