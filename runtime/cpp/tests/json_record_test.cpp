#include "json_record.h"

#include <doctest/doctest.h>

#include <string>

using gircse::core::JsonRecord;
using gircse::core::parse_json;

TEST_CASE("only JSON is read") {
  for (const char *content : {"", " ", "{", "[1,]", "{\"a\":1,}", "nul", "01", "'a'", "\"\\ud800\"", "\"\xff\"",
                              "1e400", "{} {}", "\xef\xbb\xbf{}", "NaN"}) {
    CAPTURE(content);
    CHECK_THROWS_AS(parse_json(content), std::runtime_error);
  }
  CHECK_THROWS_WITH(parse_json(std::string("{}\0", 3)), "JSON is malformed at byte 3");
  CHECK(parse_json(" {\"a\\u0000b\": [1, 2.5, true, null]}\n").size() == 1);
}

TEST_CASE("nesting has a limit") {
  const auto nested = [](std::size_t depth) { return std::string(depth, '[') + std::string(depth, ']'); };
  CHECK(parse_json(nested(1000)).is_array());
  CHECK_THROWS_WITH(parse_json(nested(1002)), "JSON is nested too deeply");
  CHECK_THROWS_WITH(parse_json(std::string(10'000'000, '[')), "JSON is nested too deeply");
}

TEST_CASE("fields have the type that is asked for") {
  const nlohmann::json json = parse_json(R"({"t":"x","i":-3,"n":2.5,"b":true,"u":null,"l":[1,2],"s":["a"],"big":1e3,
                                             "large":9223372036854775808,"o":{"k":"v"},"r":[{"x":1},{"y":"z"}]})");
  JsonRecord record(json, "$");
  CHECK(record.text("t") == "x");
  CHECK(record.integer("i") == -3);
  CHECK(record.number("n") == 2.5);
  CHECK(record.number("i") == -3.0);
  CHECK(record.boolean("b"));
  CHECK_FALSE(record.text_or_null("u").has_value());
  CHECK_FALSE(record.record_or_null("u").has_value());
  CHECK(record.integers("l") == std::vector<std::int64_t>{1, 2});
  CHECK(record.texts("s") == std::vector<std::string>{"a"});
  CHECK(record.named_texts("o").front().second == "v");
  CHECK(record.one_of("t", {"x", "y"}) == "x");
  CHECK_THROWS_WITH(record.one_of("t", {"y"}), "Invalid enum value 'x' - at `$.t`");
  CHECK_THROWS_WITH(record.text("i"), "Expected `str`, got `int` - at `$.i`");
  CHECK_THROWS_WITH(record.integer("n"), "Expected `int`, got `float` - at `$.n`");
  CHECK_THROWS_WITH(record.integer("big"), "Expected `int`, got `float` - at `$.big`");
  CHECK_THROWS_WITH(record.integer("large"), "Integer out of range - at `$.large`");
  CHECK_THROWS_WITH(record.number("b"), "Expected `float`, got `bool` - at `$.b`");
  CHECK_THROWS_WITH(record.boolean("i"), "Expected `bool`, got `int` - at `$.i`");
  CHECK_THROWS_WITH(record.text_or_null("o"), "Expected `str | null`, got `object` - at `$.o`");
  CHECK_THROWS_WITH(record.integers("s"), "Expected `int`, got `str` - at `$.s[0]`");
  CHECK_THROWS_WITH(record.texts("l"), "Expected `str`, got `int` - at `$.l[0]`");
  CHECK_THROWS_WITH(record.records("r").at(1).integer("y"), "Expected `int`, got `str` - at `$.r[1].y`");
  CHECK_THROWS_WITH(record.record("u"), "Expected `object`, got `null` - at `$.u`");
  CHECK_THROWS_WITH(record.text("none"), "Object missing required field `none`");
}

TEST_CASE("a field that nobody asked for is an error") {
  const nlohmann::json json = parse_json(R"({"a":1,"b":{"c":2}})");
  JsonRecord record(json, "$");
  record.integer("a");
  CHECK_THROWS_WITH(record.finish(), "Object contains unknown field `b`");
  JsonRecord inner = record.record("b");
  CHECK_NOTHROW(record.finish());
  CHECK_FALSE(inner.has("d"));
  CHECK_THROWS_WITH(inner.finish(), "Object contains unknown field `c` - at `$.b`");
  CHECK_THROWS_WITH(JsonRecord(parse_json("[]"), "$"), "Expected `object`, got `array`");
}
