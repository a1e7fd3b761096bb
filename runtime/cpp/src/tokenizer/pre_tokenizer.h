// How a text is split into the words that byte-pair encoding works on.
#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "tokenizer/pattern.h"

namespace gircse::core {

enum class SplitBehavior { kRemoved, kIsolated, kMergedWithPrevious, kMergedWithNext, kContiguous };

struct SplitStep {
  Pattern pattern;
  SplitBehavior behavior;
  bool invert;
};

struct DigitsStep {
  bool individual;
};

enum class PrependScheme { kNever, kFirst, kAlways };

struct MetaspaceStep {
  std::string replacement;
  Pattern replacement_pattern;
  PrependScheme prepend;
  bool split;
};

// Its pattern is a SplitStep of its own; that the bytes are written as characters is left to Bpe.
struct PrefixSpaceStep {};

using PreTokenizerStep = std::variant<SplitStep, DigitsStep, MetaspaceStep, PrefixSpaceStep>;

using WordVisitor = std::function<void(std::string_view word)>;

class PreTokenizer {
 public:
  explicit PreTokenizer(std::vector<PreTokenizerStep> steps) : steps_(std::move(steps)) {}

  // Visits the words of a text, none of them empty. `start`: bytes at its front that stem from the first character of
  // all that is encoded.
  void split(std::string_view text, std::size_t start, StepBudget &budget, const WordVisitor &visit) const {
    run(0, text, start, budget, visit);
  }

 private:
  void run(std::size_t step, std::string_view text, std::size_t start, StepBudget &budget,
           const WordVisitor &visit) const;

  std::vector<PreTokenizerStep> steps_;
};

}  // namespace gircse::core
