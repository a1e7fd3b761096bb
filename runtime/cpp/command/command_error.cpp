#include "command_error.h"

#include <cerrno>
#include <cstdio>
#include <system_error>

namespace gircse::command {
namespace {

std::string escaped(char byte) {
  char text[5];
  std::snprintf(text, sizeof text, "\\x%02x", static_cast<unsigned>(static_cast<unsigned char>(byte)));
  return text;
}

bool is_control(char byte) { return static_cast<unsigned char>(byte) < 0x20 || byte == 0x7f; }

// One line that a terminal can show, whatever the name of a file holds.
std::string readable(std::string_view part) {
  std::string line;
  for (const char byte : part) {
    if (byte == '\n' || byte == '\r') {
      line += ' ';
    } else if (is_control(byte)) {
      line += escaped(byte);
    } else {
      line += byte;
    }
  }
  return line;
}

std::string without_full_stop(std::string text) {
  while (!text.empty() && text.back() == '.') text.pop_back();
  return text;
}

std::string sentence(const std::string &where, const std::string &got, const std::optional<std::string> &expected,
                     const std::optional<std::string> &hint) {
  std::string text = without_full_stop(readable(where) + " " + readable(got));
  if (expected) text += "; " + without_full_stop(readable(*expected));
  return text + (hint ? ". " + readable(*hint) : ".");
}

}  // namespace

CommandError::CommandError(const std::string &where, const std::string &got, const std::optional<std::string> &expected,
                           const std::optional<std::string> &hint)
    : std::runtime_error(sentence(where, got, expected, hint)) {}

std::string system_message() { return std::generic_category().message(errno); }

std::string repr(std::string_view value) {
  const bool double_quotes = value.find('\'') != value.npos && value.find('"') == value.npos;
  const char quote = double_quotes ? '"' : '\'';
  std::string text(1, quote);
  for (const char byte : value) {
    if (byte == quote || byte == '\\') {
      text += {'\\', byte};
    } else if (byte == '\n' || byte == '\r' || byte == '\t') {
      text += {'\\', byte == '\n' ? 'n' : byte == '\r' ? 'r' : 't'};
    } else if (is_control(byte)) {
      text += escaped(byte);
    } else {
      text += byte;
    }
  }
  return text + quote;
}

}  // namespace gircse::command
