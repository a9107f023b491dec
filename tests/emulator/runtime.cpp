// What the CUDA library asks of the CUDA runtime and of a torch with CUDA. The build gives it these under the names of
// torch's, so that it takes a CPU's tensors for those of a GPU.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "dependence.h"
#include "machine.h"

namespace {

struct Device {
  int arch, sm_count;
};
// Few multiprocessors: persistent kernels then run several tiles even of small problems.
constexpr Device kDevices[] = {{90, 3}, {80, 3}};
int device;

// Tensors of the library lie between bytes that nobody may write.
constexpr int64_t kFence = 64;
constexpr uint8_t kUntouched = 0x5A;

struct Fenced {
  AtenTensorHandle whole;
  uint8_t* data;
  int64_t bytes;
};
std::vector<Fenced> fenced;

}  // namespace

std::vector<std::pair<uint8_t*, int64_t>> emulator::device_memory() {
  std::vector<std::pair<uint8_t*, int64_t>> found;
  for (const Fenced& f : fenced) found.push_back({f.data, f.bytes});
  return found;
}

extern "C" {

// 0 is a GPU of sm_90, 1 one of sm_80.
void emulator_set_device(int index) { device = index; }

// How many tensors since the last call have been written past their ends.
int emulator_count_overruns() {
  int found = 0;
  for (const Fenced& f : fenced) {
    auto untouched = [](uint8_t byte) { return byte == kUntouched; };
    found += !std::all_of(f.data, f.data + kFence, untouched) ||
             !std::all_of(f.data + f.bytes - kFence, f.data + f.bytes, untouched);
    aoti_torch_delete_tensor_object(f.whole);
  }
  fenced.clear();
  return found;
}

int32_t emulated_device_type_cuda() { return aoti_torch_device_type_cpu(); }

AOTITorchError emulated_get_device_index(AtenTensorHandle, int32_t* index) {
  *index = device;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError emulated_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError emulated_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }

AOTITorchError emulated_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError emulated_empty_strided(int64_t dims, const int64_t* size, const int64_t* stride, int32_t dtype,
                                      int32_t device_type, int32_t, AtenTensorHandle* out) {
  int64_t count = 1;
  for (int64_t i = 0; i < dims; ++i) count = size[i] ? count + (size[i] - 1) * stride[i] : count;
  const int64_t item = aoti_torch_dtype_element_size(dtype), fence = kFence / item;
  const int64_t whole_size = count + 2 * fence, one = 1;
  Fenced f = {nullptr, nullptr, whole_size * item};
  if (auto error = aoti_torch_empty_strided(1, &whole_size, &one, dtype, device_type, 0, &f.whole)) return error;
  aoti_torch_get_data_ptr(f.whole, reinterpret_cast<void**>(&f.data));
  std::memset(f.data, kUntouched, f.bytes);
  fenced.push_back(f);
  return aoti_torch__reinterpret_tensor(f.whole, dims, size, stride, fence, out);
}

AOTITorchError emulated_cuda_caching_allocator_raw_alloc(uint64_t bytes, void** data) {
  const int64_t size = int64_t(bytes), one = 1;
  AtenTensorHandle inside;
  const int32_t byte = aoti_torch_dtype_int8(), cpu = aoti_torch_device_type_cpu();
  if (auto error = emulated_empty_strided(1, &size, &one, byte, cpu, 0, &inside)) return error;
  aoti_torch_get_data_ptr(inside, data);
  return aoti_torch_delete_tensor_object(inside);
}

AOTITorchError emulated_cuda_caching_allocator_raw_delete(void*) { return AOTI_TORCH_SUCCESS; }  // with the fences

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int index) {
  const Device& d = kDevices[index];
  *value = attribute == cudaDevAttrComputeCapabilityMajor   ? d.arch / 10
           : attribute == cudaDevAttrComputeCapabilityMinor ? d.arch % 10
                                                            : d.sm_count;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int value) {
  return value <= emulator::kMaxSharedBytes ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height,
                              cudaMemcpyKind, cudaStream_t) {
  for (size_t i = 0; i < height; ++i) {
    std::memcpy(static_cast<char*>(to) + i * to_pitch, static_cast<const char*>(from) + i * from_pitch, width);
  }
  emulator::forget_kernel_ahead();  // the next kernel comes after the copy, which comes after the last kernel
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t) { return "an error of the emulator"; }

}  // extern "C"
