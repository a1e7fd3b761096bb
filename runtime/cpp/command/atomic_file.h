// Files that are there as a whole or not at all.
#pragma once

#include <cstddef>
#include <cstdio>
#include <string>

namespace gircse::command {

// A scratch file with the permissions that the umask gives. It replaces `path` when it is committed, and is deleted
// if it never is. One at a time: delete_scratch_file knows of one.
class AtomicFile {
 public:
  // Throws CommandError, as all functions here do.
  explicit AtomicFile(const std::string &path);
  AtomicFile(const AtomicFile &) = delete;
  AtomicFile &operator=(const AtomicFile &) = delete;
  ~AtomicFile();

  void write(const void *data, std::size_t size);
  void rewind();
  void commit();

 private:
  [[noreturn]] void fail() const;

  std::string path_;
  std::string scratch_;
  std::FILE *file_ = nullptr;
};

// Deletes the scratch file of an AtomicFile; for signal handlers.
void delete_scratch_file() noexcept;

}  // namespace gircse::command
