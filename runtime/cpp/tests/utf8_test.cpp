#include "utf8.h"

#include <doctest/doctest.h>

#include <string>

using gircse::core::find_utf8_fault;

TEST_CASE("Valid UTF-8 has no offset, NUL included") {
  CHECK(!find_utf8_fault(""));
  CHECK(!find_utf8_fault(std::string("a\0b\xC3\xA9\xF0\x9F\x98\x80 and eight more", 23)));
}

TEST_CASE("The offset is that of the first byte of the sequence that is wrong") {
  const std::string ascii(20, 'a');
  CHECK(find_utf8_fault(ascii + "\x80")->offset == 20);
  CHECK(find_utf8_fault(ascii + "\xC3")->offset == 20);
  CHECK(find_utf8_fault("\xC3\xA9\xE4\xB8z")->offset == 2);
  CHECK(find_utf8_fault("\xC0\x80")->offset == 0);          // overlong
  CHECK(find_utf8_fault("a\xED\xA0\x80")->offset == 1);     // a surrogate
  CHECK(find_utf8_fault("\xF4\x90\x80\x80")->offset == 0);  // above U+10FFFF
}
