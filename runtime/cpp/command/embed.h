// What gircse-embed-cpp does: from lines of text to vectors, read and written as it goes.
#pragma once

#include "arguments.h"

namespace gircse::command {

// Embeds the texts, or tests the bundle, and returns the exit code: 1 for a failed self-test.
int embed(const Arguments &arguments);

}  // namespace gircse::command
