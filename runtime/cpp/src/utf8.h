// UTF-8, read strictly: no surrogates, no overlong forms, nothing above U+10FFFF.
#pragma once

#include <cstddef>
#include <optional>
#include <string_view>

namespace gircse::core {

// Byte offset of the first sequence that is not UTF-8, as Python's decoder gives it.
std::optional<std::size_t> invalid_utf8_offset(std::string_view text);

}  // namespace gircse::core
