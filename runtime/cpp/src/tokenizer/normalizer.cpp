#include "tokenizer/normalizer.h"

#include <optional>

#include "tokenizer/nfc.h"

namespace gircse::core {

namespace {

// Each returns the changed text, or nothing where it stays as it is.

std::optional<std::string> changed(const NfcStep &, std::string_view text) {
  if (plainly_nfc(text)) return std::nullopt;
  return nfc(text);
}

std::optional<std::string> changed(const PrependStep &step, std::string_view text) {
  if (text.empty()) return std::nullopt;
  return step.text + std::string(text);
}

std::optional<std::string> changed(const ReplaceStep &step, std::string_view text) {
  std::string out;
  out.reserve(text.size() + text.size() / 2);
  step.pattern.split(text, [&](std::size_t begin, std::size_t end, bool is_match) {
    out += is_match ? std::string_view(step.content) : text.substr(begin, end - begin);
  });
  return out;
}

}  // namespace

std::string_view Normalizer::apply(std::string_view text, std::string &memory) const {
  for (const NormalizerStep &step : steps_) {
    std::optional<std::string> next = std::visit([text](const auto &known) { return changed(known, text); }, step);
    if (!next) continue;
    memory = std::move(*next);
    text = memory;
  }
  return text;
}

}  // namespace gircse::core
