#include "safetensors.h"

#include <cstring>
#include <stdexcept>

#include "json_record.h"

namespace gircse::core {
namespace {

constexpr std::size_t kLargestHeader = 100'000'000;  // as in the safetensors library
constexpr std::size_t kLargestDimension = std::size_t{1} << 30;

std::size_t read_header_size(const std::string &content) {
  if (content.size() < 8) throw std::runtime_error("the header is too small");
  std::uint64_t size = 0;
  for (std::size_t i = 8; i-- > 0;) size = (size << 8) | static_cast<unsigned char>(content[i]);
  if (size > kLargestHeader) throw std::runtime_error("the header is too large");
  if (size > content.size() - 8) throw std::runtime_error("the header is longer than the file");
  return static_cast<std::size_t>(size);
}

void check_tensor(JsonRecord tensor, std::size_t data_size) {
  const std::string dtype = tensor.text("dtype");
  std::size_t elements = 1;
  for (const std::int64_t dimension : tensor.integers("shape")) {
    if (dimension < 0 || static_cast<std::size_t>(dimension) > kLargestDimension ||
        (elements *= static_cast<std::size_t>(dimension)) > kLargestDimension) {
      throw std::runtime_error("a tensor has an impossible shape");
    }
  }
  const std::vector<std::int64_t> offsets = tensor.integers("data_offsets");
  tensor.finish();
  if (offsets.size() != 2 || offsets[0] < 0 || offsets[0] > offsets[1] ||
      static_cast<std::size_t>(offsets[1]) > data_size) {
    throw std::runtime_error("a tensor lies outside the file");
  }
  if (dtype == "F32" && static_cast<std::size_t>(offsets[1] - offsets[0]) != elements * sizeof(float)) {
    throw std::runtime_error("a tensor has another size than its shape");
  }
}

}  // namespace

Safetensors::Safetensors(std::string content) : content_(std::move(content)) {
  const std::size_t header_size = read_header_size(content_);
  data_start_ = 8 + header_size;
  header_ = parse_json(std::string_view(content_).substr(8, header_size));
  if (!header_.is_object()) refuse_type(header_, "object", "$");
  for (const auto &item : header_.items()) {
    if (item.key() != "__metadata__") check_tensor({item.value(), item.key()}, content_.size() - data_start_);
  }
}

std::vector<float> Safetensors::floats(const std::string &name) const {
  const std::vector<std::size_t> offsets = header_.at(name).at("data_offsets");
  std::vector<float> values((offsets[1] - offsets[0]) / sizeof(float));
  if (!values.empty()) std::memcpy(values.data(), content_.data() + data_start_ + offsets[0], offsets[1] - offsets[0]);
  return values;
}

}  // namespace gircse::core
