#include "manifest.h"

#include <algorithm>
#include <stdexcept>
#include <tuple>

#include "error.h"
#include "json_record.h"

namespace gircse::core {
namespace {

constexpr std::int64_t kSchemaVersion = 3;
constexpr std::int64_t kOldestSchemaVersion = 1;
constexpr const char *kExportAgain = "Export the bundle again.";

const std::vector<std::string_view> kLayoutNames = {"unrolled", "stepwise"};

Error refusal(std::string_view got, std::optional<std::string_view> expected, std::string_view hint = kExportAgain) {
  return {GIRCSE_ERROR_BUNDLE, kManifestName, got, expected, hint};
}

void check_schema_version(const nlohmann::json &content) {
  const std::int64_t version = JsonRecord(content, "$").integer("schema_version");
  if (version > kSchemaVersion) {
    throw refusal("has schema version " + std::to_string(version),
                  "this libgircse reads up to " + std::to_string(kSchemaVersion), "Upgrade libgircse.");
  }
  if (version < kOldestSchemaVersion) {
    throw refusal(
        "has schema version " + std::to_string(version),
        "this libgircse reads " + std::to_string(kOldestSchemaVersion) + " to " + std::to_string(kSchemaVersion));
  }
}

GraphFacts read_graph_facts(JsonRecord record) {
  GraphFacts facts;
  facts.architecture = record.text("architecture");
  facts.layout = record.one_of("layout", kLayoutNames);
  facts.steps = record.integer("steps");
  facts.pooling = record.one_of("pooling", {"mean", "last"});
  facts.temperature = record.number("temperature");
  facts.max_tokens = record.integer("max_tokens");
  facts.hidden_size = record.integer("hidden_size");
  facts.num_layers = record.integer("num_layers");
  facts.kv_size = record.integer("kv_size");
  facts.vocab_size = record.integer("vocab_size");
  record.finish();
  return facts;
}

void check_graph_facts(const GraphFacts &facts) {
  constexpr std::int64_t largest = 1 << 30;  // far above any model, and products of two of them cannot overflow
  const auto sizes = {facts.max_tokens, facts.hidden_size, facts.num_layers, facts.kv_size, facts.vocab_size};
  if (facts.steps < 0 || facts.steps > kMaxSteps || std::min(sizes) < 1 || std::max(sizes) > largest ||
      !(facts.temperature > 0)) {
    throw refusal("has values that no export writes: " + facts.to_json(),
                  "there are 0 to 64 steps, sizes are at least 1, and the temperature is above 0");
  }
}

// Reads the fields that describe a source only to check them: nothing here depends on them.
void check_sources(JsonRecord &manifest) {
  JsonRecord model = manifest.record("model");
  model.text("name"), model.text_or_null("revision"), model.text("config_sha256"), model.finish();
  if (std::optional<JsonRecord> adapter = manifest.record_or_null("adapter")) {
    adapter->text("name"), adapter->text_or_null("revision"), adapter->text("sha256"), adapter->finish();
  }
  if (manifest.has("tokenizer")) manifest.one_of("tokenizer", {"json", "auto"});
}

void check_tensors(JsonRecord &graph, const std::string &field) {
  for (JsonRecord &tensor : graph.records(field)) {
    tensor.text("name"), tensor.text("dtype");
    const nlohmann::json &shape = tensor.raw("shape");
    if (!shape.is_array()) refuse_type(shape, "array", tensor.path_of("shape"));
    for (std::size_t i = 0; i < shape.size(); ++i) {
      if (!shape[i].is_string() && !shape[i].is_number_integer()) {
        refuse_type(shape[i], "int | str", tensor.path_of("shape", i));
      }
    }
    tensor.finish();
  }
}

std::string read_graph_path(JsonRecord graph) {
  std::string path = graph.text("path");
  check_tensors(graph, "inputs");
  check_tensors(graph, "outputs");
  graph.finish();
  return path;
}

// A layout that stands as a key of an object.
void check_layout_key(const std::string &key, const std::string &path) {
  if (std::find(kLayoutNames.begin(), kLayoutNames.end(), key) == kLayoutNames.end()) {
    throw std::runtime_error("Invalid enum value '" + key + "' - at `key` in `" + path + "`");
  }
}

void check_rewrites(JsonRecord &variant) {
  if (!variant.has("rewrites")) return;
  for (auto &[layout, counts] : variant.named_records("rewrites")) {
    check_layout_key(layout, variant.path_of("rewrites"));
    for (const auto &item : variant.raw("rewrites")[layout].items()) {
      if (!item.value().is_number_integer()) {
        refuse_type(item.value(), "int", variant.path_of("rewrites") + "[...][...]");
      }
    }
  }
}

void check_checked(JsonRecord &variant) {
  if (!variant.has("checked")) return;
  for (const auto &[layout, texts] : variant.named_integers("checked")) {
    check_layout_key(layout, variant.path_of("checked"));
  }
}

Variant read_variant(JsonRecord record) {
  Variant variant;
  for (auto &[layout, graph] : record.named_records("graphs")) {
    check_layout_key(layout, record.path_of("graphs"));
    variant.files.insert(variant.graphs[layout] = read_graph_path(graph));
  }
  variant.files.insert(record.text("weights"));
  if (record.has("more_weights")) {
    const std::vector<std::string> more = record.texts("more_weights");
    variant.files.insert(more.begin(), more.end());
  }
  if (record.has("float32")) record.texts("float32");
  check_rewrites(record);
  check_checked(record);
  if (record.has("tensorrt")) {
    if (const std::optional<JsonRecord> graph = record.record_or_null("tensorrt")) {
      variant.files.insert(read_graph_path(*graph));
    }
  }
  record.finish();
  return variant;
}

Manifest read_manifest(JsonRecord record) {
  Manifest manifest;
  record.integer("schema_version");
  check_sources(record);
  manifest.graph = read_graph_facts(record.record("graph"));
  manifest.prompt_template = record.text("prompt_template");
  manifest.pad_token_id = record.integer("pad_token_id");
  for (auto &[precision, variant] : record.named_records("variants")) {
    manifest.variants[precision] = read_variant(variant);
  }
  manifest.golden = record.boolean("golden");
  manifest.golden_missing_reason = record.text_or_null("golden_missing_reason");
  for (auto &[tool, version] : record.named_texts("tools")) {
    if (tool == "tokenizers") manifest.tokenizers_version = version;
  }
  for (auto &[path, entry] : record.named_records("files")) {
    manifest.files[path] = {entry.integer("bytes"), entry.text("sha256")};
    entry.finish();
  }
  if (record.has("query_instruction")) manifest.query_instruction = record.text("query_instruction");
  if (record.has("prompt_suffix")) manifest.prompt_suffix = record.text("prompt_suffix");
  if (record.has("truncation_side")) {
    manifest.truncate_left = record.one_of("truncation_side", {"right", "left"}) == "left";
  }
  record.finish();
  return manifest;
}

void check_variants(const Manifest &manifest) {
  const std::set<std::string> layouts = manifest.graph.layouts();
  if (manifest.variants.empty()) throw refusal("has no variants", "a bundle has one or more");
  for (const auto &[precision, variant] : manifest.variants) {
    const bool known = std::all_of(variant.graphs.begin(), variant.graphs.end(),
                                   [&](const auto &graph) { return layouts.count(graph.first) > 0; });
    if (!known || (variant.graphs.size() != layouts.size() && variant.graphs.count("stepwise") == 0)) {
      const std::string names = listed(variant.graphs);
      throw refusal("gives variant " + precision + " the graphs " + (names.empty() ? "none" : names),
                    "layout " + manifest.graph.layout + " has " + listed(layouts));
    }
  }
}

void check_files(const Manifest &manifest) {
  std::set<std::string> required = {"tokenizer.json"};
  if (manifest.golden) required.insert({"golden.json", "golden.safetensors"});
  for (const auto &item : manifest.variants) required.insert(item.second.files.begin(), item.second.files.end());
  for (const std::string &path : required) {
    if (manifest.files.count(path) == 0) {
      throw refusal("has no entry for " + path, "every file is listed under 'files' with its hash");
    }
  }
}

void check_prompt(const Manifest &manifest) {
  if (manifest.pad_token_id < 0 || manifest.pad_token_id >= manifest.graph.vocab_size) {
    throw refusal("has the padding token " + std::to_string(manifest.pad_token_id),
                  "the tokens of the model are 0 to " + std::to_string(manifest.graph.vocab_size - 1));
  }
  const std::string &form = manifest.prompt_template;
  const std::size_t first = form.find("{text}");
  if (first == form.npos || form.find("{text}", first + 6) != form.npos) {
    throw refusal("has the prompt template " + in_quotes(form), "a template holds {text} exactly once");
  }
}

}  // namespace

GraphFacts GraphFacts::from_json(std::string_view content) {
  return read_graph_facts(JsonRecord(parse_json(content), "$"));
}

std::string GraphFacts::to_json() const {
  const nlohmann::ordered_json facts = {
      {"architecture", architecture}, {"layout", layout},           {"steps", steps},
      {"pooling", pooling},           {"temperature", temperature}, {"max_tokens", max_tokens},
      {"hidden_size", hidden_size},   {"num_layers", num_layers},   {"kv_size", kv_size},
      {"vocab_size", vocab_size},
  };
  return facts.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

bool GraphFacts::operator==(const GraphFacts &other) const {
  const auto fields = [](const GraphFacts &facts) {
    return std::tie(facts.architecture, facts.layout, facts.steps, facts.pooling, facts.temperature, facts.max_tokens,
                    facts.hidden_size, facts.num_layers, facts.kv_size, facts.vocab_size);
  };
  return fields(*this) == fields(other);
}

std::set<std::string> GraphFacts::layouts() const {
  return steps > 0 ? std::set<std::string>{"stepwise", layout} : std::set<std::string>{layout};
}

Manifest Manifest::from_json(std::string_view content) {
  Manifest manifest;
  try {
    const nlohmann::json json = parse_json(content);
    check_schema_version(json);
    manifest = read_manifest(JsonRecord(json, "$"));
  } catch (const std::runtime_error &err) {
    throw refusal(std::string("cannot be read: ") + err.what(), std::nullopt);
  }
  check_graph_facts(manifest.graph);
  check_variants(manifest);
  check_files(manifest);
  check_prompt(manifest);
  return manifest;
}

}  // namespace gircse::core
