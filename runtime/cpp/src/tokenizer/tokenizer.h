// The tokenizer of a bundle: tokenizer.json, with the token ids that Hugging Face tokenizers gives.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace gircse::core {

class Tokenizer {
 public:
  // Reads the content of a tokenizer.json; its own truncation and padding are ignored. Throws std::runtime_error, which
  // names the construct that is not supported or what is wrong.
  explicit Tokenizer(std::string_view json);
  ~Tokenizer();
  Tokenizer(Tokenizer &&) noexcept;

  // Token ids of a text, which is valid UTF-8, without special tokens around it. Safe to call from several threads.
  // A character that no token holds is left out where there is no unknown token, as in Hugging Face tokenizers. Throws
  // std::runtime_error where the unknown token that is needed is not in the vocabulary, where a pattern would take too
  // long, or where added tokens claim the same white space.
  std::vector<std::uint32_t> encode(std::string_view text) const;

 private:
  struct Impl;
  std::unique_ptr<const Impl> impl_;
};

}  // namespace gircse::core
