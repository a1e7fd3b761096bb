#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "tokenizer/json_fields.h"
#include "tokenizer/spec.h"
#include "tokenizer/steps_json.h"
#include "tokenizer/tokenizer_document.h"

namespace gircse::core {

namespace {

using nlohmann::json;

void refuse_affixes(const Fields &fields) {
  for (const char *name : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    if (!fields.value(name).is_null() && !fields.text(name).empty())
      fields.fail("sets " + std::string(name) + ", which is not supported");
  }
}

void refuse_clashes(const BpeSpec &model) {
  std::vector<std::uint32_t> ids = model.ids;
  std::sort(ids.begin(), ids.end());
  const auto twice = std::adjacent_find(ids.begin(), ids.end());
  if (twice != ids.end()) throw std::runtime_error("model.vocab has two tokens with the id " + std::to_string(*twice));
}

BpeSpec read_model(TokenizerDocument &document) {
  const json &object = document.rest["model"];
  const Fields fields(object, "the model");
  if (fields.has("type") && fields.text("type") != "BPE")
    fields.fail("is a " + fields.text("type") + ", which is not supported");
  fields.allow({"type", "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk",
                "byte_fallback", "ignore_merges", "vocab", "merges"});
  for (const char *name : {"vocab", "merges"}) {
    if (!fields.has(name)) fields.fail("has no '" + std::string(name) + "'");
    if (!object[name].is_discarded()) fields.fail("has a '" + std::string(name) + "' of a wrong type");
  }
  const json &dropout = fields.value("dropout");
  if (!dropout.is_null() && !(dropout.is_number() && dropout.get<double>() == 0))
    fields.fail("sets dropout, which is not supported");
  refuse_affixes(fields);
  BpeSpec model;
  if (!fields.value("unk_token").is_null()) model.unknown_token = fields.text("unk_token");
  model.fuse_unknown = fields.flag("fuse_unk", false);
  model.byte_fallback = fields.flag("byte_fallback", false);
  model.ignore_merges = fields.flag("ignore_merges", false);
  model.vocabulary = std::move(document.vocabulary);
  model.ids = std::move(document.ids);
  model.merges = std::move(document.merges);
  refuse_clashes(model);
  return model;
}

std::vector<AddedToken> read_added_tokens(const json &list) {
  std::vector<AddedToken> tokens;
  if (!list.is_array()) throw std::runtime_error("added_tokens is not an array");
  for (const json &object : list) {
    const Fields fields(object, "an added token");
    fields.allow({"id", "content", "single_word", "lstrip", "rstrip", "normalized", "special"});
    if (!fields.value("id").is_number_unsigned() || fields.value("id") > std::numeric_limits<std::uint32_t>::max())
      fields.fail("has no id");
    tokens.push_back({fields.text("content"), fields.flag("single_word"), fields.flag("lstrip"), fields.flag("rstrip"),
                      fields.flag("normalized"), fields.flag("special")});
  }
  return tokens;
}

}  // namespace

TokenizerSpec read_tokenizer(std::string_view text) {
  TokenizerDocument document = parse_document(text);
  const Fields fields(document.rest, "it");
  fields.allow({"version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer", "post_processor",
                "decoder", "model"});
  if (fields.has("version") && fields.text("version") != "1.0")
    fields.fail("has the version '" + fields.text("version") + "', which is not supported");
  for (const char *name : {"truncation", "padding", "post_processor", "decoder"}) {  // of no effect on ids
    if (!fields.value(name).is_null() && !fields.value(name).is_object())
      fields.fail("has a '" + std::string(name) + "' of a wrong type");
  }
  TokenizerSpec spec;
  read_normalizer(fields.value("normalizer"), spec);
  read_pre_tokenizer(fields.value("pre_tokenizer"), spec);
  if (fields.has("added_tokens")) spec.added_tokens = read_added_tokens(fields.value("added_tokens"));
  spec.model = read_model(document);
  return spec;
}

}  // namespace gircse::core
