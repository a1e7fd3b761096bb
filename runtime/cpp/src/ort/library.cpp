#include "ort/library.h"

#include <dlfcn.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <mutex>
#include <optional>
#include <vector>

#include "error.h"
#include "precision.h"

namespace gircse::core {
namespace {

// Of the C interface, which newer libraries keep; a newer header is no reason to ask for more. The header may be older:
// see ort/placement.cpp for what it lacks.
constexpr std::uint32_t kApiVersion = 24;

#if defined(__APPLE__)
constexpr std::array<const char *, 2> kUsualNames = {"libonnxruntime.1.dylib", "libonnxruntime.dylib"};
#else
constexpr std::array<const char *, 2> kUsualNames = {"libonnxruntime.so.1", "libonnxruntime.so"};
#endif

constexpr const char *kHowToFind =
    "Install ONNX Runtime and name its library in GIRCSE_ONNXRUNTIME or in the option onnxruntime.";

using GetApiBase = const OrtApiBase *(ORT_API_CALL *)();

std::string shown(const OnnxRuntimeVersion &version) {
  return std::to_string(version[0]) + "." + std::to_string(version[1]) + "." + std::to_string(version[2]);
}

Error refusal(std::string_view where, std::string_view got) {
  return {GIRCSE_ERROR_PROVIDER, where, got, "version " + shown(oldest_onnxruntime()) + " or later is needed",
          kHowToFind};
}

std::vector<std::string> candidates(const std::string &path) {
  if (!path.empty()) return {path};
  const char *named = std::getenv("GIRCSE_ONNXRUNTIME");
  if (named != nullptr && *named != '\0') return {named};
  return {kUsualNames.begin(), kUsualNames.end()};
}

void *open_library(const std::string &path) {
  std::string reasons;
  for (const std::string &candidate : candidates(path)) {
    if (void *library = dlopen(candidate.c_str(), RTLD_NOW | RTLD_LOCAL)) return library;
    const char *reason = dlerror();
    reasons += (reasons.empty() ? "" : "; ") + std::string(reason != nullptr ? reason : candidate);
  }
  throw refusal("ONNX Runtime", "cannot be loaded: " + reasons);
}

bool at_least(const std::string &version, const OnnxRuntimeVersion &oldest) {
  OnnxRuntimeVersion found = {0, 0, 0};
  std::sscanf(version.c_str(), "%d.%d.%d", &found[0], &found[1], &found[2]);
  return found >= oldest;
}

std::string file_of(const void *symbol, const std::string &otherwise) {
  Dl_info info{};
  return dladdr(symbol, &info) != 0 && info.dli_fname != nullptr ? info.dli_fname : otherwise;
}

void ORT_API_CALL discard(void *, OrtLoggingLevel, const char *, const char *, const char *, const char *) {}

OnnxRuntime load(const std::string &path) {
  void *library = open_library(path);
  void *symbol = dlsym(library, "OrtGetApiBase");
  if (symbol == nullptr) throw refusal(candidates(path).front(), "is not ONNX Runtime: it has no OrtGetApiBase");
  const OrtApiBase *base = reinterpret_cast<GetApiBase>(symbol)();
  if (base == nullptr) throw refusal(candidates(path).front(), "is not ONNX Runtime: its OrtGetApiBase gives nothing");
  OnnxRuntime runtime{nullptr, nullptr, file_of(symbol, path), base->GetVersionString()};
  if (at_least(runtime.version, oldest_onnxruntime())) runtime.api = base->GetApi(kApiVersion);
  if (runtime.api == nullptr) throw refusal(runtime.path, "is ONNX Runtime " + runtime.version);
  try {
    // A library has no business with stdout and stderr; errors come back as status.
    check_status(*runtime.api, runtime.api->CreateEnvWithCustomLogger(discard, nullptr, ORT_LOGGING_LEVEL_FATAL,
                                                                      "gircse", &runtime.env));
  } catch (const OrtFailure &err) {
    throw Error(GIRCSE_ERROR_PROVIDER, runtime.path, std::string("cannot start: ") + err.what());
  }
  return runtime;
}

bool same_file(const std::string &a, const std::string &b) {
  std::error_code failed;
  return std::filesystem::equivalent(a, b, failed) && !failed;
}

}  // namespace

const OnnxRuntime &load_onnxruntime(const std::string &path) {
  static std::mutex mutex;
  static OnnxRuntime *loaded = nullptr;  // never freed: sessions may outlive static objects
  const std::lock_guard<std::mutex> lock(mutex);
  if (loaded == nullptr) loaded = new OnnxRuntime(load(path));
  if (!path.empty() && !same_file(path, loaded->path)) {
    throw Error(GIRCSE_ERROR_PROVIDER, path, "cannot be loaded: this process has " + loaded->path + " already",
                "ONNX Runtime cannot be loaded twice", "Name the same library every time.");
  }
  return *loaded;
}

void require_version(const OnnxRuntime &runtime, const std::string &precision) {
  const PrecisionSpec *spec = find_precision(precision);
  if (spec == nullptr || at_least(runtime.version, spec->onnxruntime)) return;
  throw Error(GIRCSE_ERROR_PROVIDER, runtime.path,
              "is ONNX Runtime " + runtime.version + ", which cannot run " + precision,
              "version " + shown(spec->onnxruntime) + " or later is needed for it",
              "Name a newer one in GIRCSE_ONNXRUNTIME or in the option onnxruntime, or choose another precision.");
}

bool OrtFailure::out_of_memory() const {
  const std::string reason = what();
  for (const char *sign : {"bad_alloc", "allocate memory", "out of memory", "Failed to allocate"}) {
    if (reason.find(sign) != reason.npos) return true;
  }
  return false;
}

void check_status(const OrtApi &api, OrtStatus *status) {
  if (status == nullptr) return;
  const OrtOwned<OrtStatus> owned(status, api.ReleaseStatus);
  const std::string message = api.GetErrorMessage(status);
  const std::size_t start = message.find_first_not_of(" \t\r\n");
  throw OrtFailure(api.GetErrorCode(status),
                   start == message.npos ? "unknown error" : message.substr(start, message.find('\n', start) - start));
}

}  // namespace gircse::core
