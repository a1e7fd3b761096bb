#include "utf8.h"

#include <cstdint>
#include <cstring>

namespace gircse::core {
namespace {

// What may follow a first byte: how many bytes there are in all (0: none may begin so), and the bounds of the second,
// which are narrower where a longer form, a surrogate or a number above U+10FFFF would begin (Unicode, table 3-7).
struct Sequence {
  std::size_t size;
  std::uint8_t low, high;
};

Sequence sequence_of(std::uint8_t first) {
  if (first < 0x80) return {1, 0, 0};
  if (first < 0xC2) return {0, 0, 0};
  if (first < 0xE0) return {2, 0x80, 0xBF};
  if (first < 0xF0) return {3, std::uint8_t(first == 0xE0 ? 0xA0 : 0x80), std::uint8_t(first == 0xED ? 0x9F : 0xBF)};
  if (first < 0xF5) return {4, std::uint8_t(first == 0xF0 ? 0x90 : 0x80), std::uint8_t(first == 0xF4 ? 0x8F : 0xBF)};
  return {0, 0, 0};
}

const char *fault_of(std::string_view rest, const Sequence &sequence) {
  if (sequence.size == 0) return "invalid start byte";
  for (std::size_t i = 1; i < sequence.size; ++i) {
    if (i == rest.size()) return "unexpected end of data";
    const auto byte = static_cast<std::uint8_t>(rest[i]);
    const std::uint8_t low = i == 1 ? sequence.low : 0x80;
    const std::uint8_t high = i == 1 ? sequence.high : 0xBF;
    if (byte < low || byte > high) return "invalid continuation byte";
  }
  return nullptr;
}

bool ascii_block(const char *bytes) {
  std::uint64_t block = 0;
  std::memcpy(&block, bytes, sizeof block);
  return (block & 0x8080808080808080U) == 0;
}

}  // namespace

std::optional<Utf8Fault> find_utf8_fault(std::string_view text) {
  for (std::size_t at = 0; at < text.size();) {
    if (text.size() - at >= 8 && ascii_block(text.data() + at)) {
      at += 8;
      continue;
    }
    const Sequence sequence = sequence_of(static_cast<std::uint8_t>(text[at]));
    if (const char *reason = fault_of(text.substr(at), sequence)) return Utf8Fault{at, reason};
    at += sequence.size;
  }
  return std::nullopt;
}

}  // namespace gircse::core
