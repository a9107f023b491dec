#pragma once
#include "copies.h"

namespace cute {

template <class T>
struct SM80_CP_ASYNC_CACHEGLOBAL_ZFILL {
  static void copy(const T& from, T& to, bool valid) { emulator::copy_async(&from, &to, sizeof(T), valid); }
};
template <class T>
struct SM80_CP_ASYNC_CACHEALWAYS_ZFILL : SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<T> {};
inline void cp_async_fence() { emulator::commit_copies(); }
template <int N>
void cp_async_wait() {
  emulator::wait_for_copies(N);
}

}  // namespace cute
