#include "byte_source.h"

#include "command_error.h"
#include "error.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <stdexcept>
#include <utility>

#ifdef GIRCSE_HAVE_ZLIB
#include <zlib.h>
#endif

namespace gircse::command {
namespace {

class Descriptor {
 public:
  explicit Descriptor(int number) : number_(number) {}
  explicit Descriptor(const std::string &path) : number_(open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
    if (number_ < 0) throw std::runtime_error(system_message());
  }
  Descriptor(Descriptor &&other) noexcept : number_(std::exchange(other.number_, -1)) {}
  ~Descriptor() {
    if (number_ > STDERR_FILENO) close(number_);
  }

  int number() const { return number_; }
  int release() { return std::exchange(number_, -1); }

 private:
  int number_;
};

class PlainFile : public ByteSource {
 public:
  explicit PlainFile(Descriptor file) : file_(std::move(file)) {}

  std::size_t read(char *buffer, std::size_t size) override {
    for (;;) {
      const ssize_t count = ::read(file_.number(), buffer, size);
      if (count >= 0) return static_cast<std::size_t>(count);
      if (errno != EINTR) throw std::runtime_error(system_message());
    }
  }

 private:
  Descriptor file_;
};

#ifdef GIRCSE_HAVE_ZLIB

class GzipFile : public ByteSource {
 public:
  explicit GzipFile(Descriptor file) : file_(gzdopen(file.number(), "rb")) {
    if (file_ == nullptr) throw std::bad_alloc();
    file.release();
  }
  GzipFile(const GzipFile &) = delete;
  GzipFile &operator=(const GzipFile &) = delete;
  ~GzipFile() override { gzclose(file_); }

  std::size_t read(char *buffer, std::size_t size) override {
    const int count = gzread(file_, buffer, static_cast<unsigned>(size));
    // zlib hands out a file that is not packed as it is.
    if (count > 0 && gzdirect(file_) != 0) {
      const std::string_view start(buffer, std::min<std::size_t>(static_cast<std::size_t>(count), 2));
      throw std::runtime_error("Not a gzipped file (b" + core::in_quotes(start) + ")");
    }
    if (count <= 0) check();
    return static_cast<std::size_t>(count);
  }

 private:
  // Throws in the words of Python's gzip, if something is wrong.
  void check() const {
    int code = Z_OK;
    const std::string message = gzerror(file_, &code);  // "<file>: what is wrong"
    if (code == Z_OK || code == Z_STREAM_END) return;
    if (code == Z_ERRNO) throw std::runtime_error(system_message());
    if (code == Z_BUF_ERROR) {
      throw std::runtime_error("Compressed file ended before the end-of-stream marker was reached");
    }
    const std::string reason = message.substr(message.find(": ") + 2);
    throw std::runtime_error("Error " + std::to_string(code) + " while decompressing data: " + reason);
  }

  gzFile file_;
};

#endif

std::unique_ptr<ByteSource> open_gzip(Descriptor file) {
#ifdef GIRCSE_HAVE_ZLIB
  return std::make_unique<GzipFile>(std::move(file));
#else
  static_cast<void>(file);
  throw std::runtime_error("this command was built without zlib, which unpacks .gz");
#endif
}

}  // namespace

std::unique_ptr<ByteSource> open_bytes(const std::string &path) {
  Descriptor file(path);
  if (std::filesystem::path(path).extension() == ".gz") return open_gzip(std::move(file));
  return std::make_unique<PlainFile>(std::move(file));
}

std::unique_ptr<ByteSource> standard_input() { return std::make_unique<PlainFile>(Descriptor(STDIN_FILENO)); }

}  // namespace gircse::command
