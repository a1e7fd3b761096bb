#include "vector_files.h"

#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstdlib>

namespace gircse::command {
namespace {

constexpr std::size_t kNpyAlignment = 64;
constexpr std::size_t kNpyRowDigits = 21;  // numpy leaves room for as many, so that a header can be written again

void append_json_string(std::string &line, std::string_view text) {
  line += '"';
  for (const char byte : text) {
    switch (byte) {
      case '"': line += "\\\""; break;
      case '\\': line += "\\\\"; break;
      case '\b': line += "\\b"; break;
      case '\f': line += "\\f"; break;
      case '\n': line += "\\n"; break;
      case '\r': line += "\\r"; break;
      case '\t': line += "\\t"; break;
      default:
        if (static_cast<unsigned char>(byte) < 0x20) {
          char escape[7];
          std::snprintf(escape, sizeof escape, "\\u%04x", static_cast<unsigned>(byte));
          line += escape;
        } else {
          line += byte;
        }
    }
  }
  line += '"';
}

// Digits without a point, and where the point stands: 0.00125 is {"125", -2}.
struct Decimal {
  std::string digits;
  int point;
};

Decimal shortest_decimal(double value) {
  char buffer[32];
  const auto end = std::to_chars(buffer, buffer + sizeof buffer, value, std::chars_format::scientific).ptr;
  const std::string_view text(buffer, static_cast<std::size_t>(end - buffer));
  const std::size_t e = text.find('e');
  Decimal decimal{std::string(1, text.front()), std::atoi(std::string(text.substr(e + 1)).c_str()) + 1};
  if (e > 2) decimal.digits += text.substr(2, e - 2);
  return decimal;
}

}  // namespace

std::string npy_header(std::size_t rows, std::size_t dimension) {
  const std::string count = std::to_string(rows);
  std::string header = "{'descr': '<f4', 'fortran_order': False, 'shape': (" + count + ", " +
                       std::to_string(dimension) + "), }" + std::string(kNpyRowDigits - count.size(), ' ');
  const std::string magic("\x93NUMPY\x01\x00", 8);
  const std::size_t unpadded = magic.size() + 2 + header.size() + 1;
  header += std::string(kNpyAlignment - unpadded % kNpyAlignment, ' ') + '\n';
  return magic + static_cast<char>(header.size() & 0xff) + static_cast<char>(header.size() >> 8) + header;
}

std::string number_text(double value) {
  if (std::isnan(value)) return "NaN";
  if (std::isinf(value)) return value < 0 ? "-Infinity" : "Infinity";
  const std::string sign = std::signbit(value) ? "-" : "";
  const auto [digits, point] = shortest_decimal(std::abs(value));
  const int size = static_cast<int>(digits.size());
  const auto left = [&digits = digits](int count) { return digits.substr(0, static_cast<std::size_t>(count)); };
  const auto right = [&digits = digits](int start) { return digits.substr(static_cast<std::size_t>(start)); };
  if (point <= -4 || point > 16) {
    char exponent[16];
    std::snprintf(exponent, sizeof exponent, "e%+03d", point - 1);
    return sign + left(1) + (size > 1 ? "." + right(1) : "") + exponent;
  }
  if (point <= 0) return sign + "0." + std::string(static_cast<std::size_t>(-point), '0') + digits;
  if (point >= size) return sign + digits + std::string(static_cast<std::size_t>(point - size), '0') + ".0";
  return sign + left(point) + "." + right(point);
}

std::string json_line(std::string_view text, const float *vector, std::size_t dimension) {
  std::string line = "{\"text\": ";
  append_json_string(line, text);
  line += ", \"embedding\": [";
  for (std::size_t i = 0; i < dimension; ++i) {
    if (i > 0) line += ", ";
    line += number_text(vector[i]);
  }
  return line + "]}\n";
}

}  // namespace gircse::command
