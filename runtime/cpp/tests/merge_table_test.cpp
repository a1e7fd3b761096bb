#include "tokenizer/merge_table.h"

#include <doctest/doctest.h>

#include <cstdint>
#include <random>
#include <vector>

using gircse::core::Merge;
using gircse::core::MergeTable;
using Symbols = std::vector<std::uint32_t>;

static Symbols merged(const MergeTable &table, Symbols symbols) {
  table.apply(symbols);
  return symbols;
}

// Merges a pair at a time, the best one and of several the first: what byte-pair encoding is.
static Symbols merged_slowly(const MergeTable &table, Symbols symbols) {
  while (true) {
    Merge best;
    std::size_t at = 0;
    for (std::size_t i = 0; i + 1 < symbols.size(); ++i) {
      const Merge merge = table.find(symbols[i], symbols[i + 1]);
      if (merge.rank < best.rank) best = merge, at = i;
    }
    if (best.rank == Merge::kNoRank) return symbols;
    symbols[at] = best.product;
    symbols.erase(symbols.begin() + static_cast<std::ptrdiff_t>(at) + 1);
  }
}

TEST_CASE("Words of any length merge as if one pair at a time") {
  std::mt19937 generator(1);
  const auto below = [&generator](std::uint32_t limit) { return static_cast<std::uint32_t>(generator() % limit); };
  MergeTable table(60);
  constexpr std::uint32_t kCharacters = 4;
  for (std::uint32_t rank = 0; rank < 60; ++rank) {
    const std::uint32_t known = kCharacters + rank;
    table.add(below(known), below(known), {rank, known});
  }
  for (const std::size_t size : {0U, 1U, 2U, 5U, 31U, 32U, 33U, 34U, 100U, 700U}) {
    Symbols word(size);
    for (std::uint32_t &symbol : word) symbol = below(kCharacters);
    CHECK(merged(table, word) == merged_slowly(table, word));
  }
}

TEST_CASE("A pair that comes twice has its last rank") {
  MergeTable table(4);
  table.add(0, 1, {0, 10});
  table.add(1, 2, {1, 11});
  CHECK(merged(table, {0, 1, 2}) == Symbols{10, 2});
  table.add(0, 1, {2, 10});
  CHECK(merged(table, {0, 1, 2}) == Symbols{0, 11});
}

TEST_CASE("Without merges, nothing changes") { CHECK(merged(MergeTable(0), {7, 8, 9}) == Symbols{7, 8, 9}); }
