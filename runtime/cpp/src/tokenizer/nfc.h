// Unicode normalization form C, with the version of Unicode that Hugging Face tokenizers has (9.0).
#pragma once

#include <string>
#include <string_view>

namespace gircse::core {

// Whether nothing in a text can change. False does not say that something does.
bool plainly_nfc(std::string_view text);

std::string nfc(std::string_view text);

}  // namespace gircse::core
