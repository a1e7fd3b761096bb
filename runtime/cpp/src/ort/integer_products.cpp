#include "ort/integer_products.h"

#include <algorithm>
#include <array>
#include <cstdint>

namespace gircse::core {
namespace {

constexpr std::size_t kRows = 4, kElements = kRows * kRows;

// An ONNX model: c = MatMulInteger(a, b), a uint8 (4, 4), b int8 (4, 4) all 127; PROBE of runtime/integer_products.py.
constexpr unsigned char kProbe[] = {
    0x08, 0x08, 0x3a, 0x64, 0x0a, 0x18, 0x0a, 0x01, 0x61, 0x0a, 0x01, 0x62, 0x12, 0x01, 0x63, 0x22, 0x0d, 0x4d, 0x61,
    0x74, 0x4d, 0x75, 0x6c, 0x49, 0x6e, 0x74, 0x65, 0x67, 0x65, 0x72, 0x12, 0x01, 0x70, 0x2a, 0x1b, 0x08, 0x04, 0x08,
    0x04, 0x10, 0x03, 0x42, 0x01, 0x62, 0x4a, 0x10, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f,
    0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x5a, 0x13, 0x0a, 0x01, 0x61, 0x12, 0x0e, 0x0a, 0x0c, 0x08, 0x02, 0x12, 0x08, 0x0a,
    0x02, 0x08, 0x04, 0x0a, 0x02, 0x08, 0x04, 0x62, 0x13, 0x0a, 0x01, 0x63, 0x12, 0x0e, 0x0a, 0x0c, 0x08, 0x06, 0x12,
    0x08, 0x0a, 0x02, 0x08, 0x04, 0x0a, 0x02, 0x08, 0x04, 0x42, 0x04, 0x0a, 0x00, 0x10, 0x0d,
};

bool saturates(const OnnxRuntime &runtime) {
  const OrtApi &api = *runtime.api;
  const auto options = create_owned(api, api.ReleaseSessionOptions, api.CreateSessionOptions);
  check_status(api, api.SetIntraOpNumThreads(options.get(), 1));
  const auto session = create_owned(api, api.ReleaseSession, [&](OrtSession **created) {
    return api.CreateSessionFromArray(runtime.env, kProbe, sizeof kProbe, options.get(), created);
  });
  const auto memory = create_owned(api, api.ReleaseMemoryInfo, [&](OrtMemoryInfo **created) {
    return api.CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, created);
  });
  std::array<std::uint8_t, kElements> largest{};
  largest.fill(255);
  const std::array<std::int64_t, 2> shape = {kRows, kRows};
  const auto input = create_owned(api, api.ReleaseValue, [&](OrtValue **created) {
    return api.CreateTensorWithDataAsOrtValue(memory.get(), largest.data(), largest.size(), shape.data(), shape.size(),
                                              ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, created);
  });
  const char *input_name = "a", *output_name = "c";
  const OrtValue *given = input.get();
  const auto output = create_owned(api, api.ReleaseValue, [&](OrtValue **created) {
    return api.Run(session.get(), nullptr, &input_name, &given, 1, &output_name, 1, created);
  });
  void *data = nullptr;
  check_status(api, api.GetTensorMutableData(output.get(), &data));
  const auto *products = static_cast<const std::int32_t *>(data);
  const std::int32_t exact = kRows * 255 * 127;
  return std::any_of(products, products + kElements, [](std::int32_t product) { return product != exact; });
}

}  // namespace

bool products_saturate(const OnnxRuntime &runtime) {
  static const bool found = saturates(runtime);  // a process has one ONNX Runtime
  return found;
}

}  // namespace gircse::core
