#include "manifest.h"

#include <doctest/doctest.h>

#include <nlohmann/json.hpp>
#include <string>

#include "error.h"

using gircse::core::Error;
using gircse::core::GraphFacts;
using gircse::core::Manifest;
using nlohmann::json;

static json example() {
  return json::parse(R"({
    "schema_version": 3,
    "model": {"name": "demo", "revision": null, "config_sha256": "0"},
    "adapter": {"name": "a", "revision": "b", "sha256": "c"},
    "graph": {"architecture": "llama", "layout": "unrolled", "steps": 8, "pooling": "mean", "temperature": 1.5,
              "max_tokens": 512, "hidden_size": 576, "num_layers": 30, "kv_size": 192, "vocab_size": 49152},
    "prompt_template": "Instruct: {instruction}\nQuery:{text}",
    "pad_token_id": 2,
    "variants": {"fp32": {
      "graphs": {"unrolled": {"path": "fp32/model.onnx", "inputs": [], "outputs": []},
                 "stepwise": {"path": "fp32/stepwise.onnx",
                              "inputs": [{"name": "x", "dtype": "int64", "shape": ["batch", 1]}], "outputs": []}},
      "weights": "fp32/weights.bin", "float32": ["norms"], "rewrites": {"stepwise": {"casts": 3}}, "tensorrt": null}},
    "golden": false,
    "golden_missing_reason": "no memory",
    "tools": {"tokenizers": "0.23"},
    "files": {"tokenizer.json": {"bytes": 1, "sha256": "t"}, "fp32/model.onnx": {"bytes": 2, "sha256": "m"},
              "fp32/stepwise.onnx": {"bytes": 3, "sha256": "s"}, "fp32/weights.bin": {"bytes": 4, "sha256": "w"}},
    "query_instruction": "Find it", "tokenizer": "auto", "prompt_suffix": "</s>", "truncation_side": "left"})");
}

TEST_CASE("every field is read") {
  const Manifest manifest = Manifest::from_json(example().dump());
  CHECK(manifest.graph.hidden_size == 576);
  CHECK(manifest.graph.temperature == 1.5);
  CHECK(manifest.graph.layouts() == std::set<std::string>{"stepwise", "unrolled"});
  CHECK(manifest.variants.at("fp32").graphs.at("stepwise") == "fp32/stepwise.onnx");
  CHECK(manifest.variants.at("fp32").files ==
        std::set<std::string>{"fp32/model.onnx", "fp32/stepwise.onnx", "fp32/weights.bin"});
  CHECK(manifest.files.at("fp32/weights.bin").bytes == 4);
  CHECK(manifest.files.at("fp32/weights.bin").sha256 == "w");
  CHECK(manifest.pad_token_id == 2);
  CHECK(manifest.golden_missing_reason == "no memory");
  CHECK(manifest.tokenizers_version == "0.23");
  CHECK(manifest.query_instruction == "Find it");
  CHECK(manifest.prompt_suffix == "</s>");
  CHECK(manifest.truncate_left);
}

TEST_CASE("fields of later schema versions have defaults") {
  json content = example();
  content["schema_version"] = 1;
  for (const char *field : {"query_instruction", "tokenizer", "prompt_suffix", "truncation_side"}) content.erase(field);
  for (const char *field : {"float32", "rewrites", "tensorrt"}) content["variants"]["fp32"].erase(field);
  const Manifest manifest = Manifest::from_json(content.dump());
  CHECK(manifest.query_instruction.empty());
  CHECK_FALSE(manifest.truncate_left);
}

TEST_CASE("every field that is required is missed, and every other one is unknown") {
  const json content = example();
  for (const auto &item : content.items()) {
    if (item.key() == "schema_version") continue;
    CAPTURE(item.key());
    json changed = content;
    changed[item.key() + "_"] = item.value();
    CHECK_THROWS_AS(Manifest::from_json(changed.dump()), Error);
    changed = content;
    changed[item.key()] = json::array({json::object()});
    CHECK_THROWS_AS(Manifest::from_json(changed.dump()), Error);
  }
  for (const char *path : {"/model/name", "/graph/steps", "/graph/pooling", "/variants/fp32/weights", "/golden",
                           "/files/tokenizer.json/bytes", "/pad_token_id", "/adapter", "/tools",
                           "/variants/fp32/graphs", "/variants/fp32/graphs/stepwise/inputs/0/dtype"}) {
    CAPTURE(path);
    json changed = content;
    const json::json_pointer pointer(path);
    changed[pointer.parent_pointer()].erase(pointer.back());
    CHECK_THROWS_AS(Manifest::from_json(changed.dump()), Error);
  }
}

TEST_CASE("facts survive a round trip and are told apart") {
  const GraphFacts facts = GraphFacts::from_json(example()["graph"].dump());
  CHECK(GraphFacts::from_json(facts.to_json()) == facts);
  CHECK(facts.to_json() ==
        R"({"architecture":"llama","layout":"unrolled","steps":8,"pooling":"mean","temperature":1.5,)"
        R"("max_tokens":512,"hidden_size":576,"num_layers":30,"kv_size":192,"vocab_size":49152})");
  json other = example()["graph"];
  other["vocab_size"] = 49153;
  CHECK_FALSE(GraphFacts::from_json(other.dump()) == facts);
  other.erase("vocab_size");
  CHECK_THROWS_AS(GraphFacts::from_json(other.dump()), std::runtime_error);
}
