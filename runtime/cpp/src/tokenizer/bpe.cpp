#include "tokenizer/bpe.h"

#include <stdexcept>
#include <utility>

#include "tokenizer/byte_level.h"
#include "tokenizer/code_points.h"

namespace gircse::core {

namespace {

constexpr std::uint32_t kNone = TokenTable::kNone;
constexpr char32_t kTableSize = 0x10000;
constexpr std::string_view kSpace = "\xE2\x96\x81";  // U+2581, which SentencePiece writes for a space

std::string fallback_token(std::size_t byte) {
  constexpr std::string_view digits = "0123456789ABCDEF";
  return {'<', '0', 'x', digits[byte / 16], digits[byte % 16], '>'};
}

}  // namespace

// The symbols that a word begins as.
class Bpe::Symbols {
 public:
  Symbols(const Bpe &bpe, std::vector<std::uint32_t> &symbols, std::vector<std::uint32_t> &ids)
      : bpe_(bpe), symbols_(symbols), ids_(ids) {
    symbols_.clear();
  }

  void add(std::uint32_t symbol) {
    flush_unknown();
    symbols_.push_back(symbol);
  }

  // A character that the vocabulary does not have: its bytes if it has all of them, else the unknown token or nothing.
  void add_missing(std::string_view character) {
    if (bpe_.byte_fallback_ && add_bytes(character)) return;
    if (!bpe_.unknown_token_) return;
    if (bpe_.unknown_ == kNone) {
      throw std::runtime_error("the unknown token '" + *bpe_.unknown_token_ +
                               "' is not in the vocabulary, and the text needs it");
    }
    if (!bpe_.fuse_unknown_) flush_unknown();
    unknown_ = true;
  }

  // Ends the word, or a part of it that no merge reaches beyond.
  void finish() {
    flush_unknown();
    bpe_.merges_.apply(symbols_);
    for (const std::uint32_t symbol : symbols_) ids_.push_back(bpe_.ids_[symbol]);
    symbols_.clear();
  }

 private:
  // As in Hugging Face tokenizers, an unknown token before them comes after them.
  bool add_bytes(std::string_view character) {
    const auto fallback = [this](char c) { return bpe_.byte_fallbacks_[static_cast<std::uint8_t>(c)]; };
    for (const char c : character) {
      if (fallback(c) == kNone) return false;
    }
    for (const char c : character) symbols_.push_back(fallback(c));
    return true;
  }

  void flush_unknown() {
    if (unknown_) symbols_.push_back(bpe_.unknown_);
    unknown_ = false;
  }

  const Bpe &bpe_;
  std::vector<std::uint32_t> &symbols_, &ids_;
  bool unknown_ = false;
};

Bpe::Bpe(BpeSpec spec, bool byte_level)
    : vocabulary_(std::move(spec.vocabulary)),
      ids_(std::move(spec.ids)),
      unknown_token_(std::move(spec.unknown_token)),
      fuse_unknown_(spec.fuse_unknown),
      byte_fallback_(spec.byte_fallback),
      ignore_merges_(spec.ignore_merges),
      byte_level_(byte_level),
      merges_(spec.merges.size() / 2) {
  read_merges(spec.merges);
  index_characters();
  if (unknown_token_) unknown_ = vocabulary_.find(*unknown_token_);
}

void Bpe::read_merges(const StringList &merges) {
  const auto number_of = [this](std::string_view token) {
    const std::uint32_t number = vocabulary_.find(token);
    if (number == kNone)
      throw std::runtime_error("a merge names '" + std::string(token) + "', which is not in the vocabulary");
    return number;
  };
  std::string product;
  for (std::size_t i = 0; i + 1 < merges.size(); i += 2) {
    if (merges[i].empty() || merges[i + 1].empty()) throw std::runtime_error("a merge with nothing is not supported");
    const std::uint32_t left = number_of(merges[i]), right = number_of(merges[i + 1]);
    product.assign(merges[i]).append(merges[i + 1]);
    merges_.add(left, right, {static_cast<std::uint32_t>(i / 2), number_of(product)});
  }
}

void Bpe::index_characters() {
  for (std::size_t byte = 0; byte < 256; ++byte) {
    byte_characters_[byte] = byte_character(static_cast<std::uint8_t>(byte));
    byte_symbols_[byte] = vocabulary_.find(byte_characters_[byte]);
    byte_fallbacks_[byte] = vocabulary_.find(fallback_token(byte));
  }
  if (byte_level_) return;
  characters_.assign(kTableSize, kNone);
  before_space_.assign(vocabulary_.size(), false);
  for (std::size_t number = 0; number < vocabulary_.size(); ++number) {
    const std::string_view token = vocabulary_[number];
    if (token.empty()) continue;
    const auto [code, size] = code_point_at(token, 0);
    if (size == token.size() && code < kTableSize) characters_[code] = static_cast<std::uint32_t>(number);
    for (std::size_t at = token.find(kSpace, 1); at != std::string_view::npos; at = token.find(kSpace, at + 1)) {
      const std::size_t before = previous_code_point(token, at);
      if (const std::uint32_t symbol = vocabulary_.find(token.substr(before, at - before)); symbol != kNone) {
        before_space_[symbol] = true;
      }
    }
  }
}

std::optional<std::uint32_t> Bpe::id_of(std::string_view token) const {
  const std::uint32_t number = vocabulary_.find(token);
  return number == kNone ? std::nullopt : std::optional<std::uint32_t>(ids_[number]);
}

// A word as the vocabulary writes it.
std::string_view Bpe::written(std::string_view word, std::string &memory) const {
  if (!byte_level_) return word;
  memory.clear();
  for (const char byte : word) memory += byte_characters_[static_cast<std::uint8_t>(byte)];
  return memory;
}

void Bpe::encode(std::string_view word, BpeMemory &memory, std::vector<std::uint32_t> &ids) const {
  if (word.empty()) return;
  if (ignore_merges_) {
    if (const std::uint32_t whole = vocabulary_.find(written(word, memory.written)); whole != kNone) {
      ids.push_back(ids_[whole]);
      return;
    }
  }
  Symbols symbols(*this, memory.symbols, ids);
  if (byte_level_) {
    encode_bytes(word, symbols);
  } else {
    encode_characters(word, symbols);
  }
  symbols.finish();
}

void Bpe::encode_bytes(std::string_view word, Symbols &symbols) const {
  for (const char c : word) {
    const auto byte = static_cast<std::uint8_t>(c);
    if (byte_symbols_[byte] != kNone) {
      symbols.add(byte_symbols_[byte]);
    } else {
      symbols.add_missing(byte_characters_[byte]);
    }
  }
}

// Words of SentencePiece's kind are whole texts. They are cut before a space that no token holds together with the
// character before it: no merge goes across, so that the parts are independent.
void Bpe::encode_characters(std::string_view word, Symbols &symbols) const {
  bool may_cut = false;
  for (std::size_t at = 0; at < word.size();) {
    const auto [code, size] = code_point_at(word, at);
    const std::string_view character = word.substr(at, size);
    at += size;
    const std::uint32_t symbol = code < kTableSize ? characters_[code] : vocabulary_.find(character);
    if (symbol == kNone) {
      symbols.add_missing(character);
      may_cut = false;
      continue;
    }
    if (may_cut && character == kSpace) symbols.finish();
    symbols.add(symbol);
    may_cut = !before_space_[symbol];
  }
}

}  // namespace gircse::core
