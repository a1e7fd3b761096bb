#include "safetensors.h"

#include <doctest/doctest.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

using gircse::core::Safetensors;

static std::string file(const std::string &header, const std::string &data, std::uint64_t size) {
  std::string content(8, '\0');
  for (int i = 0; i < 8; ++i) content[static_cast<std::size_t>(i)] = static_cast<char>(size >> (8 * i));
  return content + header + data;
}

static std::string file(const std::string &header, const std::string &data) {
  return file(header, data, header.size());
}

TEST_CASE("tensors are read by name") {
  std::string data(24, '\0');
  const float numbers[] = {1.5f, -2.0f, 0.0f, 3.25f};
  std::memcpy(data.data() + 8, numbers, sizeof numbers);
  const Safetensors tensors(
      file(R"({"a":{"dtype":"I64","shape":[],"data_offsets":[0,8]},)"
           R"("b":{"dtype":"F32","shape":[2,2],"data_offsets":[8,24]},"__metadata__":{"x":"y"}}  )",
           data));
  CHECK(tensors.has("a"));
  CHECK_FALSE(tensors.has("c"));
  CHECK_FALSE(tensors.has("__metadata__"));
  CHECK(tensors.dtype("a") == "I64");
  CHECK(tensors.shape("a").empty());
  CHECK(tensors.shape("b") == std::vector<std::size_t>{2, 2});
  CHECK(tensors.floats("b") == std::vector<float>{1.5f, -2.0f, 0.0f, 3.25f});
}

TEST_CASE("a tensor may have no elements") {
  const Safetensors tensors(file(R"({"a":{"dtype":"F32","shape":[3,0],"data_offsets":[0,0]}})", ""));
  CHECK(tensors.floats("a").empty());
}

static std::string tensor(const std::string &dtype, const std::string &shape, const std::string &offsets) {
  return R"({"a":{"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" + offsets + "}}";
}

TEST_CASE("damaged files are refused by what is wrong") {
  const std::string data(8, '\0');
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"", "the header is too small"},
      {std::string(7, '\0'), "the header is too small"},
      {file("{}", "", 100'000'001), "the header is too large"},
      {file("{}", "", UINT64_MAX), "the header is too large"},
      {file("{}", "", 3), "the header is longer than the file"},
      {file("", ""), "JSON is malformed at byte 1"},
      {file("[]", ""), "Expected `object`, got `array`"},
      {file(R"({"a":1})", ""), "Expected `object`, got `int` - at `a`"},
      {file(R"({"a":{"dtype":"F32","shape":[2]}})", data), "Object missing required field `data_offsets` - at `a`"},
      {file(R"({"__metadata__":{"a":1}})", ""), "Expected `str`, got `int` - at `$.__metadata__[...]`"},
      {file(tensor("F33", "[2]", "[0,8]"), data), "a tensor has the unknown type F33"},
      {file(tensor("F32", "[-1]", "[0,8]"), data), "a tensor has an impossible shape"},
      {file(tensor("F32", "[4294967296,4294967296]", "[0,8]"), data), "a tensor has an impossible shape"},
      {file(tensor("F32", "[9223372036854775807]", "[0,8]"), data), "a tensor has an impossible shape"},
      {file(tensor("F32", "[2]", "[0]"), data), "a tensor has impossible offsets"},
      {file(tensor("F32", "[2]", "[-8,0]"), data), "a tensor has impossible offsets"},
      {file(tensor("F32", "[2]", "[8,0]"), data), "a tensor has impossible offsets"},
      {file(tensor("F32", "[3]", "[0,8]"), data), "a tensor has another size than its shape"},
      {file(tensor("F32", "[1]", "[4,8]"), data), "the tensors overlap or leave a gap"},
      {file(tensor("F32", "[2]", "[0,8]"), data + "x"), "the tensors do not fill the file"},
      {file(tensor("F32", "[2]", "[0,8]"), "x"), "the tensors do not fill the file"},
  };
  for (const auto &[content, reason] : cases) {
    CHECK_THROWS_WITH_AS(Safetensors{content}, reason.c_str(), std::runtime_error);
  }
}
