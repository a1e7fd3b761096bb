// The characters that stand for bytes in the vocabularies of GPT-2's kind.
#pragma once

#include <cstdint>
#include <string>

namespace gircse::core {

// The character of a byte, as UTF-8: itself where it is printable in Latin-1, else one from U+0100 on.
std::string byte_character(std::uint8_t byte);

}  // namespace gircse::core
