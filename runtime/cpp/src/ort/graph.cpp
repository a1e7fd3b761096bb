#include "ort/graph.h"

#include <algorithm>

#include "error.h"
#include "manifest.h"
#include "ort/placement.h"
#include "ort/providers.h"
#include "precision.h"

namespace gircse::core {
namespace {

// Of the metadata that lists the nodes that compute sizes.
constexpr const char *kSizeNodesKey = "gircse.size_nodes";

std::vector<std::int64_t> signed_shape(std::initializer_list<std::size_t> shape) {
  return {shape.begin(), shape.end()};
}

std::size_t elements(std::initializer_list<std::size_t> shape) {
  std::size_t product = 1;
  for (const std::size_t dimension : shape) product *= dimension;
  return product;
}

// Bytes of an element of a KV cache.
std::size_t size_of(ONNXTensorElementDataType type) { return type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT ? 4 : 2; }

Error load_error(const OrtFailure &err, const std::string &path, const std::string &provider) {
  if (err.out_of_memory()) return {GIRCSE_ERROR_MEMORY, path, std::string("cannot be loaded: ") + err.what()};
  if (err.code == ORT_NOT_IMPLEMENTED) {
    return {GIRCSE_ERROR_PROVIDER, "provider " + provider, "cannot run " + path + ": " + err.what(),
            "the CPU has kernels for " + listed(cpu_order()), "Choose another precision or provider."};
  }
  return {GIRCSE_ERROR_BUNDLE, path, std::string("cannot be loaded by ONNX Runtime: ") + err.what(), std::nullopt,
          "Export again."};
}

}  // namespace

OrtGraph::OrtGraph(const OnnxRuntime &runtime, const std::filesystem::path &path, const std::string &provider,
                   int threads, bool integer_products)
    : runtime_(&runtime),
      path_(path),
      host_memory_(nullptr, api().ReleaseMemoryInfo),
      device_memory_(nullptr, api().ReleaseMemoryInfo),
      session_(nullptr, api().ReleaseSession) {
  const auto options = session_options(runtime, provider, threads, integer_products);
  try {
    host_memory_ = create_owned(api(), api().ReleaseMemoryInfo, [&](OrtMemoryInfo **info) {
      return api().CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, info);
    });
    if (provider != "cpu") {
      device_memory_ = create_owned(api(), api().ReleaseMemoryInfo, [&](OrtMemoryInfo **info) {
        return api().CreateMemoryInfo("Cuda", OrtArenaAllocator, 0, OrtMemTypeDefault, info);
      });
    }
    session_ = create_owned(api(), api().ReleaseSession, [&](OrtSession **session) {
      return api().CreateSession(runtime.env, path.c_str(), options.get(), session);
    });
  } catch (const OrtFailure &err) {
    throw load_error(err, path.string(), provider);
  }
}

std::string OrtGraph::metadata(const char *key) const {
  const auto entries = create_owned(api(), api().ReleaseModelMetadata, [&](OrtModelMetadata **found) {
    return api().SessionGetModelMetadata(session_.get(), found);
  });
  char *value = nullptr;
  check_status(api(), api().ModelMetadataLookupCustomMetadataMap(entries.get(), allocator(), key, &value));
  return taken(value);
}

std::string OrtGraph::fallback_warning() const {
  if (!device_memory_) return {};
  try {
    return core::fallback_warning(path_.string(), nodes_on_cpu(api(), session_.get()), metadata(kSizeNodesKey));
  } catch (const OrtFailure &err) {  // no reason not to run
    return path_.string() + ": ONNX Runtime does not say where its nodes run: " + err.what();
  }
}

ONNXTensorElementDataType OrtGraph::input_type(const std::string &name) const {
  std::size_t count = 0;
  check_status(api(), api().SessionGetInputCount(session_.get(), &count));
  for (std::size_t i = 0; i < count; ++i) {
    char *found = nullptr;
    check_status(api(), api().SessionGetInputName(session_.get(), i, allocator(), &found));
    if (taken(found) != name) continue;
    const auto info = create_owned(api(), api().ReleaseTypeInfo, [&](OrtTypeInfo **type) {
      return api().SessionGetInputTypeInfo(session_.get(), i, type);
    });
    const OrtTensorTypeAndShapeInfo *tensor = nullptr;
    ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    check_status(api(), api().CastTypeInfoToTensorInfo(info.get(), &tensor));
    check_status(api(), api().GetTensorElementType(tensor, &type));
    return type;
  }
  throw Error(GIRCSE_ERROR_BUNDLE, path_.string(), "has no input " + name, std::nullopt, "Export the bundle again.");
}

OrtAllocator *OrtGraph::allocator() const {
  OrtAllocator *found = nullptr;  // one for the whole process, which nobody frees
  check_status(api(), api().GetAllocatorWithDefaultOptions(&found));
  return found;
}

std::string OrtGraph::taken(char *text) const {
  if (text == nullptr) return {};
  const std::string copy = text;
  check_status(api(), api().AllocatorFree(allocator(), text));
  return copy;
}

OrtTensor OrtGraph::tensor(float *data, std::initializer_list<std::size_t> shape) const {
  return host_tensor(data, elements(shape) * sizeof *data, signed_shape(shape), ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
}

OrtTensor OrtGraph::tensor(std::int64_t *data, std::initializer_list<std::size_t> shape) const {
  return host_tensor(data, elements(shape) * sizeof *data, signed_shape(shape), ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);
}

OrtTensor OrtGraph::tensor(ONNXTensorElementDataType type, std::vector<unsigned char> &bytes,
                           std::initializer_list<std::size_t> shape) const {
  return host_tensor(bytes.data(), bytes.size(), signed_shape(shape), type);
}

OrtTensor OrtGraph::empty_tensor(ONNXTensorElementDataType type, std::initializer_list<std::size_t> shape) const {
  return host_tensor(nullptr, 0, signed_shape(shape), type);
}

OrtTensor OrtGraph::host_tensor(void *data, std::size_t bytes, const std::vector<std::int64_t> &shape,
                                ONNXTensorElementDataType type) const {
  static std::int64_t nothing = 0;  // a tensor of no elements needs an address too
  return create_owned(api(), api().ReleaseValue, [&](OrtValue **value) {
    return api().CreateTensorWithDataAsOrtValue(host_memory_.get(), bytes > 0 ? data : &nothing, bytes, shape.data(),
                                                shape.size(), type, value);
  });
}

std::vector<OrtTensor> OrtGraph::run(const std::vector<NamedTensor> &inputs, const std::vector<std::string> &outputs,
                                     const TokenBatch &batch) const {
  try {
    return device_memory_ ? run_on_device(inputs, outputs) : run_on_host(inputs, outputs);
  } catch (const OrtFailure &err) {
    throw Error(err.out_of_memory() ? GIRCSE_ERROR_MEMORY : GIRCSE_ERROR_PROVIDER, "ONNX Runtime",
                "failed in a batch of " + std::to_string(batch.size()) + " texts of " + std::to_string(batch.tokens) +
                    " tokens: " + err.what(),
                std::nullopt, "If memory ran out, use smaller batches (batch_size, batch_tokens).");
  }
}

std::vector<OrtTensor> OrtGraph::run_on_host(const std::vector<NamedTensor> &inputs,
                                             const std::vector<std::string> &outputs) const {
  std::vector<const char *> input_names, output_names;
  std::vector<const OrtValue *> values;
  for (const NamedTensor &input : inputs) {
    input_names.push_back(input.name.c_str());
    values.push_back(input.value);
  }
  for (const std::string &output : outputs) output_names.push_back(output.c_str());
  std::vector<OrtValue *> results(outputs.size(), nullptr);
  OrtStatus *status = api().Run(session_.get(), nullptr, input_names.data(), values.data(), values.size(),
                                output_names.data(), output_names.size(), results.data());
  std::vector<OrtTensor> owned;
  for (OrtValue *result : results) owned.emplace_back(result, api().ReleaseValue);
  check_status(api(), status);
  return owned;
}

std::vector<OrtTensor> OrtGraph::run_on_device(const std::vector<NamedTensor> &inputs,
                                               const std::vector<std::string> &outputs) const {
  const auto binding = create_owned(api(), api().ReleaseIoBinding, [&](OrtIoBinding **created) {
    return api().CreateIoBinding(session_.get(), created);
  });
  for (const NamedTensor &input : inputs) {
    check_status(api(), api().BindInput(binding.get(), input.name.c_str(), input.value));
  }
  const OrtMemoryInfo *place = host_memory_.get();  // of the first output
  for (const std::string &output : outputs) {
    check_status(api(), api().BindOutputToDevice(binding.get(), output.c_str(), place));
    place = device_memory_.get();
  }
  check_status(api(), api().RunWithBinding(session_.get(), nullptr, binding.get()));
  check_status(api(), api().SynchronizeBoundOutputs(binding.get()));
  OrtValue **results = nullptr;
  std::size_t count = 0;
  check_status(api(), api().GetBoundOutputValues(binding.get(), allocator(), &results, &count));
  std::vector<OrtTensor> owned;
  for (std::size_t i = 0; i < count; ++i) owned.emplace_back(results[i], api().ReleaseValue);
  if (results != nullptr) check_status(api(), api().AllocatorFree(allocator(), results));
  return owned;
}

const float *OrtGraph::floats(const OrtTensor &tensor, std::initializer_list<std::size_t> shape) const {
  return static_cast<const float *>(checked_data(tensor, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, shape));
}

std::vector<unsigned char> OrtGraph::bytes(const OrtTensor &tensor, ONNXTensorElementDataType type,
                                           std::initializer_list<std::size_t> shape) const {
  const auto *data = static_cast<const unsigned char *>(checked_data(tensor, type, shape));
  return {data, data + elements(shape) * size_of(type)};
}

void *OrtGraph::checked_data(const OrtTensor &tensor, ONNXTensorElementDataType wanted,
                             std::initializer_list<std::size_t> shape) const {
  const auto info = create_owned(api(), api().ReleaseTensorTypeAndShapeInfo, [&](OrtTensorTypeAndShapeInfo **found) {
    return api().GetTensorTypeAndShape(tensor.get(), found);
  });
  std::size_t dimensions = 0;
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  check_status(api(), api().GetDimensionsCount(info.get(), &dimensions));
  check_status(api(), api().GetTensorElementType(info.get(), &type));
  std::vector<std::int64_t> found(dimensions);
  check_status(api(), api().GetDimensions(info.get(), found.data(), dimensions));
  if (type != wanted || found != signed_shape(shape)) {
    throw Error(GIRCSE_ERROR_BUNDLE, path_.string(), "gives tensors of another type or shape than its manifest says",
                std::nullopt, "Export the bundle again.");
  }
  void *data = nullptr;
  check_status(api(), api().GetTensorMutableData(tensor.get(), &data));
  return data;
}

}  // namespace gircse::core
