// Tensor cores: mma.sync with ldmatrix, and wgmma, which each warp does by itself and in its own time.
#include "tensor_cores.h"

#include "machine.h"

namespace emulator {
namespace {

constexpr int kRowBytes = 32, kMaxColumns = 256;

// Rows of 32 bytes from the tile that a descriptor names: rows of 128 bytes in the 128-byte swizzle, or of 64 in that of
// 64 bytes.
void gather(uint8_t (*to)[kRowBytes], const Block& block, uint64_t descriptor, int first, int rows) {
  const uint32_t swizzle = descriptor >> 62, pitch = swizzle == 1 ? 128 : 64;
  require((swizzle == 1 || swizzle == 2) && (descriptor >> 49 & 7) == 0, "the swizzle of a descriptor");
  const uint32_t start = uint32_t(descriptor & 0x3FFF) << 4, stride = uint32_t(descriptor >> 32 & 0x3FFF) << 4;
  for (int r = first; r < first + rows; ++r) {
    for (int half = 0; half < 2; ++half) {
      uint32_t at = start + r / 8 * stride + r % 8 * pitch + half * 16;
      at ^= (at >> 7 & (swizzle == 1 ? 7 : 3)) << 4;
      require(in_shared(block, block.memory + at, 16), "wgmma reads outside of shared memory");
      std::memcpy(to[r - first] + half * 16, &block.async_view[at], 16);
    }
  }
}

void widen(int16_t (&to)[kRowBytes], const uint8_t* row, Operands) {
  for (int i = 0; i < kRowBytes; ++i) to[i] = int8_t(row[i]);
}

float widen(uint16_t v, Operands type) {
  return type == kHalf ? __half2float(__ushort_as_half(v)) : __bfloat162float(__ushort_as_bfloat16(v));
}

void widen(float (&to)[kRowBytes / 2], const uint8_t* row, Operands type) {
  for (int i = 0; i < kRowBytes / 2; ++i) {
    uint16_t v;
    std::memcpy(&v, row + 2 * i, 2);
    to[i] = widen(v, type);
  }
}

template <class Value, class Sum, int K>
void multiply(const WarpMultiply& op, uint8_t (*a)[kRowBytes], uint8_t (*b)[kRowBytes]) {
  const auto type = Operands(op.type);
  Value rows[16][K], column[K];
  for (int m = 0; m < 16; ++m) widen(rows[m], a[m], type);
  for (int n = 0; n < op.n; ++n) {
    widen(column, b[n], type);
    for (int m = 0; m < 16; ++m) {
      Sum sum = 0;
      for (int i = 0; i < K; ++i) sum += Sum(rows[m][i]) * Sum(column[i]);
      const int lane = m % 8 * 4 + n % 8 / 2, place = n / 8 * 4 + m / 8 * 2 + n % 2;
      Sum& d = static_cast<Sum*>(op.sums[lane])[place];
      d = (op.add ? d : Sum(0)) + sum;
    }
  }
}

bool can_execute(const Warp& warp) { return !warp.queue.empty() && warp.queue.front().lanes == 32; }

void execute(const Block& block, int index, Warp& warp) {
  static uint8_t a[16][kRowBytes], b[kMaxColumns][kRowBytes];
  const WarpMultiply op = warp.queue.front();
  gather(a, block, op.a, index % 4 * 16, 16);
  gather(b, block, op.b, 0, op.n);
  op.type == kInt8 ? multiply<int16_t, int32_t, kRowBytes>(op, a, b) : multiply<float, float, kRowBytes / 2>(op, a, b);
  warp.queue.pop_front();
  ++warp.done;
  wake(warp.waiting);
}

}  // namespace

void multiply_warpgroup(Operands type, int n, uint64_t a, uint64_t b, void* sums, bool add) {
  Warp& warp = my_warp();
  const long place = me().issued++ - warp.done;
  require(place >= 0, "lanes of a warp issue different wgmma");
  if (place == long(warp.queue.size())) warp.queue.push_back({n, add, type, a, b});
  WarpMultiply& op = warp.queue[place];
  require(op.type == type && op.n == n && op.a == a && op.b == b && op.add == add,
          "lanes of a warp issue wgmma with different arguments");
  op.sums[me().thread % 32] = sums;
  if (++op.lanes == 32) wake(warp.waiting);
}

void commit_multiplies() { me().groups.push_back(me().issued); }

void wait_for_multiplies(int open_groups) {
  long until = 0;
  for (auto& groups = me().groups; int(groups.size()) > open_groups; groups.pop_front()) until = groups.front();
  Warp& warp = my_warp();
  while (warp.done < until) {
    bool all_issued = long(warp.queue.size()) >= until - warp.done;
    for (long i = 0; all_issued && i < until - warp.done; ++i) all_issued = warp.queue[i].lanes == 32;
    if (!all_issued) {
      warp.waiting.push_back(current);
      wait_until_woken("wgmma");
    } else if (random_bits() % 2) {  // some come late
      make_runnable(current);
      wait_until_woken("nothing");
    } else {
      execute(my_block(), me().thread / 32, warp);  // as late as can be
    }
  }
}

void finish_some_multiply() {
  size_t warps = 0;
  for (const Block& block : blocks) warps += block.warps.size();
  const size_t first = random_bits() % warps;
  for (size_t i = 0; i < warps; ++i) {
    const size_t at = (first + i) % warps, of_block = warps / blocks.size();
    Block& block = blocks[at / of_block];
    Warp& warp = block.warps[at % of_block];
    if (!can_execute(warp)) continue;
    execute(block, int(at % of_block), warp);
    return;
  }
}

// PTX ISA, fragments of mma.m16n8k32 with .s8.
void multiply_16x8x32(const uint32_t (&a)[4], const uint32_t (&b)[2], uint32_t (&sums)[4]) {
  uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const Lanes& all = exchange(mine, sizeof mine);
  auto code = [&](int lane, int byte) { return int(int8_t(all.words[lane][byte / 4] >> 8 * (byte % 4))); };
  auto a_at = [&](int m, int k) { return code(m % 8 * 4 + k % 16 / 4, k % 4 + (m >= 8) * 4 + (k >= 16) * 8); };
  auto b_at = [&](int k, int n) { return code(n * 4 + k % 16 / 4, 16 + k % 4 + (k >= 16) * 4); };
  const int lane = me().thread % 32;
  for (int i = 0; i < 4; ++i) {
    const int m = lane / 4 + i / 2 * 8, n = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 32; ++k) sums[i] += uint32_t(a_at(m, k) * b_at(k, n));
  }
  end_exchange();
}

// PTX ISA, fragments of mma.m16n8k16 with .f16 or .bf16.
void multiply_16x8x16(Operands type, const uint32_t (&a)[4], const uint32_t (&b)[2], float (&sums)[4]) {
  uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const Lanes& all = exchange(mine, sizeof mine);
  auto value = [&](int lane, int half) { return widen(uint16_t(all.words[lane][half / 2] >> 16 * (half % 2)), type); };
  auto a_at = [&](int m, int k) { return value(m % 8 * 4 + k % 8 / 2, k % 2 + (m >= 8) * 2 + (k >= 8) * 4); };
  auto b_at = [&](int k, int n) { return value(n * 4 + k % 8 / 2, 8 + k % 2 + (k >= 8) * 2); };
  const int lane = me().thread % 32;
  for (int i = 0; i < 4; ++i) {
    const int m = lane / 4 + i / 2 * 8, n = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) sums[i] += a_at(m, k) * b_at(k, n);
  }
  end_exchange();
}

void load_matrices(const void* row, bool transposed, uint32_t* (&to)[4]) {
  const Lanes& all = exchange(&row, sizeof row);
  const int lane = me().thread % 32;
  auto row_of = [&](int i) {
    const uint8_t* from;
    std::memcpy(&from, all.words[i], sizeof from);
    require(in_shared(my_block(), from, 16) && shared_address(from) % 16 == 0, "where ldmatrix reads");
    return from;
  };
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint8_t value[4];
    for (int half = 0; half < 2; ++half) {
      const int r = transposed ? lane % 4 * 2 + half : lane / 4, c = transposed ? lane / 4 : lane % 4 * 2 + half;
      std::memcpy(value + half * 2, row_of(matrix * 8 + r) + c * 2, 2);
    }
    std::memcpy(to[matrix], value, 4);
  }
  end_exchange();
}

void store_matrices(const void* row, const uint32_t (&from)[4]) {
  struct {
    uint32_t values[4];
    const void* row;
  } mine = {{from[0], from[1], from[2], from[3]}, row};
  const Lanes& all = exchange(&mine, sizeof mine);
  uint8_t* to;
  std::memcpy(&to, all.words[me().thread % 32] + 4, sizeof to);
  require(in_shared(my_block(), to, 16) && shared_address(to) % 16 == 0, "where stmatrix writes");
  const int lane = me().thread % 32;  // writes the row that it names
  for (int i = 0; i < 4; ++i) std::memcpy(to + i * 4, &all.words[lane % 8 * 4 + i][lane / 8], 4);
  end_exchange();
}

}  // namespace emulator
