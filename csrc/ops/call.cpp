#include "ops/call.h"

#include <cstdlib>
#include <cstring>
#include <mutex>

namespace mixdq {
namespace {

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

bool is_float(int32_t dtype) {
  const Dtypes& d = dtypes();
  return dtype == d.f16 || dtype == d.bf16 || dtype == d.f32;
}

}  // namespace

const Dtypes& dtypes() {
  static const Dtypes known;
  return known;
}

int32_t dtype_of(Float type) {
  return type == Float::f32 ? dtypes().f32 : type == Float::f16 ? dtypes().f16 : dtypes().bf16;
}

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

Call::Call(const char* op, const Tensor& x) : op_(op), guard_(device_index(x)) {
  keep_.reserve(8);
  const Device& facts = device_facts(device_);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
  on_ = {static_cast<cudaStream_t>(stream), device_, facts.sm_count, facts.arch, dependent_launches(facts.arch)};
}

Call::~Call() {
  for (void* memory : scratch_) aoti_torch_cuda_caching_allocator_raw_delete(memory);
}

bool Call::is_captured() const {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  return cudaStreamIsCapturing(on_.stream, &status) == cudaSuccess && status != cudaStreamCaptureStatusNone;
}

int Call::device_index(const Tensor& x) {
  int32_t type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &type));
  STD_TORCH_CHECK(type == aoti_torch_device_type_cuda(), op_, ": the input must be a CUDA tensor");
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(x.get(), &device_));
  return device_;
}

View Call::look(const Tensor& t, const char* name) const {
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

View Call::keep(Tensor t, const char* name) {
  keep_.push_back(std::move(t));
  return look(keep_.back(), name);
}

View Call::keep_copied_weight(Tensor t) {
  copied_weight_ = true;
  return keep(std::move(t), "the weight");
}

View Call::values(const Tensor& t, const char* name, int64_t count, int32_t dtype) {
  View v = look(t, name);
  STD_TORCH_CHECK(v.dtype == dtype, op_, ": ", name, " has the wrong dtype; float32 scales and int32 sums are needed");
  STD_TORCH_CHECK(v.numel() == count, op_, ": ", name, " must have ", count, " values; found ", v.numel());
  return v.dense() ? v : keep(torch::stable::contiguous(t), name);
}

const float* Call::floats(const Tensor& t, const char* name, int64_t count) {
  return static_cast<const float*>(values(t, name, count, dtypes().f32).data);
}

const void* Call::float_vector(const OptionalTensor& t, const char* name, int64_t count, Float* type) {
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

Float Call::float_type(int32_t dtype, const char* name) const {
  const Dtypes& d = dtypes();
  STD_TORCH_CHECK(is_float(dtype), op_, ": ", name, " must be float16, bfloat16 or float32 on CUDA");
  return dtype == d.f16 ? Float::f16 : dtype == d.bf16 ? Float::bf16 : Float::f32;
}

Float Call::float_type(ScalarType type) const {
  STD_TORCH_CHECK(type == ScalarType::Half || type == ScalarType::BFloat16 || type == ScalarType::Float, op_,
                  ": the output must be float16, bfloat16 or float32 on CUDA");
  return type == ScalarType::Half ? Float::f16 : type == ScalarType::BFloat16 ? Float::bf16 : Float::f32;
}

Tensor Call::empty(const int64_t* size, const int64_t* stride, int64_t dims, int32_t dtype) const {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, size, stride, dtype, aoti_torch_device_type_cuda(), device_, &handle));
  return Tensor(handle);
}

Tensor Call::empty_rows(const View& like, int64_t last, int32_t dtype) const {
  Ints size(like.size, like.size + like.dims), stride(like.dims);
  size.back() = last;
  int64_t step = 1;
  for (int64_t i = like.dims - 1; i >= 0; --i) stride[i] = step, step *= size[i];
  return empty(size.data(), stride.data(), like.dims, dtype);
}

Tensor Call::empty_image(int64_t batch, int64_t channels, int64_t height, int64_t width, int32_t dtype) const {
  int64_t size[4] = {batch, channels, height, width};
  int64_t stride[4] = {height * width * channels, 1, width * channels, channels};
  return empty(size, stride, 4, dtype);
}

void* Call::scratch(int64_t bytes) {
  scratch_.push_back(nullptr);
  TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_caching_allocator_raw_alloc(bytes, &scratch_.back()));
  return scratch_.back();
}

void Call::check(cudaError_t error, const char* what) const {
  STD_TORCH_CHECK(error == cudaSuccess, op_, ": ", what, " failed: ", cudaGetErrorString(error));
}

}  // namespace mixdq
