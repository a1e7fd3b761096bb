// ONNX Runtime, found when the first bundle is opened and never linked: its symbols carry its version, so a program
// that links to one release does not start with another.
#pragma once

#include <onnxruntime_c_api.h>

#include <memory>
#include <stdexcept>
#include <string>

namespace gircse::core {

// One library per process: ONNX Runtime cannot be unloaded, nor can two of them share a process safely.
struct OnnxRuntime {
  const OrtApi *api;
  OrtEnv *env;  // lives until the process ends
  std::string path;
  std::string version;
};

// Loads the library on the first call: `path`, else $GIRCSE_ONNXRUNTIME, else what the loader finds. Throws Error where
// there is none, it is too old, or another one is loaded already.
const OnnxRuntime &load_onnxruntime(const std::string &path);

// Throws Error where the CPU provider of this release is known to run a precision wrong.
void require_version(const OnnxRuntime &runtime, const std::string &precision);

// What ONNX Runtime says of a call that failed, in its first line.
class OrtFailure : public std::runtime_error {
 public:
  OrtFailure(OrtErrorCode error_code, const std::string &reason) : std::runtime_error(reason), code(error_code) {}

  bool out_of_memory() const;

  const OrtErrorCode code;
};

// Throws OrtFailure unless a call has succeeded.
void check_status(const OrtApi &api, OrtStatus *status);

// An object of ONNX Runtime and the function that releases it.
template <class Object>
using OrtOwned = std::unique_ptr<Object, void(ORT_API_CALL *)(Object *)>;

// Calls a function of ONNX Runtime that creates an object, and owns it; throws OrtFailure.
template <class Object, class Create>
OrtOwned<Object> create_owned(const OrtApi &api, void(ORT_API_CALL *release)(Object *), Create create) {
  Object *object = nullptr;
  check_status(api, create(&object));
  return {object, release};
}

}  // namespace gircse::core
