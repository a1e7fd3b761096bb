// Tokens that are found in a text before anything else.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace gircse::core {

struct AddedToken {
  std::string content;
  bool single_word = false, lstrip = false, rstrip = false, normalized = false, special = false;

  bool operator==(const AddedToken &other) const;
};

// A part of a text: a token, or text that is tokenized further.
using PartVisitor = std::function<void(std::string_view text, std::size_t begin, std::optional<std::uint32_t> id)>;

// Finds the leftmost token, the longest of those that begin there, and goes on behind it.
class AddedTokens {
 public:
  struct Entry {
    std::string pattern;  // what is looked for: the content, or what normalization makes of it
    AddedToken token;
    std::uint32_t id;
  };

  // Throws std::runtime_error where a pattern is empty or comes twice.
  explicit AddedTokens(std::vector<Entry> entries);

  bool empty() const { return entries_.empty(); }

  // Visits all of a text in order. Throws std::runtime_error where the flags of tokens contradict one another.
  void split(std::string_view text, const PartVisitor &visit) const;

 private:
  struct Node {
    std::vector<std::pair<std::uint8_t, std::uint32_t>> children;  // sorted by byte
    std::optional<std::uint32_t> entry;
  };

  void insert(std::uint32_t entry);
  std::uint32_t child(std::uint32_t node, std::uint8_t byte) const;
  std::optional<std::uint32_t> longest_at(std::string_view text, std::size_t at) const;

  std::vector<Entry> entries_;
  std::vector<Node> nodes_;
  std::vector<std::uint32_t> roots_;  // child of the root by byte; 0: none
};

}  // namespace gircse::core
