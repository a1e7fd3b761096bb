// Vectors as bytes of files: the same that numpy and Python's json write.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace gircse::command {

// The header of a .npy file of (rows, dimension) float32. Its length does not depend on the number of rows.
std::string npy_header(std::size_t rows, std::size_t dimension);

// {"text": ..., "embedding": [...]} and a newline; `text` is valid UTF-8.
std::string json_line(std::string_view text, const float *vector, std::size_t dimension);

// A number as Python's repr writes it: the fewest digits that give the same double again.
std::string number_text(double value);

}  // namespace gircse::command
