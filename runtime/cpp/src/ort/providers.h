// What each provider asks of ONNX Runtime.
#pragma once

#include <string>

#include "ort/library.h"

namespace gircse::core {

// Throws Error where the library was built without a provider.
void require_provider(const OnnxRuntime &runtime, const std::string &provider);

// Options of a session on a provider: "cpu", "cuda" or "onnxruntime-tensorrt". With integer_products, the graph
// multiplies 8-bit integers. Throws Error where it cannot start.
OrtOwned<OrtSessionOptions> session_options(const OnnxRuntime &runtime, const std::string &provider, int threads,
                                            bool integer_products);

}  // namespace gircse::core
