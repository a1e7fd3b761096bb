#include "tokenizer/pattern.h"

#include <doctest/doctest.h>

#include <stdexcept>
#include <string>
#include <string_view>

using gircse::core::Pattern;
using gircse::core::StepBudget;

// A text with its matches in brackets.
static std::string marked(const Pattern &pattern, std::string_view text) {
  StepBudget budget(text.size());
  std::string found;
  pattern.split(text, budget, [&](std::size_t begin, std::size_t end, bool is_match) {
    const std::string part(text.substr(begin, end - begin));
    found += is_match ? "[" + part + "]" : part;
  });
  return found;
}

static std::string marked(std::string_view regex, std::string_view text) { return marked(Pattern::regex(regex), text); }

TEST_CASE("A literal matches from the left, without overlaps") {
  CHECK(marked(Pattern::literal("aa"), "aaaba") == "[aa]aba");
  CHECK(marked(Pattern::literal("x"), "") == "");
}

TEST_CASE("The first alternative that matches wins, and quantifiers give back what the rest needs") {
  CHECK(marked("a|ab", "ab") == "[a]b");
  CHECK(marked("(?:ab|a)b", "abab") == "[ab][ab]");
  CHECK(marked("a+ab", "aaab") == "[aaab]");
  CHECK(marked("a++ab", "aaab") == "aaab");
  CHECK(marked("a+?b?", "aab") == "[a][ab]");
  CHECK(marked("a{2,3}", "aaaaa") == "[aaa][aa]");
  CHECK(marked("x(?i:'s|'ll)?", "x'S x'lL x'q") == "[x'S] [x'lL] [x]'q");
}

TEST_CASE("Assertions take no text") {
  CHECK(marked(R"(\s+(?!\S)|\s+)", "  a  ") == "[ ][ ]a[  ]");
  CHECK(marked(R"(\p{L}(?=\d))", "ab1") == "a[b]1");
  CHECK(marked(R"(\Aa)", "aa") == "[a]a");
}

TEST_CASE("Classes hold what Unicode says, beyond ASCII too") {
  CHECK(marked(R"([^\s\p{L}])", "a1 \xC3\xA9.") == "a[1] \xC3\xA9[.]");
  CHECK(marked(R"(\s)", "a\xE2\x80\x83\xE1\xA0\x8E") == "a[\xE2\x80\x83]\xE1\xA0\x8E");  // not U+180E
  CHECK(marked(R"([\-a-c\]])", "-b]d") == "[-][b][]]d");
}

TEST_CASE("A long run needs no stack") {
  const std::string text(5'000'000, ' ');
  CHECK(marked(R"(\s*[\r\n]+|\s+(?!\S)|\s+)", text + "x") == "[" + text.substr(1) + "][ ]x");
}

TEST_CASE("A pattern that takes too long is an error, not a wait") {
  std::string source;
  for (int i = 0; i < 40; ++i) source += "(?:a|a)";
  CHECK_THROWS_AS(marked(source + "b", std::string(60, 'a')), std::runtime_error);
  CHECK_THROWS_AS(marked("a+a+a+a+b", std::string(100'000, 'a')), std::runtime_error);
}
