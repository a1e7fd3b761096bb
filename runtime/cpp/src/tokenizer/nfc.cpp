#include "tokenizer/nfc.h"

#include <algorithm>
#include <cstdint>
#include <vector>

#include "tokenizer/code_points.h"
#include "tokenizer/unicode_tables.h"

namespace gircse::core {

namespace {

constexpr char32_t kLFirst = 0x1100, kVFirst = 0x1161, kTBase = 0x11A7, kSyllableFirst = 0xAC00;
constexpr char32_t kLCount = 19, kVCount = 21, kTCount = 28, kSyllableCount = kLCount * kVCount * kTCount;

struct Mark {
  char32_t code;
  std::uint8_t combining_class;
};

std::uint8_t combining_class(char32_t code) {
  const auto *end = unicode::kCombiningRanges + unicode::kCombiningRangeCount;
  const auto *found = std::lower_bound(unicode::kCombiningRanges, end, code,
                                       [](const auto &range, char32_t value) { return range.last < value; });
  return found != end && found->first <= code ? found->combining_class : std::uint8_t{0};
}

void decompose(char32_t code, std::vector<Mark> &out) {
  if (code >= kSyllableFirst && code < kSyllableFirst + kSyllableCount) {
    const char32_t syllable = code - kSyllableFirst;
    out.push_back({kLFirst + syllable / (kVCount * kTCount), 0});
    out.push_back({kVFirst + syllable / kTCount % kVCount, 0});
    if (syllable % kTCount != 0) out.push_back({kTBase + syllable % kTCount, 0});
    return;
  }
  const auto *end = unicode::kDecompositions + unicode::kDecompositionCount;
  const auto *found = std::lower_bound(unicode::kDecompositions, end, code,
                                       [](const auto &entry, char32_t value) { return entry.code < value; });
  if (found == end || found->code != code) {
    out.push_back({code, combining_class(code)});
    return;
  }
  const char32_t *parts = unicode::kDecomposed + found->begin;
  for (std::size_t i = 0; i < found->size; ++i) out.push_back({parts[i], combining_class(parts[i])});
}

// The one code point that two compose to; 0 where there is none.
char32_t compose(char32_t first, char32_t second) {
  if (first >= kLFirst && first < kLFirst + kLCount && second >= kVFirst && second < kVFirst + kVCount) {
    return kSyllableFirst + ((first - kLFirst) * kVCount + (second - kVFirst)) * kTCount;
  }
  if (first >= kSyllableFirst && first < kSyllableFirst + kSyllableCount && (first - kSyllableFirst) % kTCount == 0 &&
      second > kTBase && second < kTBase + kTCount) {
    return first + (second - kTBase);
  }
  const auto *end = unicode::kCompositions + unicode::kCompositionCount;
  const auto *found =
      std::lower_bound(unicode::kCompositions, end, std::pair(first, second),
                       [](const auto &entry, auto pair) { return std::pair(entry.first, entry.second) < pair; });
  return found != end && found->first == first && found->second == second ? found->composed : 0;
}

// Puts every run of marks in the order of their classes.
void order(std::vector<Mark> &marks) {
  const auto starter = [](const Mark &mark) { return mark.combining_class == 0; };
  for (auto at = marks.begin(); at != marks.end();) {
    at = std::find_if_not(at, marks.end(), starter);
    const auto end = std::find_if(at, marks.end(), starter);
    std::stable_sort(at, end, [](const Mark &a, const Mark &b) { return a.combining_class < b.combining_class; });
    at = end;
  }
}

// Composes in place: every character with the last starter before it, unless something between blocks it.
void compose(std::vector<Mark> &marks) {
  std::size_t kept = 0;
  std::size_t starter = marks.size();  // none yet
  for (std::size_t at = 0; at < marks.size(); ++at) {
    const Mark mark = marks[at];
    const bool adjacent = kept == starter + 1;
    if (starter < kept && (adjacent || marks[kept - 1].combining_class < mark.combining_class)) {
      if (const char32_t composed = compose(marks[starter].code, mark.code); composed != 0) {
        marks[starter].code = composed;
        continue;
      }
    }
    if (mark.combining_class == 0) starter = kept;
    marks[kept++] = mark;
  }
  marks.resize(kept);
}

// Whether text around a code point may change: it has a combining class, composes with what is before it, or is never
// in normalized text. All others begin a part that can be normalized alone.
bool active(CodePoint point) {
  return point.value >= 0x300 && (unicode::properties(point.value) & unicode::kNfcActive) != 0;
}

// Where the next code point is for which `active` is `wanted`.
std::size_t find_active(std::string_view text, std::size_t at, bool wanted) {
  while (at < text.size()) {
    const CodePoint point = code_point_at(text, at);
    if (active(point) == wanted) return at;
    at += point.size;
  }
  return at;
}

void append_normalized(std::string_view text, std::vector<Mark> &marks, std::string &out) {
  marks.clear();
  for (std::size_t at = 0; at < text.size();) {
    const auto [code, size] = code_point_at(text, at);
    decompose(code, marks);
    at += size;
  }
  order(marks);
  compose(marks);
  for (const Mark &mark : marks) append_utf8(out, mark.code);
}

}  // namespace

bool plainly_nfc(std::string_view text) { return find_active(text, 0, true) == text.size(); }

std::string nfc(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  std::vector<Mark> marks;
  for (std::size_t done = 0; done < text.size();) {
    const std::size_t first = find_active(text, done, true);
    const std::size_t begin = first == text.size() || first == done ? first : previous_code_point(text, first);
    const std::size_t end = find_active(text, first, false);
    out.append(text, done, begin - done);
    append_normalized(text.substr(begin, end - begin), marks, out);
    done = end;
  }
  return out;
}

}  // namespace gircse::core
