// JSON objects with a fixed set of fields, read strictly: a field that is missing, unknown or of another type is an
// error in the words of Python's msgspec.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace gircse::core {

// Parses JSON; throws std::runtime_error.
nlohmann::json parse_json(std::string_view content);

class JsonRecord {
 public:
  // `value` has to outlive the record; `path` is where it stands in the file, such as "$.graph".
  JsonRecord(const nlohmann::json &value, std::string path);

  // Whether an optional field is there; marks it as known.
  bool has(const std::string &field);

  std::string text(const std::string &field);
  std::optional<std::string> text_or_null(const std::string &field);
  std::string one_of(const std::string &field, const std::vector<std::string_view> &choices);
  std::int64_t integer(const std::string &field);
  double number(const std::string &field);
  bool boolean(const std::string &field);
  std::vector<std::int64_t> integers(const std::string &field);
  std::vector<std::string> texts(const std::string &field);

  JsonRecord record(const std::string &field);
  std::optional<JsonRecord> record_or_null(const std::string &field);
  std::vector<JsonRecord> records(const std::string &field);

  // The entries of an object that has names of its own in place of fields.
  std::vector<std::pair<std::string, JsonRecord>> named_records(const std::string &field);
  std::vector<std::pair<std::string, std::string>> named_texts(const std::string &field);
  std::vector<std::pair<std::string, std::int64_t>> named_integers(const std::string &field);

  // A field whose type the caller checks.
  const nlohmann::json &raw(const std::string &field);
  std::string path_of(const std::string &field) const;
  std::string path_of(const std::string &field, std::size_t place) const;

  // Refuses every field that was not asked for.
  void finish() const;

 private:
  const nlohmann::json *value_;
  std::string path_;
  std::set<std::string> known_;
};

// Says that a value has another type than expected.
[[noreturn]] void refuse_type(const nlohmann::json &value, std::string_view expected, const std::string &path);

}  // namespace gircse::core
