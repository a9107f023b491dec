// Asynchronous copies: mbarriers, tensor maps and the copies that follow them, cp.async.
#include "copies.h"

#include <cuda.h>

#include "machine.h"

namespace emulator {
namespace {

Barrier& find(Block& block, uint64_t* barrier) {
  auto found = block.barriers.find(barrier);
  require(found != block.barriers.end(), "an mbarrier that nobody initialized");
  require(*barrier == found->second.content, "somebody wrote into an mbarrier");
  return found->second;
}

void end_phase_if_complete(Barrier& b) {
  if (b.pending || b.bytes) return;
  ++b.phase;
  b.pending = b.count;
  wake(b.waiting);
}

// What a CUtensorMap holds here.
struct Map {
  uint64_t mark;
  const uint8_t* data;
  uint32_t dims, is_im2col, swizzle;  // swizzle: how many bits of an address are changed
  uint64_t size[4], stride[3];
  uint32_t box[3];
  uint8_t step[4];
  int8_t lower[2], upper[2];
};
static_assert(sizeof(Map) <= sizeof(CUtensorMap), "must fit");
constexpr uint64_t kMark = 0x7A7A0D15EA5E7A7A;

bool fits_swizzle(const Map& m, uint32_t row_bytes) { return !m.swizzle || row_bytes <= 16u << m.swizzle; }

uint32_t swizzled(const Map& m, uint32_t address) { return address ^ (address >> 7 & ((1u << m.swizzle) - 1)) << 4; }

struct Copy {
  int block;
  Map map;
  uint64_t* barrier;
  uint8_t* to;
  std::vector<int> at;
  unsigned offset_w, offset_h;
};
std::vector<Copy> under_way;

// What both encoders check, by the driver's documentation.
bool encode(Map& m, CUtensorMap* out, CUtensorMapDataType type, unsigned dims, void* data, const cuuint64_t* size,
            const cuuint64_t* stride, const cuuint32_t* step, CUtensorMapSwizzle swizzle) {
  bool good = uint64_t(out) % 64 == 0 && uint64_t(data) % 16 == 0 && type == CU_TENSOR_MAP_DATA_TYPE_UINT8 && dims <= 4;
  m = {};
  m.mark = kMark;
  m.data = static_cast<const uint8_t*>(data);
  m.dims = dims;
  m.swizzle = swizzle == CU_TENSOR_MAP_SWIZZLE_32B    ? 1
              : swizzle == CU_TENSOR_MAP_SWIZZLE_64B  ? 2
              : swizzle == CU_TENSOR_MAP_SWIZZLE_128B ? 3
                                                      : 0;
  good &= m.swizzle || swizzle == CU_TENSOR_MAP_SWIZZLE_NONE;
  for (unsigned i = 0; i < dims && good; ++i) {
    good &= size[i] >= 1 && size[i] <= 1ull << 32 && step[i] >= 1 && step[i] <= 8;
    m.size[i] = size[i], m.step[i] = step[i];
    if (i + 1 == dims) break;
    good &= stride[i] % 16 == 0 && stride[i] < 1ull << 40;
    m.stride[i] = stride[i];
  }
  return good;
}

CUresult encode_tiled(CUtensorMap* out, CUtensorMapDataType type, cuuint32_t dims, void* data, const cuuint64_t* size,
                      const cuuint64_t* stride, const cuuint32_t* box, const cuuint32_t* step, CUtensorMapInterleave,
                      CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  Map m;
  bool good = dims <= 3 && encode(m, out, type, dims, data, size, stride, step, swizzle);
  for (unsigned i = 0; i < dims && good; ++i) {
    good &= box[i] >= 1 && box[i] <= 256 && step[i] == 1;
    m.box[i] = box[i];
  }
  good = good && box[0] % 16 == 0 && fits_swizzle(m, box[0]);
  if (good) std::memcpy(out, &m, sizeof m);
  return good ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult encode_im2col(CUtensorMap* out, CUtensorMapDataType type, cuuint32_t dims, void* data, const cuuint64_t* size,
                       const cuuint64_t* stride, const int* lower, const int* upper, cuuint32_t channels,
                       cuuint32_t pixels, const cuuint32_t* step, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  Map m;
  bool good = dims == 4 && encode(m, out, type, dims, data, size, stride, step, swizzle) && step[0] == 1;
  good = good && channels % 16 == 0 && channels <= 256 && pixels <= 1024 && fits_swizzle(m, channels);
  if (!good) return CUDA_ERROR_INVALID_VALUE;
  m.is_im2col = 1;
  m.box[0] = channels, m.box[1] = pixels;
  for (int i = 0; i < 2; ++i) {
    good &= lower[i] >= -128 && lower[i] <= 127 && upper[i] >= -128 && upper[i] <= 127;
    good &= int64_t(size[i + 1]) - 1 + upper[i] >= lower[i];
    m.lower[i] = lower[i], m.upper[i] = upper[i];
  }
  if (good) std::memcpy(out, &m, sizeof m);
  return good ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

// Writes the rows of a box one after another, in the swizzle of the map.
class Writer {
 public:
  Writer(const Copy& copy, Block& block) : map_(copy.map), block_(block), at_(uint32_t(copy.to - block.memory)) {}

  void row(const uint8_t* from, int64_t first) {  // zeros where there is nothing to read
    for (uint32_t i = 0; i < map_.box[0]; ++i) {
      const uint32_t a = swizzled(map_, at_ + written + i);
      const int64_t c = first + i;
      block_.memory[a] = block_.async_view[a] = from && c >= 0 && c < int64_t(map_.size[0]) ? from[c] : 0;
    }
    written += map_.box[0];
  }

  uint32_t written = 0;

 private:
  const Map& map_;
  Block& block_;
  uint32_t at_;
};

void copy_tiled(const Copy& k, Writer& to) {
  const Map& m = k.map;
  for (uint32_t z = 0; z < (m.dims > 2 ? m.box[2] : 1); ++z) {
    for (uint32_t y = 0; y < m.box[1]; ++y) {
      const int64_t at_y = k.at[1] + int64_t(y), at_z = m.dims > 2 ? k.at[2] + int64_t(z) : 0;
      const bool inside = at_y >= 0 && at_y < int64_t(m.size[1]) &&
                          (m.dims < 3 || (at_z >= 0 && at_z < int64_t(m.size[2])));
      to.row(inside ? m.data + at_y * m.stride[0] + (m.dims > 2 ? at_z * m.stride[1] : 0) : nullptr, k.at[0]);
    }
  }
}

// Pixels follow each other inside of the bounding box, from one line and one image to the next.
void copy_im2col(const Copy& k, Writer& to) {
  const Map& m = k.map;
  int64_t w = k.at[1], h = k.at[2], n = k.at[3];
  for (uint32_t i = 0; i < m.box[1]; ++i) {
    const int64_t x = w + k.offset_w, y = h + k.offset_h;
    const bool inside = x >= 0 && x < int64_t(m.size[1]) && y >= 0 && y < int64_t(m.size[2]) && n < int64_t(m.size[3]);
    to.row(inside ? m.data + x * m.stride[0] + y * m.stride[1] + n * m.stride[2] : nullptr, k.at[0]);
    w += m.step[1];
    if (w <= int64_t(m.size[1]) - 1 + m.upper[0]) continue;
    w = m.lower[0];
    h += m.step[2];
    if (h <= int64_t(m.size[2]) - 1 + m.upper[1]) continue;
    h = m.lower[1];
    ++n;
  }
}

void do_copy(const AsyncCopy& copy) {
  if (copy.valid) {
    std::memcpy(copy.to, copy.from, copy.bytes);
  } else {
    std::memset(copy.to, 0, copy.bytes);
  }
}

void do_store(const Block& block, const BulkStore& store) {
  Map m;
  std::memcpy(&m, store.map, sizeof m);
  for (uint32_t y = 0; y < m.box[1]; ++y) {
    for (uint32_t x = 0; x < m.box[0]; ++x) {
      const int64_t at_x = store.x + int64_t(x), at_y = store.y + int64_t(y);
      if (at_x < 0 || at_x >= int64_t(m.size[0]) || at_y < 0 || at_y >= int64_t(m.size[1])) continue;
      const_cast<uint8_t*>(m.data)[at_y * m.stride[0] + at_x] =
          block.async_view[swizzled(m, store.from + y * m.box[0] + x)];
    }
  }
}

}  // namespace

void init_barrier(uint64_t* barrier, uint32_t count) {
  require(uint64_t(barrier) % 8 == 0 && in_shared(my_block(), barrier, 8), "the address of an mbarrier");
  require(!my_block().barriers.count(barrier), "an mbarrier is initialized twice");
  *barrier = uint64_t(random_bits()) << 32 | random_bits();
  Barrier& b = my_block().barriers[barrier];
  b.count = b.pending = count;
  b.content = *barrier;
}

void arrive(uint64_t* barrier, uint32_t expected_bytes) {
  Barrier& b = find(my_block(), barrier);
  b.bytes += expected_bytes;
  require(b.bytes < 1 << 20, "more bytes than an mbarrier counts");
  require(b.pending > 0, "too many arrivals at an mbarrier");
  --b.pending;
  end_phase_if_complete(b);
}

void arrive_at(uint64_t* barrier, unsigned rank) {
  auto* theirs = static_cast<uint64_t*>(of_rank(barrier, rank));
  require(blocks[rank].alive > 0, "an arrival at a block that has ended");
  Barrier& b = find(blocks[rank], theirs);
  require(b.pending > 0, "too many arrivals at an mbarrier");
  --b.pending;
  end_phase_if_complete(b);
}

void wait_for_phase(uint64_t* barrier, uint32_t parity) {
  if (random_bits() % 4 == 0) {  // some come late
    make_runnable(current);
    wait_until_woken("nothing");
  }
  while ((find(my_block(), barrier).phase & 1) == parity) {
    find(my_block(), barrier).waiting.push_back(current);
    wait_until_woken("the mbarrier at " + std::to_string(reinterpret_cast<uint8_t*>(barrier) - my_block().shared) +
                     ", parity " + std::to_string(parity));
  }
}

void fence_async() {
  if (++my_warp().fenced_lanes < 32) return;
  my_warp().fenced_lanes = 0;
  Block& block = my_block();
  constexpr size_t kPiece = 1024;
  for (size_t at = 0; at < block.bytes; at += kPiece) {
    if (std::memcmp(&block.async_view[at], block.memory + at, kPiece)) {
      std::memcpy(&block.async_view[at], block.memory + at, kPiece);
    }
  }
}

void bulk_copy(const void* map, uint64_t* barrier, void* to, std::vector<int> at, bool im2col, unsigned offset_w,
               unsigned offset_h) {
  require(uint64_t(map) % 64 == 0, "the address of a tensor map");
  Copy k = {me().block, {}, barrier, static_cast<uint8_t*>(to), std::move(at), offset_w, offset_h};
  std::memcpy(&k.map, map, sizeof k.map);
  const Map& m = k.map;
  require(m.mark == kMark && bool(m.is_im2col) == im2col && m.dims == k.at.size(), "a tensor map of another kind");
  require(shared_address(to) % (m.swizzle ? 128u << m.swizzle : 128u) == 0, "where a bulk copy goes is not aligned");
  const size_t rows = m.box[1] * size_t(m.dims > 2 && !im2col ? m.box[2] : 1);
  require(in_shared(my_block(), to, m.box[0] * rows), "a bulk copy goes past shared memory");
  if (im2col) {
    require(offset_w <= 255 && offset_h <= 255, "the offset of a tap");
    for (int i = 0; i < 2; ++i) {
      require(k.at[1 + i] >= m.lower[i] && k.at[1 + i] <= int64_t(m.size[1 + i]) - 1 + m.upper[i],
              "an im2col copy begins outside of its bounding box");
    }
    require(k.at[3] < int64_t(m.size[3]), "an im2col copy begins past the last image");
  }
  find(my_block(), barrier);
  under_way.push_back(std::move(k));
}

void bulk_copy_to_all(const void* map, uint64_t* barrier, unsigned mask, void* to, std::vector<int> at) {
  const int mine = me().block;
  for (unsigned rank = 0; rank < blocks.size(); ++rank) {
    if (!(mask >> rank & 1)) continue;
    require(blocks[rank].alive > 0, "a copy to a block that has ended");
    bulk_copy(map, barrier, to, at, false, 0, 0);
    Copy& k = under_way.back();
    k.block = int(rank);
    k.barrier = static_cast<uint64_t*>(of_rank(barrier, rank));
    k.to = static_cast<uint8_t*>(of_rank(to, rank));
    find(blocks[rank], k.barrier);
  }
  require(mask >> mine & 1 && !(mask >> blocks.size()), "the blocks of a copy to several");
}

bool copies_under_way() { return !under_way.empty(); }
void forget_copies() { under_way.clear(); }

void finish_some_copy() {
  const size_t i = random_bits() % under_way.size();
  std::swap(under_way[i], under_way.back());
  const Copy k = std::move(under_way.back());
  under_way.pop_back();
  Block& block = blocks[k.block];
  Writer writer(k, block);
  k.map.is_im2col ? copy_im2col(k, writer) : copy_tiled(k, writer);
  Barrier& b = find(block, k.barrier);
  b.bytes -= writer.written;
  end_phase_if_complete(b);
}

void bulk_store(const void* map, const void* from, int x, int y) {
  Map m;
  std::memcpy(&m, map, sizeof m);
  require(uint64_t(map) % 64 == 0 && m.mark == kMark && !m.is_im2col && m.dims == 2, "a tensor map to store by");
  require(shared_address(from) % (m.swizzle ? 128u << m.swizzle : 128u) == 0, "where a bulk store reads is not aligned");
  require(in_shared(my_block(), from, m.box[0] * m.box[1]), "a bulk store reads past shared memory");
  const BulkStore store = {map, shared_address(from), x, y};
  if (!late_copies) do_store(my_block(), store);
  me().stores.push_back(store);
}

void commit_stores() {
  me().store_groups.push_back(std::move(me().stores));
  me().stores.clear();
}

void wait_for_stores(int open_groups) {
  for (auto& groups = me().store_groups; int(groups.size()) > open_groups; groups.pop_front()) {
    if (!late_copies) continue;
    for (const BulkStore& store : groups.front()) do_store(my_block(), store);
  }
}

void copy_async(const void* from, void* to, int bytes, bool valid) {
  require(bytes == 4 || bytes == 8 || bytes == 16, "how much cp.async copies");
  require(in_shared(my_block(), to, bytes) && shared_address(to) % bytes == 0, "where cp.async goes");
  require(!valid || uint64_t(from) % bytes == 0, "where cp.async reads is not aligned");
  const AsyncCopy copy = {from, to, bytes, valid};
  if (!late_copies) do_copy(copy);
  me().copies.push_back(copy);
}

void commit_copies() {
  me().copy_groups.push_back(std::move(me().copies));
  me().copies.clear();
}

void wait_for_copies(int open_groups) {
  if (open_groups == 0 && !me().copies.empty()) commit_copies();
  for (auto& groups = me().copy_groups; int(groups.size()) > open_groups; groups.pop_front()) {
    if (!late_copies) continue;
    for (const AsyncCopy& copy : groups.front()) do_copy(copy);
  }
}

}  // namespace emulator

extern "C" cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                                        cudaDriverEntryPointQueryResult* found) {
  *function = nullptr;
  if (!std::strcmp(name, "cuTensorMapEncodeTiled")) *function = reinterpret_cast<void*>(emulator::encode_tiled);
  if (!std::strcmp(name, "cuTensorMapEncodeIm2col")) *function = reinterpret_cast<void*>(emulator::encode_im2col);
  *found = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
