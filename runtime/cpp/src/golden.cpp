#include "golden.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "error.h"
#include "json_record.h"
#include "safetensors.h"

namespace gircse::core {
namespace {

constexpr const char *kPromptsFile = "golden.json";
constexpr const char *kVectorsFile = "golden.safetensors";
constexpr const char *kCopyAgain = "Copy or export the bundle again.";

Error damaged(const std::string &where, const std::string &got,
              std::optional<std::string_view> expected = std::nullopt) {
  return {GIRCSE_ERROR_BUNDLE, where, got, expected, kCopyAgain};
}

void check_prompts(const std::vector<GoldenPrompt> &prompts, std::int64_t vocab_size, const std::string &path) {
  const auto no_tokens = [](const GoldenPrompt &prompt) { return prompt.token_ids.empty(); };
  if (prompts.empty() || std::any_of(prompts.begin(), prompts.end(), no_tokens)) {
    throw damaged(path, "has no text, or one without tokens");
  }
  std::optional<std::int64_t> unknown;  // the smallest
  for (const GoldenPrompt &prompt : prompts) {
    for (const std::int64_t token : prompt.token_ids) {
      if ((token < 0 || token >= vocab_size) && token < unknown.value_or(INT64_MAX)) unknown = token;
    }
  }
  if (unknown) {
    throw damaged(path, "has the token " + std::to_string(*unknown),
                  "the model has " + std::to_string(vocab_size) + " tokens");
  }
}

// A shape as Python shows it.
std::string shown(const std::vector<std::size_t> &shape) {
  std::string text;
  for (const std::size_t dimension : shape) text += (text.empty() ? "" : ", ") + std::to_string(dimension);
  return "(" + text + (shape.size() == 1 ? ",)" : ")");
}

// A float32 tensor of golden.safetensors, whose shape is checked.
std::vector<float> read_tensor(const Safetensors &file, const std::string &path, const std::string &name,
                               const std::vector<std::size_t> &shape) {
  if (!file.has(name)) throw damaged(path, "has no " + name);
  if (file.dtype(name) != "F32" || file.shape(name) != shape) {
    throw damaged(path + ": " + name, "has type " + file.dtype(name) + " and shape " + shown(file.shape(name)),
                  "F32 and " + shown(shape) + " were expected");
  }
  return file.floats(name);
}

struct StepCosines {
  double smallest = std::numeric_limits<double>::infinity();
  std::size_t text = 0;
  bool failed = false;  // one is below the limit, or is not a number
};

StepCosines compare_step(const StepVectors &ours, const StepVectors &golden, std::size_t step, double limit) {
  StepCosines result;
  for (std::size_t row = 0; row < golden.batch; ++row) {
    const double value = cosine(ours.at(row, step), golden.at(row, step), golden.hidden);
    if (!(value >= limit)) result.failed = true;
    if (!std::isnan(result.smallest) && !(value >= result.smallest)) result.smallest = value, result.text = row;
  }
  return result;
}

}  // namespace

std::vector<GoldenPrompt> read_golden_prompts(const Bundle &bundle) {
  const Manifest &manifest = bundle.manifest();
  if (!manifest.golden) {
    throw Error(GIRCSE_ERROR_BUNDLE, bundle.directory().string(),
                "has no golden vectors (" + manifest.golden_missing_reason.value_or("None") + ")", std::nullopt,
                "Export again on a machine where the PyTorch reference can run.");
  }
  const std::string path = bundle.file(kPromptsFile).string();
  std::vector<GoldenPrompt> prompts;
  try {
    const nlohmann::json content = parse_json(bundle.read(kPromptsFile));
    for (JsonRecord &record : JsonRecord(content, "$").records("cases")) {
      prompts.push_back({record.text("instruction"), record.text("text"), record.integers("token_ids")});
    }
  } catch (const std::runtime_error &err) {
    throw damaged(path, std::string("cannot be read: ") + err.what());
  }
  check_prompts(prompts, manifest.graph.vocab_size, path);
  return prompts;
}

StepVectors read_golden_vectors(const Bundle &bundle, std::size_t prompts) {
  const std::string path = bundle.file(kVectorsFile).string();
  const auto steps = static_cast<std::size_t>(bundle.manifest().graph.steps);
  const auto hidden = static_cast<std::size_t>(bundle.manifest().graph.hidden_size);
  StepVectors golden{prompts, steps, hidden, std::vector<float>(prompts * (steps + 1) * hidden)};
  try {
    const Safetensors file(bundle.read(kVectorsFile));
    const std::vector<float> prompt = read_tensor(file, path, "prompt_embedding", {prompts, hidden});
    const std::vector<float> soft = read_tensor(file, path, "step_embeddings", {prompts, steps, hidden});
    for (std::size_t row = 0; row < prompts; ++row) {
      std::copy_n(prompt.data() + row * hidden, hidden, golden.at(row, 0));
      if (steps > 0) std::copy_n(soft.data() + row * steps * hidden, steps * hidden, golden.at(row, 1));
    }
  } catch (const std::runtime_error &err) {
    throw damaged(path, std::string("cannot be read: ") + err.what());
  }
  return golden;
}

void check_golden_tokens(const Bundle &bundle, const PromptTokenizer &tokenizer) {
  if (!bundle.manifest().golden) return;
  std::size_t number = 0;
  for (const GoldenPrompt &golden : read_golden_prompts(bundle)) {
    ++number;
    if (tokenizer.tokenize({golden.text}, {golden.instruction, std::nullopt, false, 0}).ids.front() !=
        golden.token_ids) {
      const std::string &version = bundle.manifest().tokenizers_version;
      throw Error(GIRCSE_ERROR_BUNDLE, bundle.directory().string(),
                  "gives golden text " + std::to_string(number) + " other tokens than at the export",
                  "that was with tokenizers " + (version.empty() ? "of an unknown version" : version),
                  std::string("If ") + kManifestName + " was changed, export the bundle again; otherwise report it.");
    }
  }
}

SelfTest compare_with_golden(const StepVectors &ours, const StepVectors &golden, double limit) {
  SelfTest result;
  result.texts = golden.batch;
  result.limit = limit;
  result.min_cosine = std::numeric_limits<double>::infinity();
  bool failed = false;
  for (std::size_t step = 0; step <= golden.steps; ++step) {
    const StepCosines found = compare_step(ours, golden, step, limit);
    const bool smaller = !std::isnan(result.min_cosine) && !(found.smallest >= result.min_cosine);
    if (!failed && (found.failed || smaller)) result.worst_step = step, result.worst_text = found.text;
    failed = failed || found.failed;
    if (smaller) result.min_cosine = found.smallest;
  }
  for (std::size_t i = 0; i < golden.values.size(); ++i) {
    const double difference = std::fabs(ours.values[i] - golden.values[i]);
    if (std::isnan(result.max_difference)) break;  // and stays NaN
    if (!(difference <= result.max_difference)) result.max_difference = difference;
  }
  return result;
}

}  // namespace gircse::core
