// What each provider asks of ONNX Runtime.
#pragma once

#include <string>

#include "ort/library.h"

namespace gircse::core {

// Options of a session on a provider: "cpu", "cuda" or "onnxruntime-tensorrt". Throws Error where the library was built
// without it, or it cannot start.
OrtOwned<OrtSessionOptions> session_options(const OnnxRuntime &runtime, const std::string &provider, int threads);

}  // namespace gircse::core
