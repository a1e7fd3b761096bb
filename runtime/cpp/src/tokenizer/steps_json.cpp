#include "tokenizer/steps_json.h"

#include <algorithm>
#include <string>
#include <utility>

#include "tokenizer/code_points.h"
#include "tokenizer/json_fields.h"

namespace gircse::core {

namespace {

using nlohmann::json;

constexpr const char *kGpt2Pattern = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
constexpr std::size_t kMaxSteps = 100;

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

NormalizerStep read_normalizer_step(const json &object) {
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

}  // namespace

void read_normalizer(const json &object, TokenizerSpec &spec) {
  for_each_step(object, "the normalizer", "normalizers",
                [&](const json &step) { spec.normalizer.push_back(read_normalizer_step(step)); });
}

void read_pre_tokenizer(const json &object, TokenizerSpec &spec) {
  for_each_step(object, "the pre-tokenizer", "pretokenizers", PreTokenizerReader(spec));
}

}  // namespace gircse::core
