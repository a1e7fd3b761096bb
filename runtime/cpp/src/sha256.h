// SHA-256 (FIPS 180-4), with the processor's own instructions where it has them: hashing must not outlast the loading
// of a graph that runs beside it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace gircse::core {

class Sha256 {
 public:
  void update(const void *data, std::size_t size);

  // Hexadecimal digest of everything so far; ends the computation.
  std::string hex_digest();

 private:
  std::array<std::uint32_t, 8> state_ = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                         0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<std::uint8_t, 64> pending_{};
  std::size_t pending_size_ = 0;
  std::uint64_t total_size_ = 0;
};

namespace sha256 {

// Advances the state by whole blocks of 64 bytes; both give the same state.
void compress_portable(std::uint32_t *state, const std::uint8_t *blocks, std::size_t count);
bool has_instructions();
void compress_instructions(std::uint32_t *state, const std::uint8_t *blocks, std::size_t count);

}  // namespace sha256
}  // namespace gircse::core
