// A bundle, opened once, that turns texts into vectors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "bundle.h"
#include "golden.h"
#include "ort/library.h"
#include "prompt_tokenizer.h"
#include "session.h"

namespace gircse::core {

// How a bundle is opened; the fields are those of gircse_open_options.
struct OpenOptions {
  std::optional<std::string> precision;
  std::string provider = "auto";
  std::optional<std::string> layout;
  std::string onnxruntime;
  int threads = 0;
  std::size_t streams = 1;
  bool verify = true;
  bool prefix_cache = true;
};

// How prompts run; the fields are those of gircse_encode_options.
struct RunOptions {
  std::int32_t steps = -1;
  bool all_steps = false;
  std::size_t batch_size = 32;
  std::size_t batch_tokens = 4096;
};

class Embedder {
 public:
  Embedder(const std::string &path, const OpenOptions &options);

  const Manifest &manifest() const noexcept { return bundle_.manifest(); }
  const std::string &precision() const noexcept { return precision_; }
  const std::string &provider() const noexcept { return provider_; }
  const std::string &layout() const noexcept { return layout_; }
  const std::string &onnxruntime() const noexcept { return runtime_->version; }

  // Why "auto" passed over better providers, one per line.
  const std::string &skipped() const noexcept { return skipped_; }

  // What makes it slow, in one line; empty where nothing is known to.
  const std::string &warning() const noexcept { return session_->warning; }

  const PromptTokenizer &tokenizer() const noexcept { return tokenizer_; }

  // Number of floats that one text gives.
  std::size_t row_size(const RunOptions &options) const;

  // Embeds prompts into (n, hidden) floats, or (n, steps, hidden) with all_steps; row i belongs to prompt i.
  void embed(const std::vector<TokenIds> &prompts, const RunOptions &options, float *vectors) const;

  // The same with prompts that were made of texts: what they begin with is run once, where that saves work.
  void embed_texts(const std::vector<TokenIds> &prompts, const PromptOptions &prompt, const RunOptions &options,
                   float *vectors) const;

  // Throws Error where a prompt that did not come from the tokenizer has no tokens, too many, or unknown ones.
  void check_length(std::size_t prompt, std::size_t tokens) const;
  void check_tokens(std::size_t prompt, const TokenIds &ids) const;

  // Embeds the golden texts and compares every step with PyTorch.
  SelfTest self_test() const;

 private:
  std::optional<Prefix> choose_prefix(const std::vector<TokenIds> &prompts, const PromptOptions &options) const;
  void embed_after(const std::optional<Prefix> &prefix, const std::vector<TokenIds> &prompts, const RunOptions &options,
                   float *vectors) const;
  std::size_t checked_steps(const RunOptions &options) const;
  void open(const OpenOptions &options);
  void open_on(const std::string &provider, const OpenOptions &options);

  Bundle bundle_;
  PromptTokenizer tokenizer_;
  const OnnxRuntime *runtime_;
  std::unique_ptr<Session> session_;
  std::size_t streams_ = 1;
  std::unique_ptr<PrefixCache> prefixes_;  // null where prompts are run whole
  std::string precision_;
  std::string provider_;
  std::string layout_;
  std::string skipped_;
};

}  // namespace gircse::core
