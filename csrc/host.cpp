// mixdq_ao._C: what Python can ask of the kernels without a GPU. Tensors go through ops/, not through here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "catalogue.h"

namespace py = pybind11;

namespace mixdq {
namespace {

// A problem of that size with aligned, dense operands. With several taps it is an image one pixel wide under a window as
// high as there are taps: for the choice of a kernel only their number counts.
Matmul problem(int64_t m, int n, int k, int taps, int bits, bool floating = false, bool geglu = false,
               bool quantizes = false) {
  if (m < 1 || n < 1 || k < 1 || taps < 1 || k % taps) {
    throw py::value_error("m, n, k and taps must be positive and k a multiple of taps, since k = taps * channels");
  }
  if (bits != 8 && bits != 4 && bits != 2) throw py::value_error("bits must be 8, 4 or 2");
  Matmul p;
  Image& x = p.x;
  x.channels = k / taps;
  if (taps == 1) {
    x.width = p.out_w = int(m);
  } else {
    x.height = int(m) + taps - 1;
    p.out_h = int(m);
    p.window.r = taps;
  }
  x.stride_w = x.channels;
  x.stride_h = x.stride_w * x.width;
  x.stride_n = x.stride_h * x.height;
  p.bits = bits;
  p.floating = floating;
  p.weights[0].n = n;
  p.out_stride = n;
  static const float somewhere = 1;
  if (geglu) p.geglu.scale = p.geglu.zero_point = &somewhere, p.out_stride = n / 2;
  if (quantizes) p.quantizer.scale = p.quantizer.zero_point = &somewhere;
  return p;
}

const Kernel& named(const std::string& name) {
  int i = find_kernel(name);
  if (i < 0) throw py::value_error("there is no kernel '" + name + "'; kernels() lists them");
  return catalogue()[i];
}

py::dict facts() {
  py::dict d;
  d["archs"] = MIXDQ_ARCHS;
  d["cutlass"] = MIXDQ_CUTLASS;
  d["nvcc"] = MIXDQ_NVCC;
  d["dependent_launches"] = bool(MIXDQ_SM90);
  return d;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The catalogue of CUDA kernels, and which of them runs a problem of a given size; needs no GPU.";

  py::class_<Kernel>(m, "Kernel")
      .def_readonly("name", &Kernel::name)
      .def_readonly("family", &Kernel::family)
      .def_readonly("tile_m", &Kernel::tile_m)
      .def_readonly("tile_n", &Kernel::tile_n)
      .def_readonly("math_groups", &Kernel::math_groups)
      .def_readonly("max_splits", &Kernel::max_splits)
      .def_readonly("packed", &Kernel::packed)
      .def_readonly("floating", &Kernel::floating)
      .def_readonly("sharing", &Kernel::sharing)
      .def_readonly("geglu", &Kernel::geglu)
      .def_readonly("quantizes", &Kernel::quantizes)
      .def("__repr__", [](const Kernel& k) { return "<kernel " + std::string(k.name) + ">"; });

  py::class_<Tuned>(m, "Tuned")
      .def(py::init([](int arch, int64_t rows, int n, int k, int taps, int bits, std::string kernel, int splits) {
             return Tuned{arch, rows, n, k, taps, bits, std::move(kernel), splits};
           }),
           py::arg("arch"), py::arg("m"), py::arg("n"), py::arg("k"), py::arg("taps"), py::arg("bits"),
           py::arg("kernel"), py::arg("splits"))
      .def_readonly("arch", &Tuned::arch)
      .def_readonly("m", &Tuned::m)
      .def_readonly("n", &Tuned::n)
      .def_readonly("k", &Tuned::k)
      .def_readonly("taps", &Tuned::taps)
      .def_readonly("bits", &Tuned::bits)
      .def_readonly("kernel", &Tuned::kernel)
      .def_readonly("splits", &Tuned::splits);

  py::class_<Choice>(m, "Choice")
      .def_property_readonly("kernel", [](const Choice& c) { return catalogue()[c.kernel].name; })
      .def_readonly("splits", &Choice::splits)
      .def_readonly("tuned", &Choice::tuned)
      .def("__repr__", [](const Choice& c) {
        return std::string(catalogue()[c.kernel].name) + ":" + std::to_string(c.splits) + (c.tuned ? " (tuned)" : "");
      });

  m.def("kernels", &catalogue, "All kernels, in the order of the catalogue.");
  m.def(
      "select",
      [](int64_t rows, int n, int k, int taps, int bits, int arch, int sm_count, bool floating,
         bool geglu, bool quantizes) -> py::object {
        Choice choice = select(problem(rows, n, k, taps, bits, floating, geglu, quantizes), arch, sm_count);
        return choice.kernel < 0 ? py::none() : py::cast(choice);
      },
      "The kernel for [m, k] times [n, k]; k is the whole reduction, taps * channels. `floating`: for weight-only layers, "
      "where it is None if torch's own operators multiply. `geglu`: with GEGLU and quantization at the end, "
      "`quantizes`: with quantization at the beginning; None if those are a kernel of their own.",
      py::arg("m"), py::arg("n"), py::arg("k"), py::arg("taps") = 1, py::arg("bits") = 8, py::arg("arch") = 90,
      py::arg("sm_count") = 132, py::arg("floating") = false, py::arg("geglu") = false, py::arg("quantizes") = false);
  m.def(
      "why_not",
      [](const std::string& kernel, int64_t rows, int n, int k, int taps, int bits, int arch, bool floating, bool geglu,
         bool quantizes) {
        return why_not(named(kernel), problem(rows, n, k, taps, bits, floating, geglu, quantizes), arch);
      },
      "Why a kernel cannot do that problem, or an empty string.", py::arg("kernel"), py::arg("m"), py::arg("n"),
      py::arg("k"), py::arg("taps") = 1, py::arg("bits") = 8, py::arg("arch") = 90, py::arg("floating") = false,
      py::arg("geglu") = false, py::arg("quantizes") = false);
  m.def("tuning_table", &tuning_table, "The measured shapes.");
  m.def(
      "nearest",
      [](const std::vector<Tuned>& table, int64_t rows, int n, int k, int taps, int bits, int arch) {
        const Tuned* row = nearest(table, problem(rows, n, k, taps, bits), arch);
        return row ? py::cast(*row) : py::none();
      },
      "The row of a tuning table that holds for that problem, or None.", py::arg("table"), py::arg("m"), py::arg("n"),
      py::arg("k"), py::arg("taps") = 1, py::arg("bits") = 8, py::arg("arch") = 90);
  m.def("facts", &facts, "What the kernels were built for and with.");
}

}  // namespace mixdq
