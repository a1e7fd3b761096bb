// Any bytes as tokenizer.json: a tokenizer, or one clear error; what opens encodes any text or says why not.
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>

#include "tokenizer/tokenizer.h"

static constexpr std::string_view kTexts[] = {"", " ", "it's the <x>y 123",
                                              "e\xcc\x81\xe1\x84\x80\xe1\x85\xa1 \xf0\x9f\x98\x80\n\n\t",
                                              "<s>THE\xc2\xa0 the  <|end|>"};

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t *data, std::size_t size) {
  try {
    const gircse::core::Tokenizer tokenizer(std::string_view(reinterpret_cast<const char *>(data), size));
    for (const std::string_view text : kTexts) tokenizer.encode(text);
  } catch (const std::runtime_error &) {
  }
  return 0;
}
