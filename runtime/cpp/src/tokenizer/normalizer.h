// What is done to a text before it is split into words.
#pragma once

#include <memory>
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

class Normalizer {
 public:
  explicit Normalizer(std::vector<NormalizerStep> steps) : steps_(std::move(steps)) {}

  bool empty() const { return steps_.empty(); }

  // The normalized text: the text itself where nothing changes, else one that `memory` holds.
  std::string_view apply(std::string_view text, std::string &memory) const;

 private:
  std::vector<NormalizerStep> steps_;
};

}  // namespace gircse::core
