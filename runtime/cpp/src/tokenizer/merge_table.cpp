#include "tokenizer/merge_table.h"

#include <algorithm>
#include <array>
#include <queue>

namespace gircse::core {

namespace {

// Up to here, looking for the best pair anew is faster than a queue.
constexpr std::size_t kMaxScan = 32;

struct Node {
  std::uint32_t symbol;
  std::size_t previous, next;  // kEnd at either end
  bool gone;
};

constexpr std::size_t kEnd = std::numeric_limits<std::size_t>::max();

struct Candidate {
  Merge merge;
  std::size_t at;

  bool operator>(const Candidate &other) const {
    return merge.rank != other.merge.rank ? merge.rank > other.merge.rank : at > other.at;
  }
};

using Candidates = std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>>;

std::vector<Node> linked(const std::vector<std::uint32_t> &symbols) {
  std::vector<Node> nodes(symbols.size());
  for (std::size_t i = 0; i < nodes.size(); ++i) {
    nodes[i] = {symbols[i], i == 0 ? kEnd : i - 1, i + 1 == nodes.size() ? kEnd : i + 1, false};
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
  std::vector<Node> nodes = linked(symbols);
  std::vector<Candidate> storage;
  storage.reserve(nodes.size());
  Candidates queue({}, std::move(storage));
  const auto consider = [&](std::size_t at) {
    if (at == kEnd || nodes[at].next == kEnd) return;
    const Merge merge = find(nodes[at].symbol, nodes[nodes[at].next].symbol);
    if (merge.rank != Merge::kNoRank) queue.push({merge, at});
  };
  for (std::size_t i = 0; i < nodes.size(); ++i) consider(i);
  while (!queue.empty()) {
    const Candidate top = queue.top();
    queue.pop();
    Node &node = nodes[top.at];
    if (node.gone || node.next == kEnd) continue;
    Node &right = nodes[node.next];
    const Merge merge = find(node.symbol, right.symbol);
    if (merge.rank == Merge::kNoRank || merge.product != top.merge.product) continue;  // one of the two has changed
    node.symbol = top.merge.product;
    right.gone = true;
    node.next = right.next;
    if (node.next != kEnd) nodes[node.next].previous = top.at;
    consider(node.previous);
    consider(top.at);
  }
  symbols.clear();
  for (const Node &node : nodes) {
    if (!node.gone) symbols.push_back(node.symbol);
  }
}

}  // namespace gircse::core
