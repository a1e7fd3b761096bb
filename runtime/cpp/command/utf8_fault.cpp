#include "utf8_fault.h"

namespace gircse::command {
namespace {

// What may follow a first byte: how many bytes there are in all (0: none may begin so), and the bounds of the second,
// which are narrower where a longer form, a surrogate or a number above U+10FFFF would begin.
struct Sequence {
  std::size_t size;
  unsigned char low, high;
};

Sequence sequence_of(unsigned char first) {
  if (first < 0x80) return {1, 0, 0};
  if (first < 0xC2) return {0, 0, 0};
  if (first < 0xE0) return {2, 0x80, 0xBF};
  if (first < 0xF0) {
    const unsigned char low = first == 0xE0 ? 0xA0 : 0x80;
    const unsigned char high = first == 0xED ? 0x9F : 0xBF;
    return {3, low, high};
  }
  if (first > 0xF4) return {0, 0, 0};
  const unsigned char low = first == 0xF0 ? 0x90 : 0x80;
  const unsigned char high = first == 0xF4 ? 0x8F : 0xBF;
  return {4, low, high};
}

const char *fault_at(std::string_view text, std::size_t start, const Sequence &sequence) {
  if (sequence.size == 0) return "invalid start byte";
  for (std::size_t i = 1; i < sequence.size; ++i) {
    if (start + i == text.size()) return "unexpected end of data";
    const auto byte = static_cast<unsigned char>(text[start + i]);
    const unsigned char low = i == 1 ? sequence.low : 0x80;
    const unsigned char high = i == 1 ? sequence.high : 0xBF;
    if (byte < low || byte > high) return "invalid continuation byte";
  }
  return nullptr;
}

}  // namespace

std::optional<Utf8Fault> find_utf8_fault(std::string_view text) {
  for (std::size_t start = 0; start < text.size();) {
    const Sequence sequence = sequence_of(static_cast<unsigned char>(text[start]));
    if (const char *reason = fault_at(text, start, sequence)) return Utf8Fault{start, reason};
    start += sequence.size;
  }
  return std::nullopt;
}

}  // namespace gircse::command
