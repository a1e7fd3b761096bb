// What every session gives, whatever computes it.
#pragma once

#include <cstddef>

#include "batch_planner.h"
#include "numerics.h"

namespace gircse::core {

class Session {
 public:
  virtual ~Session() = default;

  // Runs a batch through the prompt pass and the first `steps` refinement steps; safe to call from several threads.
  virtual StepVectors run(const TokenBatch &batch, std::size_t steps) const = 0;
};

}  // namespace gircse::core
