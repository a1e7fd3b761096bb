#include "ort/sessions.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "error.h"
#include "ort/graph.h"
#include "precision.h"

namespace gircse::core {
namespace {

constexpr const char *kGraphIdentityKey = "gircse";

// The arrays of a batch are inputs only; ONNX Runtime's interface has no pointers to constants.
std::int64_t *data_of(const std::vector<std::int64_t> &values) { return const_cast<std::int64_t *>(values.data()); }

// One graph with all K steps; a run costs K steps whatever it is asked for.
class UnrolledSession : public Session {
 public:
  UnrolledSession(OrtGraph graph, const GraphFacts &facts) : graph_(std::move(graph)), facts_(facts) {}

  StepVectors run(const TokenBatch &batch, std::size_t steps, const Prefix *) const override {
    const auto most = static_cast<std::size_t>(facts_.steps), hidden = static_cast<std::size_t>(facts_.hidden_size);
    const OrtTensor ids = graph_.tensor(data_of(batch.input_ids), {batch.size(), batch.tokens});
    const OrtTensor mask = graph_.tensor(data_of(batch.attention_mask), {batch.size(), batch.tokens});
    const std::vector<NamedTensor> inputs = {{"input_ids", ids.get()}, {"attention_mask", mask.get()}};
    StepVectors vectors{batch.size(), steps, hidden, std::vector<float>(batch.size() * (steps + 1) * hidden)};
    const auto prompt = graph_.run(inputs, outputs(), batch);
    const float *prompts = graph_.floats(prompt.front(), {batch.size(), hidden});
    const float *all_steps = most > 0 ? graph_.floats(prompt.back(), {batch.size(), most, hidden}) : nullptr;
    for (std::size_t row = 0; row < batch.size(); ++row) {
      std::copy_n(prompts + row * hidden, hidden, vectors.at(row, 0));
      if (steps > 0) std::copy_n(all_steps + row * most * hidden, steps * hidden, vectors.at(row, 1));
    }
    return vectors;
  }

 private:
  std::vector<std::string> outputs() const {
    if (facts_.steps == 0) return {"prompt_embedding"};
    return {"prompt_embedding", "step_embeddings"};
  }

  OrtGraph graph_;
  GraphFacts facts_;
};

// One graph, run once for the prompt and once per step; a run costs only the steps that it is asked for.
class StepwiseSession : public Session, private PrefixSession {
 public:
  StepwiseSession(OrtGraph graph, const GraphFacts &facts, bool takes_prefixes)
      : graph_(std::move(graph)),
        facts_(facts),
        cache_type_(graph_.input_type("past.0.key")),
        takes_prefixes_(takes_prefixes) {
    for (std::int64_t layer = 0; layer < facts.num_layers; ++layer) {
      for (const char *kind : {".key", ".value"}) {
        past_.push_back("past." + std::to_string(layer) + kind);
        present_.push_back("present." + std::to_string(layer) + kind);
      }
    }
  }

  StepVectors run(const TokenBatch &batch, std::size_t steps, const Prefix *prefix) const override {
    const auto hidden = static_cast<std::size_t>(facts_.hidden_size);
    StepVectors vectors{batch.size(), steps, hidden, std::vector<float>(batch.size() * (steps + 1) * hidden)};
    const std::size_t before = prefix == nullptr ? 0 : prefix->tokens;
    KeysAndValues repeated = prefix == nullptr ? KeysAndValues{} : repeat(*prefix, batch.size());
    std::vector<OrtTensor> state = first_state(batch.size(), before, repeated);
    for (std::size_t k = 0; k <= steps; ++k) {
      state = run_step(batch, before, k, k == steps, state);
      repeated.clear();  // of the prompt pass alone
      const float *next = graph_.floats(state.front(), {batch.size(), 1, hidden});
      for (std::size_t row = 0; row < batch.size(); ++row) std::copy_n(next + row * hidden, hidden, vectors.at(row, k));
    }
    pool_and_normalize(vectors, facts_.pooling == "mean");
    return vectors;
  }

  const PrefixSession *prefixes() const override { return takes_prefixes_ ? this : nullptr; }

 private:
  KeysAndValues compute_prefix(const TokenIds &ids) const override {
    const TokenBatch batch{{0}, ids.size(), ids, std::vector<std::int64_t>(ids.size(), 1)};
    KeysAndValues nothing, values;
    const std::vector<OrtTensor> state = run_step(batch, 0, 0, false, first_state(1, 0, nothing));
    for (auto value = state.begin() + 1; value != state.end(); ++value) {
      values.push_back(graph_.bytes(*value, cache_type_, {1, ids.size(), static_cast<std::size_t>(facts_.kv_size)}));
    }
    return values;
  }

  // Every kept value, once for every row of a batch.
  KeysAndValues repeat(const Prefix &prefix, std::size_t rows) const {
    KeysAndValues repeated;
    for (const auto &value : *prefix.values) {
      std::vector<unsigned char> &target = repeated.emplace_back();
      target.reserve(rows * value.size());
      for (std::size_t row = 0; row < rows; ++row) target.insert(target.end(), value.begin(), value.end());
    }
    return repeated;
  }

  // What the prompt pass takes: no hidden state, and the cache of what lies before, which has to outlive it.
  std::vector<OrtTensor> first_state(std::size_t rows, std::size_t before, KeysAndValues &values) const {
    const auto hidden = static_cast<std::size_t>(facts_.hidden_size), kv = static_cast<std::size_t>(facts_.kv_size);
    std::vector<OrtTensor> state;
    state.push_back(graph_.empty_tensor(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, {rows, 0, hidden}));
    for (std::size_t i = 0; i < past_.size(); ++i) {
      state.push_back(before == 0 ? graph_.empty_tensor(cache_type_, {rows, 0, kv})
                                  : graph_.tensor(cache_type_, values[i], {rows, before, kv}));
    }
    return state;
  }

  // The prompt (k = 0) or a refinement step; takes and gives next_hidden and the cache.
  std::vector<OrtTensor> run_step(const TokenBatch &batch, std::size_t before, std::size_t k, bool last,
                                  const std::vector<OrtTensor> &state) const {
    const std::size_t rows = batch.size();
    std::vector<std::int64_t> mask = extended_mask(batch, before, k);
    const OrtTensor mask_tensor = graph_.tensor(mask.data(), {rows, before + batch.tokens + k});
    const OrtTensor ids = graph_.tensor(data_of(batch.input_ids), {rows, k == 0 ? batch.tokens : 0});
    std::vector<NamedTensor> inputs = {{"input_ids", ids.get()}, {"attention_mask", mask_tensor.get()}};
    if (facts_.steps > 0) inputs.push_back({"hidden", state.front().get()});
    for (std::size_t i = 0; i < past_.size(); ++i) inputs.push_back({past_[i], state[i + 1].get()});
    std::vector<std::string> outputs = {"next_hidden"};
    if (!last) outputs.insert(outputs.end(), present_.begin(), present_.end());
    return graph_.run(inputs, outputs, batch);
  }

  // A 1 for every token of the prefix, the prompt's mask, a 1 for every soft token: (batch, before + tokens + k).
  static std::vector<std::int64_t> extended_mask(const TokenBatch &batch, std::size_t before, std::size_t k) {
    const std::size_t width = before + batch.tokens + k;
    std::vector<std::int64_t> mask(batch.size() * width, 1);
    for (std::size_t row = 0; row < batch.size(); ++row) {
      std::copy_n(batch.attention_mask.data() + row * batch.tokens, batch.tokens, mask.data() + row * width + before);
    }
    return mask;
  }

  OrtGraph graph_;
  GraphFacts facts_;
  ONNXTensorElementDataType cache_type_;
  bool takes_prefixes_;
  std::vector<std::string> past_;
  std::vector<std::string> present_;
};

// Every graph repeats the facts of its bundle, so that a foreign one is found out.
void check_identity(const OrtGraph &graph, const GraphFacts &facts, const std::string &path) {
  const std::string identity = graph.metadata(kGraphIdentityKey);
  bool same = false;
  try {
    same = GraphFacts::from_json(identity) == facts;
  } catch (const std::runtime_error &) {  // not even facts
  }
  if (!same) {
    throw Error(GIRCSE_ERROR_BUNDLE, path,
                "belongs to another bundle: it computes " + (identity.empty() ? "None" : identity),
                "the manifest describes " + facts.to_json(), "Export the bundle again.");
  }
}

}  // namespace

std::unique_ptr<Session> open_session(const Bundle &bundle, const OnnxRuntime &runtime, const std::string &precision,
                                      const std::string &layout, const std::string &provider, int threads) {
  const GraphFacts &facts = bundle.manifest().graph;
  const std::filesystem::path path = bundle.graph(precision, layout);
  const PrecisionSpec *spec = find_precision(precision);
  OrtGraph graph(runtime, path, provider, threads, spec != nullptr && spec->integer_products);
  check_identity(graph, facts, path.string());
  const std::string warning = graph.fallback_warning();
  std::unique_ptr<Session> session;
  if (layout == "unrolled") {
    session = std::make_unique<UnrolledSession>(std::move(graph), facts);
  } else {
    session = std::make_unique<StepwiseSession>(std::move(graph), facts, provider == "cpu");
  }
  session->warning = warning;
  return session;
}

}  // namespace gircse::core
