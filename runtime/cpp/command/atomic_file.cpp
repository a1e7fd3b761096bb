#include "atomic_file.h"

#include "command_error.h"

#include <unistd.h>

#include <climits>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <random>
#include <utility>

namespace gircse::command {
namespace {

// All that a signal handler can read: a path, and whether it is one.
char scratch_path[PATH_MAX];
volatile std::sig_atomic_t scratch_exists = 0;

std::string random_hex() {
  std::random_device random;
  char text[17];
  std::snprintf(text, sizeof text, "%08x%08x", random(), random());
  return text;
}

std::string scratch_of(const std::string &path) {
  const std::filesystem::path target(path);
  return (target.parent_path() / ("." + target.filename().string() + "." + random_hex())).string();
}

}  // namespace

AtomicFile::AtomicFile(const std::string &path) : path_(path), scratch_(scratch_of(path)) {
  if (scratch_.size() < sizeof scratch_path) {  // no system opens a longer one
    std::memcpy(scratch_path, scratch_.c_str(), scratch_.size() + 1);
    scratch_exists = 1;
  }
  file_ = std::fopen(scratch_.c_str(), "wbx");
  if (file_ != nullptr) return;
  scratch_exists = 0;
  fail();
}

AtomicFile::~AtomicFile() {
  if (file_ != nullptr) std::fclose(file_);
  delete_scratch_file();
}

void AtomicFile::write(const void *data, std::size_t size) {
  if (std::fwrite(data, 1, size, file_) != size) fail();
}

void AtomicFile::rewind() {
  if (std::fseek(file_, 0, SEEK_SET) != 0) fail();
}

void AtomicFile::commit() {
  const int closed = std::fclose(std::exchange(file_, nullptr));
  if (closed != 0 || std::rename(scratch_.c_str(), path_.c_str()) != 0) fail();
  scratch_exists = 0;
}

void AtomicFile::fail() const {
  throw CommandError("--output " + path_, "cannot be written: " + system_message(), std::nullopt,
                     "Check its directory and the free space.");
}

void delete_scratch_file() noexcept {
  if (scratch_exists != 0) unlink(scratch_path);
  scratch_exists = 0;
}

}  // namespace gircse::command
