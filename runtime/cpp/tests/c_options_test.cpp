#include "c_options.h"

#include <doctest/doctest.h>

#include <cstring>
#include <string>

using gircse::core::check_target;
using gircse::core::default_encode_options;
using gircse::core::Error;
using gircse::core::fill;
using gircse::core::read;

// A struct as a newer header might have it.
struct Newer {
  gircse_encode_options known;
  std::size_t later;
};

TEST_CASE("defaults") {
  gircse_encode_options options;
  gircse_encode_options_init(&options, sizeof options);
  CHECK(options.size == sizeof options);
  CHECK(options.steps == -1);
  CHECK(options.batch_size == 32);
  CHECK(options.batch_tokens == 4096);
  CHECK(options.prompt.data == nullptr);
  gircse_open_options open;
  gircse_open_options_init(&open, sizeof open);
  CHECK(open.verify == 1);
  CHECK(open.precision == nullptr);
  CHECK(open.streams == 1);
}

TEST_CASE("a shorter struct is not written beyond its end, and its missing fields have defaults") {
  gircse_encode_options options;
  std::memset(static_cast<void *>(&options), 0x55, sizeof options);
  const std::size_t size = offsetof(gircse_encode_options, batch_size);
  fill(&options, size, default_encode_options());
  CHECK(options.size == size);
  CHECK(options.steps == -1);
  CHECK(options.batch_size == 0x5555555555555555);
  options.steps = 2;
  const gircse_encode_options found = read(&options, default_encode_options(), "encode_options");
  CHECK(found.steps == 2);
  CHECK(found.batch_size == 32);
}

TEST_CASE("a longer struct is filled with zeros, and may not set what is not known") {
  Newer newer;
  std::memset(static_cast<void *>(&newer), 0x55, sizeof newer);
  fill(&newer.known, sizeof newer, default_encode_options());
  CHECK(newer.known.size == sizeof newer);
  CHECK(newer.later == 0);
  newer.known.steps = 3;
  CHECK(read(&newer.known, default_encode_options(), "encode_options").steps == 3);
  newer.later = 1;
  CHECK_THROWS_WITH_AS(read(&newer.known, default_encode_options(), "encode_options"),
                       "encode_options set a field that this libgircse does not know. Upgrade libgircse.", Error);
}

TEST_CASE("sizes that no struct has") {
  gircse_encode_options options = default_encode_options();
  for (const std::size_t size : {std::size_t{0}, std::size_t{7}, std::size_t{12}, SIZE_MAX}) {
    options.size = size;
    CHECK_THROWS_AS(read(&options, default_encode_options(), "encode_options"), Error);
  }
  fill(&options, 0, default_encode_options());
  CHECK(options.size == SIZE_MAX);  // nothing was written
  gircse_description description{};
  CHECK_THROWS_AS(check_target(&description, "description"), Error);
  CHECK_THROWS_AS(check_target<gircse_description>(nullptr, "description"), Error);
  CHECK(read<gircse_encode_options>(nullptr, default_encode_options(), "encode_options").batch_size == 32);
}
