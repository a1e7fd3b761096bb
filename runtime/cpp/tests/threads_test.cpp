// Several threads on one embedder, for the sanitizers: GIRCSE_TEST_BUNDLE names a bundle, GIRCSE_ONNXRUNTIME the library.
#include <doctest/doctest.h>
#include <gircse/gircse.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

namespace {

constexpr std::array<std::string_view, 4> kTexts = {"how do I reset the card", "", "ünïcödé 😀",
                                                    "the small bird sings"};

// Calls a function that returns an error, and gives its code.
gircse_code code_of(gircse_error *error) {
  const gircse_code code = gircse_error_code(error);
  if (code != GIRCSE_OK && code != GIRCSE_ERROR_CLOSED) MESSAGE(gircse_error_message(error));
  gircse_error_free(error);
  return code;
}

// NULL where the bundle cannot be opened: a thread must not throw.
gircse_embedder *open_bundle(int verify, std::size_t streams = 1) {
  gircse_open_options options;
  gircse_open_options_init(&options, sizeof options);
  options.threads = 1;
  options.verify = verify;
  options.streams = streams;
  gircse_embedder *embedder = nullptr;
  CHECK(code_of(gircse_open(std::getenv("GIRCSE_TEST_BUNDLE"), &options, &embedder)) == GIRCSE_OK);
  return embedder;
}

std::size_t dimension_of(const gircse_embedder *embedder) {
  gircse_description description{};
  description.size = sizeof description;
  REQUIRE(code_of(gircse_describe(embedder, &description)) == GIRCSE_OK);
  return description.dimension;
}

gircse_code encode(const gircse_embedder *embedder, std::vector<float> &vectors, std::size_t batch_size = 32) {
  std::vector<gircse_text> texts;
  for (const std::string_view text : kTexts) texts.push_back({text.data(), text.size()});
  gircse_encode_options options;
  gircse_encode_options_init(&options, sizeof options);
  options.batch_size = batch_size;
  return code_of(
      gircse_encode(embedder, texts.data(), texts.size(), &options, vectors.data(), vectors.size(), nullptr));
}

bool has_bundle() {
  if (std::getenv("GIRCSE_TEST_BUNDLE") != nullptr) return true;
  MESSAGE("skipped: GIRCSE_TEST_BUNDLE does not name a bundle");
  return false;
}

template <class Work>
void in_threads(int count, Work work) {
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) threads.emplace_back(work);
  for (std::thread &thread : threads) thread.join();
}

}  // namespace

TEST_CASE("threads share an embedder and get the vectors of one thread") {
  if (!has_bundle()) return;
  gircse_embedder *embedder = open_bundle(1);
  REQUIRE(embedder != nullptr);
  std::vector<float> expected(kTexts.size() * dimension_of(embedder));
  REQUIRE(encode(embedder, expected) == GIRCSE_OK);
  std::atomic<int> wrong{0};
  in_threads(4, [&] {
    for (int round = 0; round < 3; ++round) {
      std::vector<float> vectors(expected.size());
      if (encode(embedder, vectors) != GIRCSE_OK || vectors != expected) ++wrong;
    }
    gircse_self_test_report report{};
    report.size = sizeof report;
    if (code_of(gircse_self_test(embedder, &report)) != GIRCSE_OK) ++wrong;
  });
  CHECK(wrong == 0);
  gircse_close(embedder);
}

TEST_CASE("streams give the vectors of one stream") {
  if (!has_bundle()) return;
  gircse_embedder *one = open_bundle(0), *three = open_bundle(0, 3);
  REQUIRE(one != nullptr);
  REQUIRE(three != nullptr);
  std::vector<float> expected(kTexts.size() * dimension_of(one)), vectors(expected.size());
  REQUIRE(encode(one, expected, 1) == GIRCSE_OK);
  for (int round = 0; round < 3; ++round) {
    REQUIRE(encode(three, vectors, 1) == GIRCSE_OK);
    CHECK(vectors == expected);
  }
  gircse_close(one);
  gircse_close(three);
}

TEST_CASE("threads may open bundles at the same time") {
  if (!has_bundle()) return;
  in_threads(4, [] { gircse_close(open_bundle(0)); });
}

TEST_CASE("an embedder is closed while threads encode") {
  if (!has_bundle()) return;
  gircse_embedder *embedder = open_bundle(0);
  REQUIRE(embedder != nullptr);
  const std::size_t floats = kTexts.size() * dimension_of(embedder);
  std::atomic<int> running{0}, closed{0};
  std::thread closing([&] {
    while (running < 4) std::this_thread::yield();
    gircse_close(embedder);
  });
  in_threads(4, [&] {
    std::vector<float> vectors(floats);
    gircse_code code = encode(embedder, vectors);
    ++running;
    while (code == GIRCSE_OK) code = encode(embedder, vectors);
    if (code == GIRCSE_ERROR_CLOSED) ++closed;
  });
  closing.join();
  CHECK(closed == 4);
}

TEST_CASE("faults from several threads") {
  in_threads(4, [] {
    for (int round = 0; round < 100; ++round) {
      gircse_embedder *embedder = nullptr;
      gircse_error *error = gircse_open("no bundle", nullptr, &embedder);
      CHECK(gircse_error_code(error) == GIRCSE_ERROR_BUNDLE);
      CHECK(std::string(gircse_error_message(error)).find("no bundle is not a bundle; it has no gircse.json") == 0);
      gircse_error_free(error);
      gircse_close(embedder);
    }
  });
}
