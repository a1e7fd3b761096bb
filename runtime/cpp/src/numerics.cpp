#include "numerics.h"

#include <algorithm>
#include <array>
#include <cmath>

namespace gircse::core {
namespace {

constexpr float kL2Epsilon = 1e-12f;  // smallest norm that is divided by, as in torch.nn.functional.normalize

// numpy's pairwise summation of squares: blocks of at most 128 in eight running sums, halves above that.
float sum_of_squares(const float *values, std::size_t size) {
  if (size < 8) {
    float sum = 0;
    for (std::size_t i = 0; i < size; ++i) sum += values[i] * values[i];
    return sum;
  }
  if (size > 128) {
    const std::size_t half = size / 2 - size / 2 % 8;
    return sum_of_squares(values, half) + sum_of_squares(values + half, size - half);
  }
  std::array<float, 8> sums;
  for (std::size_t j = 0; j < 8; ++j) sums[j] = values[j] * values[j];
  std::size_t i = 8;
  for (; i + 8 <= size; i += 8) {
    for (std::size_t j = 0; j < 8; ++j) sums[j] += values[i + j] * values[i + j];
  }
  float sum = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
  for (; i < size; ++i) sum += values[i] * values[i];
  return sum;
}

}  // namespace

void pool_and_normalize(StepVectors &states, bool mean) {
  std::vector<float> sum(states.hidden);
  for (std::size_t row = 0; row < states.batch; ++row) {
    std::fill(sum.begin(), sum.end(), 0.0f);
    for (std::size_t step = 0; step <= states.steps; ++step) {
      float *state = states.at(row, step);
      if (mean && step > 0) {
        for (std::size_t i = 0; i < states.hidden; ++i) {
          sum[i] += state[i];
          state[i] = sum[i] / static_cast<float>(step);
        }
      }
      l2_normalize(state, states.hidden);
    }
  }
}

void l2_normalize(float *vector, std::size_t size) {
  const float norm = std::max(std::sqrt(sum_of_squares(vector, size)), kL2Epsilon);
  for (std::size_t i = 0; i < size; ++i) vector[i] /= norm;
}

double cosine(const float *a, const float *b, std::size_t size) {
  double dot = 0, aa = 0, bb = 0;
  for (std::size_t i = 0; i < size; ++i) {
    const double x = a[i], y = b[i];
    dot += x * y, aa += x * x, bb += y * y;
  }
  return dot / std::max(std::sqrt(aa) * std::sqrt(bb), 1e-12);
}

}  // namespace gircse::core
