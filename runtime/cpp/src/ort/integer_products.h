// Whether ONNX Runtime multiplies 8-bit integers exactly on this CPU; runtime/integer_products.py has the reasons.
#pragma once

#include "ort/library.h"

namespace gircse::core {

// Whether the CPU provider gives wrong products unless told otherwise; takes a few milliseconds, once a process.
bool products_saturate(const OnnxRuntime &runtime);

}  // namespace gircse::core
