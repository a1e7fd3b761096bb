#include "json_record.h"

#include <algorithm>
#include <stdexcept>

namespace gircse::core {
namespace {

using nlohmann::json;

constexpr int kMaxDepth = 1000;  // about what Python reads

std::string at(const std::string &path) { return path == "$" ? "" : " - at `" + path + "`"; }

std::string type_name(const json &value) {
  switch (value.type()) {
    case json::value_t::object: return "object";
    case json::value_t::array: return "array";
    case json::value_t::string: return "str";
    case json::value_t::boolean: return "bool";
    case json::value_t::null: return "null";
    case json::value_t::number_float: return "float";
    default: return "int";
  }
}

std::string expect_text(const json &value, const std::string &path) {
  if (!value.is_string()) refuse_type(value, "str", path);
  return value.get<std::string>();
}

std::int64_t expect_integer(const json &value, const std::string &path) {
  if (!value.is_number_integer()) refuse_type(value, "int", path);
  if (value.is_number_unsigned() && value.get<std::uint64_t>() > INT64_MAX) {
    throw std::runtime_error("Integer out of range" + at(path));
  }
  return value.get<std::int64_t>();
}

const json &expect_array(const json &value, const std::string &path) {
  if (!value.is_array()) refuse_type(value, "array", path);
  return value;
}

const json &expect_object(const json &value, const std::string &path) {
  if (!value.is_object()) refuse_type(value, "object", path);
  return value;
}

}  // namespace

void refuse_type(const json &value, std::string_view expected, const std::string &path) {
  throw std::runtime_error("Expected `" + std::string(expected) + "`, got `" + type_name(value) + "`" + at(path));
}

json parse_json(std::string_view content) {
  // The parser takes a NUL for the end and skips a byte order mark; JSON has neither.
  const std::size_t nul = content.find('\0');
  if (nul != content.npos) throw std::runtime_error("JSON is malformed at byte " + std::to_string(nul + 1));
  if (content.substr(0, 3) == "\xef\xbb\xbf") throw std::runtime_error("JSON is malformed at byte 1");
  const auto check_depth = [](int depth, json::parse_event_t, const json &) {
    if (depth > kMaxDepth) throw std::runtime_error("JSON is nested too deeply");
    return true;
  };
  try {
    return json::parse(content, check_depth);
  } catch (const json::parse_error &err) {
    throw std::runtime_error("JSON is malformed at byte " + std::to_string(err.byte));
  } catch (const json::exception &err) {  // a number that is out of range
    throw std::runtime_error(std::string("JSON is malformed: ") + err.what());
  }
}

JsonRecord::JsonRecord(const json &value, std::string path)
    : value_(&expect_object(value, path)), path_(std::move(path)) {}

bool JsonRecord::has(const std::string &field) {
  known_.insert(field);
  return value_->contains(field);
}

const json &JsonRecord::raw(const std::string &field) {
  if (!has(field)) throw std::runtime_error("Object missing required field `" + field + "`" + at(path_));
  return value_->find(field).value();
}

std::string JsonRecord::path_of(const std::string &field) const { return path_ + "." + field; }

std::string JsonRecord::path_of(const std::string &field, std::size_t place) const {
  return path_of(field) + "[" + std::to_string(place) + "]";
}

std::string JsonRecord::text(const std::string &field) { return expect_text(raw(field), path_of(field)); }

std::optional<std::string> JsonRecord::text_or_null(const std::string &field) {
  const json &value = raw(field);
  if (value.is_null()) return std::nullopt;
  if (!value.is_string()) refuse_type(value, "str | null", path_of(field));
  return value.get<std::string>();
}

std::string JsonRecord::one_of(const std::string &field, const std::vector<std::string_view> &choices) {
  const std::string value = text(field);
  if (std::find(choices.begin(), choices.end(), value) == choices.end()) {
    throw std::runtime_error("Invalid enum value '" + value + "'" + at(path_of(field)));
  }
  return value;
}

std::int64_t JsonRecord::integer(const std::string &field) { return expect_integer(raw(field), path_of(field)); }

double JsonRecord::number(const std::string &field) {
  const json &value = raw(field);
  if (!value.is_number()) refuse_type(value, "float", path_of(field));
  return value.get<double>();
}

bool JsonRecord::boolean(const std::string &field) {
  const json &value = raw(field);
  if (!value.is_boolean()) refuse_type(value, "bool", path_of(field));
  return value.get<bool>();
}

std::vector<std::int64_t> JsonRecord::integers(const std::string &field) {
  std::vector<std::int64_t> values;
  for (const json &item : expect_array(raw(field), path_of(field))) {
    values.push_back(expect_integer(item, path_of(field, values.size())));
  }
  return values;
}

std::vector<std::string> JsonRecord::texts(const std::string &field) {
  std::vector<std::string> values;
  for (const json &item : expect_array(raw(field), path_of(field))) {
    values.push_back(expect_text(item, path_of(field, values.size())));
  }
  return values;
}

JsonRecord JsonRecord::record(const std::string &field) { return {raw(field), path_of(field)}; }

std::optional<JsonRecord> JsonRecord::record_or_null(const std::string &field) {
  if (raw(field).is_null()) return std::nullopt;
  return record(field);
}

std::vector<JsonRecord> JsonRecord::records(const std::string &field) {
  std::vector<JsonRecord> values;
  for (const json &item : expect_array(raw(field), path_of(field))) {
    values.emplace_back(item, path_of(field, values.size()));
  }
  return values;
}

std::vector<std::pair<std::string, JsonRecord>> JsonRecord::named_records(const std::string &field) {
  std::vector<std::pair<std::string, JsonRecord>> values;
  for (const auto &item : expect_object(raw(field), path_of(field)).items()) {
    values.emplace_back(item.key(), JsonRecord(item.value(), path_of(field) + "[...]"));
  }
  return values;
}

std::vector<std::pair<std::string, std::string>> JsonRecord::named_texts(const std::string &field) {
  std::vector<std::pair<std::string, std::string>> values;
  for (const auto &item : expect_object(raw(field), path_of(field)).items()) {
    values.emplace_back(item.key(), expect_text(item.value(), path_of(field) + "[...]"));
  }
  return values;
}

std::vector<std::pair<std::string, std::int64_t>> JsonRecord::named_integers(const std::string &field) {
  std::vector<std::pair<std::string, std::int64_t>> values;
  for (const auto &item : expect_object(raw(field), path_of(field)).items()) {
    values.emplace_back(item.key(), expect_integer(item.value(), path_of(field) + "[...]"));
  }
  return values;
}

void JsonRecord::finish() const {
  for (const auto &item : value_->items()) {
    if (known_.count(item.key()) == 0) {
      throw std::runtime_error("Object contains unknown field `" + item.key() + "`" + at(path_));
    }
  }
}

}  // namespace gircse::core
