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

// What a batch may be, and what one costs: maximum prompts, maximum tokens with the padding (a prompt that alone has more
// is a batch of its own), and the tokens of padding that take as long as one more batch.
struct BatchLimits {
  std::size_t size;
  std::size_t tokens;
  std::size_t cost;
};

// Tokens that a processor computes while it reads all weights once more, which each pass of a batch does. Measured on a
// CPU; from the data sheets of GPUs.
constexpr std::size_t kPassTokens = 18;
constexpr std::size_t kPassTokensGpu = 256;

// Groups prompts of similar length, longest first, so that padding and batches together cost least. Prompts of equal
// length keep their order.
std::vector<std::vector<std::size_t>> plan_batches(const std::vector<TokenIds> &prompts, const BatchLimits &limits);

// The maximum prompts of a batch with which each of so many streams has its share; no batch is divided below 8 prompts,
// because each part reads all weights.
std::size_t stream_batch_size(std::size_t prompts, std::size_t batch_size, std::size_t streams);

// Pads the prompts at `rows` to the longest of them.
TokenBatch pad_batch(std::vector<std::size_t> rows, const std::vector<TokenIds> &prompts, std::int64_t pad_token_id);

}  // namespace gircse::core
