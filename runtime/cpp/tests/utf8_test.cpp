#include "utf8.h"

#include <doctest/doctest.h>

#include <string>

using gircse::core::invalid_utf8_offset;

TEST_CASE("Valid UTF-8 has no offset, NUL included") {
  CHECK(!invalid_utf8_offset(""));
  CHECK(!invalid_utf8_offset(std::string("a\0b\xC3\xA9\xF0\x9F\x98\x80 and eight more", 23)));
}

TEST_CASE("The offset is that of the first byte of the sequence that is wrong") {
  const std::string ascii(20, 'a');
  CHECK(*invalid_utf8_offset(ascii + "\x80") == 20);
  CHECK(*invalid_utf8_offset(ascii + "\xC3") == 20);
  CHECK(*invalid_utf8_offset("\xC3\xA9\xE4\xB8z") == 2);
  CHECK(*invalid_utf8_offset("\xC0\x80") == 0);          // overlong
  CHECK(*invalid_utf8_offset("a\xED\xA0\x80") == 1);     // a surrogate
  CHECK(*invalid_utf8_offset("\xF4\x90\x80\x80") == 0);  // above U+10FFFF
}
