#include "precision.h"

#include <array>

#include "error.h"

namespace gircse::core {
namespace {

constexpr std::array<PrecisionSpec, 5> kSpecs = {{
    {"fp32", false, true, true, 0.9999},
    {"fp16", false, true, true, 0.999},
    {"bf16", false, false, true, 0.999},
    {"int8", true, true, false, 0.97},
    {"int8-weights", true, true, false, 0.995},
}};

}  // namespace

const PrecisionSpec &precision_spec(std::string_view precision) {
  for (const PrecisionSpec &spec : kSpecs) {
    if (spec.name == precision) return spec;
  }
  throw Error(GIRCSE_ERROR_BUNDLE, "precision " + in_quotes(precision), "is not one that this libgircse knows",
              "it knows fp32, fp16, bf16, int8, int8-weights", "Upgrade libgircse.");
}

std::vector<std::string> cpu_order() {
  std::vector<std::string> names;
  for (const PrecisionSpec &spec : kSpecs) {
    if (spec.cpu) names.emplace_back(spec.name);
  }
  return names;
}

std::vector<std::string> gpu_order() { return {"fp16", "bf16", "fp32", "int8", "int8-weights"}; }

}  // namespace gircse::core
