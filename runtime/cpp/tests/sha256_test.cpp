#include "sha256.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

using gircse::core::Sha256;
namespace sha256 = gircse::core::sha256;

static std::string digest(const std::string &text) {
  Sha256 hash;
  hash.update(text.data(), text.size());
  return hash.hex_digest();
}

// FIPS 180-4 and NIST's example values.
TEST_CASE("SHA-256 of the published messages") {
  CHECK(digest("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  CHECK(digest("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  CHECK(digest("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq") ==
        "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  CHECK(digest("abcdefghbcdefghicdefghijdefghijkefghijklfghijklmghijklmnhijklmnoijklmnopjklmnopqklmnopqrlmnopqrs"
               "mnopqrstnopqrstu") == "cf5b16a778af8380036ce59e7b0492370b249b11e8f07a51afac45037afee9d1");
  CHECK(digest(std::string(1000000, 'a')) == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
  CHECK(digest(std::string(1, '\xbd')) == "68325720aabd7c82f30f554b313d0570c95accbb7dc4b5aae11204c08ffe732b");
  CHECK(digest(std::string(64, '\0')) == "f5a5fd42d16a20302798ef6ed309979b43003d2320d9f0e8ea9831a92759fb4b");
}

TEST_CASE("the processor's instructions give the state of the portable code") {
  if (!sha256::has_instructions()) MESSAGE("this processor has none: the portable code is compared with itself");
  std::mt19937 random(1);
  for (const std::size_t blocks : {std::size_t{0}, std::size_t{1}, std::size_t{2}, std::size_t{7}, std::size_t{64}}) {
    std::vector<std::uint8_t> data(64 * blocks + 1);
    for (auto &byte : data) byte = static_cast<std::uint8_t>(random());
    std::array<std::uint32_t, 8> portable{};
    for (auto &word : portable) word = static_cast<std::uint32_t>(random());
    std::array<std::uint32_t, 8> fast = portable;
    sha256::compress_portable(portable.data(), data.data() + 1, blocks);  // not aligned
    (sha256::has_instructions() ? sha256::compress_instructions : sha256::compress_portable)(fast.data(),
                                                                                             data.data() + 1, blocks);
    CHECK(fast == portable);
  }
}

TEST_CASE("a message may come in pieces of any size") {
  std::string text;
  for (int i = 0; i < 1000; ++i) text += static_cast<char>(i * 7);
  for (std::size_t size = 0; size <= 200; ++size) {
    const std::string message = text.substr(0, size);
    for (const std::size_t step : {1U, 3U, 55U, 56U, 63U, 64U, 65U}) {
      Sha256 hash;
      for (std::size_t at = 0; at < size; at += step) hash.update(message.data() + at, std::min(step, size - at));
      CHECK(hash.hex_digest() == digest(message));
    }
  }
}
