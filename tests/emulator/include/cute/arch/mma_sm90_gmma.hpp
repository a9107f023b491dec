#pragma once
#include <type_traits>
#include "tensor_cores.h"

namespace cute {

// What is under way may read registers that the compiler believes dead, and writes ones that it believes constant.
inline void warpgroup_fence_operand(uint32_t& v) { asm volatile("" : "+m"(v)); }
inline void warpgroup_fence_operand(float& v) { asm volatile("" : "+m"(v)); }
inline void warpgroup_arrive() {}
inline void warpgroup_commit_batch() { emulator::commit_multiplies(); }
template <int N>
void warpgroup_wait() {
  emulator::wait_for_multiplies(N);
}

namespace SM90::GMMA {

enum class Major { K, MN };
enum class ScaleOut { Zero, One };

template <emulator::Operands Type, int N, class Sum>
struct Multiply {
  template <class... Arguments>  // the N / 2 sums of this lane, one array, and whether they are added to
  static void fma(uint64_t a, uint64_t b, Arguments&&... arguments) {
    static_assert(sizeof...(arguments) == N / 2 + 1);
    Sum* first = nullptr;
    int count = 0;
    bool add = true, one_array = true;
    auto take = [&](auto& argument) {
      if constexpr (std::is_same_v<std::decay_t<decltype(argument)>, ScaleOut>) {
        add = argument == ScaleOut::One;
      } else {
        if (!first) first = &argument;
        one_array &= &argument == first + count++;
      }
    };
    (take(arguments), ...);
    emulator::multiply_warpgroup(Type, one_array ? N : 0, a, b, first, add);
  }
};

#define MULTIPLY(N)                                                              \
  using MMA_64x##N##x32_S32S8S8_SS_TN = Multiply<emulator::kInt8, N, uint32_t>;  \
  template <Major, Major>                                                        \
  using MMA_64x##N##x16_F32F16F16_SS = Multiply<emulator::kHalf, N, float>;      \
  template <Major, Major>                                                        \
  using MMA_64x##N##x16_F32BF16BF16_SS = Multiply<emulator::kBfloat16, N, float>;
MULTIPLY(16)
MULTIPLY(64)
MULTIPLY(80)
MULTIPLY(128)
MULTIPLY(160)
#undef MULTIPLY

}  // namespace SM90::GMMA
}  // namespace cute
