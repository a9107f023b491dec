// The operators of mixdq_ao for CUDA tensors. This is the one file that includes torch, and only its stable ABI, so that
// one binary serves every torch from the target version on. Schemas and what they mean are in mixdq_ao/ops.py.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <optional>
#include <vector>

#include "catalogue.h"
#include "kernels.h"
#include "quantize.h"

namespace mixdq {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;
using OptionalTensor = std::optional<Tensor>;

constexpr int kMaxDevices = 64;

// Asked of CUDA once for each device.
struct Device {
  int arch = 0, sm_count = 0;
};

const Device& device_facts(int index) {
  static Device devices[kMaxDevices];
  static std::once_flag asked[kMaxDevices];
  STD_TORCH_CHECK(index >= 0 && index < kMaxDevices, "mixdq_ao: device index ", index, " is out of range");
  std::call_once(asked[index], [index] {
    int major = 0, minor = 0, count = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index);
    devices[index] = {major * 10 + minor, count};
  });
  return devices[index];
}

// Only code that was compiled for sm_90a waits for the kernel ahead; code for older GPUs, which a newer one may run
// too, knows nothing of dependent launches.
bool dependent_launches(int arch) {
  static const bool wanted = [] {
    const char* value = std::getenv("MIXDQ_PDL");
    return MIXDQ_SM90 && !(value && std::strcmp(value, "0") == 0);
  }();
  return wanted && arch == 90;
}

// The numbers that the C interface has for dtypes.
struct Dtypes {
  int32_t int8 = aoti_torch_dtype_int8(), uint8 = aoti_torch_dtype_uint8(), int32 = aoti_torch_dtype_int32();
  int32_t f32 = aoti_torch_dtype_float32(), f16 = aoti_torch_dtype_float16(), bf16 = aoti_torch_dtype_bfloat16();
};

const Dtypes& dtypes() {
  static const Dtypes known;
  return known;
}

int32_t dtype_of(Float type) {
  return type == Float::f32 ? dtypes().f32 : type == Float::f16 ? dtypes().f16 : dtypes().bf16;
}

int bytes_of(Float type) { return type == Float::f32 ? 4 : 2; }

// What is known of a tensor, asked for once: each question is a call into libtorch.
struct View {
  void* data = nullptr;
  const int64_t* size = nullptr;
  const int64_t* stride = nullptr;
  int64_t dims = 0;
  int32_t dtype = 0;

  int64_t numel() const {
    int64_t product = 1;
    for (int64_t i = 0; i < dims; ++i) product *= size[i];
    return product;
  }
  bool dense() const {
    int64_t expected = 1;
    for (int64_t i = dims - 1; i >= 0; --i) {
      if (size[i] != 1 && stride[i] != expected) return false;
      expected *= size[i];
    }
    return true;
  }
};

// Leading dimensions merged into three with strides, the innermost last.
struct Rows {
  int64_t size[3] = {1, 1, 1};
  int64_t stride[3] = {0, 0, 0};
  int64_t channel_stride = 1;
  bool fits = true;

  bool equally_spaced() const { return fits && size[0] == 1 && size[1] == 1; }
};

Rows merged_rows(const View& v) {
  Rows rows;
  int64_t channels = v.size[v.dims - 1];
  rows.channel_stride = channels == 1 ? 1 : v.stride[v.dims - 1];
  int level = 2;
  bool begun = false;
  for (int64_t i = v.dims - 2; i >= 0 && rows.fits; --i) {
    if (v.size[i] == 1) continue;
    if (begun && v.stride[i] == rows.stride[level] * rows.size[level]) {
      rows.size[level] *= v.size[i];
      continue;
    }
    if (begun && --level < 0) {
      rows.fits = false;
      break;
    }
    rows.size[level] = v.size[i];
    rows.stride[level] = v.stride[i];
    begun = true;
  }
  // The strides of what is not there are those of dense memory: descriptors want sensible ones.
  if (!begun) rows.stride[2] = channels;
  for (int i = begun ? level - 1 : 1; i >= 0 && rows.fits; --i) rows.stride[i] = rows.stride[i + 1] * rows.size[i + 1];
  return rows;
}

// One call of an operator: the device and stream that it runs on, and the tensors it must keep until it has launched.
class Call {
 public:
  Call(const char* op, const Tensor& x) : op_(op), guard_(device_index(x)) {
    keep_.reserve(8);
    const Device& facts = device_facts(device_);
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    on_ = {static_cast<cudaStream_t>(stream), device_, facts.sm_count, facts.arch, dependent_launches(facts.arch)};
  }

  const Stream& on() const { return on_; }
  const char* op() const { return op_; }

  View look(const Tensor& t, const char* name) const {
    int32_t type, index;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &index));
    STD_TORCH_CHECK(type == aoti_torch_device_type_cuda() && index == device_, op_, ": ", name,
                    " must be on the input's device, cuda:", device_, "; move it with .to()");
    View v;
    int64_t *size, *stride;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(t.get(), &v.data));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(t.get(), &v.dims));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(t.get(), &size));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(t.get(), &stride));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &v.dtype));
    v.size = size, v.stride = stride;
    return v;
  }

  View keep(Tensor t, const char* name) {
    keep_.push_back(std::move(t));
    return look(keep_.back(), name);
  }

  View copy_weight(Tensor t) {
    copied_weight_ = true;
    return keep(std::move(t), "the weight");
  }

  bool copied_weight() const { return copied_weight_; }

  // A dense vector or matrix of that many values; what is not dense is copied.
  View values(const Tensor& t, const char* name, int64_t count, int32_t dtype) {
    View v = look(t, name);
    STD_TORCH_CHECK(v.dtype == dtype, op_, ": ", name, " has the wrong dtype; float32 scales and int32 sums are needed");
    STD_TORCH_CHECK(v.numel() == count, op_, ": ", name, " must have ", count, " values; found ", v.numel());
    return v.dense() ? v : keep(torch::stable::contiguous(t), name);
  }

  const float* floats(const Tensor& t, const char* name, int64_t count) {
    return static_cast<const float*>(values(t, name, count, dtypes().f32).data);
  }

  // A dense vector of any floating dtype.
  const void* float_vector(const OptionalTensor& t, const char* name, int64_t count, Float* type) {
    if (!t) return nullptr;
    View v = look(*t, name);
    STD_TORCH_CHECK(v.numel() == count, op_, ": ", name, " must have ", count, " values; found ", v.numel());
    if (!is_float(v.dtype)) {
      v = keep(torch::stable::contiguous(torch::stable::to(*t, ScalarType::Float)), name);
    } else if (!v.dense()) {
      v = keep(torch::stable::contiguous(*t), name);
    }
    *type = float_type(v.dtype, name);
    return v.data;
  }

  Float float_type(int32_t dtype, const char* name) const {
    const Dtypes& d = dtypes();
    STD_TORCH_CHECK(is_float(dtype), op_, ": ", name, " must be float16, bfloat16 or float32 on CUDA");
    return dtype == d.f16 ? Float::f16 : dtype == d.bf16 ? Float::bf16 : Float::f32;
  }

  Float float_type(ScalarType type) const {
    STD_TORCH_CHECK(type == ScalarType::Half || type == ScalarType::BFloat16 || type == ScalarType::Float, op_,
                    ": the output must be float16, bfloat16 or float32 on CUDA");
    return type == ScalarType::Half ? Float::f16 : type == ScalarType::BFloat16 ? Float::bf16 : Float::f32;
  }

  Tensor empty(const int64_t* size, const int64_t* stride, int64_t dims, int32_t dtype) const {
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(dims, size, stride, dtype, aoti_torch_device_type_cuda(), device_, &handle));
    return Tensor(handle);
  }

  // [..., last] with the leading sizes of `like`.
  Tensor empty_rows(const View& like, int64_t last, int32_t dtype) const {
    Ints size(like.size, like.size + like.dims), stride(like.dims);
    size.back() = last;
    int64_t step = 1;
    for (int64_t i = like.dims - 1; i >= 0; --i) stride[i] = step, step *= size[i];
    return empty(size.data(), stride.data(), like.dims, dtype);
  }

  // [batch, channels, height, width], channels-last.
  Tensor empty_image(int64_t batch, int64_t channels, int64_t height, int64_t width, int32_t dtype) const {
    int64_t size[4] = {batch, channels, height, width};
    int64_t stride[4] = {height * width * channels, 1, width * channels, channels};
    return empty(size, stride, 4, dtype);
  }

  // Memory until the call ends; whatever the stream runs later may reuse it.
  void* scratch(int64_t bytes) {
    int64_t stride = 1;
    keep_.push_back(empty(&bytes, &stride, 1, dtypes().int8));
    void* data;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(keep_.back().get(), &data));
    return data;
  }

  void check(cudaError_t error, const char* what) const {
    STD_TORCH_CHECK(error == cudaSuccess, op_, ": ", what, " failed: ", cudaGetErrorString(error));
  }

 private:
  int device_index(const Tensor& x) {
    int32_t type;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &type));
    STD_TORCH_CHECK(type == aoti_torch_device_type_cuda(), op_, ": the input must be a CUDA tensor");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(x.get(), &device_));
    return device_;
  }

  static bool is_float(int32_t dtype) {
    const Dtypes& d = dtypes();
    return dtype == d.f16 || dtype == d.bf16 || dtype == d.f32;
  }

  const char* op_;
  int32_t device_ = 0;
  torch::stable::accelerator::DeviceGuard guard_;
  Stream on_;
  std::vector<Tensor> keep_;
  bool copied_weight_ = false;
};

// --- floating inputs --------------------------------------------------------------------------------------------------

Floats float_rows(Call& call, const Tensor& x, View* view = nullptr) {
  View v = call.look(x, "the input");
  STD_TORCH_CHECK(v.dims >= 1, call.op(), ": the input must have at least one dimension");
  if (view) *view = v;
  Rows rows = merged_rows(v);
  if (!rows.fits) {
    v = call.keep(torch::stable::contiguous(x), "the input");
    rows = merged_rows(v);
  }
  Floats f;
  f.data = v.data;
  f.type = call.float_type(v.dtype, "the input");
  for (int i = 0; i < 3; ++i) f.size[i] = rows.size[i], f.stride[i] = rows.stride[i];
  f.size[3] = v.size[v.dims - 1];
  f.stride[3] = rows.channel_stride;
  return f;
}

Floats float_image(const Call& call, const Tensor& x) {
  View v = call.look(x, "the input");
  STD_TORCH_CHECK(v.dims == 4, call.op(), ": the input must be [batch, channels, height, width]; found ", v.dims,
                  " dimensions");
  Floats f;
  f.data = v.data;
  f.type = call.float_type(v.dtype, "the input");
  const int order[4] = {0, 2, 3, 1};
  for (int i = 0; i < 4; ++i) f.size[i] = v.size[order[i]], f.stride[i] = v.stride[order[i]];
  return f;
}

void set_groups(const Call& call, Codes& codes, int64_t bits, const Ints& groups, int64_t channels) {
  STD_TORCH_CHECK(bits == 8 || bits == 4, call.op(), ": activation bits must be 8 or 4; found ", bits);
  STD_TORCH_CHECK(!groups.empty() && groups.size() <= size_t(kMaxGroups), call.op(), ": takes 1 to ", kMaxGroups,
                  " input groups on CUDA; found ", groups.size());
  codes.bits = int(bits);
  codes.groups = int(groups.size());
  int64_t sum = 0;
  for (size_t g = 0; g < groups.size(); ++g) sum += codes.group_channels[g] = int(groups[g]);
  STD_TORCH_CHECK(sum == channels, call.op(), ": input_groups add up to ", sum, "; the input has ", channels,
                  " channels");
}

Codes static_codes(Call& call, const Tensor& scale, const Tensor& zero_point, int64_t bits, const Ints& groups,
                   int64_t channels) {
  Codes codes;
  set_groups(call, codes, bits, groups, channels);
  codes.scale = call.floats(scale, "scale", codes.groups);
  codes.zero_point = call.floats(zero_point, "zero_point", codes.groups);
  return codes;
}

Pad checked_pad(const Call& call, const Ints& pad) {
  STD_TORCH_CHECK(pad.size() == 4, call.op(), ": pad must be left, right, top, bottom; found ", pad.size(), " values");
  for (int64_t p : pad) STD_TORCH_CHECK(p >= 0, call.op(), ": pad must not be negative; found ", p);
  return {int(pad[0]), int(pad[1]), int(pad[2]), int(pad[3])};
}

Norm norm_of(Call& call, const OptionalTensor& weight, const OptionalTensor& bias, double eps, int64_t channels) {
  Norm norm;
  Float bias_type = norm.type;
  norm.weight = call.float_vector(weight, "weight", channels, &norm.type);
  norm.bias = call.float_vector(bias, "bias", channels, &bias_type);
  STD_TORCH_CHECK(!norm.weight || !norm.bias || norm.type == bias_type, call.op(),
                  ": weight and bias must have one dtype");
  if (!norm.weight) norm.type = bias_type;
  norm.eps = float(eps);
  return norm;
}

// --- matrix products --------------------------------------------------------------------------------------------------

bool unaligned(const View& v, const int64_t* stride, int count) {
  bool off = reinterpret_cast<uintptr_t>(v.data) % 16 != 0;
  for (int i = 0; i < count; ++i) off |= stride[i] % 16 != 0;
  return off;
}

void check_codes(const Call& call, const View& v) {
  STD_TORCH_CHECK(v.dtype == dtypes().int8, call.op(), ": the quantized input must be int8");
}

// Codes [..., channels] where they lie if the fast kernels can read them there, else copied.
Image code_rows(Call& call, const Tensor& xq, View* view) {
  View v = call.look(xq, "the quantized input");
  check_codes(call, v);
  STD_TORCH_CHECK(v.dims >= 1, call.op(), ": the quantized input must have at least one dimension");
  *view = v;
  int64_t channels = v.size[v.dims - 1];
  Rows rows = merged_rows(v);
  bool overlap = false;
  for (int i = 0; i < 3; ++i) overlap |= rows.size[i] > 1 && rows.stride[i] < channels;
  if (!rows.fits || rows.channel_stride != 1 || overlap || (channels % 16 == 0 && unaligned(v, rows.stride, 3))) {
    v = call.keep(torch::stable::contiguous(xq), "the quantized input");
    rows = merged_rows(v);
  }
  Image x;
  x.data = static_cast<const int8_t*>(v.data);
  x.batch = int(rows.size[0]), x.height = int(rows.size[1]), x.width = int(rows.size[2]), x.channels = int(channels);
  x.stride_n = rows.stride[0], x.stride_h = rows.stride[1], x.stride_w = rows.stride[2];
  return x;
}

// The distances between pixels of [batch, channels, height, width], those of dense memory where a size is 1.
void pixel_strides(const View& v, int64_t stride[3]) {
  stride[2] = v.size[3] == 1 ? v.size[1] : v.stride[3];
  stride[1] = v.size[2] == 1 ? stride[2] * v.size[3] : v.stride[2];
  stride[0] = v.size[0] == 1 ? stride[1] * v.size[2] : v.stride[0];
}

bool channels_last(const View& v, const int64_t stride[3]) {
  return (v.size[1] == 1 || v.stride[1] == 1) && stride[2] >= v.size[1] && stride[1] > 0 && stride[0] > 0;
}

Image code_image(Call& call, const Tensor& xq) {
  View v = call.look(xq, "the quantized input");
  check_codes(call, v);
  STD_TORCH_CHECK(v.dims == 4, call.op(), ": the quantized input must be [batch, channels, height, width]; found ",
                  v.dims, " dimensions");
  int64_t stride[3];
  pixel_strides(v, stride);
  if (!channels_last(v, stride) || (v.size[1] % 16 == 0 && unaligned(v, stride, 3))) {
    v = call.keep(torch::stable::contiguous(xq, MemoryFormat::ChannelsLast), "the quantized input");
    pixel_strides(v, stride);
  }
  Image x;
  x.data = static_cast<const int8_t*>(v.data);
  x.batch = int(v.size[0]), x.height = int(v.size[2]), x.width = int(v.size[3]), x.channels = int(v.size[1]);
  x.stride_n = stride[0], x.stride_h = stride[1], x.stride_w = stride[2];
  return x;
}

Image dense_image(const int8_t* data, int64_t batch, int64_t height, int64_t width, int64_t channels) {
  Image x;
  x.data = data;
  x.batch = int(batch), x.height = int(height), x.width = int(width), x.channels = int(channels);
  x.stride_w = channels, x.stride_h = width * channels, x.stride_n = height * width * channels;
  return x;
}

int64_t packed_size(int64_t channels, int64_t bits) { return (channels * bits + 7) / 8; }

void check_groups(const Call& call, const Ints& groups, int64_t channels, int64_t bits) {
  STD_TORCH_CHECK(bits == 8 || bits == 4 || bits == 2, call.op(), ": weight bits must be 8, 4 or 2; found ", bits);
  int64_t sum = 0;
  for (int64_t g : groups) sum += g;
  STD_TORCH_CHECK(!groups.empty() && sum == channels, call.op(), ": input_groups add up to ", sum,
                  "; the input has ", channels, " channels");
}

// The stored codes [n, packed] or [n, packed, r, s] (channels-last in memory).
Weight stored_weight(Call& call, const Tensor& qdata, const Ints& groups, int64_t bits, int64_t dims, Window* window) {
  View v = call.look(qdata, "the weight");
  STD_TORCH_CHECK(v.dtype == (bits == 8 ? dtypes().int8 : dtypes().uint8), call.op(), ": a weight of ", bits,
                  " bits must be ", bits == 8 ? "int8" : "uint8");
  int64_t packed = 0;
  for (int64_t g : groups) packed += packed_size(g, bits);
  STD_TORCH_CHECK(v.dims == dims && v.size[1] == packed, call.op(), ": the weight must have ", dims,
                  " dimensions and ", packed, " stored input channels");
  if (dims == 2) {
    if (!v.dense()) v = call.copy_weight(torch::stable::contiguous(qdata));
  } else {
    int64_t stride[3];
    pixel_strides(v, stride);
    bool dense = (packed == 1 || v.stride[1] == 1) && stride[2] == packed && stride[1] == packed * v.size[3] &&
                 stride[0] == packed * v.size[3] * v.size[2];
    if (!dense) v = call.copy_weight(torch::stable::contiguous(qdata, MemoryFormat::ChannelsLast));
    window->r = int(v.size[2]), window->s = int(v.size[3]);
  }
  Weight w;
  w.data = v.data;
  w.n = int(v.size[0]);
  return w;
}

Weight static_weight(Call& call, const Tensor& qdata, const Tensor& alpha, const Tensor& beta,
                     const OptionalTensor& bias, const Ints& groups, int64_t bits, int64_t dims = 2,
                     Window* window = nullptr) {
  Weight w = stored_weight(call, qdata, groups, bits, dims, window);
  w.alpha = call.floats(alpha, "alpha", int64_t(groups.size()) * w.n);
  w.beta = call.floats(beta, "beta", w.n);
  w.bias = call.float_vector(bias, "bias", w.n, &w.bias_type);
  return w;
}

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

// Kernels load weights before the one ahead of them has ended. That is wrong for weights which that one writes, so there
// the kernel is launched the ordinary way: fresh_weights.
void run(Call& call, Matmul p, bool fresh_weights) {
  Stream on = call.on();
  Choice choice = select(p, on.arch, on.sm_count);
  STD_TORCH_CHECK(choice.kernel >= 0, call.op(), ": there is no kernel for the problem ", p.str());
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

void multiply(Call& call, const Matmul& p, const Ints& groups) {
  if (p.m() == 0 || p.n() == 0) return;
  if (groups.size() == 1) {
    run(call, p, call.copied_weight());
  } else {
    run_groups(call, p, groups, call.copied_weight());
  }
}

void set_out(Matmul& p, const View& out, Float type, int64_t columns) {
  p.out = out.data;
  p.out_type = type;
  p.out_stride = columns;
}

// Kernels add residuals of the output's dtype or float32; the partial sums of several groups are float32.
Tensor readable_residual(const Call& call, const Matmul& p, const Tensor& residual, const Ints& groups) {
  int32_t dtype = call.look(residual, "residual").dtype;
  Float type = call.float_type(dtype, "residual");
  if (type == Float::f32 || (type == p.out_type && groups.size() == 1)) return residual;
  return torch::stable::to(residual, ScalarType::Float);
}

void set_residual(const Call& call, Matmul& p, const View& v, int64_t stride) {
  p.residual = v.data;
  p.residual_type = call.float_type(v.dtype, "residual");
  p.residual_stride = stride;
}

void check_residual(const Call& call, const View& v, const View& out) {
  bool same = v.dims == out.dims;
  for (int64_t i = 0; same && i < v.dims; ++i) same = v.size[i] == out.size[i];
  STD_TORCH_CHECK(same, call.op(), ": residual must have the shape of the output");
}

// A linear layer's residual [..., n].
void add_row_residual(Call& call, Matmul& p, const OptionalTensor& residual, const View& out, const Ints& groups) {
  if (!residual) return;
  Tensor t = readable_residual(call, p, *residual, groups);
  View v = call.keep(t, "residual");
  check_residual(call, v, out);
  Rows rows = merged_rows(v);
  if (!rows.equally_spaced() || rows.channel_stride != 1) {
    v = call.keep(torch::stable::contiguous(t), "residual");
    rows = merged_rows(v);
  }
  set_residual(call, p, v, rows.stride[2]);
}

// A convolution's residual [batch, n, height, width], or [batch, n, 1, 1] for all pixels of an image.
void add_image_residual(Call& call, Matmul& p, const OptionalTensor& residual, const View& out, const Ints& groups) {
  if (!residual) return;
  Tensor t = readable_residual(call, p, *residual, groups);
  View v = call.keep(t, "residual");
  bool one_row = v.dims == 4 && v.size[2] * v.size[3] == 1;
  one_row = one_row && v.size[0] == out.size[0] && v.size[1] == out.size[1];
  if (!one_row) check_residual(call, v, out);
  int64_t stride[3];
  pixel_strides(v, stride);
  bool spaced = stride[1] == stride[2] * v.size[3] && stride[0] == stride[1] * v.size[2];
  if (!channels_last(v, stride) || !(spaced || one_row)) {
    v = call.keep(torch::stable::contiguous(t, MemoryFormat::ChannelsLast), "residual");
    pixel_strides(v, stride);
  }
  set_residual(call, p, v, one_row ? stride[0] : stride[2]);
  if (one_row) p.residual_rows = p.out_h * p.out_w;
}

Matmul row_problem(const Image& x, int64_t bits) {
  Matmul p;
  p.x = x;
  p.out_h = x.height, p.out_w = x.width;
  p.bits = int(bits);
  return p;
}

int output_size(const Call& call, int64_t size, int64_t kernel, int64_t stride, int64_t dilation) {
  int64_t span = dilation * (kernel - 1) + 1;
  STD_TORCH_CHECK(stride > 0 && dilation > 0 && size >= span, call.op(), ": a window of ", span, " does not fit ", size,
                  " padded pixels, or stride ", stride, " or dilation ", dilation, " is not positive");
  return int((size - span) / stride + 1);
}

// Sizes of the output and the window's steps; r and s are set already.
void set_window(const Call& call, Matmul& p, const Ints& stride, const Ints& dilation) {
  STD_TORCH_CHECK(stride.size() == 2 && dilation.size() == 2, call.op(), ": stride and dilation must be pairs");
  Window& w = p.window;
  w.stride_h = int(stride[0]), w.stride_w = int(stride[1]);
  w.dilation_h = int(dilation[0]), w.dilation_w = int(dilation[1]);
  p.out_h = output_size(call, p.x.height, w.r, stride[0], dilation[0]);
  p.out_w = output_size(call, p.x.width, w.s, stride[1], dilation[1]);
}

// --- operators --------------------------------------------------------------------------------------------------------

Tensor quantize_op(const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t bits, Ints groups,
                   std::optional<Ints> pad) {
  Call call("quantize", x);
  Pad border;
  Floats f;
  OptionalTensor out;
  if (pad) {
    border = checked_pad(call, *pad);
    f = float_image(call, x);
    out = call.empty_image(f.size[0], f.size[3], f.size[1] + border.top + border.bottom,
                           f.size[2] + border.left + border.right, dtypes().int8);
  } else {
    View v;
    f = float_rows(call, x, &v);
    out = call.empty_rows(v, f.size[3], dtypes().int8);
  }
  Codes codes = static_codes(call, scale, zero_point, bits, groups, f.channels());
  View v = call.look(*out, "the output");
  if (v.numel()) call.check(quantize(f, codes, border, static_cast<int8_t*>(v.data), call.on()), "the kernel");
  return *out;
}

std::tuple<Tensor, Tensor, Tensor> quantize_per_token_op(const Tensor& x, int64_t bits, Ints groups) {
  Call call("quantize_per_token", x);
  View v;
  Floats f = float_rows(call, x, &v);
  Codes codes;
  set_groups(call, codes, bits, groups, f.channels());
  Tensor out = call.empty_rows(v, f.size[3], dtypes().int8);
  Tensor scale = call.empty_rows(v, codes.groups, dtypes().f32);
  Tensor zero_point = call.empty_rows(v, codes.groups, dtypes().f32);
  if (f.rows()) {
    auto* to = static_cast<int8_t*>(out.data_ptr());
    auto *scales = static_cast<float*>(scale.data_ptr()), *zeros = static_cast<float*>(zero_point.data_ptr());
    call.check(quantize_per_token(f, codes, to, scales, zeros, call.on()), "the kernel");
  }
  return {out, scale, zero_point};
}

Tensor layer_norm_quantize_op(const Tensor& x, OptionalTensor weight, OptionalTensor bias, double eps,
                              const Tensor& scale, const Tensor& zero_point, int64_t bits, Ints groups) {
  Call call("layer_norm_quantize", x);
  View v;
  Floats f = float_rows(call, x, &v);
  STD_TORCH_CHECK(f.size[3] <= 16384, call.op(), ": takes up to 16384 channels; found ", f.size[3]);
  Norm norm = norm_of(call, weight, bias, eps, f.channels());
  Codes codes = static_codes(call, scale, zero_point, bits, groups, f.channels());
  Tensor out = call.empty_rows(v, f.size[3], dtypes().int8);
  if (f.rows() && f.channels()) {
    call.check(layer_norm_quantize(f, norm, codes, static_cast<int8_t*>(out.data_ptr()), call.on()), "the kernel");
  }
  return out;
}

Tensor geglu_quantize_op(const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t bits, Ints groups) {
  Call call("geglu_quantize", x);
  View v;
  Floats f = float_rows(call, x, &v);
  STD_TORCH_CHECK(f.size[3] % 2 == 0, call.op(), ": needs an even number of channels; found ", f.size[3]);
  Codes codes = static_codes(call, scale, zero_point, bits, groups, f.size[3] / 2);
  Tensor out = call.empty_rows(v, f.size[3] / 2, dtypes().int8);
  if (f.rows() && f.channels()) {
    call.check(geglu_quantize(f, codes, static_cast<int8_t*>(out.data_ptr()), call.on()), "the kernel");
  }
  return out;
}

Tensor group_norm_quantize_op(const Tensor& x, int64_t num_groups, OptionalTensor weight, OptionalTensor bias,
                              double eps, bool silu, const Tensor& scale, const Tensor& zero_point, int64_t bits,
                              Ints groups, std::optional<Ints> pad) {
  Call call("group_norm_quantize", x);
  Pad border = pad ? checked_pad(call, *pad) : Pad{};
  Floats f = float_image(call, x);
  STD_TORCH_CHECK(num_groups > 0 && f.size[3] % num_groups == 0, call.op(), ": ", f.size[3],
                  " channels do not divide into ", num_groups, " groups");
  Norm norm = norm_of(call, weight, bias, eps, f.channels());
  Codes codes = static_codes(call, scale, zero_point, bits, groups, f.channels());
  Tensor out = call.empty_image(f.size[0], f.size[3], f.size[1] + border.top + border.bottom,
                                f.size[2] + border.left + border.right, dtypes().int8);
  View v = call.look(out, "the output");
  if (v.numel()) {
    void* workspace = call.scratch(group_norm_workspace(f, int(num_groups), call.on()));
    call.check(group_norm_quantize(f, int(num_groups), norm, silu, codes, border, static_cast<int8_t*>(v.data),
                                   workspace, call.on()),
               "the kernel");
  }
  return out;
}

Tensor linear_int8_op(const Tensor& xq, const Tensor& qdata, const Tensor& alpha, const Tensor& beta,
                      OptionalTensor bias, int64_t bits, Ints groups, ScalarType out_dtype, OptionalTensor residual) {
  Call call("linear_int8", xq);
  View view;
  Matmul p = row_problem(code_rows(call, xq, &view), bits);
  check_groups(call, groups, p.x.channels, bits);
  p.weights[0] = static_weight(call, qdata, alpha, beta, bias, groups, bits);
  Float type = call.float_type(out_dtype);
  Tensor out = call.empty_rows(view, p.n(), dtype_of(type));
  View v = call.look(out, "the output");
  set_out(p, v, type, p.n());
  add_row_residual(call, p, residual, v, groups);
  multiply(call, p, groups);
  return out;
}

Tensor linear_int8_dynamic_op(const Tensor& xq, const Tensor& x_scale, const Tensor& x_zero_point, const Tensor& qdata,
                              const Tensor& scale, const Tensor& weight_sum, OptionalTensor bias, int64_t bits,
                              Ints groups, ScalarType out_dtype) {
  Call call("linear_int8_dynamic", xq);
  View view;
  Matmul p = row_problem(code_rows(call, xq, &view), bits);
  check_groups(call, groups, p.x.channels, bits);
  Weight w = stored_weight(call, qdata, groups, bits, 2, nullptr);
  const int64_t count = int64_t(groups.size());
  w.alpha = call.floats(scale, "scale", count * w.n);
  w.weight_sum = static_cast<const int32_t*>(call.values(weight_sum, "weight_sum", count * w.n, dtypes().int32).data);
  w.bias = call.float_vector(bias, "bias", w.n, &w.bias_type);
  p.weights[0] = w;
  p.row_scale = call.floats(x_scale, "x_scale", p.m() * count);
  p.row_zero_point = call.floats(x_zero_point, "x_zero_point", p.m() * count);
  p.row_stride = count;
  Float type = call.float_type(out_dtype);
  Tensor out = call.empty_rows(view, p.n(), dtype_of(type));
  set_out(p, call.look(out, "the output"), type, p.n());
  multiply(call, p, groups);
  return out;
}

// Whether b begins where a ends in everything, so that the two are one weight of more rows.
bool continues(const Weight& a, const Weight& b, int64_t row_bytes) {
  if (static_cast<const char*>(a.data) + a.n * row_bytes != b.data) return false;
  if (a.alpha + a.n != b.alpha || a.beta + a.n != b.beta || !a.bias != !b.bias) return false;
  if (!a.bias) return true;
  return a.bias_type == b.bias_type && static_cast<const char*>(a.bias) + a.n * bytes_of(a.bias_type) == b.bias;
}

Tensor linear_int8_multi_op(const Tensor& xq, std::vector<Tensor> qdata, std::vector<Tensor> alpha,
                            std::vector<Tensor> beta, std::vector<OptionalTensor> bias, Ints bits, Ints groups,
                            ScalarType out_dtype) {
  Call call("linear_int8_multi", xq);
  size_t count = qdata.size();
  STD_TORCH_CHECK(count > 0 && alpha.size() == count && beta.size() == count && bias.size() == count &&
                      bits.size() == count,
                  call.op(), ": needs one qdata, alpha, beta, bias and bits for each of one or more weights");
  View view;
  Image x = code_rows(call, xq, &view);
  std::vector<Weight> weights;
  Ints weight_bits;
  int64_t n = 0;
  for (size_t i = 0; i < count; ++i) {
    check_groups(call, groups, x.channels, bits[i]);
    Weight w = static_weight(call, qdata[i], alpha[i], beta[i], bias[i], groups, bits[i]);
    n += w.n;
    bool one = !weights.empty() && groups.size() == 1 && weight_bits.back() == bits[i] &&
               continues(weights.back(), w, packed_size(x.channels, bits[i]));
    if (one) {
      weights.back().n += w.n;
    } else {
      weights.push_back(w);
      weight_bits.push_back(bits[i]);
    }
  }
  Float type = call.float_type(out_dtype);
  Tensor out = call.empty_rows(view, n, dtype_of(type));
  auto* column = static_cast<char*>(out.data_ptr());
  for (size_t first = 0; first < weights.size();) {
    Matmul p = row_problem(x, weight_bits[first]);
    p.weight_count = 0;
    for (size_t i = first; i < weights.size() && p.weight_count < kMaxWeights && weight_bits[i] == p.bits; ++i) {
      p.weights[p.weight_count++] = weights[i];
    }
    p.out = column;
    p.out_type = type;
    p.out_stride = n;
    multiply(call, p, groups);
    column += p.n() * bytes_of(type);
    first += p.weight_count;
  }
  return out;
}

// The rest of a convolution whose input and window are known.
Tensor convolve(Call& call, Matmul& p, const Ints& groups, Float type, const OptionalTensor& residual) {
  Tensor out = call.empty_image(p.x.batch, p.n(), p.out_h, p.out_w, dtype_of(type));
  View v = call.look(out, "the output");
  set_out(p, v, type, p.n());
  add_image_residual(call, p, residual, v, groups);
  multiply(call, p, groups);
  return out;
}

Tensor conv2d_int8_op(const Tensor& xq, const Tensor& qdata, const Tensor& alpha, const Tensor& beta,
                      OptionalTensor bias, Ints stride, Ints padding, Ints dilation, int64_t bits, Ints groups,
                      ScalarType out_dtype, OptionalTensor residual) {
  Call call("conv2d_int8", xq);
  STD_TORCH_CHECK(padding.size() == 2, call.op(), ": padding must be a pair");
  Matmul p;
  OptionalTensor padded;
  if (padding[0] || padding[1]) {
    int64_t pad[4] = {padding[1], padding[1], padding[0], padding[0]};
    padded = torch::stable::pad(xq, {pad, 4});
  }
  p.x = code_image(call, padded ? *padded : xq);
  p.bits = int(bits);
  check_groups(call, groups, p.x.channels, bits);
  p.weights[0] = static_weight(call, qdata, alpha, beta, bias, groups, bits, 4, &p.window);
  set_window(call, p, stride, dilation);
  return convolve(call, p, groups, call.float_type(out_dtype), residual);
}

Tensor quantized_linear_op(const Tensor& x, const Tensor& act_scale, const Tensor& act_zero_point, int64_t act_bits,
                           const Tensor& qdata, const Tensor& alpha, const Tensor& beta, OptionalTensor bias,
                           int64_t bits, Ints groups) {
  Call call("quantized_linear", x);
  View view;
  Floats f = float_rows(call, x, &view);
  Codes codes = static_codes(call, act_scale, act_zero_point, act_bits, groups, f.channels());
  check_groups(call, groups, f.channels(), bits);
  Weight w = static_weight(call, qdata, alpha, beta, bias, groups, bits);
  Tensor out = call.empty_rows(view, w.n, dtype_of(f.type));
  if (f.rows() == 0) return out;
  auto* xq = static_cast<int8_t*>(call.scratch(f.rows() * f.channels()));
  call.check(quantize(f, codes, Pad{}, xq, call.on()), "the quantizer");
  Matmul p = row_problem(dense_image(xq, 1, 1, f.rows(), f.channels()), bits);
  p.weights[0] = w;
  set_out(p, call.look(out, "the output"), f.type, w.n);
  multiply(call, p, groups);
  return out;
}

Tensor quantized_conv2d_op(const Tensor& x, const Tensor& act_scale, const Tensor& act_zero_point, int64_t act_bits,
                           const Tensor& qdata, const Tensor& alpha, const Tensor& beta, OptionalTensor bias,
                           Ints stride, Ints pad, Ints dilation, int64_t bits, Ints groups) {
  Call call("quantized_conv2d", x);
  Pad border = checked_pad(call, pad);
  Floats f = float_image(call, x);
  Codes codes = static_codes(call, act_scale, act_zero_point, act_bits, groups, f.channels());
  check_groups(call, groups, f.channels(), bits);
  int64_t height = f.size[1] + border.top + border.bottom, width = f.size[2] + border.left + border.right;
  int64_t bytes = f.size[0] * height * width * f.channels();
  auto* xq = static_cast<int8_t*>(call.scratch(bytes));
  if (bytes) call.check(quantize(f, codes, border, xq, call.on()), "the quantizer");
  Matmul p;
  p.x = dense_image(xq, f.size[0], height, width, f.channels());
  p.bits = int(bits);
  p.weights[0] = static_weight(call, qdata, alpha, beta, bias, groups, bits, 4, &p.window);
  set_window(call, p, stride, dilation);
  return convolve(call, p, groups, f.type, std::nullopt);
}

// --- weight-only ------------------------------------------------------------------------------------------------------

// The floating weight [out, in, ...], channels-last for a convolution, as torch's own operators take it.
Tensor dequantized(Call& call, const Matmul& p, int64_t dims, const Ints& groups, Float type) {
  const Weight& w = p.weights[0];
  const int64_t channels = p.x.channels, r = p.window.r, s = p.window.s;
  const int64_t size[4] = {w.n, channels, r, s}, stride[4] = {r * s * channels, 1, s * channels, channels};
  Tensor out = call.empty(size, stride, dims, dtype_of(type));
  int64_t stored = 0;
  for (int64_t g : groups) stored += packed_size(g, p.bits);
  const auto* codes = static_cast<const char*>(w.data);
  auto* to = static_cast<char*>(call.look(out, "the weight").data);
  for (size_t g = 0; g < groups.size(); ++g) {
    call.check(dequantize_weight(codes, stored, w.alpha + g * w.n, to, type, channels, w.n, p.taps(), int(groups[g]),
                                 p.bits, call.on()),
               "dequantizing the weight");
    codes += packed_size(groups[g], p.bits);
    to += groups[g] * bytes_of(type);
  }
  return out;
}

// Whether one of our kernels multiplies every group of channels of a floating input.
bool multiplies_floats(const Call& call, const Matmul& whole, const Ints& groups) {
  if (whole.x_type == Float::f32) return false;
  Matmul p = whole;
  for (int64_t g : groups) p.weight_pitch += packed_size(g, p.bits);
  for (int64_t g : groups) {
    p.x.channels = int(g);
    if (select(p, call.on().arch, call.on().sm_count).kernel < 0) return false;
    p.x.data += g * p.element_bytes();
    p.weights[0].data = static_cast<const char*>(p.weights[0].data) + packed_size(g, p.bits);
  }
  return true;
}

// The problem but for its input and output.
void set_floating(Call& call, Matmul& p, Float type, const Tensor& qdata, const Tensor& scale,
                  const OptionalTensor& bias, const Ints& groups, int64_t bits, int64_t dims) {
  check_groups(call, groups, p.x.channels, bits);
  p.bits = int(bits), p.floating = true, p.x_type = type;
  Weight& w = p.weights[0];
  w = stored_weight(call, qdata, groups, bits, dims, &p.window);
  w.alpha = call.floats(scale, "scale", int64_t(groups.size()) * w.n);
  w.bias = call.float_vector(bias, "bias", w.n, &w.bias_type);
}

OptionalTensor bias_like(const OptionalTensor& bias, const Tensor& x) {
  return bias ? OptionalTensor(torch::stable::to(*bias, x.scalar_type())) : bias;
}

Tensor linear_weight_only_op(const Tensor& x, const Tensor& qdata, const Tensor& scale, OptionalTensor bias,
                             int64_t bits, Ints groups) {
  Call call("linear_weight_only", x);
  View v = call.look(x, "the input");
  STD_TORCH_CHECK(v.dims >= 1, call.op(), ": the input must have at least one dimension");
  Tensor rows = v.dense() ? x : torch::stable::contiguous(x);
  v = call.keep(rows, "the input");
  const Float type = call.float_type(v.dtype, "the input");
  const int64_t channels = v.size[v.dims - 1], m = channels ? v.numel() / channels : 0;
  Matmul p = row_problem(dense_image(static_cast<const int8_t*>(v.data), 1, 1, m, channels), bits);
  set_floating(call, p, type, qdata, scale, bias, groups, bits, 2);
  if (m == 0 || p.n() == 0 || multiplies_floats(call, p, groups)) {
    Tensor out = call.empty_rows(v, p.n(), v.dtype);
    set_out(p, call.look(out, "the output"), type, p.n());
    multiply(call, p, groups);
    return out;
  }
  std::array<StableIValue, 3> stack{torch::stable::detail::from(rows),
                                    torch::stable::detail::from(dequantized(call, p, 2, groups, type)),
                                    torch::stable::detail::from(bias_like(bias, x))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::contiguous(torch::stable::detail::to<Tensor>(stack[0]));
}

Tensor conv2d_weight_only_op(const Tensor& x, const Tensor& qdata, const Tensor& scale, OptionalTensor bias,
                             Ints stride, Ints pad, Ints dilation, int64_t bits, Ints groups) {
  Call call("conv2d_weight_only", x);
  STD_TORCH_CHECK(call.look(x, "the input").dims == 4, call.op(), ": the input must be [batch, channels, height, width]");
  const Pad border = checked_pad(call, pad);
  const bool padded = border.left || border.right || border.top || border.bottom;
  Tensor image = padded ? torch::stable::pad(x, {pad.data(), pad.size()}) : x;
  image = torch::stable::contiguous(image, MemoryFormat::ChannelsLast);
  View v = call.keep(image, "the input");
  const Float type = call.float_type(v.dtype, "the input");
  Matmul p;
  p.x = dense_image(static_cast<const int8_t*>(v.data), v.size[0], v.size[2], v.size[3], v.size[1]);
  set_floating(call, p, type, qdata, scale, bias, groups, bits, 4);
  set_window(call, p, stride, dilation);
  if (p.m() == 0 || p.n() == 0 || multiplies_floats(call, p, groups)) {
    return convolve(call, p, groups, type, std::nullopt);
  }
  std::array<StableIValue, 7> stack{torch::stable::detail::from(image),
                                    torch::stable::detail::from(dequantized(call, p, 4, groups, type)),
                                    torch::stable::detail::from(bias_like(bias, x)),
                                    torch::stable::detail::from(stride),
                                    torch::stable::detail::from(Ints{0, 0}),
                                    torch::stable::detail::from(dilation),
                                    torch::stable::detail::from(int64_t(1))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::conv2d", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::contiguous(torch::stable::detail::to<Tensor>(stack[0]), MemoryFormat::ChannelsLast);
}

STABLE_TORCH_LIBRARY_IMPL(mixdq_ao, CUDA, m) {
  m.impl("quantize", TORCH_BOX(&quantize_op));
  m.impl("quantize_per_token", TORCH_BOX(&quantize_per_token_op));
  m.impl("layer_norm_quantize", TORCH_BOX(&layer_norm_quantize_op));
  m.impl("geglu_quantize", TORCH_BOX(&geglu_quantize_op));
  m.impl("group_norm_quantize", TORCH_BOX(&group_norm_quantize_op));
  m.impl("linear_int8", TORCH_BOX(&linear_int8_op));
  m.impl("linear_int8_dynamic", TORCH_BOX(&linear_int8_dynamic_op));
  m.impl("linear_int8_multi", TORCH_BOX(&linear_int8_multi_op));
  m.impl("conv2d_int8", TORCH_BOX(&conv2d_int8_op));
  m.impl("quantized_linear", TORCH_BOX(&quantized_linear_op));
  m.impl("quantized_conv2d", TORCH_BOX(&quantized_conv2d_op));
  m.impl("linear_weight_only", TORCH_BOX(&linear_weight_only_op));
  m.impl("conv2d_weight_only", TORCH_BOX(&conv2d_weight_only_op));
}

}  // namespace
}  // namespace mixdq
