// The golden texts of a bundle, and how far a runtime is from the vectors that PyTorch gave them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "bundle.h"
#include "numerics.h"
#include "prompt_tokenizer.h"

namespace gircse::core {

struct GoldenPrompt {
  std::string instruction;
  std::string text;
  std::vector<std::int64_t> token_ids;
};

// Reads golden.json; throws Error where the bundle has none, or it is damaged.
std::vector<GoldenPrompt> read_golden_prompts(const Bundle &bundle);

// Reads golden.safetensors: h_0 normalized and z_1..z_K of every golden prompt.
StepVectors read_golden_vectors(const Bundle &bundle, std::size_t prompts);

// Compares the token ids of the golden texts here with those of the export; without golden texts does nothing. Another
// tokenizer, or another prompt template, gives other vectors without an error.
void check_golden_tokens(const Bundle &bundle, const PromptTokenizer &tokenizer);

struct SelfTest {
  std::size_t texts = 0;
  double limit = 0;  // smallest cosine that passes
  double min_cosine = 0;
  double max_difference = 0;
  std::size_t worst_step = 0;
  std::size_t worst_text = 0;

  bool passed() const { return min_cosine >= limit; }  // NaN fails
};

// Compares vectors row by row. The worst step is the first one with a vector below the limit, or that with the smallest
// cosine.
SelfTest compare_with_golden(const StepVectors &ours, const StepVectors &golden, double limit);

}  // namespace gircse::core
