#include "tokenizer/tokenizer_document.h"

#include <stdexcept>
#include <string>

namespace gircse::core {

namespace {

using nlohmann::json;

constexpr std::size_t kMaxDepth = 100;
constexpr json::value_t kCompact = json::value_t::discarded;  // in place of what is kept elsewhere; no JSON gives it

// Builds the document as the parser reads it. Vocabularies are large: as trees they would take most of the time.
class Reader final : public nlohmann::json_sax<json> {
 public:
  explicit Reader(TokenizerDocument &document) : document_(document) {}

  bool null() override { return value(nullptr); }
  bool boolean(bool flag) override { return value(flag); }
  bool number_integer(number_integer_t number) override { return value(number); }
  bool number_float(number_float_t number, const string_t &) override { return value(number); }
  bool binary(binary_t &) override { return false; }

  bool number_unsigned(number_unsigned_t number) override {
    if (place_ != Place::kVocabulary) return value(number);
    if (number > std::numeric_limits<std::uint32_t>::max()) fail("model.vocab has the id " + std::to_string(number));
    const std::uint32_t token = document_.vocabulary.add(token_);
    document_.ids.resize(document_.vocabulary.size());
    document_.ids[token] = static_cast<std::uint32_t>(number);  // a token that comes twice has its last id
    return true;
  }

  bool string(string_t &text) override {
    if (place_ == Place::kMerge) {
      if (++merge_size_ > 2) fail("model.merges has a merge of more than two tokens");
      document_.merges.add(text);
      return true;
    }
    if (place_ != Place::kMerges) return value(std::move(text));
    add_legacy_merge(text);
    return true;
  }

  bool start_object(std::size_t) override {
    if (begins("vocab")) {
      document_.vocabulary = {};
      document_.ids.clear();
      return value(kCompact), enter(Place::kVocabulary);
    }
    return open(json::object());
  }

  bool key(string_t &name) override {
    (place_ == Place::kVocabulary ? token_ : key_) = std::move(name);
    return true;
  }

  bool end_object() override { return place_ == Place::kVocabulary ? enter(Place::kElsewhere) : close(); }

  bool start_array(std::size_t) override {
    if (place_ == Place::kMerges) {
      if (legacy_ == Legacy::kYes) fail("model.merges has both strings and arrays");
      legacy_ = Legacy::kNo;
      merge_size_ = 0;
      return enter(Place::kMerge);
    }
    if (begins("merges")) {
      document_.merges = {};
      legacy_ = Legacy::kUnknown;
      return value(kCompact), enter(Place::kMerges);
    }
    return open(json::array());
  }

  bool end_array() override {
    if (place_ == Place::kMerge) {
      if (merge_size_ != 2) fail("model.merges has a merge of fewer than two tokens");
      return enter(Place::kMerges);
    }
    return place_ == Place::kMerges ? enter(Place::kElsewhere) : close();
  }

  bool parse_error(std::size_t position, const std::string &, const nlohmann::detail::exception &) override {
    fail("it is not JSON: error at byte " + std::to_string(position));
  }

 private:
  enum class Place { kElsewhere, kVocabulary, kMerges, kMerge };
  enum class Legacy { kUnknown, kYes, kNo };  // merges as "a b", not as ["a", "b"]

  [[noreturn]] static void fail(const std::string &what) { throw std::runtime_error(what); }

  // Whether what comes now is this field of the model.
  bool begins(std::string_view field) const {
    if (place_ != Place::kElsewhere || stack_.size() != 2 || key_ != field) return false;
    const auto model = stack_[0]->find("model");
    return model != stack_[0]->end() && &*model == stack_[1] && model->is_object();
  }

  bool enter(Place place) {
    place_ = place;
    return true;
  }

  json *put(json &&element) {
    if (place_ != Place::kElsewhere) {
      fail(place_ == Place::kVocabulary ? "model.vocab has a value that is not an id"
                                        : "model.merges has a value that is not a merge of two tokens");
    }
    if (stack_.empty()) return &(document_.rest = std::move(element));
    json &parent = *stack_.back();
    if (parent.is_array()) return &parent.emplace_back(std::move(element));
    return &(parent[key_] = std::move(element));
  }

  template <typename Value>
  bool value(Value &&element) {
    put(json(std::forward<Value>(element)));
    return true;
  }

  bool open(json &&container) {
    if (stack_.size() == kMaxDepth) fail("it is nested too deep");
    stack_.push_back(put(std::move(container)));
    return true;
  }

  bool close() {
    stack_.pop_back();
    return true;
  }

  void add_legacy_merge(const std::string &text) {
    if (legacy_ == Legacy::kNo) fail("model.merges has both strings and arrays");
    legacy_ = Legacy::kYes;
    if (text.rfind("#version", 0) == 0) return;
    const std::size_t space = text.find(' ');
    if (space == std::string::npos || text.find(' ', space + 1) != std::string::npos) {
      fail("model.merges has '" + text + "', which is not two tokens");
    }
    document_.merges.add(std::string_view(text).substr(0, space));
    document_.merges.add(std::string_view(text).substr(space + 1));
  }

  TokenizerDocument &document_;
  std::vector<json *> stack_;  // containers that are open; a parent does not grow while its child does
  std::string key_, token_;
  Place place_ = Place::kElsewhere;
  Legacy legacy_ = Legacy::kUnknown;
  int merge_size_ = 0;
};

}  // namespace

TokenizerDocument parse_document(std::string_view text) {
  if (text.empty() || text.front() == '\xEF') throw std::runtime_error("it is not JSON: error at byte 1");
  TokenizerDocument document;
  Reader reader(document);
  json::sax_parse(text, &reader);
  return document;
}

}  // namespace gircse::core
