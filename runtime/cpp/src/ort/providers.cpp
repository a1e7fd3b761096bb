#include "ort/providers.h"

#include <array>
#include <set>

#include "error.h"
#include "manifest.h"
#include "ort/integer_products.h"
#include "ort/placement.h"

namespace gircse::core {
namespace {

constexpr const char *kTensorrt = "onnxruntime-tensorrt";

std::set<std::string> available_providers(const OrtApi &api) {
  char **names = nullptr;
  int count = 0;
  check_status(api, api.GetAvailableProviders(&names, &count));
  const std::set<std::string> found(names, names + count);
  check_status(api, api.ReleaseAvailableProviders(names, count));
  return found;
}

void append_tensorrt(const OrtApi &api, OrtSessionOptions *options) {
  const auto tensorrt = create_owned(api, api.ReleaseTensorRTProviderOptions, api.CreateTensorRTProviderOptions);
  check_status(api, api.SessionOptionsAppendExecutionProvider_TensorRT_V2(options, tensorrt.get()));
}

// By default the CUDA provider computes FP32 products in TF32, whose vectors are not those of FP32.
void append_cuda(const OrtApi &api, OrtSessionOptions *options) {
  const auto cuda = create_owned(api, api.ReleaseCUDAProviderOptions, api.CreateCUDAProviderOptions);
  const std::array<const char *, 1> keys = {"use_tf32"}, values = {"0"};
  check_status(api, api.UpdateCUDAProviderOptions(cuda.get(), keys.data(), values.data(), keys.size()));
  check_status(api, api.SessionOptionsAppendExecutionProvider_CUDA_V2(options, cuda.get()));
}

// The providers in the order of preference; the later ones take what the first does not run.
void append_providers(const OnnxRuntime &runtime, OrtSessionOptions *options, const std::string &provider) {
  if (provider == "cpu") return;
  const bool tensorrt = provider == kTensorrt;
  try {
    if (tensorrt) append_tensorrt(*runtime.api, options);
    append_cuda(*runtime.api, options);
  } catch (const OrtFailure &err) {
    throw Error(GIRCSE_ERROR_PROVIDER, "provider " + provider, std::string("did not start: ") + err.what(),
                "ONNX Runtime " + runtime.version + " needs a GPU with its driver and " +
                    (tensorrt ? "CUDA, cuDNN and TensorRT" : "CUDA and cuDNN"),
                "Fix the installation, or choose another provider.");
  }
}

}  // namespace

void require_provider(const OnnxRuntime &runtime, const std::string &provider) {
  if (provider == "cpu") return;
  const char *wanted = provider == kTensorrt ? "TensorrtExecutionProvider" : "CUDAExecutionProvider";
  const std::set<std::string> available = available_providers(*runtime.api);
  if (available.count(wanted) > 0) return;
  throw Error(GIRCSE_ERROR_PROVIDER, "provider " + provider, std::string("needs ") + wanted,
              runtime.path + " has " + listed(available),
              "Name ONNX Runtime's GPU build in GIRCSE_ONNXRUNTIME or in the option onnxruntime.");
}

OrtOwned<OrtSessionOptions> session_options(const OnnxRuntime &runtime, const std::string &provider, int threads,
                                            bool integer_products) {
  const OrtApi &api = *runtime.api;
  auto options = create_owned(api, api.ReleaseSessionOptions, api.CreateSessionOptions);
  if (!integer_products) {
    // Integers that are only stored become FP32 once; by default each product would convert its weights in every pass.
    check_status(api, api.AddSessionConfigEntry(options.get(), "session.disable_quant_qdq", "1"));
  } else if (provider == "cpu" && products_saturate(runtime)) {
    check_status(api, api.AddSessionConfigEntry(options.get(), "session.x64quantprecision", "1"));
  }
  // By default a weight above 1 GiB in FP32, the vocabulary of a 7B, is converted in every pass and not once.
  const char *fold_any_size = "optimization.constant_folding_max_output_size_in_bytes";
  check_status(api, api.AddSessionConfigEntry(options.get(), fold_any_size, "1099511627776"));
  if (provider != "cpu") check_status(api, api.AddSessionConfigEntry(options.get(), kRecordPlacement, "1"));
  if (threads > 0) check_status(api, api.SetIntraOpNumThreads(options.get(), threads));
  append_providers(runtime, options.get(), provider);
  return options;
}

}  // namespace gircse::core
