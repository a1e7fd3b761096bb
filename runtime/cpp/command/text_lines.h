// Texts, one per line, read when they are asked for: a file of any size takes no memory.
//
// A line ends at \n or \r\n and nowhere else. Blank lines are texts too, so that line i + 1 is text i.
#pragma once

#include "byte_source.h"

#include <cstddef>
#include <memory>
#include <string>

namespace gircse::command {

class TextLines {
 public:
  // Reads a file, or stdin where the path is "-". Throws CommandError where it cannot be opened.
  explicit TextLines(const std::string &path);

  // Reads the next line without its end, and a byte order mark before the first; false after the last.
  // Throws CommandError where the file cannot be read or the line is not UTF-8.
  bool next(std::string &text);

 private:
  bool read_raw(std::string &line);
  bool refill();

  std::string name_;
  std::unique_ptr<ByteSource> source_;
  std::string buffer_;
  std::size_t position_ = 0;
  std::size_t number_ = 0;
};

}  // namespace gircse::command
