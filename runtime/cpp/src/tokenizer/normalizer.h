// What is done to a text before it is split into words.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "tokenizer/pattern.h"

namespace gircse::core {

struct NfcStep {};

struct PrependStep {
  std::string text;
};

struct ReplaceStep {
  Pattern pattern;
  std::string content;
};

using NormalizerStep = std::variant<NfcStep, PrependStep, ReplaceStep>;

struct Normalized {
  std::string_view text;
  std::size_t start;  // bytes at the front that stem from the first character
};

class Normalizer {
 public:
  explicit Normalizer(std::vector<NormalizerStep> steps) : steps_(std::move(steps)) {}

  // The normalized text, which is not empty: the text itself where nothing changes, else one that `memory` holds.
  // What NFC makes of the first character is not followed.
  Normalized apply(std::string_view text, StepBudget &budget, std::string &memory) const;

 private:
  std::vector<NormalizerStep> steps_;
};

}  // namespace gircse::core
