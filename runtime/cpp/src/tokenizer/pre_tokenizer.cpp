#include "tokenizer/pre_tokenizer.h"

#include <algorithm>

#include "tokenizer/code_points.h"
#include "tokenizer/unicode_tables.h"

namespace gircse::core {

namespace {

struct Span {
  std::size_t begin, end;
  bool is_match;
};

using Spans = std::vector<Span>;
using PieceVisitor = std::function<void(std::size_t begin, std::size_t end)>;

bool starts_with(std::string_view text, std::string_view prefix) { return text.substr(0, prefix.size()) == prefix; }

// Joins each match to its neighbor before it, or begins a new piece; the first of several matches only.
Spans merged_with_previous(const Spans &spans) {
  Spans pieces;
  bool after_match = false;
  for (const Span &span : spans) {
    if (span.is_match && !after_match && !pieces.empty()) {
      pieces.back().end = span.end;
    } else {
      pieces.push_back(span);
    }
    after_match = span.is_match;
  }
  return pieces;
}

Spans merged_with_next(const Spans &spans) {
  Spans pieces;
  bool before_match = false;
  for (auto span = spans.rbegin(); span != spans.rend(); ++span) {
    if (span->is_match && !before_match && !pieces.empty()) {
      pieces.back().begin = span->begin;
    } else {
      pieces.push_back(*span);
    }
    before_match = span->is_match;
  }
  std::reverse(pieces.begin(), pieces.end());
  return pieces;
}

Spans contiguous(const Spans &spans) {
  Spans pieces;
  bool after_match = false;
  for (const Span &span : spans) {
    if (span.is_match == after_match && !pieces.empty()) {
      pieces.back().end = span.end;
    } else {
      pieces.push_back(span);
    }
    after_match = span.is_match;
  }
  return pieces;
}

Spans joined(SplitBehavior behavior, const Spans &spans) {
  if (behavior == SplitBehavior::kMergedWithPrevious) return merged_with_previous(spans);
  return behavior == SplitBehavior::kMergedWithNext ? merged_with_next(spans) : contiguous(spans);
}

// `spans(visit)` visits what is between matches, and the matches.
template <typename SpanSource>
void split_spans(SplitBehavior behavior, bool invert, const SpanSource &spans, const PieceVisitor &visit) {
  if (behavior == SplitBehavior::kIsolated || behavior == SplitBehavior::kRemoved) {
    const bool remove = behavior == SplitBehavior::kRemoved;
    spans([&](std::size_t begin, std::size_t end, bool is_match) {
      if (!remove || is_match == invert) visit(begin, end);
    });
    return;
  }
  Spans found;
  spans([&](std::size_t begin, std::size_t end, bool is_match) { found.push_back({begin, end, is_match != invert}); });
  for (const Span &piece : joined(behavior, found)) visit(piece.begin, piece.end);
}

void split_digits(std::string_view text, const SpanVisitor &visit) {
  std::size_t done = 0;
  for (std::size_t at = 0; at < text.size();) {
    const auto [code, size] = code_point_at(text, at);
    at += size;
    if ((unicode::properties(code) & unicode::kNumeric) == 0) continue;
    if (done < at - size) visit(done, at - size, false);
    visit(at - size, at, true);
    done = at;
  }
  if (done < text.size()) visit(done, text.size(), false);
}

// Runs one step: gives each piece, and what of it stems from the first character.
class Runner {
 public:
  using Visitor = std::function<void(std::string_view piece, std::size_t start)>;

  Runner(std::string_view text, std::size_t start, StepBudget &budget, Visitor visit)
      : text_(text), start_(start), budget_(budget), visit_(std::move(visit)) {}

  void operator()(const SplitStep &step) const {
    split_spans(
        step.behavior, step.invert, [&](const SpanVisitor &visit) { step.pattern.split(text_, budget_, visit); },
        pieces());
  }

  void operator()(const DigitsStep &step) const {
    const SplitBehavior behavior = step.individual ? SplitBehavior::kIsolated : SplitBehavior::kContiguous;
    split_spans(behavior, false, [&](const SpanVisitor &visit) { split_digits(text_, visit); }, pieces());
  }

  void operator()(const MetaspaceStep &step) const {
    std::string text;
    text.reserve(text_.size() * 2);
    for (const char c : text_) c == ' ' ? text.append(step.replacement) : text.append(1, c);
    const bool wanted = step.prepend == PrependScheme::kAlways || (step.prepend == PrependScheme::kFirst && start_ > 0);
    if (wanted && !starts_with(text, step.replacement)) text.insert(0, step.replacement);
    const Runner replaced(text, start_, budget_, visit_);
    if (!step.split) return visit_(text, start_);
    split_spans(
        SplitBehavior::kMergedWithNext, false,
        [&](const SpanVisitor &visit) { step.replacement_pattern.split(text, budget_, visit); }, replaced.pieces());
  }

  void operator()(const PrefixSpaceStep &) const {
    if (starts_with(text_, " ")) return visit_(text_, start_);
    visit_(" " + std::string(text_), start_);
  }

 private:
  PieceVisitor pieces() const {
    return [this](std::size_t begin, std::size_t end) {
      visit_(text_.substr(begin, end - begin), start_ - std::min(start_, begin));
    };
  }

  std::string_view text_;
  std::size_t start_;
  StepBudget &budget_;
  Visitor visit_;
};

}  // namespace

void PreTokenizer::run(std::size_t step, std::string_view text, std::size_t start, StepBudget &budget,
                       const WordVisitor &visit) const {
  if (step == steps_.size()) return visit(text);
  const Runner runner(text, start, budget, [&, step](std::string_view piece, std::size_t piece_start) {
    run(step + 1, piece, piece_start, budget, visit);
  });
  std::visit(runner, steps_[step]);
}

}  // namespace gircse::core
