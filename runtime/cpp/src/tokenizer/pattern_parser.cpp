#include "tokenizer/pattern_parser.h"

#include <algorithm>
#include <cctype>
#include <limits>
#include <optional>
#include <stdexcept>

#include "tokenizer/code_points.h"
#include "tokenizer/unicode_tables.h"

namespace gircse::core {

namespace {

constexpr int kMaxDepth = 16;
constexpr std::size_t kMaxSource = 65536;
constexpr std::uint32_t kUnlimited = std::numeric_limits<std::uint32_t>::max();
constexpr std::uint32_t kMaxRepeat = 1000;
constexpr std::uint64_t kAllCategories = (std::uint64_t{1} << unicode::kCategoryCount) - 1;

bool ascii_letter(char32_t code) { return (code | 0x20) >= 'a' && (code | 0x20) <= 'z'; }

class Parser {
 public:
  explicit Parser(std::string_view source) : source_(source) {}

  std::vector<PatternSequence> parse() {
    if (source_.size() > kMaxSource) fail("a pattern of more than 65536 bytes");
    std::vector<PatternSequence> branches = alternatives();
    if (!done()) fail("a ')' without '('");
    return branches;
  }

 private:
  [[noreturn]] void fail(const std::string &what) const {
    throw std::runtime_error("the pattern '" + std::string(source_) + "' has " + what + " at byte " +
                             std::to_string(at_));
  }

  bool done() const { return at_ == source_.size(); }
  bool follows(std::string_view text) const { return source_.substr(at_, text.size()) == text; }
  bool take(std::string_view text) {
    if (!follows(text)) return false;
    at_ += text.size();
    return true;
  }

  char32_t next() {
    if (done()) fail("an end too early");
    const CodePoint point = code_point_at(source_, at_);
    at_ += point.size;
    return point.value;
  }

  std::vector<PatternSequence> alternatives() {
    std::vector<PatternSequence> branches{sequence()};
    while (take("|")) branches.push_back(sequence());
    return branches;
  }

  PatternSequence sequence() {
    PatternSequence items;
    char32_t previous = 0;  // literal before this one, where case is ignored
    while (!done() && !follows("|") && !follows(")")) {
      const std::size_t begin = at_;
      items.push_back(follows("(") ? group() : single());
      check_folding(begin, previous);
      quantify(items.back());
    }
    return items;
  }

  // In (?i:), Oniguruma takes "ss" for U+00DF, "ff" for U+FB00 and so on.
  void check_folding(std::size_t begin, char32_t &previous) const {
    const char32_t literal = ignore_case_ && at_ == begin + 1 ? static_cast<char32_t>(source_[begin] | 0x20) : 0;
    if ((previous == 's' && (literal == 's' || literal == 't')) ||
        (previous == 'f' && (literal == 'f' || literal == 'i' || literal == 'l'))) {
      fail("letters of a ligature in (?i:)");
    }
    previous = literal;
  }

  PatternItem group() {
    if (++depth_ > kMaxDepth) fail("groups nested too deep");
    const bool outer = ignore_case_;
    PatternItem item;
    item.kind = PatternItem::Kind::kGroup;
    take("(");
    if (take("?=") || take("?!")) {
      item.kind = PatternItem::Kind::kLookahead;
      item.negative = source_[at_ - 1] == '!';
    } else if (take("?i:")) {
      ignore_case_ = true;
    } else if (!take("?:") && (follows("?") || follows("*"))) {
      fail("the unsupported group '(" + std::string(source_.substr(at_, 2)) + "'");
    }
    item.branches = alternatives();
    if (!take(")")) fail("a '(' without ')'");
    ignore_case_ = outer;
    --depth_;
    return item;
  }

  PatternItem single() {
    PatternItem item;
    if (take("\\A")) {
      item.kind = PatternItem::Kind::kTextStart;
      return item;
    }
    const char32_t code = next();
    if (code == '[') {
      item.set = bracket();
    } else if (code == '\\') {
      add_escape(item.set);
    } else if (code < 128 && std::string_view(".^$*+?{}]").find(static_cast<char>(code)) != std::string_view::npos) {
      fail("the unsupported '" + std::string(1, static_cast<char>(code)) + "'");
    } else {
      add_range(item.set, code, code);
    }
    item.set.finish();
    return item;
  }

  void quantify(PatternItem &item) {
    if (done()) return;
    const bool interval = follows("{");
    if (take("?")) {
      item.least = 0;
    } else if (take("*")) {
      item.least = 0, item.most = kUnlimited;
    } else if (take("+")) {
      item.most = kUnlimited;
    } else if (interval) {
      read_interval(item);
    } else {
      return;
    }
    if (follows("?") || follows("+")) {
      if (interval) fail("an interval with '?' or '+'");
      item.greed = take("?") ? Greed::kLazy : Greed::kPossessive;
      if (item.greed == Greed::kPossessive) take("+");
    }
    if (follows("*") || follows("+") || follows("?") || follows("{")) fail("a quantifier of a quantifier");
    const bool optional = item.least == 0 && item.most == 1 && item.greed == Greed::kGreedy;
    if (item.kind == PatternItem::Kind::kLookahead || item.kind == PatternItem::Kind::kTextStart) {
      fail("a quantifier of an assertion");
    }
    if (item.kind != PatternItem::Kind::kGroup) return;
    if (!optional) fail("a quantifier of a group other than '?'");
    for (const PatternSequence &branch : item.branches) {
      if (least_size(branch) == 0) fail("an optional group that can match nothing");
    }
  }

  void read_interval(PatternItem &item) {
    take("{");
    const std::optional<std::uint32_t> least = number();
    const bool range = take(",");
    const std::optional<std::uint32_t> most = range ? number() : least;
    if (!least || !take("}")) fail("an interval that is not {n}, {n,} or {n,m}");
    item.least = *least;
    item.most = most ? *most : kUnlimited;
    if (item.most == 0 || item.least > item.most) fail("an interval out of order");
  }

  std::optional<std::uint32_t> number() {
    std::optional<std::uint32_t> value;
    while (!done() && source_[at_] >= '0' && source_[at_] <= '9') {
      value = value.value_or(0) * 10 + static_cast<std::uint32_t>(source_[at_++] - '0');
      if (*value > kMaxRepeat) fail("an interval above 1000");
    }
    return value;
  }

  CharSet bracket() {
    CharSet set;
    if (take("^")) {
      if (ignore_case_) fail("a negated class in (?i:)");
      set.negate();
    }
    if (follows("]")) fail("an empty class");
    while (!take("]")) {
      if (follows("[")) fail("a class in a class");
      if (follows("&&")) fail("an intersection of classes");
      if (follows("-")) {  // only a literal at either end
        const char before = source_[at_ - 1];
        take("-");
        if (before != '[' && before != '^' && !follows("]")) fail("a '-' that is not a range");
        add_range(set, '-', '-');
        continue;
      }
      const char32_t first = next();
      std::optional<char32_t> literal = first == '\\' ? add_escape(set) : std::optional<char32_t>(first);
      if (first != '\\') add_range(set, first, first);
      if (literal && follows("-") && source_.substr(at_, 2) != "-]") {
        take("-");
        add_range(set, *literal, range_end(*literal));
      }
    }
    return set;
  }

  char32_t range_end(char32_t first) {
    const char32_t code = next();
    if (code == '[') fail("a class in a class");
    const std::optional<char32_t> last = code == '\\' ? escaped_literal() : std::optional<char32_t>(code);
    if (!last || *last < first) fail("a range out of order");
    return *last;
  }

  // Adds what follows a backslash; returns it where it is one code point.
  std::optional<char32_t> add_escape(CharSet &set) {
    if (const std::optional<char32_t> literal = escaped_literal()) {
      add_range(set, *literal, *literal);
      return literal;
    }
    if (ignore_case_) fail("a property in (?i:)");
    const char32_t letter = next();
    if (letter == 's' || letter == 'S') {
      set.add_properties(letter == 's' ? unicode::kSpace : unicode::kNotSpace);
    } else if (letter == 'd' || letter == 'D') {
      const std::uint64_t digits = category("Nd");
      set.add_properties(letter == 'd' ? digits : kAllCategories & ~digits);
    } else if (letter == 'p' || letter == 'P') {
      const std::uint64_t found = property();
      set.add_properties(letter == 'p' ? found : kAllCategories & ~found);
    } else {
      std::string escape = "\\";
      append_utf8(escape, letter);
      fail("the unsupported escape '" + escape + "'");
    }
    return std::nullopt;
  }

  // Takes an escaped control or punctuation character.
  std::optional<char32_t> escaped_literal() {
    if (done()) fail("an end too early");
    const char escape = source_[at_];
    const std::size_t control = std::string_view("tnvfrae").find(escape);
    if (control != std::string_view::npos) return ++at_, static_cast<char32_t>("\t\n\v\f\r\a\x1B"[control]);
    if (static_cast<unsigned char>(escape) >= 128 || std::isalnum(static_cast<unsigned char>(escape)) != 0)
      return std::nullopt;
    return ++at_, static_cast<char32_t>(escape);
  }

  std::uint64_t property() {
    const std::size_t end = source_.find('}', at_);
    if (!take("{") || end == std::string_view::npos) fail("a property without '{' and '}'");
    const std::string_view name = source_.substr(at_, end - at_);
    const std::uint64_t bits = category(name);
    if (bits == 0) fail("the unsupported property '" + std::string(name) + "'");
    at_ = end + 1;
    return bits;
  }

  // Bits of a general category (Lu) or of a group of them (L); 0 for another name.
  static std::uint64_t category(std::string_view name) {
    std::uint64_t bits = 0;
    if (name.empty() || name.size() > 2) return bits;
    for (std::size_t i = 0; i < unicode::kCategoryCount; ++i) {
      if (std::string_view(unicode::kCategories[i]).substr(0, name.size()) == name) bits |= std::uint64_t{1} << i;
    }
    return bits;
  }

  void add_range(CharSet &set, char32_t first, char32_t last) const {
    set.add(first, last);
    if (!ignore_case_) return;
    if (last >= 128) fail("a character that is not ASCII in (?i:)");
    for (char32_t code = first; code <= last; ++code) {
      if (!ascii_letter(code)) continue;
      set.add(code ^ 0x20, code ^ 0x20);
      if ((code | 0x20) == 's') set.add(0x17F, 0x17F);    // long s
      if ((code | 0x20) == 'k') set.add(0x212A, 0x212A);  // Kelvin sign
    }
  }

  std::string_view source_;
  std::size_t at_ = 0;
  int depth_ = 0;
  bool ignore_case_ = false;
};

}  // namespace

std::vector<PatternSequence> parse_pattern(std::string_view source) { return Parser(source).parse(); }

std::uint64_t least_size(const PatternSequence &sequence) {
  std::uint64_t size = 0;
  for (const PatternItem &item : sequence) {
    if (item.kind == PatternItem::Kind::kSet) size += item.least;
    if (item.kind != PatternItem::Kind::kGroup || item.least == 0) continue;
    std::uint64_t least = std::numeric_limits<std::uint32_t>::max();
    for (const PatternSequence &branch : item.branches) least = std::min(least, least_size(branch));
    size += least;
  }
  return size;
}

}  // namespace gircse::core
