#include "tokenizer/added_tokens.h"

#include <algorithm>
#include <stdexcept>
#include <tuple>

#include "tokenizer/code_points.h"
#include "tokenizer/unicode_tables.h"

namespace gircse::core {

namespace {

constexpr std::size_t kMaxPattern = 1024;

bool has(CodePoint point, std::uint64_t property) { return (unicode::properties(point.value) & property) != 0; }

bool is_word(CodePoint point) { return has(point, unicode::kWord); }

CodePoint last_code_point(std::string_view text) { return code_point_at(text, previous_code_point(text, text.size())); }

bool stands_alone(std::string_view before, std::string_view after) {
  return (before.empty() || !is_word(last_code_point(before))) && (after.empty() || !is_word(code_point_at(after, 0)));
}

// Size of a text without the white space at its end.
std::size_t trimmed_size(std::string_view text) {
  while (!text.empty() && has(last_code_point(text), unicode::kTrimmed)) {
    text = text.substr(0, previous_code_point(text, text.size()));
  }
  return text.size();
}

std::size_t leading_space(std::string_view text) {
  std::size_t at = 0;
  while (at < text.size() && has(code_point_at(text, at), unicode::kTrimmed)) at += code_point_at(text, at).size;
  return at;
}

}  // namespace

bool AddedToken::operator==(const AddedToken &other) const {
  const auto key = [](const AddedToken &token) {
    return std::tie(token.content, token.single_word, token.lstrip, token.rstrip, token.normalized, token.special);
  };
  return key(*this) == key(other);
}

AddedTokens::AddedTokens(std::vector<Entry> entries) : entries_(std::move(entries)), nodes_(1), roots_(256, 0) {
  for (std::uint32_t i = 0; i < entries_.size(); ++i) insert(i);
  for (const auto &[byte, node] : nodes_[0].children) roots_[byte] = node;
}

void AddedTokens::insert(std::uint32_t entry) {
  const std::string &pattern = entries_[entry].pattern;
  if (pattern.empty())
    throw std::runtime_error("the added token '" + entries_[entry].token.content + "' is normalized to nothing");
  if (pattern.size() > kMaxPattern) throw std::runtime_error("an added token of more than 1024 bytes is not supported");
  std::uint32_t node = 0;
  for (const char c : pattern) {
    const auto byte = static_cast<std::uint8_t>(c);
    std::uint32_t next = child(node, byte);
    if (next == 0) {
      next = static_cast<std::uint32_t>(nodes_.size());
      auto &children = nodes_[node].children;
      children.insert(std::upper_bound(children.begin(), children.end(), std::pair(byte, std::uint32_t{0})),
                      {byte, next});
      nodes_.emplace_back();
    }
    node = next;
  }
  if (nodes_[node].entry)
    throw std::runtime_error("the added token '" + pattern + "' comes twice, as it is normalized");
  nodes_[node].entry = entry;
}

std::uint32_t AddedTokens::child(std::uint32_t node, std::uint8_t byte) const {
  const auto &children = nodes_[node].children;
  const auto found = std::lower_bound(children.begin(), children.end(), std::pair(byte, std::uint32_t{0}));
  return found != children.end() && found->first == byte ? found->second : 0;
}

std::optional<std::uint32_t> AddedTokens::longest_at(std::string_view text, std::size_t at) const {
  std::optional<std::uint32_t> longest;
  std::uint32_t node = roots_[static_cast<std::uint8_t>(text[at])];
  while (node != 0) {
    if (nodes_[node].entry) longest = nodes_[node].entry;
    if (++at == text.size()) break;
    node = child(node, static_cast<std::uint8_t>(text[at]));
  }
  return longest;
}

void AddedTokens::split(std::string_view text, const PartVisitor &visit) const {
  if (text.empty()) return;
  std::size_t done = 0;
  std::size_t spaces_end = 0;  // of the white space that was looked at last
  for (std::size_t at = 0; !entries_.empty() && at < text.size();) {
    const std::optional<std::uint32_t> found = longest_at(text, at);
    if (!found) {
      ++at;
      continue;
    }
    const Entry &entry = entries_[*found];
    std::size_t begin = at, end = at + entry.pattern.size();
    at = end;
    if (entry.token.single_word && !stands_alone(text.substr(0, begin), text.substr(end))) continue;
    // White space that the token before has taken stays there.
    if (entry.token.lstrip) begin = begin < done ? done : done + trimmed_size(text.substr(done, begin - done));
    if (entry.token.rstrip && end > spaces_end) spaces_end = end + leading_space(text.substr(end));
    if (entry.token.rstrip) end = spaces_end;
    if (begin > end)
      throw std::runtime_error("the added token '" + entry.token.content +
                               "' lies in white space that the token before it takes");
    if (done < begin) visit(text.substr(done, begin - done), done, std::nullopt);
    if (begin < end) visit(text.substr(begin, end - begin), begin, entry.id);
    done = end;
  }
  if (done != text.size()) visit(text.substr(done), done, std::nullopt);
}

}  // namespace gircse::core
