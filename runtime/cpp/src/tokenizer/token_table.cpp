#include "tokenizer/token_table.h"

#include <algorithm>
#include <cstring>

namespace gircse::core {

namespace {

std::uint64_t mix(std::uint64_t value) {
  value *= 0x9E3779B97F4A7C15U;
  return value ^ value >> 32;
}

std::uint64_t hash(std::string_view text) {
  std::uint64_t state = text.size();
  while (text.size() >= 8) {
    std::uint64_t block = 0;
    std::memcpy(&block, text.data(), 8);
    state = mix(state ^ block);
    text.remove_prefix(8);
  }
  std::uint64_t tail = 0;
  for (const char c : text) tail = tail << 8 | static_cast<std::uint8_t>(c);
  return mix(mix(state ^ tail));
}

}  // namespace

std::size_t TokenTable::slot_of(std::string_view token) const {
  const std::size_t mask = slots_.size() - 1;
  std::size_t slot = hash(token) & mask;
  while (slots_[slot] != kNone && tokens_[slots_[slot]] != token) slot = (slot + 1) & mask;
  return slot;
}

std::uint32_t TokenTable::find(std::string_view token) const { return slots_.empty() ? kNone : slots_[slot_of(token)]; }

std::uint32_t TokenTable::add(std::string_view token) {
  if (size() * 2 >= slots_.size()) grow();
  const std::size_t slot = slot_of(token);
  if (slots_[slot] == kNone) {
    slots_[slot] = static_cast<std::uint32_t>(size());
    tokens_.add(token);
  }
  return slots_[slot];
}

void TokenTable::grow() {
  slots_.assign(std::max<std::size_t>(1024, slots_.size() * 2), kNone);
  for (std::size_t number = 0; number < size(); ++number) {
    slots_[slot_of(tokens_[number])] = static_cast<std::uint32_t>(number);
  }
}

}  // namespace gircse::core
