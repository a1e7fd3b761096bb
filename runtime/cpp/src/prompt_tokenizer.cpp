#include "prompt_tokenizer.h"

#include <algorithm>
#include <stdexcept>

#include "error.h"
#include "utf8.h"

namespace gircse::core {
namespace {

Tokenizer load_tokenizer(const Bundle &bundle) {
  const std::string content = bundle.read("tokenizer.json");
  try {
    return Tokenizer(content);
  } catch (const std::runtime_error &err) {
    throw Error(GIRCSE_ERROR_BUNDLE, bundle.file("tokenizer.json").string(),
                std::string("is not a tokenizer.json that libgircse reads: ") + err.what(), std::nullopt,
                "If the Python runtime reads it, use that one for this bundle.");
  }
}

void check_text(const std::string &where, std::string_view text) {
  if (const std::optional<Utf8Fault> fault = find_utf8_fault(text)) {
    throw Error(GIRCSE_ERROR_OPTION, where,
                std::string("is not UTF-8: ") + fault->reason + " at byte " + std::to_string(fault->offset),
                std::nullopt, "Repair the text.");
  }
}

// Refuses options that contradict each other or are not UTF-8.
void check_options(const PromptOptions &options) {
  check_text("instruction", options.instruction);
  check_text("prompt", options.prompt.value_or(""));
  if (!options.instruction.empty() && options.prompt) {
    throw Error(GIRCSE_ERROR_OPTION, "instruction",
                "is " + in_quotes(options.instruction) + " and prompt is " + in_quotes(*options.prompt),
                "only one of them can be given", "Use instruction, which the model was trained with.");
  }
}

std::string name_of(std::size_t row, const PromptOptions &options) {
  return "texts[" + std::to_string(options.first_text + row) + "]";
}

std::string replaced(std::string text, std::string_view what, std::string_view with) {
  for (std::size_t at = text.find(what); at != text.npos; at = text.find(what, at + with.size())) {
    text.replace(at, what.size(), with);
  }
  return text;
}

}  // namespace

PromptTokenizer::PromptTokenizer(const Bundle &bundle)
    : tokenizer_(load_tokenizer(bundle)),
      suffix_(bundle.manifest().prompt_suffix),
      pad_token_id_(bundle.manifest().pad_token_id),
      max_tokens_(static_cast<std::size_t>(bundle.manifest().graph.max_tokens)),
      truncate_left_(bundle.manifest().truncate_left) {
  const std::string &form = bundle.manifest().prompt_template;
  const std::size_t at = form.find("{text}");
  before_text_ = form.substr(0, at);
  after_text_ = form.substr(at + std::string_view("{text}").size());
}

TokenizedTexts PromptTokenizer::tokenize(const std::vector<std::string_view> &texts,
                                         const PromptOptions &options) const {
  check_options(options);
  for (std::size_t row = 0; row < texts.size(); ++row) check_text(name_of(row, options), texts[row]);
  TokenizedTexts result;
  result.ids.reserve(texts.size());
  for (const std::string_view text : texts) result.ids.push_back(prompt_ids(text, options));
  truncate(result, options);
  return result;
}

void PromptTokenizer::truncate(TokenizedTexts &texts, const PromptOptions &options) const {
  const auto too_long = [this](const std::vector<std::int64_t> &ids) { return ids.size() > max_tokens_; };
  const auto first = std::find_if(texts.ids.begin(), texts.ids.end(), too_long);
  texts.truncated = static_cast<std::size_t>(std::count_if(first, texts.ids.end(), too_long));
  if (texts.truncated > 0 && options.refuse_overflow) {
    const std::string more = texts.truncated > 1 ? ", and " + std::to_string(texts.truncated - 1) + " more of these " +
                                                       std::to_string(texts.ids.size()) + " texts are too long"
                                                 : "";
    throw Error(GIRCSE_ERROR_OPTION, name_of(static_cast<std::size_t>(first - texts.ids.begin()), options),
                "has " + std::to_string(first->size()) + " tokens" + more,
                "the bundle takes at most " + std::to_string(max_tokens_) + ", the instruction included",
                "Shorten the texts, or allow truncation.");
  }
  for (std::vector<std::int64_t> &ids : texts.ids) {
    if (!too_long(ids)) continue;
    if (truncate_left_) ids.erase(ids.begin(), ids.end() - static_cast<std::ptrdiff_t>(max_tokens_));
    ids.resize(max_tokens_);
    ids.shrink_to_fit();
  }
}

std::vector<std::int64_t> PromptTokenizer::prompt_ids(std::string_view text, const PromptOptions &options) const {
  std::vector<std::uint32_t> ids;
  try {
    ids = tokenizer_.encode(format_prompt(text, options));
  } catch (const std::runtime_error &err) {
    throw Error(GIRCSE_ERROR_BUNDLE, "tokenizer.json", std::string("cannot tokenize a text: ") + err.what(),
                std::nullopt, "Export the bundle with a complete tokenizer.");
  }
  if (ids.empty()) return {pad_token_id_};
  return {ids.begin(), ids.end()};
}

// The prompt, when one is given; else, without instruction, the text alone.
std::string PromptTokenizer::format_prompt(std::string_view text, const PromptOptions &options) const {
  std::string prompt(options.prompt.value_or(""));
  if (options.instruction.empty()) return prompt.append(text) + suffix_;
  return replaced(before_text_, "{instruction}", options.instruction).append(text) + after_text_ + suffix_;
}

}  // namespace gircse::core
