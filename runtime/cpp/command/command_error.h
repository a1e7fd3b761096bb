// Errors of the command itself; those of the library are gircse::Error.
#pragma once

#include <optional>
#include <stdexcept>
#include <string>

namespace gircse::command {

// An error that is printed as one line: the parts of Python's GircseError, joined as it joins them.
class CommandError : public std::runtime_error {
 public:
  CommandError(const std::string &where, const std::string &got, const std::optional<std::string> &expected,
               const std::optional<std::string> &hint);
};

// The arguments cannot be understood; printed after the usage line.
class UsageError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The reader of stdout has closed it.
class PipeClosed : public std::exception {};

// What the system says of the error in errno.
std::string system_message();

}  // namespace gircse::command
