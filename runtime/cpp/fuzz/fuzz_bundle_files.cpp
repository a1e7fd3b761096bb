// Any bytes as the small files of a bundle, which the first byte chooses: gircse.json, the identity of a graph, or
// golden.safetensors.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>

#include "error.h"
#include "manifest.h"
#include "safetensors.h"
#include "utf8.h"

using gircse::core::Error;
using gircse::core::GraphFacts;
using gircse::core::Manifest;
using gircse::core::Safetensors;

static void read_vectors(std::string_view content) {
  const Safetensors file{std::string(content)};
  for (const char *name : {"a", "prompt_embedding", "step_embeddings"}) {
    if (!file.has(name)) continue;
    file.shape(name);
    if (file.dtype(name) == "F32") file.floats(name);
  }
}

static void read(std::uint8_t kind, std::string_view content) {
  switch (kind % 3) {
    case 0: Manifest::from_json(content); break;
    case 1: GraphFacts::from_json(GraphFacts::from_json(content).to_json()); break;
    default: read_vectors(content);
  }
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t *data, std::size_t size) {
  if (size == 0) return 0;
  try {
    read(data[0], {reinterpret_cast<const char *>(data) + 1, size - 1});
  } catch (const Error &err) {
    if (gircse::core::find_utf8_fault(err.what())) std::abort();  // a message is one line of UTF-8
    if (std::string_view(err.what()).find('\n') != std::string_view::npos) std::abort();
  } catch (const std::runtime_error &) {
  }
  return 0;
}
