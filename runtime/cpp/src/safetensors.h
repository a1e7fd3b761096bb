// Float32 tensors of a safetensors file, read strictly.
#pragma once

#include <cstddef>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace gircse::core {

class Safetensors {
 public:
  // Takes the content of a file; throws std::runtime_error where its header or its ranges are damaged.
  explicit Safetensors(std::string content);

  bool has(const std::string &name) const { return header_.contains(name) && name != "__metadata__"; }

  // Type and shape of a tensor that the file has.
  std::string dtype(const std::string &name) const { return header_.at(name).at("dtype"); }
  std::vector<std::size_t> shape(const std::string &name) const { return header_.at(name).at("shape"); }

  // The elements of a tensor of type F32.
  std::vector<float> floats(const std::string &name) const;

 private:
  std::string content_;
  nlohmann::json header_;
  std::size_t data_start_ = 0;
};

}  // namespace gircse::core
