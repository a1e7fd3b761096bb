// Structs of the C interface that begin with their size: a caller may know fewer fields than the library, or more.
#pragma once

#include <gircse/gircse.h>

#include <algorithm>
#include <cstring>

#include "error.h"

namespace gircse::core {

inline constexpr std::size_t kLargestStruct = 4096;  // a size above is one that nobody has set

gircse_open_options default_open_options();
gircse_encode_options default_encode_options();

// Fills a caller's struct: what the library knows, and zeros for what it does not.
template <class Struct>
void fill(Struct *target, std::size_t size, Struct source) {
  if (target == nullptr || size < sizeof(source.size)) return;
  source.size = size;
  std::memset(static_cast<void *>(target), 0, size);
  std::memcpy(static_cast<void *>(target), &source, std::min(size, sizeof source));
}

// Reads a caller's options: fields that it does not have keep their defaults, and fields that the library does not know
// have to be zero.
template <class Struct>
Struct read(const Struct *given, Struct defaults, const char *name) {
  if (given == nullptr) return defaults;
  const std::size_t size = given->size;
  if (size < sizeof(given->size) || size > kLargestStruct || size % alignof(Struct) != 0) {
    throw Error(GIRCSE_ERROR_OPTION, name, "have the size " + std::to_string(size), "it is the size of the struct",
                std::string("Call gircse_") + name + "_init first.");
  }
  const auto *bytes = reinterpret_cast<const unsigned char *>(given);
  const std::size_t known = std::min(size, sizeof defaults);
  if (std::any_of(bytes + known, bytes + size, [](unsigned char byte) { return byte != 0; })) {
    throw Error(GIRCSE_ERROR_OPTION, name, "set a field that this libgircse does not know", std::nullopt,
                "Upgrade libgircse.");
  }
  std::memcpy(static_cast<void *>(&defaults), given, known);
  return defaults;
}

// Checks a struct that the caller wants filled.
template <class Struct>
void check_target(const Struct *target, const char *name) {
  if (target == nullptr) throw Error(GIRCSE_ERROR_OPTION, name, "is NULL");
  if (target->size < sizeof(target->size) || target->size > kLargestStruct) {
    throw Error(GIRCSE_ERROR_OPTION, name, "has the size " + std::to_string(target->size),
                "the caller sets it to the size of the struct");
  }
}

}  // namespace gircse::core
