#include "numerics.h"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <vector>

using gircse::core::cosine;
using gircse::core::l2_normalize;
using gircse::core::pool_and_normalize;
using gircse::core::StepVectors;

TEST_CASE("a vector is scaled to unit length at any size") {
  for (std::size_t size = 1; size < 600; ++size) {
    std::vector<float> vector(size, -2.0f);
    l2_normalize(vector.data(), size);
    for (const float value : vector) CHECK(value == doctest::Approx(-1 / std::sqrt(static_cast<double>(size))));
  }
}

TEST_CASE("zeros stay zeros, and NaN stays NaN") {
  std::vector<float> zeros(10, 0.0f), numbers = {3.0f, std::numeric_limits<float>::quiet_NaN(), 4.0f};
  l2_normalize(zeros.data(), zeros.size());
  CHECK(zeros == std::vector<float>(10, 0.0f));
  l2_normalize(numbers.data(), numbers.size());
  for (const float value : numbers) CHECK(std::isnan(value));
}

static StepVectors states() { return {1, 2, 2, {3, 4, 0, 2, 8, 0}}; }  // h_0, h_1, h_2

TEST_CASE("the mean leaves the prompt out") {
  StepVectors pooled = states();
  pool_and_normalize(pooled, true);
  const float expected[] = {0.6f, 0.8f, 0.0f, 1.0f, 4 / std::sqrt(17.0f), 1 / std::sqrt(17.0f)};
  for (std::size_t i = 0; i < 6; ++i) CHECK(pooled.values[i] == doctest::Approx(expected[i]));
}

TEST_CASE("the last state alone") {
  StepVectors pooled = states();
  pool_and_normalize(pooled, false);
  CHECK(pooled.values == std::vector<float>{0.6f, 0.8f, 0.0f, 1.0f, 1.0f, 0.0f});
}

TEST_CASE("without steps there is the prompt") {
  StepVectors pooled{2, 0, 1, {2, -3}};
  pool_and_normalize(pooled, true);
  CHECK(pooled.values == std::vector<float>{1.0f, -1.0f});
}

TEST_CASE("cosines") {
  const float a[] = {1, 0}, b[] = {1, 1}, zero[] = {0, 0}, nan[] = {NAN, 1};
  CHECK(cosine(a, a, 2) == 1.0);
  CHECK(cosine(a, b, 2) == doctest::Approx(std::sqrt(0.5)));
  CHECK(cosine(a, zero, 2) == 0.0);
  CHECK(std::isnan(cosine(a, nan, 2)));
}
