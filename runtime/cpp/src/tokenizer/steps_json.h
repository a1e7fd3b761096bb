// Reads the normalizer and the pre-tokenizer of a tokenizer.json.
#pragma once

#include <nlohmann/json.hpp>

#include "tokenizer/spec.h"

namespace gircse::core {

// Each throws std::runtime_error with what is damaged or not supported; null is no step at all.

void read_normalizer(const nlohmann::json &object, TokenizerSpec &spec);

// To be called after the normalizer was read.
void read_pre_tokenizer(const nlohmann::json &object, TokenizerSpec &spec);

}  // namespace gircse::core
