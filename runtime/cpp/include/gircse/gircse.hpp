// The C++17 interface of libgircse, header only, on top of gircse.h.
//
//   gircse::Embedder embedder("gircse-demo-8");
//   std::vector<float> vectors = embedder.encode({"How do I reset my PIN?", "The cat sat on the mat."});
//
// An embedder may be shared by several threads. Every error is a gircse::Error.
#ifndef GIRCSE_GIRCSE_HPP
#define GIRCSE_GIRCSE_HPP

#include <gircse/gircse.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace gircse {

class Error : public std::runtime_error {
 public:
  Error(gircse_code code, const char *message) : std::runtime_error(message), code_(code) {}

  gircse_code code() const noexcept { return code_; }

 private:
  gircse_code code_;
};

// How a bundle is opened; the fields are those of gircse_open_options.
struct OpenOptions {
  std::string precision;
  std::string provider;
  std::string layout;
  std::string onnxruntime;
  int threads = 0;
  bool verify = true;
  bool prefix_cache = true;
  std::size_t streams = 1;
};

// How texts are embedded; the fields are those of gircse_encode_options.
struct EncodeOptions {
  std::string instruction;
  std::optional<std::string> prompt;
  std::optional<int> steps;
  bool all_steps = false;
  std::size_t batch_size = 32;
  std::size_t batch_tokens = 4096;
  bool refuse_overflow = false;
  std::size_t first_text = 0;
};

namespace detail {

inline void check(gircse_error *error) {
  if (error == nullptr) return;
  Error copy(gircse_error_code(error), gircse_error_message(error));
  gircse_error_free(error);
  throw copy;
}

inline gircse_text text(std::string_view view) { return {view.data(), view.size()}; }

inline const char *or_null(const std::string &value) { return value.empty() ? nullptr : value.c_str(); }

}  // namespace detail

class Embedder {
 public:
  explicit Embedder(const std::string &bundle, const OpenOptions &options = {}) {
    gircse_open_options raw;
    gircse_open_options_init(&raw, sizeof raw);
    raw.precision = detail::or_null(options.precision);
    raw.provider = detail::or_null(options.provider);
    raw.layout = detail::or_null(options.layout);
    raw.onnxruntime = detail::or_null(options.onnxruntime);
    raw.threads = options.threads;
    raw.verify = options.verify;
    raw.prefix_cache = options.prefix_cache;
    raw.streams = options.streams;
    detail::check(gircse_open(bundle.c_str(), &raw, &handle_));
    try {
      description_.size = sizeof description_;
      detail::check(gircse_describe(handle_, &description_));
    } catch (...) {
      gircse_close(handle_);
      throw;
    }
  }

  Embedder(Embedder &&other) noexcept
      : handle_(std::exchange(other.handle_, nullptr)), description_(std::exchange(other.description_, {})) {}
  Embedder &operator=(Embedder &&other) noexcept {
    std::swap(handle_, other.handle_);
    std::swap(description_, other.description_);
    return *this;
  }
  ~Embedder() { gircse_close(handle_); }

  // The strings of the description live as long as the embedder.
  const gircse_description &description() const noexcept { return description_; }
  std::size_t dimension() const noexcept { return description_.dimension; }
  int steps() const noexcept { return static_cast<int>(description_.steps); }

  // (texts, dimension) unit vectors, or (texts, steps, dimension) with all_steps. `texts` is any container of strings
  // or string views. `truncated`, where it is not null, receives how many texts were cut.
  template <class Texts>
  std::vector<float> encode(const Texts &texts, const EncodeOptions &options = {},
                            std::size_t *truncated = nullptr) const {
    const gircse_encode_options raw = raw_options(options);
    const std::vector<gircse_text> raw_texts = views(texts);
    std::vector<float> vectors(raw_texts.size() * row_size(options));
    detail::check(
        gircse_encode(handle_, raw_texts.data(), raw_texts.size(), &raw, vectors.data(), vectors.size(), truncated));
    return vectors;
  }
  std::vector<float> encode(std::initializer_list<std::string_view> texts, const EncodeOptions &options = {},
                            std::size_t *truncated = nullptr) const {
    return encode<std::initializer_list<std::string_view>>(texts, options, truncated);
  }

  // The token ids of every text, as the graph sees them.
  template <class Texts>
  std::vector<std::vector<std::int64_t>> tokenize(const Texts &texts, const EncodeOptions &options = {},
                                                  std::size_t *truncated = nullptr) const {
    const gircse_encode_options raw = raw_options(options);
    const std::vector<gircse_text> raw_texts = views(texts);
    std::vector<std::int64_t> ids(raw_texts.size() * description_.max_tokens);
    std::vector<std::size_t> lengths(raw_texts.size());
    detail::check(gircse_tokenize(handle_, raw_texts.data(), raw_texts.size(), &raw, ids.data(), ids.size(),
                                  lengths.data(), truncated));
    std::vector<std::vector<std::int64_t>> rows;
    rows.reserve(lengths.size());
    auto start = ids.cbegin();
    for (const std::size_t length : lengths) {
      rows.emplace_back(start, start + static_cast<std::ptrdiff_t>(length));
      start += static_cast<std::ptrdiff_t>(length);
    }
    return rows;
  }
  std::vector<std::vector<std::int64_t>> tokenize(std::initializer_list<std::string_view> texts,
                                                  const EncodeOptions &options = {},
                                                  std::size_t *truncated = nullptr) const {
    return tokenize<std::initializer_list<std::string_view>>(texts, options, truncated);
  }

  gircse_self_test_report self_test() const {
    gircse_self_test_report report{};
    report.size = sizeof report;
    detail::check(gircse_self_test(handle_, &report));
    return report;
  }

 private:
  static gircse_encode_options raw_options(const EncodeOptions &options) {
    if (options.steps && *options.steps < 0) throw Error(GIRCSE_ERROR_OPTION, "steps is negative.");
    gircse_encode_options raw;
    gircse_encode_options_init(&raw, sizeof raw);
    raw.instruction = detail::text(options.instruction);
    if (options.prompt) raw.prompt = detail::text(*options.prompt);
    raw.steps = options.steps.value_or(-1);
    raw.all_steps = options.all_steps;
    raw.batch_size = options.batch_size;
    raw.batch_tokens = options.batch_tokens;
    raw.refuse_overflow = options.refuse_overflow;
    raw.first_text = options.first_text;
    return raw;
  }

  template <class Texts>
  static std::vector<gircse_text> views(const Texts &texts) {
    std::vector<gircse_text> raw;
    for (const auto &text : texts) raw.push_back(detail::text(text));
    return raw;
  }

  // Floats of one text; a number of steps that the bundle does not have is left to the library to refuse.
  std::size_t row_size(const EncodeOptions &options) const {
    if (!options.all_steps) return description_.dimension;
    const int wanted = options.steps.value_or(steps());
    return wanted < 0 || wanted > steps() ? 0 : static_cast<std::size_t>(wanted) * description_.dimension;
  }

  gircse_embedder *handle_ = nullptr;
  gircse_description description_{};
};

}  // namespace gircse

#endif  // GIRCSE_GIRCSE_HPP
