// Where texts come from: a file, one that is unpacked, or stdin.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

namespace gircse::command {

class ByteSource {
 public:
  virtual ~ByteSource() = default;

  // Reads up to `size` bytes; 0 is the end. Throws std::runtime_error with the reason alone.
  virtual std::size_t read(char *buffer, std::size_t size) = 0;
};

// Opens a file; one whose name ends in .gz is unpacked. Throws std::runtime_error with the reason alone.
std::unique_ptr<ByteSource> open_bytes(const std::string &path);

std::unique_ptr<ByteSource> standard_input();

}  // namespace gircse::command
