#include "precision.h"

#include <algorithm>
#include <array>

#include "error.h"

namespace gircse::core {
namespace {

constexpr std::array<PrecisionSpec, 7> kSpecs = {{
    {"fp32", false, true, true, false, 0.9999, {1, 24, 4}},
    {"fp16", false, true, true, false, 0.999, {1, 30, 0}},
    {"bf16", false, false, true, false, 0.999, {1, 24, 4}},
    {"int8", true, true, false, true, 0.97, {1, 32, 0}},
    {"int8-weights", true, true, false, false, 0.995, {1, 32, 0}},
    {"int4-weights", true, true, false, false, 0.9, {1, 32, 0}},
    {"fp8", true, true, false, false, 0.985, {1, 32, 0}},
}};

}  // namespace

const PrecisionSpec *find_precision(std::string_view precision) {
  const auto *found =
      std::find_if(kSpecs.begin(), kSpecs.end(), [&](const auto &spec) { return spec.name == precision; });
  return found == kSpecs.end() ? nullptr : found;
}

const PrecisionSpec &precision_spec(std::string_view precision) {
  if (const PrecisionSpec *spec = find_precision(precision)) return *spec;
  throw Error(GIRCSE_ERROR_BUNDLE, "precision " + in_quotes(precision), "is not one that this libgircse knows",
              "it knows fp32, fp16, bf16, int8, int8-weights, int4-weights, fp8", "Upgrade libgircse.");
}

std::vector<std::string> cpu_order() {
  std::vector<std::string> names;
  for (const PrecisionSpec &spec : kSpecs) {
    if (spec.cpu) names.emplace_back(spec.name);
  }
  return names;
}

std::vector<std::string> gpu_order() { return {"fp16", "bf16", "fp32", "int8", "fp8", "int8-weights", "int4-weights"}; }

OnnxRuntimeVersion oldest_onnxruntime() {
  const auto older = [](const auto &a, const auto &b) { return a.onnxruntime < b.onnxruntime; };
  return std::min_element(kSpecs.begin(), kSpecs.end(), older)->onnxruntime;
}

}  // namespace gircse::core
