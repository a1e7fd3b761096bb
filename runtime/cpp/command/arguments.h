// The arguments of gircse-embed-cpp: those of gircse-embed, understood as Python's argparse understands them.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace gircse::command {

struct Arguments {
  std::string bundle;
  std::string input = "-";
  std::optional<std::string> output;
  std::string instruction;
  std::optional<std::int64_t> steps;
  std::int64_t batch_size = 32;
  std::int64_t batch_tokens = 4096;
  std::int64_t streams = 1;
  std::string precision;
  std::string provider = "auto";
  std::string layout;
  std::optional<std::int64_t> threads;
  std::string onnxruntime;
  bool refuse_overflow = false;
  bool verify = true;
  bool self_test = false;
  bool help = false;
};

// Throws UsageError in argparse's words. After --help nothing else is read.
Arguments parse_arguments(const std::vector<std::string> &words);

std::string usage_text();
std::string help_text();

}  // namespace gircse::command
