// What a tokenizer.json says, as far as it decides the token ids.
#pragma once

#include <string_view>
#include <vector>

#include "tokenizer/added_tokens.h"
#include "tokenizer/bpe.h"
#include "tokenizer/normalizer.h"
#include "tokenizer/pre_tokenizer.h"

namespace gircse::core {

struct TokenizerSpec {
  std::vector<AddedToken> added_tokens;
  std::vector<NormalizerStep> normalizer;
  std::vector<PreTokenizerStep> pre_tokenizer;
  bool byte_level = false;  // the last step writes bytes as characters
  BpeSpec model;
};

// Throws std::runtime_error with what is damaged or not supported.
TokenizerSpec read_tokenizer(std::string_view json);

}  // namespace gircse::core
