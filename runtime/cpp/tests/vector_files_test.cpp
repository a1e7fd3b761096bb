#include "vector_files.h"

#include <doctest/doctest.h>

#include <cmath>
#include <cstdlib>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

using gircse::command::json_line;
using gircse::command::npy_header;
using gircse::command::number_text;

// What Python's repr prints.
static const std::vector<std::pair<double, std::string>> kNumbers = {
    {0.0, "0.0"},
    {-0.0, "-0.0"},
    {1.0, "1.0"},
    {-1.0, "-1.0"},
    {0.1, "0.1"},
    {123456.789, "123456.789"},
    {1e-05, "1e-05"},
    {0.0001, "0.0001"},
    {0.00012345, "0.00012345"},
    {9.999e-05, "9.999e-05"},
    {1000000000000000.0, "1000000000000000.0"},
    {1e+16, "1e+16"},
    {1e+17, "1e+17"},
    {1.2345678901234568e+17, "1.2345678901234568e+17"},
    {9007199254740992.0, "9007199254740992.0"},
    {1.5e+300, "1.5e+300"},
    {5e-324, "5e-324"},
    {1.7976931348623157e+308, "1.7976931348623157e+308"},
    {2.2250738585072014e-308, "2.2250738585072014e-308"},
    {100.0, "100.0"},
    {1e+22, "1e+22"},
    {1e+23, "1e+23"},
    {0.10000000149011612, "0.10000000149011612"},
    {9.999999747378752e-06, "9.999999747378752e-06"},
    {3.4028234663852886e+38, "3.4028234663852886e+38"},
    {1.401298464324817e-45, "1.401298464324817e-45"},
    {0.3333333432674408, "0.3333333432674408"},
    {-0.0625, "-0.0625"},
    {2.300000051036477e-05, "2.300000051036477e-05"},
    {16777216.0, "16777216.0"},
    {1.1754943508222875e-38, "1.1754943508222875e-38"},
};

TEST_CASE("numbers are written as Python writes them") {
  for (const auto &[value, text] : kNumbers) CHECK(number_text(value) == text);
  CHECK(number_text(std::nan("")) == "NaN");
  CHECK(number_text(std::numeric_limits<double>::infinity()) == "Infinity");
  CHECK(number_text(-std::numeric_limits<double>::infinity()) == "-Infinity");
}

TEST_CASE("a number comes back as the same bits") {
  std::mt19937 random(7);
  std::uniform_real_distribution<float> mantissa(-1, 1);
  std::uniform_int_distribution<int> exponent(-140, 120);
  for (int i = 0; i < 100'000; ++i) {
    const double value = std::ldexp(mantissa(random), exponent(random));
    CHECK(std::strtod(number_text(value).c_str(), nullptr) == value);
  }
}

TEST_CASE("a line of JSON escapes what Python escapes and nothing else") {
  const float vector[] = {0.5f, -1e-5f};
  CHECK(json_line("\"\\/\b\f\n\r\t\x1f\x7f\u00e9\U0001F600", vector, 2) ==
        "{\"text\": \"\\\"\\\\/\\b\\f\\n\\r\\t\\u001f\x7f\u00e9\U0001F600\", \"embedding\": [0.5, "
        "-9.999999747378752e-06]}\n");
  CHECK(json_line({"\0", 1}, vector, 0) == "{\"text\": \"\\u0000\", \"embedding\": []}\n");
}

TEST_CASE("the header of an array has the same length for every number of rows") {
  CHECK(npy_header(0, 48).size() == npy_header(std::numeric_limits<std::size_t>::max(), 48).size());
}
