#include "safetensors.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <stdexcept>
#include <utility>

#include "json_record.h"

namespace gircse::core {
namespace {

constexpr const char *kMetadata = "__metadata__";
constexpr std::size_t kLargestHeader = 100'000'000;         // as in the safetensors library
constexpr std::size_t kLargestSize = std::size_t{1} << 31;  // the product of two cannot overflow

const std::map<std::size_t, std::vector<std::string>> kElementSizes = {
    {1, {"BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"}},
    {2, {"U16", "I16", "F16", "BF16"}},
    {4, {"U32", "I32", "F32"}},
    {8, {"U64", "I64", "F64", "C64"}},
};

std::size_t read_header_size(const std::string &content) {
  if (content.size() < 8) throw std::runtime_error("the header is too small");
  std::uint64_t size = 0;
  for (std::size_t i = 8; i-- > 0;) size = (size << 8) | static_cast<unsigned char>(content[i]);
  if (size > kLargestHeader) throw std::runtime_error("the header is too large");
  if (size > content.size() - 8) throw std::runtime_error("the header is longer than the file");
  return static_cast<std::size_t>(size);
}

std::size_t element_size(const std::string &dtype) {
  for (const auto &[size, names] : kElementSizes) {
    if (std::find(names.begin(), names.end(), dtype) != names.end()) return size;
  }
  throw std::runtime_error("a tensor has the unknown type " + dtype);
}

// Begin and end of a tensor, whose size is checked.
std::pair<std::size_t, std::size_t> read_range(JsonRecord tensor) {
  std::size_t size = element_size(tensor.text("dtype"));
  for (const std::int64_t dimension : tensor.integers("shape")) {
    if (dimension < 0 || static_cast<std::size_t>(dimension) > kLargestSize ||
        (size *= static_cast<std::size_t>(dimension)) > kLargestSize) {
      throw std::runtime_error("a tensor has an impossible shape");
    }
  }
  const std::vector<std::int64_t> offsets = tensor.integers("data_offsets");
  if (offsets.size() != 2 || offsets[0] < 0 || offsets[1] < offsets[0]) {
    throw std::runtime_error("a tensor has impossible offsets");
  }
  const auto begin = static_cast<std::size_t>(offsets[0]), end = static_cast<std::size_t>(offsets[1]);
  if (end - begin != size) throw std::runtime_error("a tensor has another size than its shape");
  return {begin, end};
}

// The tensors have to follow each other without gaps and fill the file.
void check_ranges(std::vector<std::pair<std::size_t, std::size_t>> ranges, std::size_t data_size) {
  std::sort(ranges.begin(), ranges.end());
  std::size_t filled = 0;
  for (const auto &[begin, end] : ranges) {
    if (begin != filled) throw std::runtime_error("the tensors overlap or leave a gap");
    filled = end;
  }
  if (filled != data_size) throw std::runtime_error("the tensors do not fill the file");
}

}  // namespace

Safetensors::Safetensors(std::string content) : content_(std::move(content)) {
  const std::size_t header_size = read_header_size(content_);
  data_start_ = 8 + header_size;
  header_ = parse_json(std::string_view(content_).substr(8, header_size));
  if (!header_.is_object()) refuse_type(header_, "object", "$");
  std::vector<std::pair<std::size_t, std::size_t>> ranges;
  for (const auto &item : header_.items()) {
    if (item.key() == kMetadata) {
      JsonRecord(header_, "$").named_texts(kMetadata);
    } else {
      ranges.push_back(read_range({item.value(), item.key()}));
    }
  }
  check_ranges(std::move(ranges), content_.size() - data_start_);
}

std::vector<float> Safetensors::floats(const std::string &name) const {
  const std::vector<std::size_t> offsets = header_.at(name).at("data_offsets");
  std::vector<float> values((offsets[1] - offsets[0]) / sizeof(float));
  if (!values.empty()) std::memcpy(values.data(), content_.data() + data_start_ + offsets[0], offsets[1] - offsets[0]);
  return values;
}

}  // namespace gircse::core
