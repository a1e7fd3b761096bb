#include "bundle.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>

#include "error.h"
#include "precision.h"
#include "sha256.h"

namespace gircse::core {
namespace {

namespace fs = std::filesystem;

constexpr const char *kCopyAgain = "Copy or export the bundle again.";
constexpr std::size_t kBlockBytes = 1 << 20;

Error unreadable(const fs::path &path, const std::string &reason) {
  return {GIRCSE_ERROR_BUNDLE, path.string(), "cannot be read: " + reason, std::nullopt,
          "Check its path and its permissions."};
}

// Calls `use` with every block of a file.
template <class Use>
void read_blocks(const fs::path &path, Use use) {
  const auto close = [](std::FILE *file) { std::fclose(file); };
  const std::unique_ptr<std::FILE, decltype(close)> file(std::fopen(path.c_str(), "rb"), close);
  if (!file) throw unreadable(path, std::strerror(errno));
  std::string block(kBlockBytes, '\0');
  while (const std::size_t size = std::fread(block.data(), 1, block.size(), file.get())) use(block.data(), size);
  if (std::ferror(file.get()) != 0) throw unreadable(path, std::strerror(errno));
}

std::string content_of(const fs::path &path) {
  std::string content;
  read_blocks(path, [&](const char *data, std::size_t size) { content.append(data, size); });
  return content;
}

bool is_inside(const fs::path &path, const fs::path &directory) {
  return std::mismatch(directory.begin(), directory.end(), path.begin(), path.end()).first == directory.end();
}

}  // namespace

Bundle::Bundle(const std::string &path) {
  std::error_code failed;
  const fs::path manifest_path = fs::path(path) / kManifestName;
  if (!fs::is_regular_file(manifest_path, failed)) {
    throw Error(GIRCSE_ERROR_BUNDLE, path, "is not a bundle", std::string("it has no ") + kManifestName,
                "Make one: gircse-export --steps 8 --output " + path);
  }
  manifest_ = Manifest::from_json(content_of(manifest_path));
  directory_ = fs::canonical(path, failed);
  if (failed) throw unreadable(path, failed.message());
  for (const auto &[relative, entry] : manifest_.files) check_size(relative, entry);
}

fs::path Bundle::file(const std::string &relative) const {
  std::error_code failed;
  fs::path path;
  if (relative.find('\0') != relative.npos) {
    failed = std::make_error_code(std::errc::invalid_argument);
  } else {
    path = fs::weakly_canonical(directory_ / relative, failed);
  }
  if (failed == std::errc::filename_too_long) throw unreadable(directory_ / relative, failed.message());
  if (failed) {
    throw Error(GIRCSE_ERROR_BUNDLE, kManifestName,
                "has the path " + in_quotes(relative) + ", which cannot be one: " + failed.message(), std::nullopt,
                "Export the bundle again.");
  }
  if (fs::path(relative).is_absolute() || !is_inside(path, directory_)) {
    throw Error(GIRCSE_ERROR_BUNDLE, kManifestName, "has the path " + in_quotes(relative) + ", which leaves the bundle",
                "every path has to stay inside " + directory_.string(), "Do not use this bundle; export it again.");
  }
  return path;
}

std::string Bundle::read(const std::string &relative) const { return content_of(file(relative)); }

const Variant &Bundle::variant(const std::string &precision) const {
  const auto found = manifest_.variants.find(precision);
  if (found == manifest_.variants.end()) {
    throw Error(GIRCSE_ERROR_BUNDLE, directory_.string(), "has no precision " + in_quotes(precision),
                "it has " + listed(manifest_.variants), "Choose one of these.");
  }
  return found->second;
}

std::string Bundle::default_precision(const std::vector<std::string> &preferred) const {
  for (const std::string &precision : preferred) {
    if (manifest_.variants.count(precision) > 0) return precision;
  }
  if (manifest_.variants.size() > 1) {
    throw Error(GIRCSE_ERROR_BUNDLE, directory_.string(), "has several precisions and no default",
                "it has " + listed(manifest_.variants), "Name one.");
  }
  return manifest_.variants.begin()->first;
}

std::string Bundle::layout(const std::string &precision, const std::string &provider,
                           const std::optional<std::string> &wanted) const {
  if (wanted) return *wanted;
  // The CPU is as fast with stepwise, which loads in a fifth of the time; on a GPU unrolled starts one run, not K + 1.
  const std::string usual = provider == "cpu" ? "stepwise" : "unrolled";
  const auto &graphs = variant(precision).graphs;
  return graphs.count(usual) > 0 ? usual : graphs.begin()->first;
}

fs::path Bundle::graph(const std::string &precision, const std::string &layout) const {
  const auto &graphs = variant(precision).graphs;
  const auto found = graphs.find(layout);
  if (found == graphs.end()) {
    const bool calibrated = precision_spec(precision).calibrated;
    const std::string other = calibrated ? "take another precision" : "export again with --layout " + layout;
    throw Error(GIRCSE_ERROR_BUNDLE, directory_.string() + ", " + precision + ",", "has no " + layout + " graph",
                "it has " + listed(graphs), "Choose one of these, or " + other + ".");
  }
  return file(found->second);
}

void Bundle::verify(const std::string &precision) const {
  std::set<std::string> others;
  for (const auto &[other, variant] : manifest_.variants) {
    if (other != precision) others.insert(variant.files.begin(), variant.files.end());
  }
  for (const auto &[relative, entry] : manifest_.files) {
    if (others.count(relative) > 0) continue;
    Sha256 hash;
    read_blocks(file(relative), [&](const char *data, std::size_t size) { hash.update(data, size); });
    const std::string digest = hash.hex_digest();
    if (digest != entry.sha256) {
      throw Error(GIRCSE_ERROR_BUNDLE, shown(relative), "was changed or damaged: its SHA-256 is " + digest,
                  "the manifest says " + entry.sha256, kCopyAgain);
    }
  }
}

void Bundle::check_size(const std::string &relative, const FileEntry &entry) const {
  const fs::path path = file(relative);
  std::error_code failed;
  const bool regular = fs::is_regular_file(path, failed);
  if (failed && failed != std::errc::no_such_file_or_directory && failed != std::errc::not_a_directory) {
    throw unreadable(path, failed.message());
  }
  const auto size = regular ? static_cast<std::int64_t>(fs::file_size(path, failed)) : -1;
  if (!regular || size != entry.bytes) {
    throw Error(GIRCSE_ERROR_BUNDLE, shown(relative), regular ? "has " + std::to_string(size) + " bytes" : "is missing",
                "the manifest says " + std::to_string(entry.bytes) + " bytes", kCopyAgain);
  }
}

}  // namespace gircse::core
