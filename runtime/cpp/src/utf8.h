// UTF-8, read strictly: no surrogates, no overlong forms, nothing above U+10FFFF.
#pragma once

#include <cstddef>
#include <optional>
#include <string_view>

namespace gircse::core {

// What is not UTF-8, in the words of Python's decoder.
struct Utf8Fault {
  std::size_t offset;  // of the first byte of the sequence
  const char *reason;
};

std::optional<Utf8Fault> find_utf8_fault(std::string_view text);

}  // namespace gircse::core
