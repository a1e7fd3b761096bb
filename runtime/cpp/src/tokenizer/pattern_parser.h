// Reads the source of a regular expression.
#pragma once

#include <string_view>
#include <vector>

#include "tokenizer/pattern.h"

namespace gircse::core {

// Returns the alternatives. Throws std::runtime_error with what is not supported or not valid, and where.
std::vector<PatternSequence> parse_pattern(std::string_view source);

// The fewest code points that a sequence matches.
std::uint64_t least_size(const PatternSequence &sequence);

}  // namespace gircse::core
