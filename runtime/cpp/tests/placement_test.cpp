#include "ort/placement.h"

#include <doctest/doctest.h>

#include <string>
#include <vector>

using gircse::core::fallback_warning;
using gircse::core::PlacedNode;

namespace {

std::vector<PlacedNode> nodes(std::size_t count) {
  std::vector<PlacedNode> found;
  for (std::size_t i = 0; i < count; ++i) found.push_back({"n" + std::to_string(i), "Op"});
  return found;
}

}  // namespace

TEST_CASE("nodes on the CPU are named, those of sizes are not") {
  CHECK(fallback_warning("g.onnx", {{"a", "Shape"}, {"b/c", "Attention"}}, "x,a,y") ==
        "g.onnx: without a kernel on the GPU, these nodes run on the CPU, which is slow: Attention (b/c)");
  CHECK(fallback_warning("g.onnx", {{"a", "Shape"}, {"b", "Concat"}}, "a,b") == "");
  CHECK(fallback_warning("g.onnx", {{"ab", "Shape"}}, "a,b").find("Shape (ab)") != std::string::npos);
}

TEST_CASE("an older export, which lists no sizes, gets no warning") {
  CHECK(fallback_warning("g.onnx", nodes(3), "") == "");
}

TEST_CASE("a few nodes stand for many") {
  const std::string five = fallback_warning("g", nodes(5), "x"), seven = fallback_warning("g", nodes(7), "x");
  CHECK(five.substr(five.size() - 9) == ", Op (n4)");
  CHECK(seven.find("Op (n4) and 2 more") != std::string::npos);
  CHECK(seven.find("n5") == std::string::npos);
}
