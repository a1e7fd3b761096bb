#include "text_lines.h"

#include "command_error.h"
#include "standard_streams.h"
#include "utf8.h"

#include <unistd.h>

#include <string_view>

namespace gircse::command {
namespace {

constexpr std::size_t kBufferSize = std::size_t{1} << 16;
constexpr std::string_view kByteOrderMark = "\xEF\xBB\xBF";

CommandError unreadable(const std::string &name, const std::exception &error) {
  return {name, std::string("cannot be read: ") + error.what(), std::nullopt, "Check the path."};
}

void check_utf8(const std::string &name, std::size_t number, std::string_view text) {
  const auto fault = core::find_utf8_fault(text);
  if (!fault) return;
  throw CommandError(name + ", line " + std::to_string(number) + ",",
                     std::string("is not UTF-8: ") + fault->reason + " at byte " + std::to_string(fault->offset),
                     std::nullopt, "Convert the file, for example with iconv.");
}

}  // namespace

TextLines::TextLines(const std::string &path) : name_(path == "-" ? "stdin" : path) {
  if (path == "-" && is_closed(STDIN_FILENO)) {
    throw CommandError("stdin", "is closed", std::nullopt, "Redirect a file to it, or name one with --input.");
  }
  try {
    source_ = path == "-" ? standard_input() : open_bytes(path);
  } catch (const std::runtime_error &error) {
    throw unreadable(name_, error);
  }
}

bool TextLines::next(std::string &text) {
  if (!read_raw(text)) return false;
  ++number_;
  if (number_ == 1 && text.compare(0, kByteOrderMark.size(), kByteOrderMark) == 0) text.erase(0, kByteOrderMark.size());
  if (text.empty()) return false;  // a byte order mark and nothing else
  if (text.back() == '\n') text.pop_back();
  if (!text.empty() && text.back() == '\r') text.pop_back();
  check_utf8(name_, number_, text);
  return true;
}

// Reads a line with its end; false after the last.
bool TextLines::read_raw(std::string &line) {
  line.clear();
  while (position_ < buffer_.size() || refill()) {
    const std::size_t end = buffer_.find('\n', position_);
    if (end != buffer_.npos) {
      line.append(buffer_, position_, end + 1 - position_);
      position_ = end + 1;
      return true;
    }
    line.append(buffer_, position_);
    position_ = buffer_.size();
  }
  return !line.empty();
}

bool TextLines::refill() {
  buffer_.resize(kBufferSize);
  try {
    buffer_.resize(source_->read(buffer_.data(), buffer_.size()));
  } catch (const std::runtime_error &error) {
    throw unreadable(name_, error);
  }
  position_ = 0;
  return !buffer_.empty();
}

}  // namespace gircse::command
