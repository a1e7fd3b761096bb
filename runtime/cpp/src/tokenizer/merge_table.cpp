#include "tokenizer/merge_table.h"

#include <algorithm>
#include <array>
#include <queue>
#include <stdexcept>

namespace gircse::core {

namespace {

// Up to here, looking for the best pair anew is faster than a queue.
constexpr std::size_t kMaxScan = 32;

constexpr std::uint32_t kEnd = std::numeric_limits<std::uint32_t>::max();

// A symbol of a word, and those beside it; kEnd at either end.
struct Node {
  std::uint32_t symbol, previous, next;
  bool gone = false;
};

// Pairs that may merge, by rank and then by place: both in one number, the rank above.
using Queue = std::priority_queue<std::uint64_t, std::vector<std::uint64_t>, std::greater<>>;

std::vector<Node> linked(const std::vector<std::uint32_t> &symbols) {
  std::vector<Node> nodes;
  nodes.reserve(symbols.size());
  for (const std::uint32_t symbol : symbols) {
    const auto at = static_cast<std::uint32_t>(nodes.size());
    nodes.push_back({symbol, at == 0 ? kEnd : at - 1, at + 1 == symbols.size() ? kEnd : at + 1});
  }
  return nodes;
}

}  // namespace

MergeTable::MergeTable(std::size_t merges) : mask_(1) {
  while (mask_ < merges * 2) mask_ = mask_ * 2 + 1;
  entries_.resize(mask_ + 1);
}

void MergeTable::add(std::uint32_t left, std::uint32_t right, Merge merge) {
  std::size_t slot = first_slot(left, right);
  while (entries_[slot].merge.rank != Merge::kNoRank &&
         (entries_[slot].left != left || entries_[slot].right != right)) {
    slot = (slot + 1) & mask_;
  }
  entries_[slot] = {left, right, merge};
}

void MergeTable::apply(std::vector<std::uint32_t> &symbols) const {
  if (symbols.size() <= kMaxScan) {
    apply_by_scan(symbols);
  } else {
    apply_by_queue(symbols);
  }
}

void MergeTable::apply_by_scan(std::vector<std::uint32_t> &symbols) const {
  std::array<Merge, kMaxScan> merges;  // of symbol i and the next
  for (std::size_t i = 0; i + 1 < symbols.size(); ++i) merges[i] = find(symbols[i], symbols[i + 1]);
  while (symbols.size() > 1) {
    const auto end = merges.begin() + static_cast<std::ptrdiff_t>(symbols.size() - 1);
    const auto best = std::min_element(merges.begin(), end, [](Merge a, Merge b) { return a.rank < b.rank; });
    if (best->rank == Merge::kNoRank) return;
    const auto at = best - merges.begin();
    symbols[static_cast<std::size_t>(at)] = best->product;
    symbols.erase(symbols.begin() + at + 1);
    std::copy(best + 1, end, best);
    const auto i = static_cast<std::size_t>(at);
    if (i + 1 < symbols.size()) merges[i] = find(symbols[i], symbols[i + 1]);
    if (i > 0) merges[i - 1] = find(symbols[i - 1], symbols[i]);
  }
}

void MergeTable::apply_by_queue(std::vector<std::uint32_t> &symbols) const {
  if (symbols.size() >= kEnd) throw std::runtime_error("a word of more than 4294967294 characters cannot be tokenized");
  std::vector<Node> nodes = linked(symbols);
  const auto merge_at = [&](std::uint32_t at) {
    return at == kEnd || nodes[at].next == kEnd ? Merge{} : find(nodes[at].symbol, nodes[nodes[at].next].symbol);
  };
  const auto key = [](Merge merge, std::uint32_t at) { return std::uint64_t{merge.rank} << 32 | at; };
  std::vector<std::uint64_t> first;
  for (std::uint32_t at = 0; at < nodes.size(); ++at) {
    if (const Merge merge = merge_at(at); merge.rank != Merge::kNoRank) first.push_back(key(merge, at));
  }
  for (Queue queue({}, std::move(first)); !queue.empty();) {
    const auto rank = static_cast<std::uint32_t>(queue.top() >> 32), at = static_cast<std::uint32_t>(queue.top());
    queue.pop();
    Node &node = nodes[at];
    const Merge merge = node.gone ? Merge{} : merge_at(at);
    if (merge.rank != rank) continue;  // one of the two has changed since
    nodes[node.next].gone = true;
    node.symbol = merge.product;
    node.next = nodes[node.next].next;
    if (node.next != kEnd) nodes[node.next].previous = at;
    for (const std::uint32_t changed : {node.previous, at}) {
      if (const Merge next = merge_at(changed); next.rank != Merge::kNoRank) queue.push(key(next, changed));
    }
  }
  symbols.clear();
  for (const Node &node : nodes) {
    if (!node.gone) symbols.push_back(node.symbol);
  }
}

}  // namespace gircse::core
