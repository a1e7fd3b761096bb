// From texts to the token ids that the graphs see: prompt template, suffix, tokens, truncation.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "bundle.h"
#include "tokenizer/tokenizer.h"

namespace gircse::core {

// How texts become prompts; the fields are those of gircse_encode_options.
struct PromptOptions {
  std::string_view instruction;
  std::optional<std::string_view> prompt;
  bool refuse_overflow = false;
  std::size_t first_text = 0;
};

struct TokenizedTexts {
  std::vector<std::vector<std::int64_t>> ids;
  std::size_t truncated = 0;
};

class PromptTokenizer {
 public:
  // Reads the tokenizer of a bundle; throws Error where it cannot be read, or has a part that libgircse does not know.
  explicit PromptTokenizer(const Bundle &bundle);

  // Token ids of each text; an empty prompt is the single padding token. Throws Error for a text that is not UTF-8,
  // and, with refuse_overflow, for one that is too long.
  TokenizedTexts tokenize(const std::vector<std::string_view> &texts, const PromptOptions &options) const;

 private:
  void truncate(TokenizedTexts &texts, const PromptOptions &options) const;
  std::vector<std::int64_t> prompt_ids(std::string_view text, const PromptOptions &options) const;
  std::string format_prompt(std::string_view text, const PromptOptions &options) const;

  Tokenizer tokenizer_;
  std::string before_text_;
  std::string after_text_;
  std::string suffix_;
  std::int64_t pad_token_id_;
  std::size_t max_tokens_;
  bool truncate_left_;
};

}  // namespace gircse::core
