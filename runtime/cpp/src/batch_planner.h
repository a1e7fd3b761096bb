// Which prompts run together, and their padded arrays.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace gircse::core {

using TokenIds = std::vector<std::int64_t>;

// Prompts that are embedded together: `rows` are their positions in the caller's order; both arrays are (batch,
// tokens), padded on the left, the mask is 1 for a real token.
struct TokenBatch {
  std::vector<std::size_t> rows;
  std::size_t tokens = 0;
  std::vector<std::int64_t> input_ids;
  std::vector<std::int64_t> attention_mask;

  std::size_t size() const noexcept { return rows.size(); }
};

// Groups prompts of similar length, longest first, under a limit of rows and a budget of padded tokens; a prompt that
// alone exceeds the budget is a batch of its own. Prompts of equal length keep their order.
std::vector<std::vector<std::size_t>> length_buckets(const std::vector<TokenIds> &prompts, std::size_t batch_size,
                                                     std::size_t batch_tokens);

// Pads the prompts at `rows` to the longest of them.
TokenBatch pad_batch(std::vector<std::size_t> rows, const std::vector<TokenIds> &prompts, std::int64_t pad_token_id);

}  // namespace gircse::core
