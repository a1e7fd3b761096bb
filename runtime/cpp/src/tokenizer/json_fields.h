// Fields of the objects in a tokenizer.json, with errors that name them.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

namespace gircse::core {

// An object of the file, with the words that errors call it by.
class Fields {
 public:
  Fields(const nlohmann::json &object, std::string where) : object_(object), where_(std::move(where)) {
    if (!object_.is_object()) fail("is not an object");
  }

  [[noreturn]] void fail(const std::string &what) const { throw std::runtime_error(where_ + " " + what); }

  void allow(std::initializer_list<std::string_view> names) const {
    for (const auto &item : object_.items()) {
      if (std::find(names.begin(), names.end(), item.key()) == names.end()) {
        fail("has the field '" + item.key() + "', which is not supported");
      }
    }
  }

  bool has(const char *name) const { return object_.contains(name); }

  // Null where the field is missing.
  const nlohmann::json &value(const char *name) const {
    static const nlohmann::json null;
    const auto found = object_.find(name);
    return found == object_.end() ? null : *found;
  }

  std::string text(const char *name) const {
    if (!value(name).is_string()) fail("has no string '" + std::string(name) + "'");
    return value(name).get<std::string>();
  }

  bool flag(const char *name) const {
    if (!value(name).is_boolean()) fail("has no flag '" + std::string(name) + "'");
    return value(name).get<bool>();
  }

  bool flag(const char *name, bool otherwise) const { return value(name).is_null() ? otherwise : flag(name); }

  const std::string &where() const { return where_; }

 private:
  const nlohmann::json &object_;
  std::string where_;
};

inline std::string type_of(const nlohmann::json &object, const std::string &where) {
  return Fields(object, where).text("type");
}

// Visits the steps in order; a Sequence holds more of them.
template <typename Visitor>
void for_each_step(const nlohmann::json &step, const std::string &where, const char *sequence_field, Visitor &&visit) {
  if (step.is_null()) return;
  if (type_of(step, where) != "Sequence") return visit(step);
  const Fields fields(step, "the Sequence of " + where);
  fields.allow({"type", sequence_field});
  const nlohmann::json &steps = fields.value(sequence_field);
  if (!steps.is_array()) fields.fail("has no array '" + std::string(sequence_field) + "'");
  for (const nlohmann::json &inner : steps) {
    if (inner.is_null()) fields.fail("has a step that is null");
    for_each_step(inner, where, sequence_field, visit);
  }
}

}  // namespace gircse::core
