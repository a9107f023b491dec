// The kernels there are, which of them can do a problem, and which one does it. Host code without torch or CUDA.
#pragma once
#include <vector>
#include "problem.h"

namespace mixdq {

const std::vector<Kernel>& catalogue();

// Place of the kernel in the catalogue; -1 where no kernel has that name.
int find_kernel(const std::string& name);

// Why the kernel cannot do the problem on a GPU of that architecture (90 for sm_90), or an empty string. A kernel that
// does not read packed weights is asked about the problem with the weights unpacked.
std::string why_not(const Kernel& kernel, const Matmul& problem, int arch);

// The kernel for the problem: the one that MIXDQ_KERNEL=name[:splits] in the environment names where that one can do it,
// else from the tuning table where it has the shape, else by a rule that is always safe. MIXDQ_KERNEL=sm80 leaves that
// rule the kernels of one family and those of none. Only for floating activations and GEGLU there may be none (kernel < 0).
Choice select(const Matmul& problem, int arch, int sm_count);

// A measured shape: the whole reduction k = taps * channels, and what was fastest for it.
struct Tuned {
  int arch;
  int64_t m;
  int n, k, taps, bits;
  std::string kernel;
  int splits;
};

// The rows of the file that MIXDQ_TUNING_TABLE in the environment names, then those of the build.
const std::vector<Tuned>& tuning_table();

// The row of the problem's n, k, taps and bits whose m is nearest, up to half as many again; the first of several, and
// null where there is none.
const Tuned* nearest(const std::vector<Tuned>& table, const Matmul& problem, int arch);

}  // namespace mixdq
