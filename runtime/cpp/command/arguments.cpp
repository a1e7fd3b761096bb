#include "arguments.h"

#include "command_error.h"
#include "error.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <charconv>
#include <string_view>
#include <utility>

namespace gircse::command {
namespace {

using Words = std::vector<std::string>;
using Choices = std::vector<std::string_view>;

constexpr std::size_t kHelpColumn = 30;

struct Flag {
  std::string_view name;
  std::string_view value;  // what the help calls its value; empty where it takes none
  std::string_view help;
  void (*set)(Arguments &arguments, const std::string &value);
};

[[noreturn]] void fail(std::string_view flag, const std::string &message) {
  throw UsageError("argument " + std::string(flag) + ": " + message);
}

std::int64_t integer(std::string_view flag, const std::string &value) {
  std::int64_t number = 0;
  const char *start = value.data() + (value.size() > 1 && value[0] == '+' && value[1] != '-' ? 1 : 0);
  const char *const end = value.data() + value.size();
  const auto [rest, error] = std::from_chars(start, end, number);
  if (error != std::errc() || rest != end) fail(flag, "invalid int value: " + core::in_quotes(value));
  return number;
}

std::string choice(std::string_view flag, std::string_view kind, const std::string &value, const Choices &choices) {
  const bool known = std::find(choices.begin(), choices.end(), value) != choices.end();
  if (!known) fail(flag, "invalid " + std::string(kind) + " value: " + core::in_quotes(value));
  return value;
}

// A path as Python's pathlib prints it, so that messages name it alike.
std::string path(std::string_view text) {
  std::string normalized = text.substr(0, 1) == "/" ? "/" : "";
  for (std::size_t start = 0; start < text.size();) {
    const std::size_t end = std::min(text.find('/', start), text.size());
    const std::string_view part = text.substr(start, end - start);
    start = end + 1;
    if (part.empty() || part == ".") continue;
    if (!normalized.empty() && normalized.back() != '/') normalized += '/';
    normalized += part;
  }
  return normalized.empty() ? "." : normalized;
}

const std::array<Flag, 17> kFlags{{
    {"--help", "", "show this help message and exit", [](Arguments &a, const std::string &) { a.help = true; }},
    {"--input", "FILE", "UTF-8, one text per line; .gz is unpacked; - is stdin (default)",
     [](Arguments &a, const std::string &v) { a.input = v == "-" ? v : path(v); }},
    {"--output", "FILE", "x.npy or x.jsonl (default: JSON lines on stdout)",
     [](Arguments &a, const std::string &v) { a.output = path(v); }},
    {"--instruction", "INSTRUCTION", "put before every text; leave it out for documents",
     [](Arguments &a, const std::string &v) { a.instruction = v; }},
    {"--steps", "k", "refinement steps, 0 to K (default: K)",
     [](Arguments &a, const std::string &v) { a.steps = integer("--steps", v); }},
    {"--batch-size", "N", "maximum texts per batch (default: 32)",
     [](Arguments &a, const std::string &v) { a.batch_size = integer("--batch-size", v); }},
    {"--batch-tokens", "N", "maximum tokens per batch, padding included (default: 4096)",
     [](Arguments &a, const std::string &v) { a.batch_tokens = integer("--batch-tokens", v); }},
    {"--streams", "N", "batches that run at once on the CPU; as many as cores for most texts a second (default: 1)",
     [](Arguments &a, const std::string &v) { a.streams = integer("--streams", v); }},
    {"--precision", "PRECISION", "variant of the bundle (default: FP32 on the CPU, FP16 on a GPU)",
     [](Arguments &a, const std::string &v) { a.precision = v; }},
    {"--provider", "P", "where the bundle runs: auto, cpu, cuda, onnxruntime-tensorrt (default: auto)",
     [](Arguments &a, const std::string &v) {
       a.provider = choice("--provider", "Provider", v, {"auto", "cpu", "cuda", "onnxruntime-tensorrt"});
     }},
    {"--layout", "unrolled|stepwise", "graph (default: stepwise, or unrolled on a GPU)",
     [](Arguments &a, const std::string &v) { a.layout = choice("--layout", "Layout", v, {"unrolled", "stepwise"}); }},
    {"--threads", "T", "threads of a run (default: every physical core)",
     [](Arguments &a, const std::string &v) { a.threads = integer("--threads", v); }},
    {"--onnxruntime", "FILE", "library of ONNX Runtime (default: $GIRCSE_ONNXRUNTIME, then libonnxruntime.so.1)",
     [](Arguments &a, const std::string &v) { a.onnxruntime = v; }},
    {"--on-overflow", "truncate|error", "what to do with texts that are too long (default: truncate, and say how many)",
     [](Arguments &a, const std::string &v) {
       a.refuse_overflow = choice("--on-overflow", "Overflow", v, {"truncate", "error"}) == "error";
     }},
    {"--no-verify", "", "skip the hashes of the bundle's files",
     [](Arguments &a, const std::string &) { a.verify = false; }},
    {"--self-test", "", "compare with the golden vectors instead of embedding",
     [](Arguments &a, const std::string &) { a.self_test = true; }},
    {"-h", "", "", [](Arguments &a, const std::string &) { a.help = true; }},
}};

bool starts_with(std::string_view text, std::string_view start) { return text.substr(0, start.size()) == start; }

// The flag that a word names, whole or by the beginning of its name; null where it names none.
const Flag *find_flag(const std::string &word) {
  const std::string_view name = std::string_view(word).substr(0, word.find('='));
  std::vector<const Flag *> found;
  for (const Flag &flag : kFlags) {
    if (flag.name == name) return &flag;
    if (starts_with(name, "--") && starts_with(flag.name, name)) found.push_back(&flag);
  }
  if (found.size() < 2) return found.empty() ? nullptr : found.front();
  std::string names;
  for (const Flag *flag : found) names += (names.empty() ? "" : ", ") + std::string(flag->name);
  throw UsageError("ambiguous option: " + word + " could match " + names);
}

bool is_negative_number(std::string_view word) {
  const std::string_view digits = word.substr(1);
  return !digits.empty() &&
         std::all_of(digits.begin(), digits.end(), [](unsigned char c) { return std::isdigit(c) != 0 || c == '.'; });
}

// Whether argparse takes a word for a flag, known or not: other words that begin with a dash are numbers or have spaces
// inside.
bool is_flag(const std::string &word) {
  if (word.size() < 2 || word[0] != '-') return false;
  if (find_flag(word) != nullptr) return true;
  return !is_negative_number(word) && word.find(' ') == word.npos;
}

class Parser {
 public:
  explicit Parser(const Words &words) : words_(words) {}

  Arguments parse() {
    while (next_ < words_.size() && !arguments_.help) take(words_[next_++]);
    if (!arguments_.help) check();
    return arguments_;
  }

 private:
  void take(const std::string &word) {
    if (word == "--" && !only_positionals_) {
      only_positionals_ = true;
    } else if (!only_positionals_ && is_flag(word)) {
      take_flag(word);
    } else if (!has_bundle_) {
      arguments_.bundle = path(word);
      has_bundle_ = true;
    } else {
      unrecognized_.push_back(word);
    }
  }

  void take_flag(const std::string &word) {
    const Flag *flag = find_flag(word);
    const std::size_t equals = word.find('=');
    if (flag == nullptr) {
      unrecognized_.push_back(word);
    } else if (flag->value.empty()) {
      if (equals != word.npos)
        fail(flag->name, "ignored explicit argument " + core::in_quotes(word.substr(equals + 1)));
      flag->set(arguments_, "");
    } else if (equals != word.npos) {
      flag->set(arguments_, word.substr(equals + 1));
    } else {
      if (next_ == words_.size() || words_[next_] == "--" || is_flag(words_[next_])) {
        fail(flag->name, "expected one argument");
      }
      flag->set(arguments_, words_[next_++]);
    }
  }

  void check() const {
    if (!has_bundle_) throw UsageError("the following arguments are required: bundle");
    if (unrecognized_.empty()) return;
    std::string message = "unrecognized arguments:";
    for (const std::string &word : unrecognized_) message += " " + word;
    throw UsageError(message);
  }

  const Words &words_;
  std::size_t next_ = 0;
  Arguments arguments_;
  Words unrecognized_;
  bool has_bundle_ = false;
  bool only_positionals_ = false;
};

}  // namespace

Arguments parse_arguments(const std::vector<std::string> &words) { return Parser(words).parse(); }

std::string usage_text() { return "usage: gircse-embed-cpp bundle [flags]\n"; }

std::string help_text() {
  const auto line = [](std::string argument, std::string_view help) {
    argument.resize(std::max(argument.size() + 1, kHelpColumn), ' ');
    return "  " + argument + std::string(help) + "\n";
  };
  std::string text =
      usage_text() + "\nEmbed texts, one per line, with a bundle.\n\n" + line("bundle", "bundle directory");
  for (const Flag &flag : kFlags) {
    if (flag.help.empty()) continue;
    text += line(std::string(flag.name) + (flag.value.empty() ? "" : " ") + std::string(flag.value), flag.help);
  }
  return text;
}

}  // namespace gircse::command
