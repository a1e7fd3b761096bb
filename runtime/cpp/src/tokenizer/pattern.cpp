#include "tokenizer/pattern.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "tokenizer/code_points.h"
#include "tokenizer/pattern_parser.h"
#include "tokenizer/unicode_tables.h"

namespace gircse::core {

namespace {

constexpr std::size_t kNoMatch = std::numeric_limits<std::size_t>::max();
constexpr std::size_t kOthers = 128;  // index of the characters that are not ASCII

// What comes after a group: the rest of the sequence that it is in, and of those around it.
struct Rest {
  const PatternSequence *sequence;
  std::size_t index;
  const Rest *outer;
};

// Matches at one place of a text. It calls itself for parts of the pattern, never for parts of the text.
class Matcher {
 public:
  Matcher(std::string_view text, StepBudget &budget) : text_(text), budget_(budget) {}

  // End of the match that begins at `at`, or kNoMatch.
  std::size_t match(const PatternSequence &sequence, std::size_t index, std::size_t at, const Rest *rest) {
    budget_.spend(1);
    for (; index < sequence.size(); ++index) {
      const PatternItem &item = sequence[index];
      if (item.kind == PatternItem::Kind::kGroup) return match_group(sequence, index, at, rest);
      if (item.kind == PatternItem::Kind::kTextStart) {
        if (at != 0) return kNoMatch;
      } else if (item.kind == PatternItem::Kind::kLookahead) {
        if (looks(item, at) == item.negative) return kNoMatch;
      } else if (item.least == 1 && item.most == 1) {
        if (at == text_.size()) return kNoMatch;
        const auto [code, size] = code_point_at(text_, at);
        if (!item.set.contains(code)) return kNoMatch;
        at += size;
      } else if (item.greed == Greed::kPossessive) {
        const Run run = take(item, at, item.most);
        if (run.count < item.least) return kNoMatch;
        at = run.end;
      } else {
        return item.greed == Greed::kLazy ? match_lazy(sequence, index, at, rest)
                                          : match_greedy(sequence, index, at, rest);
      }
    }
    return rest == nullptr ? at : match(*rest->sequence, rest->index, at, rest->outer);
  }

 private:
  struct Run {
    std::size_t end;
    std::uint32_t count;
  };

  Run take(const PatternItem &item, std::size_t at, std::uint32_t most) {
    std::uint32_t count = 0;
    for (; count < most && at < text_.size(); ++count) {
      const auto [code, size] = code_point_at(text_, at);
      if (!item.set.contains(code)) break;
      at += size;
    }
    budget_.spend(count);
    return {at, count};
  }

  std::size_t match_greedy(const PatternSequence &sequence, std::size_t index, std::size_t at, const Rest *rest) {
    const PatternItem &item = sequence[index];
    Run run = take(item, at, item.most);
    while (run.count >= item.least) {
      const std::size_t end = match(sequence, index + 1, run.end, rest);
      if (end != kNoMatch) return end;
      if (run.count == item.least) break;
      run.end = previous_code_point(text_, run.end);
      --run.count;
    }
    return kNoMatch;
  }

  std::size_t match_lazy(const PatternSequence &sequence, std::size_t index, std::size_t at, const Rest *rest) {
    const PatternItem &item = sequence[index];
    Run run = take(item, at, item.least);
    if (run.count < item.least) return kNoMatch;
    for (std::uint32_t count = run.count;; ++count) {
      const std::size_t end = match(sequence, index + 1, run.end, rest);
      if (end != kNoMatch || count == item.most) return end;
      const Run one = take(item, run.end, 1);
      if (one.count == 0) return kNoMatch;
      run.end = one.end;
    }
  }

  std::size_t match_group(const PatternSequence &sequence, std::size_t index, std::size_t at, const Rest *rest) {
    const Rest after{&sequence, index + 1, rest};
    for (const PatternSequence &branch : sequence[index].branches) {
      const std::size_t end = match(branch, 0, at, &after);
      if (end != kNoMatch) return end;
    }
    return sequence[index].least == 0 ? match(sequence, index + 1, at, rest) : kNoMatch;
  }

  bool looks(const PatternItem &item, std::size_t at) {
    return std::any_of(item.branches.begin(), item.branches.end(),
                       [&](const PatternSequence &branch) { return match(branch, 0, at, nullptr) != kNoMatch; });
  }

  std::string_view text_;
  StepBudget &budget_;
};

// The ASCII characters that a match may begin with, and whether others may.
using Starts = std::array<bool, kOthers + 1>;

// Adds how a sequence may begin; returns whether it can also match nothing.
bool add_starts(const PatternSequence &sequence, Starts &starts) {
  for (const PatternItem &item : sequence) {
    const bool empty = item.kind == PatternItem::Kind::kLookahead || item.kind == PatternItem::Kind::kTextStart;
    bool skipped = empty || item.least == 0;
    if (item.kind == PatternItem::Kind::kSet) {
      for (char32_t code = 0; code < kOthers; ++code) starts[code] = starts[code] || item.set.contains(code);
      starts[kOthers] = starts[kOthers] || item.set.holds_others();
    } else if (item.kind == PatternItem::Kind::kGroup) {
      for (const PatternSequence &branch : item.branches) skipped = add_starts(branch, starts) || skipped;
    }
    if (!skipped) return false;
  }
  return true;
}

}  // namespace

void StepBudget::spend(std::size_t steps) {
  if (left_ < steps) throw std::runtime_error("the patterns of the tokenizer take too long on this text");
  left_ -= steps;
}

void CharSet::finish() {
  for (char32_t code = 0; code < 128; ++code) {
    if (holds(code)) ascii_[code / 64] |= std::uint64_t{1} << (code % 64);
  }
}

bool CharSet::holds(char32_t code) const {
  bool found = (unicode::properties(code) & properties_) != 0;
  for (std::size_t i = 0; !found && i < ranges_.size(); ++i)
    found = code >= ranges_[i].first && code <= ranges_[i].last;
  return found != negated_;
}

bool CharSet::holds_others() const {
  return negated_ || properties_ != 0 ||
         std::any_of(ranges_.begin(), ranges_.end(), [](const Range &range) { return range.last >= 128; });
}

Pattern Pattern::regex(std::string_view source) {
  Pattern pattern;
  pattern.branches_ = parse_pattern(source);
  const std::string named = "the pattern '" + std::string(source) + "'";
  for (const PatternSequence &branch : pattern.branches_) {
    if (least_size(branch) == 0) throw std::runtime_error(named + " can match nothing, which is not supported");
  }
  pattern.index_starts();
  return pattern;
}

Pattern Pattern::literal(std::string_view text) {
  Pattern pattern;
  pattern.literal_ = text;
  return pattern;
}

void Pattern::index_starts() {
  for (std::uint32_t i = 0; i < branches_.size(); ++i) {
    Starts starts{};
    add_starts(branches_[i], starts);
    for (std::size_t code = 0; code < starts.size(); ++code) {
      if (starts[code]) starts_[code].push_back(i);
    }
  }
}

void Pattern::split(std::string_view text, StepBudget &budget, const SpanVisitor &visit) const {
  if (!literal_.empty()) return split_literal(text, visit);
  Matcher matcher(text, budget);
  std::size_t done = 0;
  for (std::size_t at = 0; at < text.size();) {
    const auto [code, size] = code_point_at(text, at);
    std::size_t end = kNoMatch;
    for (const std::uint32_t branch : starts_[code < kOthers ? code : kOthers]) {
      end = matcher.match(branches_[branch], 0, at, nullptr);
      if (end != kNoMatch) break;
    }
    if (end == kNoMatch) {
      at += size;
      continue;
    }
    if (done < at) visit(done, at, false);
    visit(at, end, true);
    at = done = end;
  }
  if (done < text.size()) visit(done, text.size(), false);
}

void Pattern::split_literal(std::string_view text, const SpanVisitor &visit) const {
  std::size_t done = 0;
  for (std::size_t at = text.find(literal_); at != std::string_view::npos; at = text.find(literal_, done)) {
    if (done < at) visit(done, at, false);
    done = at + literal_.size();
    visit(at, done, true);
  }
  if (done < text.size()) visit(done, text.size(), false);
}

}  // namespace gircse::core
