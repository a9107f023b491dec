// One call of an operator: what it is told of its tensors, and the memory that it needs. This is the one file that
// includes torch, and of it only the stable ABI, so that one binary serves every torch from the target version on.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "kernels.h"

namespace mixdq {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;
using OptionalTensor = std::optional<Tensor>;

// The numbers that the C interface has for dtypes.
struct Dtypes {
  int32_t int8 = aoti_torch_dtype_int8(), uint8 = aoti_torch_dtype_uint8(), int32 = aoti_torch_dtype_int32();
  int32_t f32 = aoti_torch_dtype_float32(), f16 = aoti_torch_dtype_float16(), bf16 = aoti_torch_dtype_bfloat16();
};

const Dtypes& dtypes();

int32_t dtype_of(Float type);

inline int bytes_of(Float type) { return type == Float::f32 ? 4 : 2; }

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

Rows merged_rows(const View& v);

// One call of an operator: the device and stream that it runs on, and the tensors it must keep until it has launched.
// Everything here raises an error that names the operator and the tensor.
class Call {
 public:
  Call(const char* op, const Tensor& x);
  ~Call();
  Call(const Call&) = delete;

  const char* op() const { return op_; }
  const Stream& on() const { return on_; }
  // Whether launches are being recorded into a graph.
  bool is_captured() const;

  View look(const Tensor& t, const char* name) const;
  View keep(Tensor t, const char* name);

  // A weight that some kernel of this call has written: see multiply().
  View keep_copied_weight(Tensor t);
  bool copied_weight() const { return copied_weight_; }

  // A dense vector or matrix of that many values; what is not dense is copied.
  View values(const Tensor& t, const char* name, int64_t count, int32_t dtype);
  const float* floats(const Tensor& t, const char* name, int64_t count);
  // The same of any floating dtype, which it tells.
  const void* float_vector(const OptionalTensor& t, const char* name, int64_t count, Float* type);

  Float float_type(int32_t dtype, const char* name) const;
  Float float_type(ScalarType type) const;

  Tensor empty(const int64_t* size, const int64_t* stride, int64_t dims, int32_t dtype) const;
  // [..., last] with the leading sizes of `like`.
  Tensor empty_rows(const View& like, int64_t last, int32_t dtype) const;
  // [batch, channels, height, width], channels-last.
  Tensor empty_image(int64_t batch, int64_t channels, int64_t height, int64_t width, int32_t dtype) const;
  // Memory until the call ends; whatever the stream runs later may reuse it. Without a tensor around it, which would take
  // the host as long as half a launch.
  void* scratch(int64_t bytes);

  void check(cudaError_t error, const char* what) const;

 private:
  int device_index(const Tensor& x);

  const char* op_;
  int32_t device_ = 0;
  torch::stable::accelerator::DeviceGuard guard_;
  Stream on_;
  std::vector<Tensor> keep_;
  std::vector<void*> scratch_;
  bool copied_weight_ = false;
};

}  // namespace mixdq
