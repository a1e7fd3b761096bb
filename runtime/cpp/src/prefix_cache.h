// Keys and values of what many prompts begin with, an instruction above all: computed once, kept between calls.
//
// The rules are those of runtime/prefix_cache.py, so both runtimes give the same vectors.
#pragma once

#include <cstddef>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "batch_planner.h"

namespace gircse::core {

// The bytes of the keys and values of some tokens, (tokens, kv) each, in the order of the graph's inputs.
using KeysAndValues = std::vector<std::vector<unsigned char>>;

// A beginning of prompts.
struct Prefix {
  std::size_t tokens;
  std::shared_ptr<const KeysAndValues> values;
};

class PrefixSession {
 public:
  virtual ~PrefixSession() = default;

  // The keys and values of the beginning of a prompt.
  virtual KeysAndValues compute_prefix(const TokenIds &ids) const = 0;
};

inline constexpr std::size_t kMaxPrefixBytes = std::size_t{256} << 20;

// Beginnings by their token ids, the least recently used given up first. Safe to call from several threads.
class PrefixCache {
 public:
  explicit PrefixCache(std::size_t max_bytes = kMaxPrefixBytes) : max_bytes_(max_bytes) {}

  // What the prompts of a call, at least one, should share; nothing where it would save too little. That depends on the
  // call alone, not on what is kept: the same call gives the same bits. For the same reason the first tokens of a longer
  // beginning are computed again. `fixed` is the number of tokens of the instruction, which further calls will begin
  // with too; 0 if there is none.
  std::optional<Prefix> choose(const PrefixSession &session, const std::vector<TokenIds> &prompts, std::size_t fixed);

 private:
  using Entry = std::pair<TokenIds, std::shared_ptr<const KeysAndValues>>;

  std::shared_ptr<const KeysAndValues> find(const TokenIds &beginning);
  void keep(const TokenIds &beginning, const std::shared_ptr<const KeysAndValues> &values);

  std::size_t max_bytes_;
  std::mutex mutex_;
  std::list<Entry> kept_;  // the one used last comes first
  std::size_t bytes_ = 0;
};

// How many tokens all prompts begin with.
std::size_t common_length(const std::vector<TokenIds> &prompts);

}  // namespace gircse::core
