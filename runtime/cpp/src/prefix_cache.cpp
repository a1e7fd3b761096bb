#include "prefix_cache.h"

#include <algorithm>

namespace gircse::core {
namespace {

// Tokens that a call has to save for a beginning to be computed on its own, which is a pass over all weights.
constexpr std::size_t kWorthTokens = 24;

// Tokens of an instruction that is always computed on its own: the next call, too, will begin with it.
constexpr std::size_t kWorthInstruction = 8;

std::size_t bytes_of(const KeysAndValues &values) {
  std::size_t bytes = 0;
  for (const auto &value : values) bytes += value.size();
  return bytes;
}

}  // namespace

std::size_t common_length(const std::vector<TokenIds> &prompts) {
  // In the order of vectors, all others lie between the first and the last.
  const auto [first, last] = std::minmax_element(prompts.begin(), prompts.end());
  const auto end = std::mismatch(first->begin(), first->end(), last->begin(), last->end()).first;
  return static_cast<std::size_t>(end - first->begin());
}

std::optional<Prefix> PrefixCache::choose(const PrefixSession &session, const std::vector<TokenIds> &prompts,
                                          std::size_t fixed) {
  std::size_t shortest = prompts.front().size();
  for (const TokenIds &prompt : prompts) shortest = std::min(shortest, prompt.size());
  std::size_t tokens = std::min(common_length(prompts), shortest - 1);  // a prompt needs a token of its own
  if (fixed > 0) tokens = std::min(tokens, fixed);  // what else these share is of no use to the next call
  const bool is_instruction = tokens >= kWorthInstruction && tokens <= fixed;
  if ((prompts.size() - 1) * tokens < kWorthTokens && !is_instruction) return std::nullopt;
  const TokenIds beginning(prompts.front().begin(), prompts.front().begin() + static_cast<std::ptrdiff_t>(tokens));
  std::shared_ptr<const KeysAndValues> found = find(beginning);
  if (!found) {
    found = std::make_shared<const KeysAndValues>(session.compute_prefix(beginning));
    keep(beginning, found);
  }
  return Prefix{tokens, std::move(found)};
}

std::shared_ptr<const KeysAndValues> PrefixCache::find(const TokenIds &beginning) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found =
      std::find_if(kept_.begin(), kept_.end(), [&](const Entry &entry) { return entry.first == beginning; });
  if (found == kept_.end()) return nullptr;
  kept_.splice(kept_.begin(), kept_, found);
  return found->second;
}

void PrefixCache::keep(const TokenIds &beginning, const std::shared_ptr<const KeysAndValues> &values) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const Entry &entry : kept_) {
    if (entry.first == beginning) return;  // of another thread
  }
  kept_.emplace_front(beginning, values);
  bytes_ += bytes_of(*values);
  while (bytes_ > max_bytes_) {
    bytes_ -= bytes_of(*kept_.back().second);
    kept_.pop_back();
  }
}

}  // namespace gircse::core
