// Which two symbols merge to which, and in what order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

namespace gircse::core {

struct Merge {
  static constexpr std::uint32_t kNoRank = std::numeric_limits<std::uint32_t>::max();

  std::uint32_t rank = kNoRank;  // the lowest goes first; kNoRank: the two do not merge
  std::uint32_t product = 0;
};

class MergeTable {
 public:
  explicit MergeTable(std::size_t merges);

  // A pair that comes twice has the rank of the last.
  void add(std::uint32_t left, std::uint32_t right, Merge merge);

  Merge find(std::uint32_t left, std::uint32_t right) const {
    for (std::size_t slot = first_slot(left, right);; slot = (slot + 1) & mask_) {
      const Entry &entry = entries_[slot];
      if (entry.merge.rank == Merge::kNoRank || (entry.left == left && entry.right == right)) return entry.merge;
    }
  }

  // Replaces the symbols of a word by what is left when nothing more merges.
  void apply(std::vector<std::uint32_t> &symbols) const;

 private:
  struct Entry {
    std::uint32_t left, right;
    Merge merge;
  };

  std::size_t first_slot(std::uint32_t left, std::uint32_t right) const {
    const std::uint64_t mixed = (std::uint64_t{left} << 32 | right) * 0x9E3779B97F4A7C15U;
    return static_cast<std::size_t>(mixed ^ mixed >> 32) & mask_;
  }

  void apply_by_scan(std::vector<std::uint32_t> &symbols) const;
  void apply_by_queue(std::vector<std::uint32_t> &symbols) const;

  std::vector<Entry> entries_;  // open addressing, at most half full
  std::size_t mask_;
};

}  // namespace gircse::core
