// UTF-8 that is not, in the words of Python's decoder.
#pragma once

#include <cstddef>
#include <optional>
#include <string_view>

namespace gircse::command {

struct Utf8Fault {
  std::size_t offset;  // of the first byte of the sequence
  const char *reason;
};

std::optional<Utf8Fault> find_utf8_fault(std::string_view text);

}  // namespace gircse::command
