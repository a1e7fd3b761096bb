#include "golden.h"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>

using gircse::core::compare_with_golden;
using gircse::core::SelfTest;
using gircse::core::StepVectors;

static constexpr double kLimit = 0.999;

// Three texts, two steps, two dimensions; every vector is (1, 0).
static StepVectors vectors() {
  StepVectors result{3, 2, 2, std::vector<float>(18)};
  for (std::size_t i = 0; i < 18; i += 2) result.values[i] = 1;
  return result;
}

static void turn(StepVectors &vectors, std::size_t text, std::size_t step, float y) { vectors.at(text, step)[1] = y; }

TEST_CASE("the same vectors pass") {
  const SelfTest result = compare_with_golden(vectors(), vectors(), kLimit);
  CHECK(result.passed());
  CHECK(result.texts == 3);
  CHECK(result.min_cosine == 1.0);
  CHECK(result.max_difference == 0.0);
  CHECK(result.worst_step == 0);
  CHECK(result.worst_text == 0);
}

TEST_CASE("where all pass, the smallest cosine is named") {
  StepVectors ours = vectors();
  turn(ours, 2, 1, 0.01f);
  turn(ours, 1, 2, 0.02f);
  const SelfTest result = compare_with_golden(ours, vectors(), kLimit);
  CHECK(result.passed());
  CHECK(result.worst_step == 2);
  CHECK(result.worst_text == 1);
  CHECK(result.max_difference == doctest::Approx(0.02));
}

TEST_CASE("the first step that fails is named, and its worst text") {
  StepVectors ours = vectors();
  turn(ours, 0, 1, 0.1f);
  turn(ours, 2, 1, 0.2f);
  turn(ours, 1, 2, 5.0f);
  const SelfTest result = compare_with_golden(ours, vectors(), kLimit);
  CHECK_FALSE(result.passed());
  CHECK(result.worst_step == 1);
  CHECK(result.worst_text == 2);
  CHECK(result.min_cosine == doctest::Approx(1 / std::sqrt(26)));
}

TEST_CASE("NaN fails, wherever it stands") {
  for (std::size_t text = 0; text < 3; ++text) {
    for (std::size_t step = 0; step < 3; ++step) {
      StepVectors ours = vectors();
      turn(ours, text, step, std::numeric_limits<float>::quiet_NaN());
      turn(ours, 2 - text, 2, 0.03f);  // passes
      const SelfTest result = compare_with_golden(ours, vectors(), kLimit);
      CAPTURE(text);
      CAPTURE(step);
      if (text == 2 - text && step == 2) continue;
      CHECK_FALSE(result.passed());
      CHECK(std::isnan(result.min_cosine));
      CHECK(std::isnan(result.max_difference));
      CHECK(result.worst_step == step);
      CHECK(result.worst_text == text);
    }
  }
}

TEST_CASE("a step with NaN is the first that fails, whatever fails after it") {
  StepVectors ours = vectors();
  ours.at(1, 1)[0] = std::nanf("");
  turn(ours, 2, 2, 5.0f);
  const SelfTest result = compare_with_golden(ours, vectors(), kLimit);
  CHECK_FALSE(result.passed());
  CHECK(result.worst_step == 1);
  CHECK(result.worst_text == 1);
}
