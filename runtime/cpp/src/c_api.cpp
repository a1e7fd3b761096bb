// The C interface: every function turns exceptions into errors, and a handle into the embedder that it names.

#include <gircse/gircse.h>

#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "c_options.h"
#include "embedder.h"
#include "error.h"

using gircse::core::Embedder;
using gircse::core::Error;

// What a handle points to. It stays when its embedder is closed, so that a late call finds an empty handle and not
// freed memory.
struct gircse_embedder {
  std::mutex mutex;
  std::shared_ptr<const Embedder> open;
};

struct gircse_error {
  gircse_code code;
  std::string message;
};

namespace gircse::core {

gircse_open_options default_open_options() {
  gircse_open_options options{};
  options.size = sizeof options;
  options.verify = 1;
  options.prefix_cache = 1;
  options.streams = 1;
  return options;
}

gircse_encode_options default_encode_options() {
  const RunOptions defaults;
  gircse_encode_options options{};
  options.size = sizeof options;
  options.steps = defaults.steps;
  options.batch_size = defaults.batch_size;
  options.batch_tokens = defaults.batch_tokens;
  return options;
}

namespace {

// Made in advance: there is no memory left to make it when it is needed.
gircse_error *memory_error() {
  static auto *error = new gircse_error{GIRCSE_ERROR_MEMORY, "memory ran out. Use smaller batches."};
  return error;
}

gircse_error *new_error(gircse_code code, const char *message) noexcept {
  try {
    return new gircse_error{code, message};
  } catch (...) {
    return memory_error();
  }
}

template <class Work>
gircse_error *guarded(Work work) noexcept {
  memory_error();
  try {
    work();
    return nullptr;
  } catch (const Error &err) {
    return new_error(err.code(), err.what());
  } catch (const std::bad_alloc &) {
    return memory_error();
  } catch (const std::length_error &) {  // a container was asked for more than there can be
    return memory_error();
  } catch (const std::exception &err) {
    return new_error(GIRCSE_ERROR_INTERNAL, err.what());
  } catch (...) {
    return new_error(GIRCSE_ERROR_INTERNAL, "an unknown error.");
  }
}

gircse_embedder *new_handle(std::shared_ptr<const Embedder> embedder) {
  static std::mutex mutex;
  static auto *handles = new std::vector<std::unique_ptr<gircse_embedder>>;
  const std::lock_guard<std::mutex> lock(mutex);
  handles->push_back(std::make_unique<gircse_embedder>());
  handles->back()->open = std::move(embedder);
  return handles->back().get();
}

// The embedder of a handle, which stays open for as long as the caller has it.
std::shared_ptr<const Embedder> embedder_of(const gircse_embedder *handle) {
  auto *shared = const_cast<gircse_embedder *>(handle);
  std::shared_ptr<const Embedder> embedder;
  if (shared != nullptr) {
    const std::lock_guard<std::mutex> lock(shared->mutex);
    embedder = shared->open;
  }
  if (!embedder) throw Error(GIRCSE_ERROR_CLOSED, "embedder", "is closed", std::nullopt, "Open the bundle again.");
  return embedder;
}

std::optional<std::string> optional_text(const char *text) {
  return text == nullptr ? std::nullopt : std::optional<std::string>(text);
}

OpenOptions open_options(const gircse_open_options *given) {
  const gircse_open_options raw = read(given, default_open_options(), "open_options");
  OpenOptions options;
  options.precision = optional_text(raw.precision);
  options.provider = optional_text(raw.provider).value_or("auto");
  options.layout = optional_text(raw.layout);
  options.onnxruntime = optional_text(raw.onnxruntime).value_or("");
  options.threads = raw.threads;
  options.verify = raw.verify != 0;
  options.prefix_cache = raw.prefix_cache != 0;
  options.streams = raw.streams;
  return options;
}

std::string_view view(const std::string &where, const gircse_text &text) {
  if (text.data == nullptr && text.size > 0) {
    throw Error(GIRCSE_ERROR_OPTION, where, "has no data, and " + std::to_string(text.size) + " bytes");
  }
  return {text.data == nullptr ? "" : text.data, text.size};
}

std::vector<std::string_view> views(const gircse_text *texts, std::size_t count) {
  if (texts == nullptr && count > 0) throw Error(GIRCSE_ERROR_OPTION, "texts", "is NULL");
  std::vector<std::string_view> result;
  result.reserve(count);
  for (std::size_t i = 0; i < count; ++i) result.push_back(view("texts[" + std::to_string(i) + "]", texts[i]));
  return result;
}

// The two halves of gircse_encode_options.
struct EncodeOptions {
  PromptOptions prompt;
  RunOptions run;
};

EncodeOptions encode_options(const gircse_encode_options *given) {
  const gircse_encode_options raw = read(given, default_encode_options(), "encode_options");
  EncodeOptions options;
  options.prompt.instruction = view("instruction", raw.instruction);
  if (raw.prompt.data != nullptr || raw.prompt.size > 0) options.prompt.prompt = view("prompt", raw.prompt);
  options.prompt.refuse_overflow = raw.refuse_overflow != 0;
  options.prompt.first_text = raw.first_text;
  options.run = {raw.steps, raw.all_steps != 0, raw.batch_size, raw.batch_tokens};
  return options;
}

// Refuses an output of `capacity` elements that `count` rows of `row_size` do not fit into.
void check_capacity(const char *name, const void *output, std::size_t capacity, std::size_t count,
                    std::size_t row_size) {
  if (row_size > 0 && count > capacity / row_size) {
    throw Error(GIRCSE_ERROR_CAPACITY, name, "has room for " + std::to_string(capacity) + " elements",
                std::to_string(count) + " texts of " + std::to_string(row_size) + " elements are to be written");
  }
  if (output == nullptr && count * row_size > 0) throw Error(GIRCSE_ERROR_OPTION, name, "is NULL");
}

std::vector<TokenIds> split_prompts(const Embedder &embedder, const std::int64_t *ids, const std::size_t *lengths,
                                    std::size_t count) {
  if ((ids == nullptr || lengths == nullptr) && count > 0)
    throw Error(GIRCSE_ERROR_OPTION, "ids or lengths", "is NULL");
  std::vector<TokenIds> prompts;
  for (std::size_t i = 0; i < count; ++i) {
    embedder.check_length(i, lengths[i]);
    prompts.emplace_back(ids, ids + lengths[i]);
    embedder.check_tokens(i, prompts.back());
    ids += lengths[i];
  }
  return prompts;
}

gircse_description describe(const Embedder &embedder) {
  const GraphFacts &facts = embedder.manifest().graph;
  return {sizeof(gircse_description),
          static_cast<std::size_t>(facts.hidden_size),
          static_cast<std::size_t>(facts.steps),
          static_cast<std::size_t>(facts.max_tokens),
          embedder.precision().c_str(),
          embedder.provider().c_str(),
          embedder.layout().c_str(),
          embedder.manifest().query_instruction.c_str(),
          embedder.onnxruntime().c_str(),
          embedder.skipped().c_str(),
          embedder.warning().c_str()};
}

}  // namespace
}  // namespace gircse::core

using namespace gircse::core;

uint32_t gircse_abi_version(void) { return GIRCSE_ABI_VERSION; }

const char *gircse_version(void) { return GIRCSE_VERSION; }

void gircse_open_options_init(gircse_open_options *options, size_t size) {
  fill(options, size, default_open_options());
}

void gircse_encode_options_init(gircse_encode_options *options, size_t size) {
  fill(options, size, default_encode_options());
}

gircse_error *gircse_open(const char *bundle, const gircse_open_options *options, gircse_embedder **embedder) {
  return guarded([&] {
    if (embedder == nullptr) throw Error(GIRCSE_ERROR_OPTION, "embedder", "is NULL");
    *embedder = nullptr;
    if (bundle == nullptr) throw Error(GIRCSE_ERROR_OPTION, "bundle", "is NULL");
    *embedder = new_handle(std::make_shared<const Embedder>(bundle, open_options(options)));
  });
}

void gircse_close(gircse_embedder *embedder) {
  if (embedder == nullptr) return;
  std::shared_ptr<const Embedder> last;  // freed outside the lock
  const std::lock_guard<std::mutex> lock(embedder->mutex);
  last.swap(embedder->open);
}

gircse_error *gircse_describe(const gircse_embedder *embedder, gircse_description *description) {
  return guarded([&] {
    check_target(description, "description");
    fill(description, description->size, describe(*embedder_of(embedder)));
  });
}

gircse_error *gircse_encode(const gircse_embedder *embedder, const gircse_text *texts, size_t count,
                            const gircse_encode_options *options, float *vectors, size_t capacity, size_t *truncated) {
  return guarded([&] {
    const auto open = embedder_of(embedder);
    const EncodeOptions chosen = encode_options(options);
    check_capacity("vectors", vectors, capacity, count, open->row_size(chosen.run));
    const TokenizedTexts tokens = open->tokenizer().tokenize(views(texts, count), chosen.prompt);
    open->embed_texts(tokens.ids, chosen.prompt, chosen.run, vectors);
    if (truncated != nullptr) *truncated = tokens.truncated;
  });
}

gircse_error *gircse_encode_tokens(const gircse_embedder *embedder, const int64_t *ids, const size_t *lengths,
                                   size_t count, const gircse_encode_options *options, float *vectors,
                                   size_t capacity) {
  return guarded([&] {
    const auto open = embedder_of(embedder);
    const EncodeOptions chosen = encode_options(options);
    if (!chosen.prompt.instruction.empty() || chosen.prompt.prompt || chosen.prompt.refuse_overflow) {
      throw Error(GIRCSE_ERROR_OPTION, "instruction, prompt or refuse_overflow", "is set",
                  "token ids are the whole prompt", "Leave them out.");
    }
    check_capacity("vectors", vectors, capacity, count, open->row_size(chosen.run));
    open->embed(split_prompts(*open, ids, lengths, count), chosen.run, vectors);
  });
}

gircse_error *gircse_tokenize(const gircse_embedder *embedder, const gircse_text *texts, size_t count,
                              const gircse_encode_options *options, int64_t *ids, size_t capacity, size_t *lengths,
                              size_t *truncated) {
  return guarded([&] {
    const auto open = embedder_of(embedder);
    const TokenizedTexts tokens = open->tokenizer().tokenize(views(texts, count), encode_options(options).prompt);
    std::size_t total = 0;
    for (const TokenIds &prompt : tokens.ids) total += prompt.size();
    check_capacity("ids", ids, capacity, 1, total);
    if (lengths == nullptr && count > 0) throw Error(GIRCSE_ERROR_OPTION, "lengths", "is NULL");
    for (std::size_t i = 0; i < count; ++i) {
      lengths[i] = tokens.ids[i].size();
      ids = std::copy(tokens.ids[i].begin(), tokens.ids[i].end(), ids);
    }
    if (truncated != nullptr) *truncated = tokens.truncated;
  });
}

gircse_error *gircse_self_test(const gircse_embedder *embedder, gircse_self_test_report *report) {
  return guarded([&] {
    check_target(report, "report");
    const SelfTest result = embedder_of(embedder)->self_test();
    fill(report, report->size,
         {sizeof(gircse_self_test_report), result.texts, result.passed() ? 1 : 0, result.min_cosine, result.limit,
          result.max_difference, result.worst_step, result.worst_text});
  });
}

gircse_code gircse_error_code(const gircse_error *error) { return error == nullptr ? GIRCSE_OK : error->code; }

const char *gircse_error_message(const gircse_error *error) { return error == nullptr ? "" : error->message.c_str(); }

void gircse_error_free(gircse_error *error) {
  if (error != memory_error()) delete error;
}
