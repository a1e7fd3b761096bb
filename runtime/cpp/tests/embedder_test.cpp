// The whole library on a real bundle, for the sanitizers; tests/runtime/cpp compares its results with Python's.
//
// GIRCSE_TEST_BUNDLE names the bundle, and GIRCSE_ONNXRUNTIME the library of ONNX Runtime.
#include <doctest/doctest.h>
#include <gircse/gircse.hpp>

#include <algorithm>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

namespace {

const std::vector<std::string> kTexts = {"How do I reset my PIN?", "", std::string("a\0b", 3), "\xF0\x9F\x98\x80 text",
                                         "The cat sat on the mat, and then it slept for the whole of the afternoon."};

const char *bundle() {
  const char *path = std::getenv("GIRCSE_TEST_BUNDLE");
  if (path == nullptr) MESSAGE("not run: GIRCSE_TEST_BUNDLE does not name a bundle");
  return path;
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
