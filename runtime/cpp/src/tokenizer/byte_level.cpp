#include "tokenizer/byte_level.h"

#include "tokenizer/code_points.h"

namespace gircse::core {

namespace {

bool printable(unsigned byte) { return (byte > 0x20 && byte < 0x7F) || (byte > 0xA0 && byte != 0xAD); }

}  // namespace

std::string byte_character(std::uint8_t byte) {
  char32_t code = byte;
  if (!printable(byte)) {
    code = 0x100;
    for (unsigned before = 0; before < byte; ++before) code += printable(before) ? 0 : 1;
  }
  std::string text;
  append_utf8(text, code);
  return text;
}

}  // namespace gircse::core
