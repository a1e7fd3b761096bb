#include "batch_planner.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <utility>

namespace gircse::core {

std::vector<std::vector<std::size_t>> plan_batches(const std::vector<TokenIds> &prompts, const BatchLimits &limits) {
  std::vector<std::size_t> order(prompts.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return prompts[a].size() > prompts[b].size(); });
  // Of the first n prompts: their least cost, and where their last batch begins.
  std::vector<std::size_t> least(order.size() + 1, std::numeric_limits<std::size_t>::max());
  std::vector<std::size_t> begins(order.size() + 1, 0);
  least[0] = 0;
  for (std::size_t begin = 0; begin < order.size(); ++begin) {
    const std::size_t longest = prompts[order[begin]].size();
    const std::size_t fitting = std::max<std::size_t>(1, limits.tokens / longest);
    const std::size_t end = begin + std::min({limits.size, fitting, order.size() - begin});
    for (std::size_t next = begin + 1; next <= end; ++next) {
      const std::size_t cost = least[begin] + limits.cost + (next - begin) * longest;
      if (cost < least[next]) least[next] = cost, begins[next] = begin;
    }
  }
  std::vector<std::vector<std::size_t>> batches;
  const auto at = [&](std::size_t n) { return order.begin() + static_cast<std::ptrdiff_t>(n); };
  for (std::size_t end = order.size(); end > 0; end = begins[end]) batches.emplace_back(at(begins[end]), at(end));
  std::reverse(batches.begin(), batches.end());
  return batches;
}

std::size_t stream_batch_size(std::size_t prompts, std::size_t batch_size, std::size_t streams) {
  constexpr std::size_t kStreamRows = 8;
  if (streams == 1) return batch_size;
  const auto ceil = [](std::size_t a, std::size_t b) { return a / b + (a % b != 0 ? 1 : 0); };
  const std::size_t of_a_stream = ceil(prompts, streams);
  const std::size_t batches = std::max<std::size_t>(1, ceil(of_a_stream, batch_size));
  return std::min(batch_size, std::max(kStreamRows, ceil(of_a_stream, batches)));
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
