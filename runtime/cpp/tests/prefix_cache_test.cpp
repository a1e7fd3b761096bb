#include "prefix_cache.h"

#include <doctest/doctest.h>

#include <numeric>

using gircse::core::common_length;
using gircse::core::KeysAndValues;
using gircse::core::PrefixCache;
using gircse::core::PrefixSession;
using gircse::core::TokenIds;

namespace {

// Makes one byte a token, and counts.
class CountingSession : public PrefixSession {
 public:
  KeysAndValues compute_prefix(const TokenIds &ids) const override {
    ++computed;
    return {std::vector<unsigned char>(ids.begin(), ids.end())};
  }

  mutable int computed = 0;
};

TokenIds prompt(std::int64_t start, std::size_t tokens, std::int64_t last) {
  TokenIds ids(tokens);
  std::iota(ids.begin(), ids.end(), start);
  ids.push_back(last);
  return ids;
}

}  // namespace

TEST_CASE("many prompts share what they begin with") {
  CountingSession session;
  PrefixCache cache;
  const auto prefix = cache.choose(session, {prompt(0, 20, 30), prompt(0, 20, 31), prompt(0, 20, 30)}, 0);
  REQUIRE(prefix);
  CHECK(prefix->tokens == 20);
  CHECK(prefix->values->front().size() == 20);
  CHECK(session.computed == 1);
}

TEST_CASE("what saves too little is run whole") {
  CountingSession session;
  PrefixCache cache;
  CHECK(!cache.choose(session, {{1, 2, 3}}, 0));
  CHECK(!cache.choose(session, {{1, 2}, {2, 3}}, 0));
  CHECK(!cache.choose(session, {{1, 2}, {2, 3}}, 2));
  CHECK(!cache.choose(session, {{7}, {7}}, 1));
  CHECK(!cache.choose(session, {prompt(0, 23, 98), prompt(0, 23, 99)}, 0));
  CHECK(!cache.choose(session, {prompt(0, 7, 99)}, 7));
  CHECK(session.computed == 0);
}

TEST_CASE("the least that is worth it") {
  CountingSession session;
  PrefixCache cache;
  CHECK(cache.choose(session, {prompt(0, 24, 98), prompt(0, 24, 99)}, 0)->tokens == 24);
  CHECK(cache.choose(session, {prompt(0, 8, 99)}, 8)->tokens == 8);
}

TEST_CASE("an instruction is computed with the first prompt, and kept for the next") {
  CountingSession session;
  PrefixCache cache;
  for (const std::int64_t text : {97, 98, 99}) CHECK(cache.choose(session, {prompt(0, 8, text)}, 8)->tokens == 8);
  CHECK(session.computed == 1);
}

TEST_CASE("a prompt keeps a token of its own") {
  CountingSession session;
  PrefixCache cache;
  const auto prefix = cache.choose(session, {prompt(0, 39, 39), prompt(0, 40, 50)}, 40);  // one is the instruction
  REQUIRE(prefix);
  CHECK(prefix->tokens == 39);
  CHECK(session.computed == 1);
}

TEST_CASE("what was not used for longest is given up") {
  CountingSession session;
  PrefixCache cache(80);
  const auto use = [&](std::int64_t start) {
    CHECK(cache.choose(session, {prompt(start, 40, 1), prompt(start, 40, 2)}, 0));
  };
  for (const std::int64_t start : {10, 60, 10, 110}) use(start);
  CHECK(session.computed == 3);
  use(10);
  CHECK(session.computed == 3);
  use(60);
  CHECK(session.computed == 4);
  CHECK(cache.choose(session, {prompt(0, 200, 1), prompt(0, 200, 2)}, 0)->tokens == 200);  // used once, not kept
  use(60);
  CHECK(session.computed == 6);
}

TEST_CASE("common beginnings") {
  CHECK(common_length({{1, 2, 3}}) == 3);
  CHECK(common_length({{1, 2}, {1, 2, 3}}) == 2);
  CHECK(common_length({{1, 5}, {1, 2, 3}, {1, 5, 9}}) == 1);
  CHECK(common_length({{2}, {1}}) == 0);
}
