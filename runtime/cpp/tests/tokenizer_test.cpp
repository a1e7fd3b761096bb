#include "tokenizer/tokenizer.h"

#include <doctest/doctest.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

using gircse::core::Tokenizer;
using Ids = std::vector<std::uint32_t>;

// A tokenizer of a few characters; `more` is added at the top level.
static std::string document(const std::string &more) {
  return R"({"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, " ": 3, "abab": 4}, "merges": ["a b", "ab ab"]})" +
         more + "}";
}

static std::string added(const std::string &content, const std::string &flag) {
  std::string token = R"({"id": 9, "content": ")" + content + R"(", "special": true)";
  for (const std::string name : {"single_word", "lstrip", "rstrip", "normalized"}) {
    token += ", \"" + name + (name == flag ? "\": true" : "\": false");
  }
  return token + "}";
}

TEST_CASE("Characters without a token are left out, as in Hugging Face tokenizers") {
  const Tokenizer tokenizer(document(""));
  CHECK(tokenizer.encode("") == Ids{});
  CHECK(tokenizer.encode("aba") == Ids{2, 0});
  CHECK(tokenizer.encode(std::string("a\0b", 3)) == Ids{2});
}

TEST_CASE("A tokenizer that was moved works at its new place") {
  Tokenizer first(document(""));
  const Tokenizer second(std::move(first));
  CHECK(second.encode("abab") == Ids{4});
}

TEST_CASE("An added token in white space that another one has taken is an error") {
  const Tokenizer tokenizer(
      document(R"(, "added_tokens": [)" + added("a", "rstrip") + "," + added(" ", "lstrip") + "]"));
  CHECK(tokenizer.encode("ba") == Ids{1, 0});
  CHECK_THROWS_AS(tokenizer.encode("a  b"), std::runtime_error);
}

TEST_CASE("Normalizers that make a text of any size are an error") {
  std::string steps;
  for (int i = 0; i < 60; ++i) {
    steps += std::string(i == 0 ? "" : ",") + R"({"type": "Replace", "pattern": {"String": "a"}, "content": "aa"})";
  }
  const Tokenizer tokenizer(document(R"(, "normalizer": {"type": "Sequence", "normalizers": [)" + steps + "]}"));
  CHECK_THROWS_AS(tokenizer.encode("a"), std::runtime_error);
}

TEST_CASE("Several threads may use one tokenizer") {
  const Tokenizer tokenizer(document(R"(, "normalizer": {"type": "NFC"}, "added_tokens": [)" + added("b b", "") + "]"));
  const Ids expected = tokenizer.encode("abab b bab");
  std::vector<std::thread> threads;
  std::vector<Ids> found(4);
  for (Ids &ids : found) {
    threads.emplace_back([&] {
      for (int i = 0; i < 1000; ++i) ids = tokenizer.encode("abab b bab");
    });
  }
  for (std::thread &thread : threads) thread.join();
  for (const Ids &ids : found) CHECK(ids == expected);
}
