#include "error.h"

#include <array>
#include <cstdint>
#include <cstdio>

#include "utf8.h"

namespace gircse::core {
namespace {

constexpr std::size_t kMaxPart = 2000;  // bytes of a printed part; the commands in hints are shorter

bool starts_line_break(std::string_view rest, std::size_t &length) {
  constexpr std::array<std::string_view, 11> breaks = {
      "\r\n", "\n", "\r", "\v", "\f", "\x1c", "\x1d", "\x1e", "\xc2\x85", "\xe2\x80\xa8", "\xe2\x80\xa9"};
  for (const std::string_view line_break : breaks) {
    if (rest.substr(0, line_break.size()) == line_break) {
      length = line_break.size();
      return true;
    }
  }
  return false;
}

// Whether a terminal would act on a character, or hide it: controls, and the marks that change a text's direction.
bool printable(std::string_view character) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(character[i]); };
  if (character.size() == 1) return byte(0) >= 0x20 && byte(0) < 0x7f;
  if (character.size() == 2) return byte(0) != 0xc2 || byte(1) >= 0xa1;  // U+0080 to U+00A0
  if (character.size() == 3 && byte(0) == 0xe2 && byte(1) == 0x80)
    return byte(2) < 0x8b || (byte(2) > 0x8f && byte(2) < 0xaa);
  if (character.size() == 3 && byte(0) == 0xe2 && byte(1) == 0x81) return byte(2) < 0xa0 || byte(2) > 0xaf;
  return character != "\xef\xbb\xbf";  // the byte order mark
}

std::size_t sequence_length(std::string_view rest) {
  const auto first = static_cast<unsigned char>(rest.front());
  const std::size_t length = first < 0x80 ? 1 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
  if (length > rest.size() || find_utf8_fault(rest.substr(0, length))) return 0;
  return length;
}

std::uint32_t code_point(std::string_view character) {
  if (character.size() == 1) return static_cast<unsigned char>(character[0]);
  std::uint32_t value = static_cast<unsigned char>(character[0]) & (0x7fu >> character.size());
  for (const char byte : character.substr(1)) value = (value << 6) | (static_cast<unsigned char>(byte) & 0x3fu);
  return value;
}

// An escape in Python's form, of a code point or of a byte that is no character.
std::string escaped(std::uint32_t value) {
  std::array<char, 11> text{};
  std::snprintf(text.data(), text.size(), value < 0x100 ? "\\x%02x" : value < 0x10000 ? "\\u%04x" : "\\U%08x", value);
  return text.data();
}

std::string shortened(std::string_view part) {
  if (part.size() <= kMaxPart) return std::string(part);
  return std::string(part.substr(0, kMaxPart / 2)) + " [...] " + std::string(part.substr(part.size() - kMaxPart / 2));
}

std::string without_final_stop(std::string text) {
  while (!text.empty() && text.back() == '.') text.pop_back();
  return text;
}

}  // namespace

Error::Error(gircse_code code, std::string_view where, std::string_view got, std::optional<std::string_view> expected,
             std::optional<std::string_view> hint)
    : code_(code), message_(sentence(where, got, expected, hint)) {}

std::string sentence(std::string_view where, std::string_view got, std::optional<std::string_view> expected,
                     std::optional<std::string_view> hint) {
  std::string text = without_final_stop(readable(where) + " " + readable(got));
  if (expected) text += "; " + without_final_stop(readable(*expected));
  text += ".";
  if (hint) text += " " + readable(*hint);
  return text;
}

std::string readable(std::string_view part) {
  const std::string whole = shortened(part);
  std::string text;
  for (std::string_view rest = whole; !rest.empty();) {
    std::size_t length = 0;
    if (starts_line_break(rest, length)) {
      if (rest.size() > length) text += ' ';
    } else if ((length = sequence_length(rest)) == 0) {
      length = 1;
      text += escaped(static_cast<unsigned char>(rest.front()));
    } else if (printable(rest.substr(0, length))) {
      text += rest.substr(0, length);
    } else {
      text += escaped(code_point(rest.substr(0, length)));
    }
    rest.remove_prefix(length);
  }
  return text;
}

std::string in_quotes(std::string_view value) {
  const bool double_quotes = value.find('\'') != value.npos && value.find('"') == value.npos;
  const char quote = double_quotes ? '"' : '\'';
  std::string text(1, quote);
  for (const char byte : value) {
    if (byte == quote || byte == '\\') {
      text += {'\\', byte};
    } else if (byte == '\n' || byte == '\r' || byte == '\t') {
      text += {'\\', byte == '\n' ? 'n' : byte == '\r' ? 'r' : 't'};
    } else if (static_cast<unsigned char>(byte) < 0x20 || byte == 0x7f) {
      text += escaped(static_cast<unsigned char>(byte));
    } else {
      text += byte;
    }
  }
  return text + quote;
}

}  // namespace gircse::core
