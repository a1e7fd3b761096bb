// A bundle on disk, and the checks that run before anything in it is trusted.
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "manifest.h"

namespace gircse::core {

class Bundle {
 public:
  // Opens a bundle without reading the big files; throws Error where there is none, its manifest cannot be used, a path
  // leaves it, or a file is missing or has another size.
  explicit Bundle(const std::string &path);

  const Manifest &manifest() const noexcept { return manifest_; }
  const std::filesystem::path &directory() const noexcept { return directory_; }

  // The path of a file of the bundle; refuses one that is absolute or leads out of it, by ".." or by a link.
  std::filesystem::path file(const std::string &relative) const;

  // The content of a small file.
  std::string read(const std::string &relative) const;

  const Variant &variant(const std::string &precision) const;

  // The precision to take when none is named: the first preferred one, or the only one there is.
  std::string default_precision(const std::vector<std::string> &preferred) const;

  // The layout to run: the one that is wanted, else the one that suits the provider if there is a choice.
  std::string layout(const std::string &precision, const std::string &provider,
                     const std::optional<std::string> &wanted) const;

  // The path of a variant's graph in a layout.
  std::filesystem::path graph(const std::string &precision, const std::string &layout) const;

  // Reads every file but those of other variants and compares its SHA-256 with the manifest.
  void verify(const std::string &precision) const;

 private:
  std::string shown(const std::string &relative) const { return (directory_ / relative).string(); }
  void check_size(const std::string &relative, const FileEntry &entry) const;

  std::filesystem::path directory_;
  Manifest manifest_;
};

}  // namespace gircse::core
