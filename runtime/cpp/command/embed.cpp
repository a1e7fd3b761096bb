#include "embed.h"

#include "atomic_file.h"
#include "command_error.h"
#include "error.h"
#include "standard_streams.h"
#include "text_lines.h"
#include "vector_files.h"

#include <gircse/gircse.hpp>

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <functional>
#include <limits>
#include <optional>
#include <string>
#include <vector>

namespace gircse::command {
namespace {

constexpr std::size_t kWindowBatches = 32;  // full batches read ahead, so that texts of similar length meet in a batch

using Texts = std::vector<std::string>;
using Vectors = std::vector<float>;
using Write = std::function<void(const Texts &, const Vectors &)>;

void refuse(const std::string &where, std::int64_t value, const std::string &expected, const std::string &hint) {
  const std::optional<std::string> what_to_do = hint.empty() ? std::nullopt : std::optional(hint);
  throw CommandError(where, "is " + std::to_string(value), expected, what_to_do);
}

// Refuses an output that could not be written, before the work and not after it.
void check_output(const std::string &output) {
  const std::filesystem::path path(output);
  const std::string suffix = path.extension().string();
  if (suffix != ".npy" && suffix != ".jsonl") {
    throw CommandError("--output " + output, "ends in " + core::in_quotes(suffix), "it has to end in .npy or .jsonl",
                       std::nullopt);
  }
  const std::string parent = path.has_parent_path() ? path.parent_path().string() : ".";
  if (!std::filesystem::is_directory(parent)) {
    throw CommandError("--output " + output, "cannot be written", "there is no directory " + parent,
                       "Create it first.");
  }
}

OpenOptions open_options(const Arguments &arguments) {
  constexpr std::int64_t kMost = std::numeric_limits<int>::max();
  OpenOptions options;
  options.precision = arguments.precision;
  options.provider = arguments.provider;
  options.layout = arguments.layout;
  options.onnxruntime = arguments.onnxruntime;
  options.verify = arguments.verify;
  if (arguments.threads) {
    if (*arguments.threads < 1) {
      refuse("threads", *arguments.threads, "it has to be at least 1", "Leave it out to use every physical core.");
    }
    options.threads = static_cast<int>(std::min(*arguments.threads, kMost));
  }
  if (arguments.streams < 0) refuse("streams", arguments.streams, "it has to be at least 1", "");
  options.streams = static_cast<std::size_t>(arguments.streams);
  return options;
}

// What the library cannot be asked, because its type has no such number, is refused here in its words.
EncodeOptions encode_options(const Arguments &arguments, const Embedder &embedder) {
  EncodeOptions options;
  if (arguments.steps) {
    if (*arguments.steps < 0) {
      refuse("steps", *arguments.steps, "this bundle has 0 to " + std::to_string(embedder.steps()),
             "Choose one of these.");
    }
    options.steps = static_cast<int>(std::min<std::int64_t>(*arguments.steps, std::numeric_limits<int>::max()));
  }
  if (arguments.batch_size < 0) refuse("batch_size", arguments.batch_size, "it has to be at least 1", "");
  if (arguments.batch_tokens < 0) refuse("batch_tokens", arguments.batch_tokens, "it has to be at least 1", "");
  options.instruction = arguments.instruction;
  options.batch_size = static_cast<std::size_t>(arguments.batch_size);
  options.batch_tokens = static_cast<std::size_t>(arguments.batch_tokens);
  options.refuse_overflow = arguments.refuse_overflow;
  return options;
}

Texts read_window(TextLines &lines, std::size_t batch_size) {
  Texts texts;
  std::string text;
  while (texts.size() / kWindowBatches < batch_size && lines.next(text)) texts.push_back(text);
  return texts;
}

// How many texts are done, on a line of its own that ends when this does.
class Progress {
 public:
  explicit Progress(bool shown) : shown_(shown) {}
  Progress(const Progress &) = delete;
  Progress &operator=(const Progress &) = delete;
  ~Progress() {
    if (started_) write_stderr("\n");
  }

  void show(std::size_t done) {
    if (!shown_) return;
    write_stderr("\r" + std::to_string(done) + " texts");
    started_ = true;
  }

 private:
  bool shown_;
  bool started_ = false;
};

// Embeds some texts at a time, in flat memory, and hands them over with their vectors.
void embed_windows(const Embedder &embedder, const Arguments &arguments, const Write &write_window) {
  EncodeOptions options = encode_options(arguments, embedder);
  embedder.encode(Texts(), options);  // a wrong option shows now, not with the first window
  std::optional<Progress> progress(arguments.output && isatty(STDERR_FILENO) != 0);
  TextLines lines(arguments.input);
  std::size_t done = 0;
  std::size_t cut = 0;
  for (Texts texts; !(texts = read_window(lines, options.batch_size)).empty(); done += texts.size()) {
    std::size_t truncated = 0;
    options.first_text = done;
    write_window(texts, embedder.encode(texts, options, &truncated));
    cut += truncated;
    progress->show(done + texts.size());
  }
  progress.reset();
  if (cut == 0) return;
  log_line(std::to_string(cut) + " of " + std::to_string(done) + " texts were cut to " +
           std::to_string(embedder.description().max_tokens) + " tokens");
}

void embed_to_json_lines(const Embedder &embedder, const Arguments &arguments,
                         const std::function<void(const std::string &)> &write_line) {
  embed_windows(embedder, arguments, [&](const Texts &texts, const Vectors &vectors) {
    const std::size_t dimension = embedder.dimension();
    for (std::size_t row = 0; row < texts.size(); ++row) {
      write_line(json_line(texts[row], vectors.data() + row * dimension, dimension));
    }
  });
}

void embed_to_npy(AtomicFile &file, const Embedder &embedder, const Arguments &arguments) {
  const std::size_t dimension = embedder.dimension();
  const auto write_header = [&](std::size_t rows) {
    const std::string header = npy_header(rows, dimension);
    file.write(header.data(), header.size());
  };
  std::size_t rows = 0;
  write_header(rows);
  embed_windows(embedder, arguments, [&](const Texts &texts, const Vectors &vectors) {
    file.write(vectors.data(), vectors.size() * sizeof(float));
    rows += texts.size();
  });
  file.rewind();
  write_header(rows);
}

void embed_to_file(const std::string &path, const Embedder &embedder, const Arguments &arguments) {
  AtomicFile file(path);
  if (std::filesystem::path(path).extension() == ".npy") {
    embed_to_npy(file, embedder, arguments);
  } else {
    embed_to_json_lines(embedder, arguments, [&](const std::string &line) { file.write(line.data(), line.size()); });
  }
  file.commit();
  if (!is_closed(STDOUT_FILENO)) write_stdout(path + "\n");
}

int self_test(const Embedder &embedder) {
  const gircse_self_test_report report = embedder.self_test();
  const gircse_description &description = embedder.description();
  char numbers[100];
  std::snprintf(numbers, sizeof numbers, "smallest cosine to PyTorch %.7f, largest difference %.1e", report.min_cosine,
                report.max_difference);
  const std::string line = std::string("self-test ") + (report.passed != 0 ? "passed" : "FAILED") + ": " +
                           description.precision + " on " + description.provider + ", " + std::to_string(report.texts) +
                           " texts, " + numbers + "\n";
  if (!is_closed(STDOUT_FILENO)) write_stdout(line);
  return report.passed != 0 ? 0 : 1;
}

}  // namespace

int embed(const Arguments &arguments) {
  if (arguments.output) check_output(*arguments.output);
  const Embedder embedder(arguments.bundle, open_options(arguments));
  if (*embedder.description().warning != '\0') log_line(embedder.description().warning);
  if (arguments.self_test) return self_test(embedder);
  if (arguments.output) {
    embed_to_file(*arguments.output, embedder, arguments);
  } else {
    embed_to_json_lines(embedder, arguments, [](const std::string &line) { write_stdout(line); });
  }
  return 0;
}

}  // namespace gircse::command
