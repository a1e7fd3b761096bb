// The regular expressions of tokenizers: the part of Oniguruma's syntax that they use, and what it matches.
//
// A class, a literal or a group of alternatives, each once, or a class or literal with a quantifier (greedy, lazy or
// possessive), or an optional group; lookahead; \A; (?i:) for ASCII. Anything else is refused when the pattern is read.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace gircse::core {

// A set of code points.
class CharSet {
 public:
  void add(char32_t first, char32_t last) { ranges_.push_back({first, last}); }
  void add_properties(std::uint64_t bits) { properties_ |= bits; }
  void negate() { negated_ = !negated_; }

  // To be called once, after the last change.
  void finish();

  bool contains(char32_t code) const { return code < 128 ? (ascii_[code / 64] >> (code % 64) & 1U) != 0 : holds(code); }

  // Whether it may hold code points beyond ASCII.
  bool holds_others() const;

 private:
  struct Range {
    char32_t first, last;
  };

  bool holds(char32_t code) const;

  std::uint64_t properties_ = 0;
  std::vector<Range> ranges_;
  bool negated_ = false;
  std::array<std::uint64_t, 2> ascii_{};
};

enum class Greed { kGreedy, kLazy, kPossessive };

struct PatternItem;
using PatternSequence = std::vector<PatternItem>;

// One part of a pattern, and how often it comes.
struct PatternItem {
  enum class Kind { kSet, kGroup, kLookahead, kTextStart } kind = Kind::kSet;
  CharSet set;                            // kSet
  std::vector<PatternSequence> branches;  // kGroup, kLookahead
  bool negative = false;                  // kLookahead
  std::uint32_t least = 1, most = 1;      // kSet; a group is optional where least is 0
  Greed greed = Greed::kGreedy;
};

// The most work that patterns may do for one text. Those of tokenizers need a few steps per character; a hostile one
// could need more than anybody can wait for.
class StepBudget {
 public:
  explicit StepBudget(std::size_t text_size) : left_(100'000'000 + 1000 * text_size) {}

  // Throws std::runtime_error where nothing is left.
  void spend(std::size_t steps);

 private:
  std::size_t left_;
};

// What is between matches, and the matches.
using SpanVisitor = std::function<void(std::size_t begin, std::size_t end, bool is_match)>;

class Pattern {
 public:
  // Throws std::runtime_error with the construct that is not supported, or where the pattern can match nothing at all.
  static Pattern regex(std::string_view source);

  // Matches the text itself, which is not empty.
  static Pattern literal(std::string_view text);

  // Visits all of a text in order.
  void split(std::string_view text, StepBudget &budget, const SpanVisitor &visit) const;

 private:
  Pattern() = default;
  void split_literal(std::string_view text, const SpanVisitor &visit) const;
  void index_starts();

  std::string literal_;
  std::vector<PatternSequence> branches_;
  std::array<std::vector<std::uint32_t>, 129> starts_;  // branches that may match from an ASCII character on; others
};

}  // namespace gircse::core
