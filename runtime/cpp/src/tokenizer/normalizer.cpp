#include "tokenizer/normalizer.h"

#include <algorithm>

#include "tokenizer/code_points.h"
#include "tokenizer/nfc.h"

namespace gircse::core {

namespace {

constexpr std::size_t kStepsPerByte = 16;  // of what is added: a hostile tokenizer could make a text of any size

// Each changes the text in `memory` and returns what it is then, or the text that it was given.

Normalized changed(const NfcStep &, Normalized given, StepBudget &, std::string &memory) {
  if (plainly_nfc(given.text)) return given;
  memory = nfc(given.text);
  return {memory, given.start};
}

Normalized changed(const PrependStep &step, Normalized given, StepBudget &budget, std::string &memory) {
  if (given.text.empty()) return given;
  budget.spend(kStepsPerByte * step.text.size());
  memory = step.text + std::string(given.text);
  return {memory, given.start == 0 ? 0 : given.start + step.text.size()};
}

Normalized changed(const ReplaceStep &step, Normalized given, StepBudget &budget, std::string &memory) {
  std::string out;
  out.reserve(given.text.size() + given.text.size() / 2);
  std::size_t start = 0;
  step.pattern.split(given.text, budget, [&](std::size_t begin, std::size_t end, bool is_match) {
    if (is_match) budget.spend(kStepsPerByte * step.content.size());
    out += is_match ? std::string_view(step.content) : given.text.substr(begin, end - begin);
    if (is_match && end <= given.start) start += step.content.size();
    if (!is_match && begin < given.start) start += std::min(end, given.start) - begin;
  });
  memory = std::move(out);
  return {memory, start};
}

}  // namespace

Normalized Normalizer::apply(std::string_view text, StepBudget &budget, std::string &memory) const {
  Normalized normalized{text, text.empty() ? 0 : code_point_at(text, 0).size};
  for (const NormalizerStep &step : steps_) {
    normalized = std::visit([&](const auto &known) { return changed(known, normalized, budget, memory); }, step);
  }
  return normalized;
}

}  // namespace gircse::core
