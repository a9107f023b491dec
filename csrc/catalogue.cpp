#include "catalogue.h"

#include <algorithm>
#include <array>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <stdexcept>
#include <string_view>
#include <unordered_map>

// Whether sm90/ was compiled, which only sm_90a can run.
#ifndef MIXDQ_SM90
#define MIXDQ_SM90 1
#endif

namespace mixdq {
namespace {

constexpr int kFewRows = 16;
constexpr int kStep = 128;  // codes of the reduction that the cost model counts at a time

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

const char* name_of(Float type) { return type == Float::f32 ? "f32" : type == Float::f16 ? "f16" : "bf16"; }

// Asynchronous copies and TMA move 16 bytes at a time; this names what does not start on a multiple of them.
const char* misaligned(const Matmul& p, bool weights_as_stored) {
  if (reinterpret_cast<uintptr_t>(p.x.data) % 16) return "the input does not start on a multiple of 16 bytes";
  const int unit = 16 / p.x_bytes();
  if (p.x.stride_w % unit || p.x.stride_h % unit || p.x.stride_n % unit) {
    return "the input's strides are no multiples of 16 bytes";
  }
  for (int i = 0; weights_as_stored && i < p.weight_count; ++i) {
    if (reinterpret_cast<uintptr_t>(p.weights[i].data) % 16) return "a weight does not start on a multiple of 16 bytes";
  }
  if (weights_as_stored && p.pitch() % 16) return "the taps of a weight are no multiple of 16 bytes apart";
  return nullptr;
}

std::string needs_channels(const Matmul& p, int multiple) {
  if (p.x.channels > 0 && p.x.channels % multiple == 0) return "";
  return "needs a multiple of " + std::to_string(multiple) + " input channels; found " + std::to_string(p.x.channels);
}

// What TMA's im2col mode can describe.
const char* beyond_im2col(const Matmul& p) {
  if (p.is_rows()) return nullptr;
  const Window& w = p.window;
  if (w.stride_h > 8 || w.stride_w > 8) return "TMA takes strides up to 8";
  if ((w.r - 1) * w.dilation_h > 128 || (w.s - 1) * w.dilation_w > 128) return "TMA takes windows up to 129 wide";
  return nullptr;
}

// Cycles of one multiprocessor, roughly. The constants only have to rank the kernels of one family. Those of sm90 lose
// least against timings of an H200 and, where codes are packed, of an H100 (benchmarks/NOTES.md).
double estimate(const Kernel& kernel, const Matmul& p, int splits, int sm_count) {
  bool sm90 = std::string_view(kernel.family) == "sm90";
  // Per cycle: products, bytes to shared memory, bytes of the output.
  double macs = sm90 && !p.floating ? 4096 : 2048, bytes_in = sm90 ? 66 : 42, bytes_out = sm90 ? 88 : 48;
  int64_t tiles_n = 0;
  for (int i = 0; i < p.weight_count; ++i) tiles_n += ceil_div(p.weights[i].n, kernel.tile_n);
  int64_t blocks = ceil_div(p.m(), kernel.tile_m) * tiles_n * splits;
  int64_t steps = ceil_div(p.taps() * ceil_div(p.x.channels, kStep), splits);
  int64_t rounds = ceil_div(blocks, sm_count);
  double tile = double(kernel.tile_m) * kernel.tile_n;
  double math = tile * kStep / macs * (kernel.packed ? 3 : 1);  // spreading packed codes takes instructions
  double weight_bytes = kernel.packed ? p.bits / 8. : 1;
  double step = std::max(math, (kernel.tile_m * p.element_bytes() + kernel.tile_n * weight_bytes) * kStep / bytes_in);
  // Persistent kernels begin a tile while another ends, except where all warps work on one tile; of those that are not,
  // two blocks share a multiprocessor, and half of an end is hidden by the other one.
  double ends = !sm90 ? (rounds + 1) / 2. : kernel.tile_m > 128 ? rounds : 1;
  double cycles = rounds * steps * step + ends * (430 + tile * 2 / bytes_out);
  if (splits > 1) cycles += 7500 + tile * 4 / 16;
  if (p.bits != 8 && !kernel.packed) cycles += 3500 + double(p.n()) * p.k() * 1.5 / (20. * sm_count);
  return cycles;
}

Choice cheapest(std::string_view family, const Matmul& p, int arch, int sm_count) {
  Choice best;
  double least = 0;
  const auto& kernels = catalogue();
  for (int i = 0; i < int(kernels.size()); ++i) {
    const Kernel& kernel = kernels[i];
    // Where blocks that share weights gain, only measurements tell: they are for the table.
    if (family != kernel.family || kernel.sharing || !why_not(kernel, p, arch).empty()) continue;
    int64_t steps = p.taps() * ceil_div(p.x.channels, kStep);
    // A part should have some steps to itself, or handing over the sums costs more than it saves.
    for (int splits = 1; splits <= kernel.max_splits; ++splits) {
      if (splits > 1 && steps < 2 * splits) break;
      double cycles = estimate(kernel, p, splits, sm_count);
      if (best.kernel < 0 || cycles < least) best = {i, splits, false}, least = cycles;
    }
  }
  return best;
}

// With GEGLU: the first kernel with two tiles for nearly every multiprocessor, else the one with the smallest tiles. The
// arithmetic at the end of a tile is long, and only while another tile is multiplied does it take no time. Packed weights
// are unpacked first from so many rows on that it costs less than spreading them in every tile.
Choice with_geglu(const Matmul& p, int arch, int sm_count, std::string_view only) {
  constexpr int64_t kUnpackFrom = 2048;
  const auto& kernels = catalogue();
  const bool as_stored = p.m() < kUnpackFrom;
  for (bool packed : {as_stored, !as_stored}) {
    Choice choice;
    int64_t most = 0;
    for (int i = 0; i < int(kernels.size()); ++i) {
      const Kernel& kernel = kernels[i];
      if (kernel.packed != packed || (!only.empty() && only != kernel.family)) continue;
      if (!why_not(kernel, p, arch).empty()) continue;
      const int64_t tiles = ceil_div(p.m(), kernel.tile_m) * ceil_div(p.n(), kernel.tile_n);
      if (tiles * 8 >= int64_t(15) * sm_count) return {i, 1, false};
      if (tiles > most) choice = {i, 1, false}, most = tiles;
    }
    if (choice.kernel >= 0) return choice;
  }
  return {};
}

// With quantization at the beginning: where one round of blocks does it all. More would quantize the same rows so often that
// the GPU is waited for, and no longer the host that would have to launch a quantizer.
Choice quantizing(const Matmul& p, int arch, int sm_count) {
  constexpr int kPartSteps = 5;  // at least, of a split reduction
  static const int kernel = find_kernel("sm90_64x80_quantizing");
  const Kernel& k = catalogue()[kernel];
  if (!why_not(k, p, arch).empty()) return {};
  const int64_t tiles = ceil_div(p.m(), k.tile_m) * ceil_div(p.n(), k.tile_n);
  if (tiles > sm_count) return {};
  const int64_t splits = std::min<int64_t>({k.max_splits, sm_count / tiles, p.k() / (kPartSteps * kStep)});
  return {kernel, int(std::max<int64_t>(splits, 1)), false};
}

constexpr std::string_view kFamilies[] = {"sm90", "sm80"};  // the faster one first

// `only`: leaves out the kernels of every other family.
Choice by_rule(const Matmul& p, int arch, int sm_count, std::string_view only = "") {
  if (p.geglu) return with_geglu(p, arch, sm_count, only);
  if (p.quantizer) return only == "sm80" ? Choice() : quantizing(p, arch, sm_count);
  static const int few = find_kernel("few_rows");
  if (why_not(catalogue()[few], p, arch).empty()) return {few, 1, false};
  for (std::string_view family : kFamilies) {
    if (!only.empty() && family != only) continue;
    Choice choice = cheapest(family, p, arch, sm_count);
    if (choice.kernel >= 0) return choice;
  }
  if (p.floating) return {};
  return {find_kernel("direct"), 1, false};
}

// All of a problem that a choice can depend on: sizes and strides, and of addresses how they are aligned.
static_assert(kMaxWeights == 4);
using Facts = std::array<int64_t, 34>;

Facts facts_of(const Matmul& p, int arch, int sm_count) {
  uintptr_t weights = 0;
  int64_t n[kMaxWeights] = {};
  for (int i = 0; i < p.weight_count; ++i) {
    weights |= reinterpret_cast<uintptr_t>(p.weights[i].data);
    n[i] = p.weights[i].n;
  }
  const Image& x = p.x;
  const Window& w = p.window;
  const auto past_16 = [](const void* data) { return int64_t(reinterpret_cast<uintptr_t>(data) % 16); };
  return {x.batch,     x.height,     x.width,      x.channels,   x.stride_n,     x.stride_h,   x.stride_w,
          w.r,         w.s,          w.stride_h,   w.stride_w,   w.dilation_h,   w.dilation_w, p.out_h,
          p.out_w,     p.floating,   p.bits,       p.pitch(),    p.weight_count, n[0],         n[1],
          n[2],        n[3],         arch,         sm_count,     p.out_stride,   int64_t(p.x_type),
          int64_t(weights % 16), past_16(x.data), past_16(p.out), past_16(p.bos.input),
          p.geglu ? 1 + int64_t(p.out_type) : 0, bool(p.quantizer), p.bos.output ? p.bos.sample_rows : 0};
}

struct FactsHash {
  size_t operator()(const Facts& facts) const {
    uint64_t hash = 0;
    for (int64_t fact : facts) hash = (hash ^ uint64_t(fact)) * 0x9E3779B97F4A7C15u, hash ^= hash >> 29;
    return hash;
  }
};

// Splits as the kernel takes them: at most its largest; those that share weights divide a tile into powers of two.
int allowed_splits(const Kernel& kernel, int wanted) {
  const int most = std::clamp(wanted, 1, kernel.max_splits);
  if (!kernel.sharing) return most;
  int splits = 1;
  while (splits * 2 <= most) splits *= 2;
  return splits;
}

Choice by_table_or_rule(const Matmul& p, int arch, int sm_count) {
  if (const Tuned* row = p.floating || p.geglu || p.quantizer ? nullptr : nearest(tuning_table(), p, arch)) {
    int i = find_kernel(row->kernel);
    if (i >= 0 && why_not(catalogue()[i], p, arch).empty()) {
      return {i, allowed_splits(catalogue()[i], row->splits), true};
    }
  }
  return by_rule(p, arch, sm_count);
}

Choice by_environment(const char* wanted, const Matmul& p, int arch) {
  std::string name = wanted;
  size_t colon = name.find(':');
  int splits = colon == std::string::npos ? 1 : std::atoi(name.c_str() + colon + 1);
  name.resize(std::min(colon, name.size()));
  int i = find_kernel(name);
  if (i < 0) {
    std::string names;
    for (const Kernel& kernel : catalogue()) names += (names.empty() ? "" : ", ") + std::string(kernel.name);
    throw std::runtime_error("MIXDQ_KERNEL names no kernel: '" + name + "'. The kernels are " + names +
                             "; sm90 and sm80 are all of a family");
  }
  const Kernel& kernel = catalogue()[i];
  return why_not(kernel, p, arch).empty() ? Choice{i, allowed_splits(kernel, splits), false} : Choice{};
}

// A table in the form of tuning_table.inc.
std::vector<Tuned> read_table(const char* path) {
  std::ifstream file(path);
  if (!file) throw std::runtime_error(std::string("MIXDQ_TUNING_TABLE: ") + path + " cannot be read");
  std::vector<Tuned> rows;
  std::string line;
  for (int number = 1; std::getline(file, line); ++number) {
    if (line.empty() || line.rfind("//", 0) == 0) continue;
    Tuned row = {};
    char kernel[32] = "";
    int found = std::sscanf(line.c_str(), "{%d, %" SCNd64 ", %d, %d, %d, %d, \"%31[^\"]\", %d},", &row.arch, &row.m,
                            &row.n, &row.k, &row.taps, &row.bits, kernel, &row.splits);
    row.kernel = kernel;
    if (found != 8 || row.m < 1 || find_kernel(row.kernel) < 0) {
      throw std::runtime_error(std::string("MIXDQ_TUNING_TABLE: ") + path + ", line " + std::to_string(number) + ": '" +
                               line + "' is no row {arch, m, n, k, taps, bits, \"kernel\", splits}, with a kernel " +
                               "that this build has. Write the table with benchmarks/tune.py");
    }
    rows.push_back(row);
  }
  return rows;
}

}  // namespace

const std::vector<Kernel>& catalogue() {
  static const std::vector<Kernel> kernels = {
      // name, family, tile_m, tile_n, math_groups, max_splits, packed, floating, sharing, geglu, quantizes
      {"sm90_256x128", "sm90", 256, 128, 2, 1, false},
      {"sm90_128x160", "sm90", 128, 160, 2, 1, false},
      {"sm90_128x128", "sm90", 128, 128, 2, 1, false},
      {"sm90_64x160", "sm90", 64, 160, 2, 1, false},
      {"sm90_64x80", "sm90", 64, 80, 1, 8, false},
      {"sm90_128x64", "sm90", 128, 64, 1, 8, false},
      {"sm90_64x64", "sm90", 64, 64, 1, 8, false},
      {"sm90_128x16", "sm90", 128, 16, 1, 8, false},
      {"sm90_128x128_split", "sm90", 128, 128, 2, 8, false},
      {"sm90_128x160_split", "sm90", 128, 160, 2, 8, false},
      {"sm90_64x64_sharing", "sm90", 64, 64, 1, 4, false, false, true},
      {"sm90_64x160_sharing", "sm90", 64, 160, 1, 4, false, false, true},
      {"sm90_128x160_pairs", "sm90", 128, 160, 2, 2, false, false, true},
      {"sm90_128x160_packed", "sm90", 128, 160, 2, 1, true},
      {"sm90_64x160_packed", "sm90", 64, 160, 2, 1, true},
      {"sm90_64x80_packed", "sm90", 64, 80, 1, 8, true},
      {"sm90_128x64_packed", "sm90", 128, 64, 1, 8, true},
      {"sm90_128x128_floating", "sm90", 128, 128, 2, 1, true, true},
      {"sm90_64x80_floating", "sm90", 64, 80, 1, 8, true, true},
      {"sm90_128x160_geglu", "sm90", 128, 160, 2, 1, false, false, false, true},
      {"sm90_64x160_geglu", "sm90", 64, 160, 2, 1, false, false, false, true},
      {"sm90_128x160_packed_geglu", "sm90", 128, 160, 2, 1, true, false, false, true},
      {"sm90_64x160_packed_geglu", "sm90", 64, 160, 2, 1, true, false, false, true},
      {"sm90_64x80_quantizing", "sm90", 64, 80, 1, 8, false, false, false, false, true},
      {"sm80_128x160", "sm80", 128, 160, 0, 1, false},
      {"sm80_128x128", "sm80", 128, 128, 0, 1, false},
      {"sm80_128x80", "sm80", 128, 80, 0, 1, false},
      {"sm80_64x64", "sm80", 64, 64, 0, 1, false},
      {"sm80_64x32", "sm80", 64, 32, 0, 1, false},
      {"sm80_128x16", "sm80", 128, 16, 0, 1, false},
      {"few_rows", "any", kFewRows, 1, 0, 1, true},
      {"direct", "any", 64, 64, 0, 1, false},
  };
  return kernels;
}

int find_kernel(const std::string& name) {
  const auto& kernels = catalogue();
  for (int i = 0; i < int(kernels.size()); ++i) {
    if (name == kernels[i].name) return i;
  }
  return -1;
}

std::string why_not(const Kernel& kernel, const Matmul& p, int arch) {
  const std::string_view name = kernel.name, family = kernel.family;
  if (kernel.floating != p.floating) return p.floating ? "multiplies codes" : "multiplies floating activations";
  if (kernel.geglu != bool(p.geglu)) return p.geglu ? "has no GEGLU" : "ends with GEGLU";
  if (kernel.quantizes != bool(p.quantizer)) return p.quantizer ? "multiplies codes" : "quantizes its input";
  if (name == "direct") return "";
  if (family == "sm90" && !MIXDQ_SM90) return "this build has no code for sm_90a";
  if (family == "sm90" && arch != 90) return "needs sm_90; this is sm_" + std::to_string(arch);
  if (arch < 80) return "needs sm_80 or newer; this is sm_" + std::to_string(arch);
  if (p.m() >= int64_t(1) << 31) return "takes fewer than 2^31 rows";
  if (name == "few_rows") {
    if (!p.is_rows()) return "needs rows at equal distances";
    if (p.m() > kFewRows) return "takes up to " + std::to_string(kFewRows) + " rows; found " + std::to_string(p.m());
  } else if (kernel.packed && !kernel.floating && p.bits == 8) {
    return "reads weights of 4 and 2 bits";
  }
  // 16 bytes of stored codes, which in every width are at least 16 bytes of the input.
  std::string channels = needs_channels(p, kernel.packed ? 16 * 8 / p.bits : 16);
  if (!channels.empty()) return channels;
  // Unpacked weights lie in fresh memory, which is aligned.
  if (const char* what = misaligned(p, kernel.packed || p.bits == 8)) return what;
  if (family == "sm90") {
    if (const char* what = beyond_im2col(p)) return what;
  }
  if (kernel.quantizes) {
    if (!p.is_rows()) return "needs rows at equal distances";
    if (p.bits != 8) return "reads weights of 8 bits";
    if (p.weight_count != 1) return "takes one weight";
    if (p.bos.output && p.bos.sample_rows < kernel.tile_m) return "knows the first token of longer samples";
    if (reinterpret_cast<uintptr_t>(p.bos.input) % 16) return "the known token does not start on a multiple of 16 bytes";
  }
  if (kernel.geglu) {
    if (p.weight_count != 1 || p.row_scale || p.residual) return "takes one static weight without a residual";
    if (p.out_type == Float::f32) return "takes outputs of 16 bits";
    if (p.n() % 32 || p.out_stride % 16 || reinterpret_cast<uintptr_t>(p.out) % 16) {
      return "the codes' rows are no multiples of 16 bytes";
    }
  }
  return "";
}

const std::vector<Tuned>& tuning_table() {
  static const std::vector<Tuned> table = [] {
    const char* path = std::getenv("MIXDQ_TUNING_TABLE");
    std::vector<Tuned> rows = path && *path ? read_table(path) : std::vector<Tuned>();
    for (const Tuned& row : std::vector<Tuned>{
#include "tuning_table.inc"
         }) {
      rows.push_back(row);
    }
    return rows;
  }();
  return table;
}

const Tuned* nearest(const std::vector<Tuned>& table, const Matmul& p, int arch) {
  const int n = p.n(), k = p.k(), taps = p.taps();
  const double m = double(p.m());
  const Tuned* best = nullptr;
  double least = 1.5;
  for (const Tuned& row : table) {
    if (row.n != n || row.k != k || row.taps != taps || row.bits != p.bits || row.arch != arch) continue;
    double ratio = std::max(m / row.m, row.m / m);
    if (ratio > least || (best && ratio == least)) continue;
    best = &row, least = ratio;
  }
  return best;
}

Choice select(const Matmul& p, int arch, int sm_count) {
  if (const char* wanted = std::getenv("MIXDQ_KERNEL"); wanted && *wanted) {
    for (std::string_view family : kFamilies) {
      if (wanted == family) return by_rule(p, arch, sm_count, family);
    }
    Choice forced = by_environment(wanted, p, arch);
    if (forced.kernel >= 0) return forced;
    if (p.quantizer) return {};  // the wanted kernel may do what is quantized before
  }
  // A choice takes longer than all else that an operator does by itself, and a model has but a few hundred problems.
  constexpr size_t kMost = 4096;
  static thread_local std::unordered_map<Facts, Choice, FactsHash> known;
  const Facts facts = facts_of(p, arch, sm_count);
  if (auto found = known.find(facts); found != known.end()) return found->second;
  if (known.size() == kMost) known.clear();
  return known[facts] = by_table_or_rule(p, arch, sm_count);
}

std::string Matmul::str() const {
  auto by = [](int64_t a, int64_t b) { return std::to_string(a) + "x" + std::to_string(b); };
  std::string columns;
  for (int i = 0; i < weight_count; ++i) columns += (i ? "+" : "") + std::to_string(weights[i].n);
  std::string text = "m " + std::to_string(m()) + ", n " + columns + ", k " + by(taps(), x.channels) + ", int" +
                     std::to_string(bits) + " weights, " + (floating ? "floating" : row_scale ? "dynamic" : "static") +
                     (quantizer ? ", quantized" : "") + ", to " + name_of(out_type) + " every " + std::to_string(out_stride);
  if (geglu) text += ", GEGLU";
  if (residual) text += std::string(", residual ") + name_of(residual_type);
  if (!is_rows()) {
    text += ", image " + by(x.batch, x.height) + "x" + by(x.width, x.channels) + ", window " + by(window.r, window.s) +
            " stride " + by(window.stride_h, window.stride_w) + " dilation " +
            by(window.dilation_h, window.dilation_w) + " to " + by(out_h, out_w);
  }
  return text;
}

}  // namespace mixdq
