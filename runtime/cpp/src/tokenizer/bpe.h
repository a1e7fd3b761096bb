// Byte-pair encoding: the token ids of a word.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "tokenizer/merge_table.h"
#include "tokenizer/token_table.h"

namespace gircse::core {

// The model of a tokenizer.json.
struct BpeSpec {
  TokenTable vocabulary;
  std::vector<std::uint32_t> ids;  // of the vocabulary's strings
  StringList merges;               // two strings each
  std::optional<std::string> unknown_token;
  bool fuse_unknown = false;
  bool byte_fallback = false;
  bool ignore_merges = false;
};

// Memory that is used again from word to word.
struct BpeMemory {
  std::string written;
  std::vector<std::uint32_t> symbols;
};

class Bpe {
 public:
  // `byte_level`: the bytes of a word are written as characters before it is looked up. Throws std::runtime_error where
  // a merge names a token that is not in the vocabulary.
  Bpe(BpeSpec spec, bool byte_level);

  // Id of a token of the vocabulary.
  std::optional<std::uint32_t> id_of(std::string_view token) const;
  std::size_t size() const { return vocabulary_.size(); }

  // Appends the ids of a word. Throws std::runtime_error where the unknown token is needed and not in the vocabulary.
  void encode(std::string_view word, BpeMemory &memory, std::vector<std::uint32_t> &ids) const;

 private:
  class Symbols;

  void read_merges(const StringList &merges);
  void index_characters();
  std::string_view written(std::string_view word, std::string &memory) const;
  void encode_bytes(std::string_view word, Symbols &symbols) const;
  void encode_characters(std::string_view word, Symbols &symbols) const;

  TokenTable vocabulary_;
  std::vector<std::uint32_t> ids_;
  std::optional<std::string> unknown_token_;
  bool fuse_unknown_, byte_fallback_, ignore_merges_, byte_level_;
  MergeTable merges_;
  std::array<std::string, 256> byte_characters_;
  std::array<std::uint32_t, 256> byte_symbols_{};    // of the characters of bytes
  std::array<std::uint32_t, 256> byte_fallbacks_{};  // of <0x00> to <0xFF>
  std::uint32_t unknown_ = TokenTable::kNone;
  std::vector<std::uint32_t> characters_;  // symbols of U+0000 to U+FFFF
  std::vector<bool> before_space_;         // symbols after which a token goes on with U+2581
};

}  // namespace gircse::core
