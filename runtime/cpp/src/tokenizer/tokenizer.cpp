#include "tokenizer/tokenizer.h"

#include <algorithm>
#include <map>
#include <unordered_map>
#include <utility>

#include "tokenizer/spec.h"

namespace gircse::core {

namespace {

// Gives every added token its id: that of the model where it has the token, else the next one after the model's and all
// added tokens'. The id in the file is not used, as in Hugging Face tokenizers.
std::map<std::uint32_t, AddedToken> with_ids(const std::vector<AddedToken> &tokens, const Bpe &model) {
  std::map<std::uint32_t, AddedToken> by_id;
  std::unordered_map<std::string, std::uint32_t> ids;
  auto next_id = static_cast<std::uint32_t>(model.size());
  for (const AddedToken &token : tokens) {
    if (token.content.empty()) continue;
    const auto known = ids.find(token.content);
    const std::optional<std::uint32_t> id = known != ids.end() ? known->second : model.id_of(token.content);
    if (known != ids.end() && by_id.at(*id) == token) continue;
    ids[token.content] = id.value_or(next_id);
    by_id[id.value_or(next_id)] = token;
    if (!id) ++next_id;
  }
  return by_id;
}

}  // namespace

struct Tokenizer::Impl {
  explicit Impl(TokenizerSpec spec)
      : normalizer(std::move(spec.normalizer)),
        pre_tokenizer(std::move(spec.pre_tokenizer)),
        model(std::move(spec.model), spec.byte_level),
        raw_tokens(added_tokens(spec.added_tokens, false)),
        normalized_tokens(added_tokens(spec.added_tokens, true)) {}

  AddedTokens added_tokens(const std::vector<AddedToken> &tokens, bool normalized) const {
    std::vector<AddedTokens::Entry> entries;
    for (const auto &[id, token] : with_ids(tokens, model)) {
      if (token.normalized != normalized) continue;
      StepBudget budget(token.content.size());
      std::string memory;
      const std::string_view pattern =
          normalized ? normalizer.apply(token.content, budget, memory).text : token.content;
      entries.push_back({std::string(pattern), token, id});
    }
    return AddedTokens(std::move(entries));
  }

  Normalizer normalizer;
  PreTokenizer pre_tokenizer;
  Bpe model;
  AddedTokens raw_tokens, normalized_tokens;
};

Tokenizer::Tokenizer(std::string_view json) : impl_(std::make_unique<const Impl>(read_tokenizer(json))) {}

Tokenizer::~Tokenizer() = default;

Tokenizer::Tokenizer(Tokenizer &&) noexcept = default;

std::vector<std::uint32_t> Tokenizer::encode(std::string_view text) const {
  std::vector<std::uint32_t> ids;
  StepBudget budget(text.size());
  std::string normalized;
  BpeMemory memory;
  const auto add_word = [&](std::string_view word) { impl_->model.encode(word, memory, ids); };
  impl_->raw_tokens.split(text, [&](std::string_view part, std::size_t begin, std::optional<std::uint32_t> id) {
    if (id) return ids.push_back(*id);
    const Normalized plain = impl_->normalizer.apply(part, budget, normalized);
    const std::size_t start = begin == 0 ? plain.start : 0;
    impl_->normalized_tokens.split(
        plain.text, [&](std::string_view inner, std::size_t inner_begin, std::optional<std::uint32_t> inner_id) {
          if (inner_id) return ids.push_back(*inner_id);
          impl_->pre_tokenizer.split(inner, start - std::min(start, inner_begin), budget, add_word);
        });
  });
  return ids;
}

}  // namespace gircse::core
