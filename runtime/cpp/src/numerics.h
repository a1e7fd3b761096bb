// Pooling and comparison of step states, with the same operations in the same order as numpy, so that the vectors are
// those of the Python runtime to the last bit.
#pragma once

#include <cstddef>
#include <vector>

namespace gircse::core {

// What one run yields: h_0 normalized and z_1..z_steps of each text, (batch, steps + 1, hidden) float32.
struct StepVectors {
  std::size_t batch = 0;
  std::size_t steps = 0;
  std::size_t hidden = 0;
  std::vector<float> values;

  const float *at(std::size_t row, std::size_t step) const {
    return values.data() + (row * (steps + 1) + step) * hidden;
  }
  float *at(std::size_t row, std::size_t step) { return values.data() + (row * (steps + 1) + step) * hidden; }
};

// Pools and normalizes the states h_0..h_steps in place; `mean` averages h_1..h_k, otherwise z_k is h_k.
void pool_and_normalize(StepVectors &states, bool mean);

// Scales a vector to unit length.
void l2_normalize(float *vector, std::size_t size);

// Cosine of two vectors, in double precision.
double cosine(const float *a, const float *b, std::size_t size);

}  // namespace gircse::core
