// The two layouts of a bundle's graphs on ONNX Runtime.
#pragma once

#include <memory>
#include <string>

#include "bundle.h"
#include "ort/library.h"
#include "session.h"

namespace gircse::core {

// Loads the graph of one precision in one layout. Throws Error where it does not load, or belongs to another bundle.
std::unique_ptr<Session> open_session(const Bundle &bundle, const OnnxRuntime &runtime, const std::string &precision,
                                      const std::string &layout, const std::string &provider, int threads);

}  // namespace gircse::core
