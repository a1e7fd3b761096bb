// Errors inside the library: the parts of Python's GircseError, and the same sentence made of them.
#pragma once

#include <gircse/gircse.h>

#include <exception>
#include <optional>
#include <string>
#include <string_view>

namespace gircse::core {

// What is wrong (`where`), what was found there (`got`), what should have been there, and what to do.
class Error : public std::exception {
 public:
  Error(gircse_code code, std::string_view where, std::string_view got,
        std::optional<std::string_view> expected = std::nullopt, std::optional<std::string_view> hint = std::nullopt);

  gircse_code code() const noexcept { return code_; }
  const char *what() const noexcept override { return message_.c_str(); }

 private:
  gircse_code code_;
  std::string message_;
};

// Joins the parts to one line that a terminal can show, whatever a damaged file put into them.
std::string sentence(std::string_view where, std::string_view got, std::optional<std::string_view> expected,
                     std::optional<std::string_view> hint);

// Puts a part on one line, escapes control characters and invalid UTF-8, and leaves out the middle of a long one.
std::string readable(std::string_view part);

// A value in quotes, for messages: what Python's repr shows of a simple string.
std::string in_quotes(std::string_view value);

}  // namespace gircse::core
