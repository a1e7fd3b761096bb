// Strings in one block of memory, by number and by content.
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

namespace gircse::core {

class StringList {
 public:
  std::size_t size() const { return ends_.size(); }

  std::string_view operator[](std::size_t number) const {
    const std::size_t begin = number == 0 ? 0 : ends_[number - 1];
    return {text_.data() + begin, ends_[number] - begin};
  }

  void add(std::string_view text) {
    text_ += text;
    ends_.push_back(text_.size());
  }

 private:
  std::string text_;
  std::vector<std::size_t> ends_;
};

// Different strings, numbered in the order in which they were added.
class TokenTable {
 public:
  static constexpr std::uint32_t kNone = std::numeric_limits<std::uint32_t>::max();

  std::size_t size() const { return tokens_.size(); }
  std::string_view operator[](std::size_t number) const { return tokens_[number]; }

  // Number of a string, kNone where it is not in the table.
  std::uint32_t find(std::string_view token) const;

  // Number of a string, which is added if it is new.
  std::uint32_t add(std::string_view token);

 private:
  std::size_t slot_of(std::string_view token) const;
  void grow();

  StringList tokens_;
  std::vector<std::uint32_t> slots_;  // open addressing, at most half full
};

}  // namespace gircse::core
