#include "ops/multiply.h"

#include <cstring>

#include "catalogue.h"
#include "ops/operands.h"

namespace mixdq {
namespace {

// The weights as int8 in scratch memory.
void unpack_weights(Call& call, Matmul& p) {
  constexpr int64_t kAlign = 256;
  int64_t total = 0, offset[kMaxWeights];
  int64_t row = int64_t(p.taps()) * p.x.channels;
  for (int i = 0; i < p.weight_count; ++i) {
    offset[i] = total;
    total += (p.weights[i].n * row + kAlign - 1) / kAlign * kAlign;
  }
  auto* codes = static_cast<int8_t*>(call.scratch(total));
  for (int i = 0; i < p.weight_count; ++i) {
    Weight& w = p.weights[i];
    call.check(unpack_weight(w.data, codes + offset[i], int64_t(w.n) * p.taps(), p.x.channels, p.bits, call.on()),
               "unpacking a weight");
    w.data = codes + offset[i];
  }
  p.bits = 8;
}

// For the kernels that read weights without gaps between the taps: copies of them.
void close_gaps(Call& call, Matmul& p) {
  const int64_t width = p.packed_channels();
  for (int i = 0; i < p.weight_count; ++i) {
    Weight& w = p.weights[i];
    const int64_t taps = int64_t(w.n) * p.taps();
    void* dense = call.scratch(taps * width);
    call.check(cudaMemcpy2DAsync(dense, width, w.data, p.pitch(), width, taps, cudaMemcpyDeviceToDevice,
                                 call.on().stream),
               "copying a part of the weight");
    w.data = dense;
  }
  p.weight_pitch = 0;
}

Choice choose(const Call& call, const Matmul& p) { return select(p, call.on().arch, call.on().sm_count); }

// Kernels load weights before the one ahead of them has ended. That is wrong for weights which that one writes, so there
// the kernel is launched the ordinary way: fresh_weights.
void launch(Call& call, const Choice& choice, Matmul p, bool fresh_weights) {
  Stream on = call.on();
  const Kernel& kernel = catalogue()[choice.kernel];
  bool unpacks = p.bits != 8 && !kernel.packed;
  if (p.pitch() != p.packed_channels() && (unpacks || std::strcmp(kernel.name, "direct") == 0)) {
    close_gaps(call, p);
    fresh_weights = true;
  }
  if (unpacks) {
    unpack_weights(call, p);
    fresh_weights = true;
  }
  on.dependent = on.dependent && !fresh_weights;
  MatmulFn function = matmul_function(choice.kernel);
  STD_TORCH_CHECK(function, call.op(), ": this build lacks the kernel ", kernel.name, " for sm_", on.arch,
                  "; build again with MIXDQ_CUDA_ARCHS including this GPU's");
  cudaError_t error = function(p, choice.splits, on);
  STD_TORCH_CHECK(error == cudaSuccess, call.op(), ": kernel ", kernel.name, " with ", choice.splits,
                  " splits failed: ", cudaGetErrorString(error), "; problem ", p.str());
}

void run(Call& call, const Matmul& p, bool fresh_weights) {
  Choice choice = choose(call, p);
  STD_TORCH_CHECK(choice.kernel >= 0, call.op(), ": there is no kernel for the problem ", p.str());
  launch(call, choice, p, fresh_weights);
}

// Each group of input channels has scales of its own: its product is added to the float32 sum of those before it, and the
// last one adds the offset and rounds. The weights' alpha, weight_sum and the rows' scales are [groups, ...].
void run_groups(Call& call, const Matmul& whole, const Ints& groups, bool fresh_weights) {
  const int64_t m = whole.m(), n = whole.n();
  int64_t stored = 0;
  for (int64_t g : groups) stored += packed_size(g, whole.bits);
  // Two sums take turns, since a kernel may not write what it reads.
  void* sums[2] = {call.scratch(m * n * 4), groups.size() > 2 ? call.scratch(m * n * 4) : nullptr};
  int64_t channel = 0, stored_channel = 0;
  for (size_t g = 0; g < groups.size(); ++g) {
    bool last = g + 1 == groups.size();
    Matmul p = whole;
    p.weight_pitch = stored;
    p.x.data += channel * p.element_bytes();
    p.x.channels = int(groups[g]);
    if (p.row_scale) p.row_scale += g, p.row_zero_point += g;
    if (g > 0) {
      p.residual = sums[(g - 1) % 2], p.residual_type = Float::f32;
      p.residual_stride = n, p.residual_rows = 1;
    }
    if (!last) p.out = sums[g % 2], p.out_type = Float::f32, p.out_stride = n;
    for (int i = 0; i < p.weight_count; ++i) {
      Weight& w = p.weights[i];
      w.data = static_cast<const char*>(w.data) + stored_channel;
      w.alpha += g * w.n;
      if (w.weight_sum) w.weight_sum += g * w.n;
      if (!last) w.beta = nullptr, w.bias = nullptr;
    }
    run(call, p, fresh_weights);
    channel += groups[g];
    stored_channel += packed_size(groups[g], whole.bits);
  }
}

}  // namespace

bool is_multiplied(const Call& call, const Matmul& p) { return choose(call, p).kernel >= 0; }

bool try_to_multiply(Call& call, const Matmul& p) {
  Choice choice = choose(call, p);
  if (choice.kernel >= 0) launch(call, choice, p, call.copied_weight());
  return choice.kernel >= 0;
}

void multiply(Call& call, const Matmul& p, const Ints& groups) {
  if (p.m() == 0 || p.n() == 0) return;
  if (groups.size() == 1) {
    run(call, p, call.copied_weight());
  } else {
    run_groups(call, p, groups, call.copied_weight());
  }
}

Tensor convolve(Call& call, Matmul& p, const Ints& groups, Float type, const OptionalTensor& residual) {
  Tensor out = call.empty_image(p.x.batch, p.n(), p.out_h, p.out_w, dtype_of(type));
  View v = call.look(out, "the output");
  set_out(p, v, type, p.n());
  add_image_residual(call, p, residual, v);
  multiply(call, p, groups);
  return out;
}

}  // namespace mixdq
