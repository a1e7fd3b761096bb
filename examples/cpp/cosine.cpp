// Embeds two texts and prints their cosine.
//
// Without CMake: c++ -std=c++17 cosine.cpp $(pkg-config --cflags --libs gircse) -o cosine
#include <gircse/gircse.hpp>

#include <cstdio>
#include <exception>
#include <numeric>
#include <string_view>
#include <vector>

int main(int argc, char **argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: cosine BUNDLE QUERY DOCUMENT\n");
    return 2;
  }
  try {
    const gircse::Embedder embedder(argv[1]);
    gircse::EncodeOptions options;
    options.instruction = embedder.description().query_instruction;  // queries have one, documents have none
    const std::vector<float> query = embedder.encode({std::string_view(argv[2])}, options);
    const std::vector<float> document = embedder.encode({std::string_view(argv[3])});
    // The vectors have length 1: their product is the cosine.
    std::printf("%.6f\n", std::inner_product(query.begin(), query.end(), document.begin(), 0.0));
  } catch (const gircse::Error &error) {
    std::fprintf(stderr, "cosine: %s\n", error.what());
    return 1;
  }
}
