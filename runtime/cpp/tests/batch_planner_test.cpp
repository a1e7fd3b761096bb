#include "batch_planner.h"

#include <doctest/doctest.h>

#include <vector>

using gircse::core::pad_batch;
using gircse::core::plan_batches;
using gircse::core::stream_batch_size;
using gircse::core::TokenIds;

using Batches = std::vector<std::vector<std::size_t>>;

static std::vector<TokenIds> prompts(const std::vector<std::size_t> &lengths) {
  std::vector<TokenIds> result;
  for (const std::size_t length : lengths) result.emplace_back(length, 1);
  return result;
}

TEST_CASE("prompts of similar length run together, longest first, equal ones in order") {
  CHECK(plan_batches(prompts({2, 5, 2, 9, 5}), {2, 100, 9}) == Batches{{3}, {1, 4}, {0, 2}});
  CHECK(plan_batches(prompts({1, 1, 1}), {32, 4096, 9}) == Batches{{0, 1, 2}});
  CHECK(plan_batches({}, {32, 4096, 9}).empty());
}

TEST_CASE("a budget counts the padding, and one prompt may exceed it") {
  CHECK(plan_batches(prompts({4, 3, 3, 9}), {32, 8, 9}) == Batches{{3}, {0}, {1, 2}});
  CHECK(plan_batches(prompts({4, 3}), {32, 1, 9}) == Batches{{0}, {1}});
  CHECK(plan_batches(prompts({4, 3}), {SIZE_MAX, SIZE_MAX, 9}) == Batches{{0, 1}});
}

TEST_CASE("a batch is divided where its padding costs more than another batch") {
  CHECK(plan_batches(prompts({10, 4, 4, 4}), {32, 100, 17}) == Batches{{0}, {1, 2, 3}});
  CHECK(plan_batches(prompts({10, 4, 4, 4}), {32, 100, 19}) == Batches{{0, 1, 2, 3}});
}

TEST_CASE("every stream has its share of the prompts") {
  CHECK(stream_batch_size(500, 32, 1) == 32);
  CHECK(stream_batch_size(0, 32, 4) == 8);
  CHECK(stream_batch_size(20, 32, 2) == 10);
  CHECK(stream_batch_size(65, 32, 2) == 17);
  CHECK(stream_batch_size(64, 32, 16) == 8);
  CHECK(stream_batch_size(64, 3, 2) == 3);
  CHECK(stream_batch_size(64, SIZE_MAX, SIZE_MAX) == 8);
}

TEST_CASE("prompts are padded on the left") {
  const auto batch = pad_batch({2, 0}, {{7, 8}, {9}, {4, 5, 6}}, 3);
  CHECK(batch.size() == 2);
  CHECK(batch.tokens == 3);
  CHECK(batch.input_ids == std::vector<std::int64_t>{4, 5, 6, 3, 7, 8});
  CHECK(batch.attention_mask == std::vector<std::int64_t>{1, 1, 1, 0, 1, 1});
}
