#include "batch_planner.h"

#include <doctest/doctest.h>

#include <vector>

using gircse::core::length_buckets;
using gircse::core::pad_batch;
using gircse::core::TokenIds;

using Buckets = std::vector<std::vector<std::size_t>>;

static std::vector<TokenIds> prompts(const std::vector<std::size_t> &lengths) {
  std::vector<TokenIds> result;
  for (const std::size_t length : lengths) result.emplace_back(length, 1);
  return result;
}

TEST_CASE("prompts of similar length run together, longest first, equal ones in order") {
  CHECK(length_buckets(prompts({2, 5, 2, 9, 5}), 2, 100) == Buckets{{3, 1}, {4, 0}, {2}});
  CHECK(length_buckets(prompts({1, 1, 1}), 32, 4096) == Buckets{{0, 1, 2}});
  CHECK(length_buckets({}, 32, 4096).empty());
}

TEST_CASE("a budget counts the padding, and one prompt may exceed it") {
  CHECK(length_buckets(prompts({4, 3, 3, 9}), 32, 8) == Buckets{{3}, {0, 1}, {2}});
  CHECK(length_buckets(prompts({4, 3}), 32, 1) == Buckets{{0}, {1}});
  CHECK(length_buckets(prompts({4, 3}), SIZE_MAX, SIZE_MAX) == Buckets{{0, 1}});
}

TEST_CASE("prompts are padded on the left") {
  const auto batch = pad_batch({2, 0}, {{7, 8}, {9}, {4, 5, 6}}, 3);
  CHECK(batch.size() == 2);
  CHECK(batch.tokens == 3);
  CHECK(batch.input_ids == std::vector<std::int64_t>{4, 5, 6, 3, 7, 8});
  CHECK(batch.attention_mask == std::vector<std::int64_t>{1, 1, 1, 0, 1, 1});
}
