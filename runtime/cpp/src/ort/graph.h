// One graph of a bundle, loaded in ONNX Runtime.
#pragma once

#include <cstdint>
#include <filesystem>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "batch_planner.h"
#include "ort/library.h"

namespace gircse::core {

using OrtTensor = OrtOwned<OrtValue>;

// A tensor on the host, or on the device where it was computed, and the name of the input that it is for.
struct NamedTensor {
  std::string name;
  const OrtValue *value;
};

class OrtGraph {
 public:
  // Loads a graph; `threads` of one run on the CPU, 0 for the physical cores; `integer_products`: it multiplies 8-bit
  // integers. Throws Error where the library lacks the provider, the device cannot be used, or the graph does not load.
  OrtGraph(const OnnxRuntime &runtime, const std::filesystem::path &path, const std::string &provider, int threads,
           bool integer_products);

  // The value of an entry of the graph's metadata; empty where there is none.
  std::string metadata(const char *key) const;

  // One line that names the nodes that a GPU leaves to the CPU; empty where there are none.
  std::string fallback_warning() const;

  // Element type of an input; throws Error where the graph has no such input.
  ONNXTensorElementDataType input_type(const std::string &name) const;

  // A tensor on memory of the caller, which has to outlive it.
  OrtTensor tensor(float *data, std::initializer_list<std::size_t> shape) const;
  OrtTensor tensor(std::int64_t *data, std::initializer_list<std::size_t> shape) const;

  // The same of another type, whose elements are bytes to the caller.
  OrtTensor tensor(ONNXTensorElementDataType type, std::vector<unsigned char> &bytes,
                   std::initializer_list<std::size_t> shape) const;

  // A tensor of no elements.
  OrtTensor empty_tensor(ONNXTensorElementDataType type, std::initializer_list<std::size_t> shape) const;

  // Runs the graph; the batch is for the error of a run that fails. The outputs stay on the device, but for the first.
  std::vector<OrtTensor> run(const std::vector<NamedTensor> &inputs, const std::vector<std::string> &outputs,
                             const TokenBatch &batch) const;

  // A copy of the bytes of a tensor on the host, which has to have that type and shape; throws Error where it has not.
  std::vector<unsigned char> bytes(const OrtTensor &tensor, ONNXTensorElementDataType type,
                                   std::initializer_list<std::size_t> shape) const;

  // The elements of a float32 tensor on the host, which has to have that shape; throws Error where it has not.
  const float *floats(const OrtTensor &tensor, std::initializer_list<std::size_t> shape) const;

 private:
  const OrtApi &api() const { return *runtime_->api; }
  OrtAllocator *allocator() const;

  // A text that ONNX Runtime has allocated, which is freed; empty where it is null.
  std::string taken(char *text) const;
  std::vector<OrtTensor> run_on_host(const std::vector<NamedTensor> &inputs,
                                     const std::vector<std::string> &outputs) const;
  std::vector<OrtTensor> run_on_device(const std::vector<NamedTensor> &inputs,
                                       const std::vector<std::string> &outputs) const;
  void *checked_data(const OrtTensor &tensor, ONNXTensorElementDataType type,
                     std::initializer_list<std::size_t> shape) const;
  OrtTensor host_tensor(void *data, std::size_t bytes, const std::vector<std::int64_t> &shape,
                        ONNXTensorElementDataType type) const;

  const OnnxRuntime *runtime_;
  std::filesystem::path path_;
  OrtOwned<OrtMemoryInfo> host_memory_;
  OrtOwned<OrtMemoryInfo> device_memory_;  // null on the CPU
  OrtOwned<OrtSession> session_;
};

}  // namespace gircse::core
