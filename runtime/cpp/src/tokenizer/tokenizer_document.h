// A tokenizer.json as it was parsed: the vocabulary and the merges in compact form, all else as JSON.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string_view>
#include <vector>

#include "tokenizer/token_table.h"

namespace gircse::core {

struct TokenizerDocument {
  nlohmann::json rest;  // model.vocab and model.merges are `discarded` where they have the right type
  TokenTable vocabulary;
  std::vector<std::uint32_t> ids;  // of the vocabulary's strings
  StringList merges;               // two strings each
};

// Throws std::runtime_error where the text is not JSON, or its vocabulary or merges are not what they should be.
TokenizerDocument parse_document(std::string_view json);

}  // namespace gircse::core
