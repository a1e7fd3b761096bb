// What every session gives, whatever computes it.
#pragma once

#include <cstddef>
#include <string>

#include "batch_planner.h"
#include "numerics.h"
#include "prefix_cache.h"

namespace gircse::core {

class Session {
 public:
  virtual ~Session() = default;

  // Runs a batch through the prompt pass and the first `steps` refinement steps; safe to call from several threads.
  // Every prompt begins with the prefix, where there is one; the batch holds the rest, and padding lies between.
  virtual StepVectors run(const TokenBatch &batch, std::size_t steps, const Prefix *prefix = nullptr) const = 0;

  // What computes prefixes; null where every prompt has to be run whole.
  virtual const PrefixSession *prefixes() const { return nullptr; }

  // What makes it slow, in one line; empty where nothing is known to.
  std::string warning;
};

}  // namespace gircse::core
