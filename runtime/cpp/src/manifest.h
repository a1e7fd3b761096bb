// The manifest of a bundle, gircse.json: the fields and checks of gircse.runtime.manifest.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

namespace gircse::core {

inline constexpr const char *kManifestName = "gircse.json";
inline constexpr int kMaxSteps = 64;

// What the graphs compute. Every graph repeats it in its ONNX metadata; strings are those of Python's enums.
struct GraphFacts {
  std::string architecture;
  std::string layout;
  std::int64_t steps = 0;
  std::string pooling;
  double temperature = 1;
  std::int64_t max_tokens = 0;
  std::int64_t hidden_size = 0;
  std::int64_t num_layers = 0;
  std::int64_t kv_size = 0;
  std::int64_t vocab_size = 0;

  // The facts as JSON, as gircse.json and the ONNX metadata hold them; throws std::runtime_error.
  static GraphFacts from_json(std::string_view content);
  std::string to_json() const;
  bool operator==(const GraphFacts &other) const;

  // The graphs of a variant.
  std::set<std::string> layouts() const;
};

struct FileEntry {
  std::int64_t bytes = 0;
  std::string sha256;
};

// One precision of the bundle: its graphs by layout, and all files that belong to it.
struct Variant {
  std::map<std::string, std::string> graphs;
  std::set<std::string> files;
};

struct Manifest {
  GraphFacts graph;
  std::string prompt_template;
  std::int64_t pad_token_id = 0;
  std::map<std::string, Variant> variants;
  bool golden = false;
  std::optional<std::string> golden_missing_reason;
  std::string tokenizers_version;
  std::map<std::string, FileEntry> files;
  std::string query_instruction;
  std::string prompt_suffix;
  bool truncate_left = false;

  // Reads the content of gircse.json; throws Error.
  static Manifest from_json(std::string_view content);
};

// Names of a map as one text, for messages.
template <class Map>
std::string listed(const Map &map) {
  std::string text;
  for (const auto &item : map) {
    if (!text.empty()) text += ", ";
    if constexpr (std::is_convertible_v<decltype(item), std::string_view>) {
      text += item;
    } else {
      text += item.first;
    }
  }
  return text;
}

}  // namespace gircse::core
