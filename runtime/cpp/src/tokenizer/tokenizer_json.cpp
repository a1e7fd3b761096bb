#include <algorithm>
#include <initializer_list>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

#include "tokenizer/code_points.h"
#include "tokenizer/spec.h"
#include "tokenizer/tokenizer_document.h"

namespace gircse::core {

namespace {

using nlohmann::json;

constexpr const char *kGpt2Pattern = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
constexpr std::size_t kMaxSteps = 100;

// An object of the file, with the words that errors call it by.
class Fields {
 public:
  Fields(const json &object, std::string where) : object_(object), where_(std::move(where)) {
    if (!object_.is_object()) fail("is not an object");
  }

  [[noreturn]] void fail(const std::string &what) const { throw std::runtime_error(where_ + " " + what); }

  void allow(std::initializer_list<std::string_view> names) const {
    for (const auto &item : object_.items()) {
      if (std::find(names.begin(), names.end(), item.key()) == names.end()) {
        fail("has the field '" + item.key() + "', which is not supported");
      }
    }
  }

  bool has(const char *name) const { return object_.contains(name); }

  // Null where the field is missing.
  const json &value(const char *name) const {
    static const json null;
    const auto found = object_.find(name);
    return found == object_.end() ? null : *found;
  }

  std::string text(const char *name) const {
    if (!value(name).is_string()) fail("has no string '" + std::string(name) + "'");
    return value(name).get<std::string>();
  }

  bool flag(const char *name) const {
    if (!value(name).is_boolean()) fail("has no flag '" + std::string(name) + "'");
    return value(name).get<bool>();
  }

  bool flag(const char *name, bool otherwise) const { return value(name).is_null() ? otherwise : flag(name); }

  const std::string &where() const { return where_; }

 private:
  const json &object_;
  std::string where_;
};

std::string type_of(const json &object, const std::string &where) { return Fields(object, where).text("type"); }

Pattern read_pattern(const Fields &fields) {
  const json &value = fields.value("pattern");
  if (!value.is_object() || value.size() != 1 || (!value.contains("String") && !value.contains("Regex"))) {
    fields.fail("has a pattern that is neither a String nor a Regex");
  }
  const Fields pattern(value, "the pattern of " + fields.where());
  if (value.contains("Regex")) return Pattern::regex(pattern.text("Regex"));
  const std::string text = pattern.text("String");
  if (text.empty()) pattern.fail("is an empty String, which is not supported");
  return Pattern::literal(text);
}

// Visits the steps in order; a Sequence holds more of them.
template <typename Visitor>
void for_each_step(const json &step, const std::string &where, const char *sequence_field, Visitor &&visit) {
  if (step.is_null()) return;
  if (type_of(step, where) != "Sequence") return visit(step);
  const Fields fields(step, "the Sequence of " + where);
  fields.allow({"type", sequence_field});
  const json &steps = fields.value(sequence_field);
  if (!steps.is_array()) fields.fail("has no array '" + std::string(sequence_field) + "'");
  for (const json &inner : steps) {
    if (inner.is_null()) fields.fail("has a step that is null");
    for_each_step(inner, where, sequence_field, visit);
  }
}

NormalizerStep read_normalizer(const json &object) {
  const std::string type = type_of(object, "the normalizer");
  const Fields fields(object, "the normalizer " + type);
  if (type == "NFC") {
    fields.allow({"type"});
    return NfcStep{};
  }
  if (type == "Prepend") {
    fields.allow({"type", "prepend"});
    if (fields.text("prepend").empty()) fields.fail("prepends nothing, which is not supported");
    return PrependStep{fields.text("prepend")};
  }
  if (type == "Replace") {
    fields.allow({"type", "pattern", "content"});
    return ReplaceStep{read_pattern(fields), fields.text("content")};
  }
  fields.fail("is not supported");
}

SplitStep read_split(const Fields &fields) {
  static const std::pair<const char *, SplitBehavior> behaviors[] = {
      {"Removed", SplitBehavior::kRemoved},
      {"Isolated", SplitBehavior::kIsolated},
      {"MergedWithPrevious", SplitBehavior::kMergedWithPrevious},
      {"MergedWithNext", SplitBehavior::kMergedWithNext},
      {"Contiguous", SplitBehavior::kContiguous},
  };
  fields.allow({"type", "pattern", "behavior", "invert"});
  const std::string name = fields.text("behavior");
  for (const auto &[known, behavior] : behaviors) {
    if (name == known) return {read_pattern(fields), behavior, fields.flag("invert")};
  }
  fields.fail("has the behavior '" + name + "', which is not supported");
}

PrependScheme read_prepend_scheme(const Fields &fields) {
  const std::string name = fields.has("prepend_scheme") ? fields.text("prepend_scheme") : "always";
  const bool never = name == "never";
  if (!never && name != "first" && name != "always")
    fields.fail("has the prepend_scheme '" + name + "', which is not supported");
  if (!never && !fields.flag("add_prefix_space", true))
    fields.fail("has an add_prefix_space that its prepend_scheme contradicts");
  return never ? PrependScheme::kNever : name == "first" ? PrependScheme::kFirst : PrependScheme::kAlways;
}

MetaspaceStep read_metaspace(const Fields &fields) {
  fields.allow({"type", "replacement", "add_prefix_space", "prepend_scheme", "split", "str_rep"});
  const std::string replacement = fields.text("replacement");
  if (replacement.empty() || code_point_at(replacement, 0).size != replacement.size()) {
    fields.fail("has a replacement that is not one character");
  }
  if (!fields.value("str_rep").is_null()) fields.text("str_rep");  // of no effect
  return {replacement, Pattern::literal(replacement), read_prepend_scheme(fields), fields.flag("split", true)};
}

// Reads the pre-tokenizer into a specification, step by step.
class PreTokenizerReader {
 public:
  explicit PreTokenizerReader(TokenizerSpec &spec) : spec_(spec) {}

  void operator()(const json &object) {
    const std::string type = type_of(object, "the pre-tokenizer");
    const Fields fields(object, "the pre-tokenizer " + type);
    if (spec_.byte_level) fields.fail("comes after ByteLevel, which is not supported");
    if (spec_.pre_tokenizer.size() >= kMaxSteps) fields.fail("is one of more than 100, which is not supported");
    if (type == "Split") {
      spec_.pre_tokenizer.emplace_back(read_split(fields));
    } else if (type == "Digits") {
      fields.allow({"type", "individual_digits"});
      spec_.pre_tokenizer.emplace_back(DigitsStep{fields.flag("individual_digits")});
    } else if (type == "Metaspace") {
      add_metaspace(fields);
    } else if (type == "ByteLevel") {
      add_byte_level(fields);
    } else {
      fields.fail("is not supported");
    }
  }

 private:
  void add_metaspace(const Fields &fields) {
    MetaspaceStep step = read_metaspace(fields);
    if (step.prepend == PrependScheme::kFirst && (changed_ || has_nfc())) {
      fields.fail("has the prepend_scheme 'first' after NFC or Metaspace, which is not supported");
    }
    changed_ = true;
    spec_.pre_tokenizer.emplace_back(std::move(step));
  }

  void add_byte_level(const Fields &fields) {
    fields.allow({"type", "add_prefix_space", "trim_offsets", "use_regex"});
    fields.flag("trim_offsets");  // of no effect on ids
    if (fields.flag("add_prefix_space")) spec_.pre_tokenizer.emplace_back(PrefixSpaceStep{});
    if (!fields.has("use_regex") || fields.flag("use_regex")) {
      spec_.pre_tokenizer.emplace_back(SplitStep{Pattern::regex(kGpt2Pattern), SplitBehavior::kIsolated, false});
    }
    spec_.byte_level = true;
  }

  bool has_nfc() const {
    return std::any_of(spec_.normalizer.begin(), spec_.normalizer.end(),
                       [](const NormalizerStep &step) { return std::holds_alternative<NfcStep>(step); });
  }

  TokenizerSpec &spec_;
  bool changed_ = false;
};

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
  for_each_step(fields.value("normalizer"), "the normalizer", "normalizers",
                [&](const json &step) { spec.normalizer.push_back(read_normalizer(step)); });
  for_each_step(fields.value("pre_tokenizer"), "the pre-tokenizer", "pretokenizers", PreTokenizerReader(spec));
  if (fields.has("added_tokens")) spec.added_tokens = read_added_tokens(fields.value("added_tokens"));
  spec.model = read_model(document);
  return spec;
}

}  // namespace gircse::core
