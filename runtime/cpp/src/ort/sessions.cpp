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

  StepVectors run(const TokenBatch &batch, std::size_t steps) const override {
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
class StepwiseSession : public Session {
 public:
  StepwiseSession(OrtGraph graph, const GraphFacts &facts)
      : graph_(std::move(graph)), facts_(facts), cache_type_(graph_.input_type("past.0.key")) {
    for (std::int64_t layer = 0; layer < facts.num_layers; ++layer) {
      for (const char *kind : {".key", ".value"}) {
        past_.push_back("past." + std::to_string(layer) + kind);
        present_.push_back("present." + std::to_string(layer) + kind);
      }
    }
  }

  StepVectors run(const TokenBatch &batch, std::size_t steps) const override {
    const auto hidden = static_cast<std::size_t>(facts_.hidden_size);
    StepVectors vectors{batch.size(), steps, hidden, std::vector<float>(batch.size() * (steps + 1) * hidden)};
    std::vector<OrtTensor> state;  // h_{k-1} and, but for the last step, the cache
    for (std::size_t k = 0; k <= steps; ++k) {
      state = run_step(batch, k, k == steps, std::move(state));
      const float *next = graph_.floats(state.front(), {batch.size(), 1, hidden});
      for (std::size_t row = 0; row < batch.size(); ++row) std::copy_n(next + row * hidden, hidden, vectors.at(row, k));
    }
    pool_and_normalize(vectors, facts_.pooling == "mean");
    return vectors;
  }

 private:
  // The prompt (k = 0) or a refinement step; takes and gives next_hidden and the cache.
  std::vector<OrtTensor> run_step(const TokenBatch &batch, std::size_t k, bool last,
                                  std::vector<OrtTensor> state) const {
    const auto hidden = static_cast<std::size_t>(facts_.hidden_size), kv = static_cast<std::size_t>(facts_.kv_size);
    const std::size_t rows = batch.size();
    std::vector<std::int64_t> mask = extended_mask(batch, k);
    const OrtTensor mask_tensor = graph_.tensor(mask.data(), {rows, batch.tokens + k});
    const OrtTensor ids = graph_.tensor(data_of(batch.input_ids), {rows, k == 0 ? batch.tokens : 0});
    const OrtTensor no_hidden = graph_.empty_tensor(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, {rows, 0, hidden});
    const OrtTensor no_past = graph_.empty_tensor(cache_type_, {rows, 0, kv});
    std::vector<NamedTensor> inputs = {{"input_ids", ids.get()}, {"attention_mask", mask_tensor.get()}};
    if (facts_.steps > 0) inputs.push_back({"hidden", k == 0 ? no_hidden.get() : state.front().get()});
    for (std::size_t i = 0; i < past_.size(); ++i) {
      inputs.push_back({past_[i], k == 0 ? no_past.get() : state[i + 1].get()});
    }
    std::vector<std::string> outputs = {"next_hidden"};
    if (!last) outputs.insert(outputs.end(), present_.begin(), present_.end());
    return graph_.run(inputs, outputs, batch);
  }

  // The prompt's mask, then a 1 for every soft token: (batch, tokens + k).
  static std::vector<std::int64_t> extended_mask(const TokenBatch &batch, std::size_t k) {
    std::vector<std::int64_t> mask(batch.size() * (batch.tokens + k), 1);
    for (std::size_t row = 0; row < batch.size(); ++row) {
      std::copy_n(batch.attention_mask.data() + row * batch.tokens, batch.tokens,
                  mask.data() + row * (batch.tokens + k));
    }
    return mask;
  }

  OrtGraph graph_;
  GraphFacts facts_;
  ONNXTensorElementDataType cache_type_;
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
  if (layout == "unrolled") return std::make_unique<UnrolledSession>(std::move(graph), facts);
  return std::make_unique<StepwiseSession>(std::move(graph), facts);
}

}  // namespace gircse::core
