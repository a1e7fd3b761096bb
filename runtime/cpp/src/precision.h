// What the runtime knows of each precision: the table of gircse.runtime.precision.
#pragma once

#include <array>
#include <string>
#include <string_view>
#include <vector>

namespace gircse::core {

using OnnxRuntimeVersion = std::array<int, 3>;

struct PrecisionSpec {
  std::string_view name;
  bool calibrated;        // made from a calibration: has the stepwise graph alone
  bool cpu;               // ONNX Runtime's CPU provider has kernels for it
  bool cuda;              // ONNX Runtime's GPU providers run its graphs
  bool integer_products;  // its graphs multiply 8-bit integers
  double self_test_min_cosine;
  OnnxRuntimeVersion onnxruntime;  // oldest release whose CPU provider gives the right vectors
};

// The row of a precision; null where this version does not know it.
const PrecisionSpec *find_precision(std::string_view precision);

// The same; throws Error where this version does not know it.
const PrecisionSpec &precision_spec(std::string_view precision);

// Which variant is taken when none is named, the best first: of those that the CPU runs, and on a GPU.
std::vector<std::string> cpu_order();
std::vector<std::string> gpu_order();

// Oldest release of ONNX Runtime that runs any precision.
OnnxRuntimeVersion oldest_onnxruntime();

}  // namespace gircse::core
