#include "error.h"

#include <doctest/doctest.h>

#include <string>

using gircse::core::Error;
using gircse::core::in_quotes;
using gircse::core::readable;
using gircse::core::sentence;

TEST_CASE("parts become sentences") {
  CHECK(sentence("a", "is b", std::nullopt, std::nullopt) == "a is b.");
  CHECK(sentence("a", "is b.", "c is expected.", "Do d.") == "a is b; c is expected. Do d.");
  CHECK(sentence("a", "is b", std::nullopt, "Run: c --flag") == "a is b. Run: c --flag");
  const Error err(GIRCSE_ERROR_BUNDLE, "a", "is b");
  CHECK(err.code() == GIRCSE_ERROR_BUNDLE);
  CHECK(std::string(err.what()) == "a is b.");
}

TEST_CASE("a part is one line that a terminal can show") {
  CHECK(readable("a\nb\r\nc\xe2\x80\xa8"
                 "d\xc2\x85"
                 "e\n") == "a b c d e");
  CHECK(readable("\x1b[31m\t\x7f") == "\\x1b[31m\\x09\\x7f");
  CHECK(readable(std::string("a\0b", 3)) == "a\\x00b");
  CHECK(readable("ünïcödé 😀 日本") == "ünïcödé 😀 日本");
  CHECK(readable("\xe2\x80\xae\xe2\x80\x8b\xef\xbb\xbf\xc2\xa0\xc2\x9f") == "\\u202e\\u200b\\ufeff\\xa0\\x9f");
}

TEST_CASE("bytes that are no UTF-8 are escaped one by one") {
  CHECK(readable("a\xff"
                 "b\xc3(") == "a\\xffb\\xc3(");
  CHECK(readable("\xed\xa0\x80") == "\\xed\\xa0\\x80");
  CHECK(readable("\xf0\x9f") == "\\xf0\\x9f");
}

TEST_CASE("the middle of a long part is left out") {
  const std::string text = readable(std::string(70'000, 'x'));
  CHECK(text == std::string(1000, 'x') + " [...] " + std::string(1000, 'x'));
  CHECK(readable(std::string(2000, 'x')) == std::string(2000, 'x'));
}

TEST_CASE("quotes as Python's repr sets them") {
  CHECK(in_quotes("a") == "'a'");
  CHECK(in_quotes("it's") == "\"it's\"");
  CHECK(in_quotes("'\"") == "'\\'\"'");
  CHECK(in_quotes("a\n\\\t\r") == "'a\\n\\\\\\t\\r'");
}
