// Any text to one of the tokenizers in seeds/, which the first byte chooses: ids of its vocabulary, the same ones every
// time, or one clear error.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "tokenizer/tokenizer.h"
#include "utf8.h"

using gircse::core::Tokenizer;

static constexpr std::uint32_t kMostTokens = 1000;  // more than any of the vocabularies has

static std::vector<Tokenizer> load_tokenizers() {
  std::vector<std::filesystem::path> paths;
  for (const auto &entry : std::filesystem::directory_iterator(GIRCSE_FUZZ_TOKENIZERS)) paths.push_back(entry.path());
  std::sort(paths.begin(), paths.end());
  std::vector<Tokenizer> tokenizers;
  for (const auto &path : paths) {
    std::ifstream file(path, std::ios::binary);
    tokenizers.emplace_back(std::string(std::istreambuf_iterator<char>(file), {}));
  }
  if (tokenizers.empty()) std::abort();
  return tokenizers;
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t *data, std::size_t size) {
  static const std::vector<Tokenizer> tokenizers = load_tokenizers();
  if (size == 0) return 0;
  const std::string_view text(reinterpret_cast<const char *>(data) + 1, size - 1);
  if (gircse::core::find_utf8_fault(text)) return 0;  // the library asks this first
  const Tokenizer &tokenizer = tokenizers[data[0] % tokenizers.size()];
  try {
    const std::vector<std::uint32_t> ids = tokenizer.encode(text);
    const bool known = std::all_of(ids.begin(), ids.end(), [](std::uint32_t id) { return id < kMostTokens; });
    if (!known || ids != tokenizer.encode(text)) std::abort();
  } catch (const std::runtime_error &) {
  }
  return 0;
}
