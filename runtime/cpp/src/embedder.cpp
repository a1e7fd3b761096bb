#include "embedder.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <future>

#include "error.h"
#include "ort/providers.h"
#include "ort/sessions.h"
#include "precision.h"

namespace gircse::core {
namespace {

constexpr std::array<const char *, 4> kProviders = {"auto", "cpu", "cuda", "onnxruntime-tensorrt"};

template <class Choices>
void check_choice(const char *where, const std::string &value, const Choices &choices) {
  if (std::find(choices.begin(), choices.end(), value) != choices.end()) return;
  std::string expected;
  for (const char *choice : choices) expected += (expected.empty() ? "" : ", ") + std::string(choice);
  throw Error(GIRCSE_ERROR_OPTION, where, "is " + in_quotes(value), "it has to be one of " + expected);
}

void check_open_options(const OpenOptions &options) {
  if (options.threads < 0) {
    throw Error(GIRCSE_ERROR_OPTION, "threads", "is " + std::to_string(options.threads), "it has to be at least 1",
                "Leave it at 0 to use every physical core.");
  }
  if (options.streams == 0) throw Error(GIRCSE_ERROR_OPTION, "streams", "is 0", "it has to be at least 1");
  if (options.provider == "tensorrt" || options.provider == "tensorrt-rtx") {
    throw Error(GIRCSE_ERROR_PROVIDER, "provider " + options.provider, "is not in libgircse",
                "it has cpu, cuda, onnxruntime-tensorrt", "Use the Python runtime for engines.");
  }
  check_choice("provider", options.provider, kProviders);
  if (options.layout) check_choice("layout", *options.layout, std::array{"unrolled", "stepwise"});
}

void check_runs_on_gpu(const std::string &precision, const std::string &provider) {
  const PrecisionSpec *spec = find_precision(precision);
  if (provider == "cpu" || spec == nullptr || spec->cuda) return;
  std::vector<std::string> able = gpu_order();
  able.erase(std::remove_if(able.begin(), able.end(), [](const auto &name) { return !precision_spec(name).cuda; }),
             able.end());
  throw Error(GIRCSE_ERROR_PROVIDER, "provider " + provider, "does not run " + precision,
              "its graph is made for the CPU; ONNX Runtime on a GPU runs " + listed(able),
              "Choose another precision or provider.");
}

// Loads a graph while a second thread hashes the files; a wrong hash explains a failed load, so it wins.
template <class Open>
std::unique_ptr<Session> while_verifying(const Bundle &bundle, const std::string &precision, Open open_it) {
  std::future<void> verification = std::async(std::launch::async, [&bundle, &precision] { bundle.verify(precision); });
  std::unique_ptr<Session> session;
  try {
    session = open_it();
  } catch (const Error &err) {
    if (err.code() == GIRCSE_ERROR_BUNDLE) verification.get();
    throw;
  }
  verification.get();
  return session;
}

// Does work(0) to work(count - 1), several at once; the first error ends it.
template <class Work>
void in_streams(std::size_t streams, std::size_t count, Work work) {
  std::atomic<std::size_t> next{0};
  const auto stream = [&] {
    try {
      for (std::size_t at = next++; at < count; at = next++) work(at);
    } catch (...) {
      next = count;
      throw;
    }
  };
  std::vector<std::future<void>> others;  // when they are destroyed, they have ended
  for (std::size_t i = 1; i < std::min(streams, count); ++i) others.push_back(std::async(std::launch::async, stream));
  stream();
  for (std::future<void> &other : others) other.get();
}

}  // namespace

Embedder::Embedder(const std::string &path, const OpenOptions &options)
    : bundle_((check_open_options(options), path)), tokenizer_(bundle_), runtime_(nullptr) {
  if (options.precision) bundle_.variant(*options.precision);
  runtime_ = &load_onnxruntime(options.onnxruntime);
  open(options);
  if (options.verify) check_golden_tokens(bundle_, tokenizer_);  // after the hashes, which explain damage better
}

void Embedder::open(const OpenOptions &options) {
  if (options.provider != "auto") return open_on(options.provider, options);
  try {
    return open_on("cuda", options);
  } catch (const Error &err) {
    if (err.code() != GIRCSE_ERROR_PROVIDER) throw;
    skipped_ = err.what();
  }
  open_on("cpu", options);
}

void Embedder::open_on(const std::string &provider, const OpenOptions &options) {
  const std::string precision =
      options.precision ? *options.precision : bundle_.default_precision(provider == "cpu" ? cpu_order() : gpu_order());
  check_runs_on_gpu(precision, provider);
  if (provider == "cpu") require_version(*runtime_, precision);
  require_provider(*runtime_, provider);  // before any file is hashed: "auto" may have to pass over it
  const std::string layout = bundle_.layout(precision, provider, options.layout);
  const int threads = options.threads == 0 && options.streams > 1 ? 1 : options.threads;
  const auto open_it = [&] { return open_session(bundle_, *runtime_, precision, layout, provider, threads); };
  session_ = options.verify ? while_verifying(bundle_, precision, open_it) : open_it();
  if (options.prefix_cache && session_->prefixes() != nullptr) prefixes_ = std::make_unique<PrefixCache>();
  precision_ = precision, provider_ = provider, layout_ = layout;
  if (provider == "cpu") streams_ = options.streams;
}

std::size_t Embedder::checked_steps(const RunOptions &options) const {
  const std::int64_t most = manifest().graph.steps;
  if (options.steps < -1 || options.steps > most) {
    const bool possible = options.steps > most && options.steps <= kMaxSteps;
    throw Error(GIRCSE_ERROR_OPTION, "steps", "is " + std::to_string(options.steps),
                "this bundle has 0 to " + std::to_string(most),
                possible ? "Choose one of these, or export with --steps " + std::to_string(options.steps)
                         : "Choose one of these.");
  }
  for (const auto &[name, value] :
       {std::pair("batch_size", options.batch_size), std::pair("batch_tokens", options.batch_tokens)}) {
    if (value == 0) throw Error(GIRCSE_ERROR_OPTION, name, "is 0", "it has to be at least 1");
  }
  return static_cast<std::size_t>(options.steps < 0 ? most : options.steps);
}

std::size_t Embedder::row_size(const RunOptions &options) const {
  const std::size_t steps = checked_steps(options);
  return static_cast<std::size_t>(manifest().graph.hidden_size) * (options.all_steps ? steps : 1);
}

void Embedder::check_length(std::size_t prompt, std::size_t tokens) const {
  const std::int64_t most = manifest().graph.max_tokens;
  if (tokens > 0 && tokens <= static_cast<std::size_t>(most)) return;
  throw Error(GIRCSE_ERROR_OPTION, "prompt " + std::to_string(prompt), "has " + std::to_string(tokens) + " tokens",
              "the bundle takes 1 to " + std::to_string(most));
}

void Embedder::check_tokens(std::size_t prompt, const TokenIds &ids) const {
  const std::int64_t vocab_size = manifest().graph.vocab_size;
  for (const std::int64_t token : ids) {
    if (token >= 0 && token < vocab_size) continue;
    throw Error(GIRCSE_ERROR_OPTION, "prompt " + std::to_string(prompt), "has the token " + std::to_string(token),
                "the tokens of the model are 0 to " + std::to_string(vocab_size - 1));
  }
}

void Embedder::embed(const std::vector<TokenIds> &prompts, const RunOptions &options, float *vectors) const {
  embed_after(std::nullopt, prompts, options, vectors);
}

void Embedder::embed_texts(const std::vector<TokenIds> &prompts, const PromptOptions &prompt, const RunOptions &options,
                           float *vectors) const {
  embed_after(choose_prefix(prompts, prompt), prompts, options, vectors);
}

std::optional<Prefix> Embedder::choose_prefix(const std::vector<TokenIds> &prompts,
                                              const PromptOptions &options) const {
  if (!prefixes_ || prompts.empty()) return std::nullopt;
  std::size_t fixed = 0;
  if (!options.instruction.empty() || !options.prompt.value_or("").empty()) {
    fixed = common_length({tokenizer_.tokenize({""}, options).ids.front(), prompts.front()});
  }
  return prefixes_->choose(*session_->prefixes(), prompts, fixed);
}

void Embedder::embed_after(const std::optional<Prefix> &prefix, const std::vector<TokenIds> &prompts,
                           const RunOptions &options, float *vectors) const {
  const std::size_t steps = checked_steps(options), row_floats = row_size(options);
  const std::size_t first = options.all_steps ? 1 : steps;
  const auto before = static_cast<std::ptrdiff_t>(prefix ? prefix->tokens : 0);
  std::vector<TokenIds> own;
  if (prefix) {
    for (const TokenIds &prompt : prompts) own.emplace_back(prompt.begin() + before, prompt.end());
  }
  auto batches =
      plan_batches(prompts, {stream_batch_size(prompts.size(), options.batch_size, streams_), options.batch_tokens,
                             (provider_ == "cpu" ? kPassTokens : kPassTokensGpu) * (steps + 1)});
  in_streams(streams_, batches.size(), [&](std::size_t at) {
    const TokenBatch batch = pad_batch(std::move(batches[at]), prefix ? own : prompts, manifest().pad_token_id);
    const StepVectors outputs = session_->run(batch, steps, prefix ? &*prefix : nullptr);
    for (std::size_t i = 0; i < batch.size(); ++i) {
      std::copy_n(outputs.at(i, first), row_floats, vectors + batch.rows[i] * row_floats);
    }
  });
}

SelfTest Embedder::self_test() const {
  const std::vector<GoldenPrompt> golden = read_golden_prompts(bundle_);
  std::vector<TokenIds> prompts;
  std::vector<std::size_t> rows;
  for (const GoldenPrompt &prompt : golden) {
    rows.push_back(prompts.size());
    prompts.push_back(prompt.token_ids);
  }
  const StepVectors expected = read_golden_vectors(bundle_, golden.size());
  const auto steps = static_cast<std::size_t>(manifest().graph.steps);
  const StepVectors ours = session_->run(pad_batch(std::move(rows), prompts, manifest().pad_token_id), steps);
  return compare_with_golden(ours, expected, precision_spec(precision_).self_test_min_cosine);
}

}  // namespace gircse::core
