// The compiled functions behind the names of the catalogue.
#include <cstring>

#include "catalogue.h"
#include "kernels.h"
#include "matmuls.h"
#include "sm90/kernels.h"

namespace mixdq {
namespace {

struct Named {
  const char* name;
  MatmulFn function;
};

#define MIXDQ_NAMED(NAME) {#NAME, &NAME},
const Named kFunctions[] = {
    MIXDQ_NAMED(sm80_128x160) MIXDQ_NAMED(sm80_128x128) MIXDQ_NAMED(sm80_128x80)
    MIXDQ_NAMED(sm80_64x64) MIXDQ_NAMED(sm80_64x32) MIXDQ_NAMED(sm80_128x16)
    MIXDQ_NAMED(few_rows) MIXDQ_NAMED(direct)
#if MIXDQ_SM90
    MIXDQ_SM90_KERNELS(MIXDQ_NAMED)
#endif
};
#undef MIXDQ_NAMED

MatmulFn find(const char* name) {
  for (const Named& named : kFunctions) {
    if (std::strcmp(named.name, name) == 0) return named.function;
  }
  return nullptr;
}

}  // namespace

MatmulFn matmul_function(int kernel) {
  static const std::vector<MatmulFn> functions = [] {
    std::vector<MatmulFn> found;
    for (const Kernel& k : catalogue()) found.push_back(find(k.name));
    return found;
  }();
  return functions.at(kernel);
}

}  // namespace mixdq
