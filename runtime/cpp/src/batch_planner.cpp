#include "batch_planner.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace gircse::core {

std::vector<std::vector<std::size_t>> length_buckets(const std::vector<TokenIds> &prompts, std::size_t batch_size,
                                                     std::size_t batch_tokens) {
  std::vector<std::size_t> order(prompts.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return prompts[a].size() > prompts[b].size(); });
  std::vector<std::vector<std::size_t>> buckets;
  for (auto start = order.begin(); start != order.end();) {
    const std::size_t fitting = std::max<std::size_t>(1, batch_tokens / prompts[*start].size());
    const std::size_t left = static_cast<std::size_t>(order.end() - start);
    const auto end = start + static_cast<std::ptrdiff_t>(std::min({batch_size, fitting, left}));
    buckets.emplace_back(start, end);
    start = end;
  }
  return buckets;
}

TokenBatch pad_batch(std::vector<std::size_t> rows, const std::vector<TokenIds> &prompts, std::int64_t pad_token_id) {
  TokenBatch batch;
  for (const std::size_t row : rows) batch.tokens = std::max(batch.tokens, prompts[row].size());
  batch.input_ids.assign(rows.size() * batch.tokens, pad_token_id);
  batch.attention_mask.assign(rows.size() * batch.tokens, 0);
  std::size_t end = 0;
  for (const std::size_t row : rows) {
    end += batch.tokens;
    const auto offset = static_cast<std::ptrdiff_t>(end - prompts[row].size());
    std::copy(prompts[row].begin(), prompts[row].end(), batch.input_ids.begin() + offset);
    std::fill_n(batch.attention_mask.begin() + offset, prompts[row].size(), 1);
  }
  batch.rows = std::move(rows);
  return batch;
}

}  // namespace gircse::core
