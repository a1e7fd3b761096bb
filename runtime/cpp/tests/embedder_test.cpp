// The whole library on a real bundle, for the sanitizers; tests/runtime/cpp compares its results with Python's.
//
// GIRCSE_TEST_BUNDLE names the bundle, and GIRCSE_ONNXRUNTIME the library of ONNX Runtime.
#include <doctest/doctest.h>
#include <gircse/gircse.hpp>

#include <atomic>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

namespace {

const std::vector<std::string> kTexts = {"How do I reset my PIN?", "", std::string("a\0b", 3), "\xF0\x9F\x98\x80 text",
                                         "The cat sat on the mat, and then it slept for the whole of the afternoon."};

const char *bundle() {
  const char *path = std::getenv("GIRCSE_TEST_BUNDLE");
  if (path == nullptr) MESSAGE("not run: GIRCSE_TEST_BUNDLE does not name a bundle");
  return path;
}

template <class Work>
void run_in_threads(int count, const Work &work) {
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) threads.emplace_back(work);
  for (std::thread &thread : threads) thread.join();
}

}  // namespace

TEST_CASE("every way to embed gives the same vectors") {
  if (bundle() == nullptr) return;
  for (const char *layout : {"stepwise", "unrolled"}) {
    gircse::OpenOptions open;
    open.layout = layout;
    open.threads = 1;
    gircse::Embedder first(bundle(), open);
    const gircse::Embedder embedder = std::move(first);
    const std::size_t dimension = embedder.dimension();
    const auto steps = static_cast<std::size_t>(embedder.steps());

    gircse::EncodeOptions alone;
    alone.batch_size = 1;
    const std::vector<float> vectors = embedder.encode(kTexts, alone);
    REQUIRE(vectors.size() == kTexts.size() * dimension);

    alone.all_steps = true;
    const std::vector<float> every_step = embedder.encode(kTexts, alone);
    REQUIRE(every_step.size() == kTexts.size() * steps * dimension);
    for (std::size_t text = 0; text < kTexts.size(); ++text) {
      const float *last = every_step.data() + ((text + 1) * steps - 1) * dimension;
      CHECK(std::equal(last, last + dimension, vectors.data() + text * dimension));
    }
    CHECK(embedder.self_test().passed != 0);
  }
}

TEST_CASE("every text has tokens, an empty one too") {
  if (bundle() == nullptr) return;
  const gircse::Embedder embedder(bundle());
  const auto rows = embedder.tokenize(kTexts);
  REQUIRE(rows.size() == kTexts.size());
  for (const auto &row : rows) CHECK_FALSE(row.empty());
}

TEST_CASE("threads share an embedder") {
  if (bundle() == nullptr) return;
  gircse::OpenOptions options;
  options.threads = 1;
  const gircse::Embedder embedder(bundle(), options);
  const std::vector<float> expected = embedder.encode(kTexts);
  std::atomic<int> different{0};
  run_in_threads(4, [&] {
    for (int round = 0; round < 3; ++round) {
      if (embedder.encode(kTexts) != expected) ++different;
      if (embedder.tokenize(kTexts).size() != kTexts.size()) ++different;
    }
  });
  CHECK(different == 0);
}

TEST_CASE("an embedder is opened in several threads at once") {
  if (bundle() == nullptr) return;
  std::atomic<int> failed{0};
  run_in_threads(3, [&] {
    if (gircse::Embedder(bundle()).encode(kTexts).empty()) ++failed;
  });
  CHECK(failed == 0);
}

TEST_CASE("closing while others embed lets their calls finish and refuses later ones") {
  if (bundle() == nullptr) return;
  gircse_embedder *embedder = nullptr;
  REQUIRE(gircse_open(bundle(), nullptr, &embedder) == nullptr);
  gircse_description description{};
  description.size = sizeof description;
  REQUIRE(gircse_describe(embedder, &description) == nullptr);
  const std::size_t dimension = description.dimension;
  const gircse_text text = {"a text", 6};
  std::atomic<int> done{0};
  std::atomic<int> refused{0};
  std::atomic<int> wrong{0};
  const auto embed_until_closed = [&] {
    std::vector<float> vector(dimension);
    for (;;) {
      gircse_error *error = gircse_encode(embedder, &text, 1, nullptr, vector.data(), vector.size(), nullptr);
      const gircse_code code = gircse_error_code(error);
      gircse_error_free(error);
      if (code == GIRCSE_OK) {
        ++done;
        continue;
      }
      code == GIRCSE_ERROR_CLOSED ? ++refused : ++wrong;
      return;
    }
  };
  std::thread closer([&] {
    while (done < 5) std::this_thread::yield();
    gircse_close(embedder);
    gircse_close(embedder);
  });
  run_in_threads(3, embed_until_closed);
  closer.join();
  CHECK(refused == 3);
  CHECK(wrong == 0);
}

TEST_CASE("errors carry a code and a message") {
  gircse_error *error = gircse_open("no/such/bundle", nullptr, nullptr);
  CHECK(gircse_error_code(error) == GIRCSE_ERROR_OPTION);
  gircse_error_free(error);
  gircse_embedder *embedder = nullptr;
  error = gircse_open("no/such/bundle", nullptr, &embedder);
  CHECK(gircse_error_code(error) == GIRCSE_ERROR_BUNDLE);
  CHECK(std::string(gircse_error_message(error)).find("no/such/bundle is not a bundle") == 0);
  gircse_error_free(error);
  gircse_error_free(nullptr);
  CHECK(gircse_error_code(nullptr) == GIRCSE_OK);
  CHECK(std::string(gircse_error_message(nullptr)).empty());
  CHECK_THROWS_AS(gircse::Embedder("no/such/bundle"), gircse::Error);
}
