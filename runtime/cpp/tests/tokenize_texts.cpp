// Token ids of many texts, for comparisons with Hugging Face tokenizers: tokenize_texts TOKENIZER_JSON < texts > ids.
// A text is its size in bytes, as a little-endian 32-bit number, and its bytes; ids are their number and they, likewise,
// or 0xFFFFFFFF and a message with its size where the text cannot be tokenized. Seconds go to stderr.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <string>
#include <string_view>
#include <vector>

#include "tokenizer/tokenizer.h"
#include "utf8.h"

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

std::string read_all(std::istream &stream) { return {std::istreambuf_iterator<char>(stream), {}}; }

void put(std::uint32_t number) { std::cout.write(reinterpret_cast<const char *>(&number), sizeof number); }

void put_message(std::string_view message) {
  put(0xFFFFFFFF);
  put(static_cast<std::uint32_t>(message.size()));
  std::cout << message;
}

std::vector<std::string_view> split_texts(std::string_view input) {
  std::vector<std::string_view> texts;
  while (input.size() >= sizeof(std::uint32_t)) {
    std::uint32_t size = 0;
    std::copy_n(input.data(), sizeof size, reinterpret_cast<char *>(&size));
    texts.push_back(input.substr(sizeof size, size));
    input.remove_prefix(sizeof size + texts.back().size());
  }
  return texts;
}

void tokenize(const gircse::core::Tokenizer &tokenizer, std::string_view text) {
  if (const auto fault = gircse::core::find_utf8_fault(text)) {
    return put_message(std::string(fault->reason) + " at byte " + std::to_string(fault->offset));
  }
  try {
    const std::vector<std::uint32_t> ids = tokenizer.encode(text);
    put(static_cast<std::uint32_t>(ids.size()));
    std::cout.write(reinterpret_cast<const char *>(ids.data()),
                    static_cast<std::streamsize>(ids.size() * sizeof(std::uint32_t)));
  } catch (const std::exception &error) {
    put_message(error.what());
  }
}

}  // namespace

int main(int argc, char **argv) {
  if (argc < 2) return 2;
  std::ios::sync_with_stdio(false);
  std::ifstream file(argv[1], std::ios::binary);
  const std::string json = read_all(file);
  try {
    const auto opened = Clock::now();
    const gircse::core::Tokenizer tokenizer(json);
    std::cerr << "load " << seconds_since(opened) << '\n';
    const std::string input = read_all(std::cin);
    const auto texts = split_texts(input);
    const auto started = Clock::now();
    for (const std::string_view text : texts) tokenize(tokenizer, text);
    std::cerr << "encode " << seconds_since(started) << '\n';
  } catch (const std::exception &error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
  return 0;
}
